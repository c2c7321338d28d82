# SPDX-License-Identifier: Apache-2.0
"""A bundle with its weights as others take it: folder and zip that run where this package is not installed.

Everything is built and checked beside the place where it goes, so nothing half-made appears there. The same input
gives the same bytes: files are sorted, times are fixed, and versions are those installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_synth import __version__
from monai_synth.errors import UserError
from monai_synth.package_check import LARGE
from monai_synth.package_docs import SAMPLED, packaged_readme
from monai_synth.package_vendor import Code, needed_code, read_configs, renamed_configs, write_code

ROOT = Path(__file__).resolve().parent
OWN = ROOT.name
MODEL = "model.pt"  # the zoo's name
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def package_bundle(
    bundle: str,
    *,
    ckpt_dir: str,
    out: str,
    model_file: str = MODEL,
    depend: bool = False,
    version: str | None = None,
    change: str | None = None,
    weights_url: str | None = None,
    dataset_dir: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Write ``out/<bundle>/`` and ``out/<bundle>_v<version>.zip``, and check them as the model zoo does.

    Args:
        bundle: folder of a bundle, or the name of one of this package.
        ckpt_dir: folder with its trained files.
        out: folder to write to, made where it is not there; other packages in it are left as they are.
        model_file: the trained file that becomes ``models/model.pt``, which the packaged bundle loads and samples by
            default; another ``model.pt`` is then left out.
        depend: pin this package as a dependency instead of copying the code that the bundle needs.
        version: of the packaged bundle. Default: that of its metadata.
        change: what is new in ``version``; needed where its changelog does not have it.
        weights_url: where weights above 25 MB will lie; their names are added to it.
        dataset_dir: dataset for checking training and sampling. Default: the built-in phantom.
        report: takes each line of the result.

    Returns:
        The zip.

    Raises:
        UserError: there is no such bundle; no trained file, or one of another bundle; the package is in
            ``out`` already; the version has no entry in the changelog; a check of the packaged bundle fails.
    """
    source = _bundle_folder(bundle)
    name = source.name
    meta = json.loads((source / "configs" / "metadata.json").read_text(encoding="utf-8"))
    meta = _with_version(meta, version, change)
    target, archive_name = Path(out).absolute(), f"{name}_v{meta['version']}.zip"
    _refuse_to_replace(target, name, archive_name)
    files = _trained_files(name, Path(ckpt_dir), model_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        folder = work / name
        _build(source, folder, meta, files, depend=depend, weights_url=weights_url)
        archive = work / archive_name
        _write_zip(folder, archive)
        for line in _check(archive, dataset_dir, forbid=not depend, private=[str(Path(ckpt_dir).absolute())]):
            report(line)
        target.mkdir(exist_ok=True)
        for path in (folder, archive):
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"wrote {target / name} with {', '.join(sorted(files))}")
    report(f"wrote {target / archive.name}")
    return target / archive.name


# What the user gives


def _bundle_folder(bundle: str) -> Path:
    own = ROOT.parent / "bundles"
    for folder in (Path(bundle), Path("bundles") / bundle, own / bundle):
        if (folder / "configs" / "metadata.json").is_file():
            folder = folder.resolve()
            if not folder.name.isidentifier():
                raise UserError(f"the bundle's folder is named {folder.name!r}; give it a name of letters, digits, '_'")
            return folder
    known = sorted(p.name for p in own.glob("*") if (p / "configs" / "metadata.json").is_file())
    raise UserError(f"there is no bundle {bundle!r}; give a folder with configs/metadata.json, or {', '.join(known)}")


def _refuse_to_replace(target: Path, *names: str) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target} is a file; give a folder")
    for name in names:
        if (target / name).exists():
            raise UserError(f"--out {target} has {name} already; give another folder, or remove it")


def _with_version(meta: dict[str, Any], version: str | None, change: str | None) -> dict[str, Any]:
    version = meta["version"] if version is None else version
    if not _VERSION.fullmatch(version):
        raise UserError(f"--version is {version!r}; give MAJOR.MINOR.PATCH, e.g. 0.2.0")
    changelog = dict(meta["changelog"])
    if change:
        if version in changelog:
            raise UserError(f"the changelog has {version} already; give a new --version with --change")
        changelog = {version: change, **changelog}
    elif version not in changelog:
        raise UserError(f"the changelog has no {version}; say with --change TEXT what is new in it")
    return meta | {"version": version, "changelog": changelog}


def _trained_files(bundle: str, folder: Path, model_file: str) -> dict[str, Path]:
    """The trained files of this bundle by the name that they get; not those for resuming."""
    from monai_synth.checkpoint import load_file

    if not folder.is_dir():
        raise UserError(f"--ckpt-dir {folder} is no folder; give the one that a training of {bundle} wrote to")
    if Path(model_file).name != model_file:
        raise UserError(f"--model-file is {model_file!r}; give the name of a file in --ckpt-dir, model_rflow.pt say")
    others = sorted(path.name for path in folder.glob("model_*.pt"))
    if model_file == MODEL and others and not (folder / MODEL).is_file():
        raise UserError(f"{folder} has no {MODEL}, but {', '.join(others)}; say with --model-file which it shall be")
    model = load_file(folder / model_file, option="--ckpt-dir")
    there = model["contract"].get("bundle")
    if there != bundle:
        raise UserError(
            f"{folder / model_file} was trained by the bundle {there!r}, this is {bundle!r}; give the right --ckpt-dir"
        )
    if model["stage"] not in SAMPLED:
        raise UserError(f"{folder / model_file} holds the stage {model['stage']!r}; give one that is sampled")
    found = {MODEL: folder / model_file}
    for path in sorted(folder.glob("*.pt")):
        if path.name.startswith(("last_", ".")) or path.name in (MODEL, model_file):
            continue
        if load_file(path, option="--ckpt-dir")["contract"].get("bundle", bundle) == bundle:
            found[path.name] = path
    return found


# What is written


def _build(
    source: Path,
    folder: Path,
    meta: dict[str, Any],
    files: Mapping[str, Path],
    *,
    depend: bool,
    weights_url: str | None,
) -> None:
    from monai_synth.checkpoint import load_file, sha256_of

    name = source.name
    package = f"{name}_scripts"
    configs = read_configs(source / "configs")
    code = needed_code(configs, ROOT)
    trained = {file: load_file(path) for file, path in files.items()}
    _own_defaults(configs, trained)
    if depend:
        _ask_for_dependency(configs)
    else:
        configs = renamed_configs(configs, name, package, ROOT)
        write_code(code, folder, package, ROOT)
    meta = meta | _pins(meta, code, depend=depend) | _data_format(meta, files[MODEL])
    for part in ("configs", "docs", "models"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for path, content in {"metadata.json": meta, **configs}.items():
        text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
        (folder / "configs" / path).write_text(text, encoding="utf-8")
    for path in ("LICENSE", "configs/logging.conf", "docs/data_license.txt"):
        if (source / path).is_file():
            shutil.copyfile(source / path, folder / path)
    readme = (source / "docs" / "README.md").read_text(encoding="utf-8")
    hashes = {file: sha256_of(path) for file, path in files.items()}
    readme = packaged_readme(readme, name, meta, trained, hashes, configs=configs, depend=depend)
    (folder / "docs" / "README.md").write_text(readme, encoding="utf-8")
    for file, path in files.items():
        shutil.copyfile(path, folder / "models" / file)
    _write_large_files(folder, weights_url)


def _own_defaults(configs: Mapping[str, Any], trained: Mapping[str, Mapping[str, Any]]) -> None:
    """Sample with the weights of the bundle, train beside them, guide the features that have a classifier.

    ``monai.bundle.load`` puts ``models/model.pt`` into the network of ``inference.json``, so this is the network of
    that file and not of the last training. What is sampled for maps makes the phantom where none are given.

    Args:
        configs: contents by file name, which are changed.
        trained: contents of the trained files by name.
    """
    from monai_synth.checkpoint import classifier_file

    inference = configs["inference.json"]
    inference |= {"dataset_dir": "@phantom_dir", "ckpt_dir": "$@bundle_root + '/models'"}
    for key in ("latest", "latest_dir"):
        inference.pop(key, None)
    if "features" in inference:
        schedule = trained[MODEL]["contract"]["schedule"]
        inference["features"] = [f for f in inference["features"] if classifier_file(f, schedule) in trained]
    if "label_dir" in inference:  # maps are needed: the phantom's, where none are given
        inference["phantom"] = configs["train.json"]["phantom"]
        inference["initialize"].append(
            "$None if @label_dir else bundle.ensure_dataset(@dataset_dir, @phantom_dir, @phantom, 'demo', @device)"
        )
    for content in configs.values():
        if str(content.get("ckpt_dir", "")).startswith("$bundle.default_ckpt_dir("):
            # a folder for each dataset, the phantom's too, so that no training replaces the weights of the bundle
            content["ckpt_dir"] = "$bundle.default_ckpt_dir(@bundle_root, @dataset_dir, @bundle_root)"


def _ask_for_dependency(configs: Mapping[str, Any]) -> None:
    """End in one line where the pinned package is missing; MONAI would go on until something of it is used."""
    needed = f"{OWN}=={__version__}"
    message = f"{OWN}: error: this bundle needs {needed}, which is not installed; give `pip install {needed}`"
    for content in configs.values():
        if "imports" in content:
            content["imports"] = ["$import sys", "$from importlib.util import find_spec", *content["imports"]]
            content["initialize"].insert(0, f"$find_spec('{OWN}') or sys.exit('{message}')")


def _pins(meta: Mapping[str, Any], code: Code, *, depend: bool) -> dict[str, Any]:
    """Versions as installed: of MONAI, torch, numpy, what the metadata names, and what the code imports.

    MONAI does not require fire, by which its command line is made.
    """
    of_module = importlib.metadata.packages_distributions()

    def names(modules: set[str]) -> set[str]:
        return {_normal(of_module[m][0]) for m in modules if m in of_module}

    declared = {_normal(re.split(r"[^\w.-]", r)[0]) for r in _requirements() if "extra ==" not in r}
    lazy = names(code.sometimes)
    first = {"monai", "torch", "numpy"}
    needed = {"fire"} | set(map(_normal, meta["required_packages_version"])) | names(code.always) | lazy & declared
    required = needed - first - {_normal(OWN)}
    optional = lazy - declared - first - required
    pins = {name: _installed(name) for name in sorted(required)}
    return {
        "monai_version": _installed("monai"),
        "pytorch_version": _installed("torch"),
        "numpy_version": _installed("numpy"),
        "required_packages_version": ({OWN: __version__} if depend else {}) | pins,
        "optional_packages_version": {name: _installed(name) for name in sorted(optional)},
    }


def _requirements() -> Sequence[str]:
    try:
        return importlib.metadata.requires(OWN) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{name} is not installed, so its version cannot be pinned; install it") from error


def _data_format(meta: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Sizes of this model's input and output; those of the metadata are the demo's.

    The first convolution knows the channels, the contract the size, and a call the rest.
    """
    import torch

    from monai_synth.checkpoint import load_file, restore_network
    from monai_synth.package_check import extra_arguments

    contract = load_file(model)["contract"]
    network = restore_network(load_file(model), model)
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    size = [int(n) // int(contract.get("factor", 1)) for n in contract["image_size"]]
    made = json.loads(json.dumps(meta["network_data_format"]))
    image, pred = made["inputs"]["image"], made["outputs"]["pred"]
    _resize(image, [first.in_channels, *size])
    extra = extra_arguments(network, model, made)
    with torch.no_grad():
        output = network(torch.zeros(1, first.in_channels, *size), **extra)
    _resize(pred, list(output.shape[1:]))
    return {"network_data_format": made}


def _resize(spec: dict[str, Any], shape: Sequence[int]) -> None:
    if spec["num_channels"] != shape[0]:
        spec.pop("channel_def", None)  # its words are for another number of channels
    spec["num_channels"], spec["spatial_shape"] = int(shape[0]), [int(n) for n in shape[1:]]


def _write_large_files(folder: Path, weights_url: str | None) -> None:
    from monai_synth.checkpoint import sha256_of

    lines = []
    for path in sorted((folder / "models").iterdir()):
        if path.stat().st_size > LARGE:
            url = f"{weights_url.rstrip('/')}/{path.name}" if weights_url else ""
            lines += [
                f'  - path: "models/{path.name}"', f'    url: "{url}"',
                f'    hash_val: "{sha256_of(path)}"', '    hash_type: "sha256"',
            ]  # fmt: skip
    if lines:
        (folder / "large_files.yml").write_text("\n".join(["large_files:", *lines]) + "\n", encoding="utf-8")


def _write_zip(folder: Path, archive: Path) -> None:
    """Zip a folder so that equal content gives equal bytes."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix(), date_time=_TIME)
            info.external_attr = 0o100644 << 16
            info.create_system = 3
            info.compress_type = zipfile.ZIP_STORED if path.suffix == ".pt" else zipfile.ZIP_DEFLATED
            with path.open("rb") as content, file.open(info, "w", force_zip64=True) as written:
                shutil.copyfileobj(content, written, 1 << 20)


# How it is checked


def _check(archive: Path, dataset_dir: str | None, *, forbid: bool, private: list[str]) -> list[str]:
    """Lines of the checks of what the zip holds, in an empty folder and a process of its own.

    Raises:
        UserError: a check fails.
    """
    with tempfile.TemporaryDirectory() as empty:
        with zipfile.ZipFile(archive) as file:
            file.extractall(empty)
        (name,) = os.listdir(empty)
        result = Path(empty) / "result.json"
        command = [sys.executable, str(ROOT / "package_check.py"), name, "--result", str(result)]
        command += ["--schema", str(ROOT / "metadata_schema.json")]
        command += ["--dataset-dir", str(Path(dataset_dir).absolute())] if dataset_dir else []
        command += ["--forbid", OWN] if forbid else []
        command += ["--private", *private] if private else []
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
        if not result.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the packaged bundle could not be checked ({last}); nothing was written")
        results = json.loads(result.read_text(encoding="utf-8"))
    failed = {r["check"]: r["text"] for r in results if r["status"] == "FAIL"}
    if failed:
        text = "; ".join(f"{check}: {why}" for check, why in failed.items())
        if dataset_dir is None and any(check.endswith("properties") for check in failed):
            text += "; they were asked with the phantom, so give the dataset of the training as --dataset-dir"
        raise UserError(f"the packaged bundle fails: {text}; nothing was written")
    return [f"{r['status']:4} {r['check']}: {r['text']}" for r in results]
