# SPDX-License-Identifier: Apache-2.0
"""What the model zoo's own verification does, offline, on a bundle's folder; run as a script in a process of its own.

It imports nothing of this package, so that it can forbid it: a packaged bundle has to run where it is not installed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGE = 25_000_000  # bytes; the zoo's repository takes no larger file
FILES = ("LICENSE", "configs/metadata.json", "configs/train.json", "configs/inference.json", "configs/logging.conf",
         "models/model.pt", "docs/README.md", "docs/data_license.txt")  # fmt: skip
# of docs/README.md; that of the title aside
HEADINGS = ("Authors", "Tags", "Model Description", "Data", "Performance", "Additional Usage Steps",
            "System Configuration", "Limitations", "Citation Info", "References", "License")  # fmt: skip
_ABSOLUTE = re.compile(r"^~?/|^[A-Za-z]:[\\/]|^\\\\|file://|(?<![\w:/.])/(?:home|Users|mnt|media|root|tmp|var)/\w")
_REFERENCE = re.compile(r"[@%][\w#:]+|^\+?[\w#:]+$")  # in an expression; a key
_UID = re.compile(r"(?<![\d.])[012](?:\.\d+){5,}(?![\d.])")


class Failed(Exception):  # noqa: N818
    """A check does not hold; its text says what to mend."""


class Skipped(Exception):  # noqa: N818
    """A check does not apply; its text says why."""


class Forbidden:
    """Import hook that knows no package of a given name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r} (forbidden here)", name=name)


class Bundle:
    """The checks of one bundle's folder, each a method that returns what it found."""

    def __init__(self, folder: Path, schema: Path, dataset_dir: str | None, private: list[str]) -> None:
        self.folder = folder.resolve()
        self.schema = schema
        self.private = private
        self.meta = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
        self.given = {"ckpt_dir": str(self.folder / "models")} | ({"dataset_dir": dataset_dir} if dataset_dir else {})

    def files(self) -> str:
        missing = [name for name in FILES if not (self.folder / name).is_file()]
        if missing:
            raise Failed(f"{', '.join(missing)} missing")
        return f"{len(FILES)} that the zoo asks for are there"

    def large_files(self) -> str:
        import yaml

        large = [p for p in sorted(self.folder.rglob("*")) if p.is_file() and p.stat().st_size > LARGE]
        path = self.folder / "large_files.yml"
        entries = yaml.safe_load(path.read_text())["large_files"] if path.is_file() else []
        listed = {entry["path"]: entry for entry in entries}
        for file in large:
            name = file.relative_to(self.folder).as_posix()
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if listed.get(name, {}).get("hash_val") != digest:
                raise Failed(f"{name} has {file.stat().st_size} bytes and is not in large_files.yml with its hash")
        without = [name for name, entry in listed.items() if not entry.get("url")]
        told = f"; no url yet for {', '.join(without)} (--weights-url)" if without else ""
        return f"{len(large)} above 25 MB, listed with SHA-256{told}"

    def version(self) -> str:
        version = self.meta["version"]
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or version not in self.meta["changelog"]:
            raise Failed(f"version {version!r} is not MAJOR.MINOR.PATCH or not in the changelog")
        return f"{version} is in the changelog"

    def metadata(self) -> str:
        from monai.bundle import verify_metadata

        with tempfile.TemporaryDirectory() as folder:
            # verify_metadata downloads the schema only where the file is not there
            schema = Path(shutil.copy(self.schema, Path(folder) / "schema.json"))
            verify_metadata(meta_file=str(self.folder / "configs" / "metadata.json"), filepath=str(schema))
        return "agrees with the schema"

    def readme(self) -> str:
        text = (self.folder / "docs" / "README.md").read_text(encoding="utf-8")
        found = set(re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE))
        missing = [heading for heading in HEADINGS if heading not in found]
        if missing:
            raise Failed(f"docs/README.md has no heading {', '.join(missing)}")
        return f"{len(HEADINGS)} headings of the zoo's template"

    def pins(self) -> str:
        wanted = {"monai": self.meta["monai_version"], "torch": self.meta["pytorch_version"],
                  "numpy": self.meta["numpy_version"], **self.meta["required_packages_version"]}  # fmt: skip
        for name, version in wanted.items():
            try:
                here = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                here = "none"
            if here != version:
                raise Failed(f"{name} is pinned to {version}, installed is {here}")
        return f"{len(wanted)} packages, as installed here"

    def configs(self) -> str:
        from monai.bundle import ConfigParser
        from monai.bundle.config_item import ConfigComponent
        from monai.utils import optional_import

        sys.path.insert(0, str(self.folder))
        paths = sorted(p for p in (self.folder / "configs").glob("*.json") if p.name != "metadata.json")
        for path in paths:
            content = json.loads(path.read_text(encoding="utf-8"))
            for item in _leaves(content):
                if isinstance(item, str) and (_ABSOLUTE.search(item) or "#" in _REFERENCE.sub("", item)):
                    raise Failed(f"{path.name} holds {item!r}: a path of a machine, or a '#'")
                if isinstance(item, dict) and "_target_" in item:
                    target = ConfigComponent(config=item, id="").resolve_module_name()
                    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
                    if not callable(target) and not optional_import(module, name=name)[1]:
                        raise Failed(f"{path.name} names {item['_target_']}, which cannot be imported")
            parser = ConfigParser()
            parser.read_config([str(p) for p in self._with_base(path, content, paths)])
            if "run" not in parser:
                raise Failed(f"{path.name} has no id 'run'")
        return f"{len(paths)} parse, and what they name can be imported"

    @staticmethod
    def _with_base(path: Path, content: dict[str, Any], paths: list[Path]) -> list[Path]:
        """A config alone, or an overlay after the config that has its keys."""
        if "imports" in content:
            return [path]
        keys = {re.split("[#:]", key.lstrip("+"))[0] for key in content}
        others = {p: json.loads(p.read_text(encoding="utf-8")) for p in paths}
        whole = {p: other for p, other in others.items() if "imports" in other}
        return [max(whole, key=lambda p: len(keys & whole[p].keys())), path]

    def trained_files(self) -> str:
        own = f"{self.folder.name}_scripts"
        package = own if (self.folder / own).is_dir() else "monai_synth"
        checkpoint = importlib.import_module(f"{package}.checkpoint")
        found = []
        for path in sorted((self.folder / "models").glob("*.pt")):
            checkpoint.restore_network(checkpoint.load_file(path), path)
            found.append(path.name)
        return f"the weights of {', '.join(found)} fit their networks"

    def train_properties(self) -> str:
        import torch

        contract = torch.load(self.folder / "models" / "model.pt", map_location="cpu", weights_only=True)["contract"]
        values: dict[str, Any] = {"preset": "demo"}
        if "factor" in contract:
            # The packed stages are taken as they are, not asked whether they belong to the dataset of this check; the
            # image is the demo's, because encoding a dataset of 512 x 512 by the CPU would take hours.
            steps = json.loads((self.folder / "configs" / "train.json").read_text(encoding="utf-8"))["initialize"]
            values |= {"factor": contract["factor"]}
            values |= {"initialize": [step for step in steps if "ensure_stages(" not in step]}
        else:
            values |= {"image_size": list(contract["image_size"])}
        return self._properties("train", "training", **values)

    def inference_properties(self) -> str:
        return self._properties("inference", "run")

    def _properties(self, config: str, run_id: str, **values: Any) -> str:
        from monai.bundle import ConfigWorkflow

        kind = "train" if config == "train" else "infer"
        path = str(self.folder / "configs" / f"{config}.json")
        made = ConfigWorkflow(path, workflow_type=kind, run_id=run_id, device="cpu", **self.given, **values)
        made.initialize()
        missing = made.check_properties()
        made.finalize()
        if missing:
            raise Failed(f"{config}.json lacks {', '.join(missing)}")
        return f"{config}.json has all"

    def net_in_out(self) -> str:
        from monai.bundle import verify_net_in_out

        network = self._network()
        spec = self.meta["network_data_format"]
        verify_net_in_out(
            net_id="network_def", config_file=str(self.folder / "configs" / "inference.json"),
            meta_file=str(self.folder / "configs" / "metadata.json"), device="cpu",
            extra_forward_args=extra_arguments(network, self.folder / "models" / "model.pt", spec),
            bundle_root=str(self.folder), **self.given,
        )  # fmt: skip
        sizes = [[s["num_channels"], *s["spatial_shape"]] for s in (spec["inputs"]["image"], spec["outputs"]["pred"])]
        return " -> ".join(" x ".join(map(str, size)) for size in sizes)

    def load(self) -> str:
        import torch

        there = torch.load(self.folder / "models" / "model.pt", map_location="cpu", weights_only=True)["state_dict"]
        state = self._network().state_dict()
        if there.keys() != state.keys() or not all(torch.equal(state[k], v) for k, v in there.items()):
            raise Failed("monai.bundle.load gives other weights than models/model.pt holds")
        return f"monai.bundle.load gives the network with its {len(state)} tensors"

    def _network(self) -> Any:
        from monai.bundle import load

        return load(
            self.folder.name, bundle_dir=str(self.folder.parent), source="github", workflow_type="inference",
            key_in_ckpt="state_dict", device="cpu",
        )  # fmt: skip

    def torchscript(self) -> str:
        raise Skipped("the network takes more than an image; exclude it from the zoo's TorchScript check")

    def supported_apps(self) -> str:
        if self.meta.get("supported_apps"):
            raise Failed("supported_apps is not empty, and no app was checked")
        raise Skipped("none named")

    def private_content(self) -> str:
        import torch

        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        for path in files:
            name = path.relative_to(self.folder).as_posix()
            data = path.read_bytes()
            for word in self.private:
                if word.encode() in data:
                    raise Failed(f"{name} holds {word!r}")
            if path.suffix == ".pt":
                for text in _leaves(_without_tensors(torch.load(path, map_location="cpu", weights_only=True))):
                    if isinstance(text, str) and (_ABSOLUTE.search(text) or _UID.search(text)):
                        raise Failed(f"{name} holds {text!r}, a path or an identifier; train it again without it")
            elif path.suffix == ".py":
                ast.parse(data)
        return f"{len(files)} files hold no path of this machine and no identifier"


# before those that write into the folder, private_content
CHECKS = ("files", "private_content", "large_files", "version", "metadata", "readme", "pins", "configs",
          "trained_files", "train_properties", "inference_properties", "net_in_out", "load", "supported_apps",
          "torchscript")  # fmt: skip


def extra_arguments(network: Any, checkpoint: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What a network's forward takes beside the image, for a batch of one."""
    import torch

    contract = torch.load(checkpoint, map_location="cpu", weights_only=True)["contract"]
    size = spec["inputs"]["image"]["spatial_shape"]
    made = {"timesteps": torch.tensor([1])}
    if "classes" in contract:
        made["class_labels"] = torch.tensor([0])
    if "factor" in contract:  # a model of latents is told the map
        made["seg"] = torch.ones(1, len(contract["labels"]), *size)
    taken = list(inspect.signature(network.forward).parameters)[1:]
    return {name: value for name, value in made.items() if name in taken}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _without_tensors(content: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if k == "state_dict" else v for k, v in content.items()}


def machine_words() -> list[str]:
    """Texts that would tell on which machine a bundle was made.

    A host's name of letters only may be a word of the code itself ("container", "workstation"), and is not looked for.
    """
    host = socket.gethostname()
    home = str(Path.home())
    return [word for word in (host, home + os.sep) if len(word) > 6 and not word.isalpha()]


def run_checks(bundle: Bundle) -> list[dict[str, str]]:
    """Every check with ``ok``, ``FAIL`` or ``skip`` and what was found, in the order of the zoo."""
    results = []
    for name in CHECKS:
        try:
            status, text = "ok", getattr(bundle, name)()
        except Skipped as reason:
            status, text = "skip", str(reason)
        except Exception as error:
            while not isinstance(error, Failed) and error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
            status, text = "FAIL", f"{kind}{' '.join(str(error).split())[:400]}"
        results.append({"check": name.replace("_", " "), "status": status, "text": text})
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schema", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--dataset-dir")
    parser.add_argument("--forbid", help="top-level package that must not be imported")
    parser.add_argument("--private", nargs="*", default=[])
    arguments = parser.parse_args(argv)
    # the folder of this script is on the path and holds modules with common names
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    if arguments.forbid:
        sys.meta_path.insert(0, Forbidden(arguments.forbid))  # type: ignore[arg-type]
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(sys.stderr):
        bundle = Bundle(arguments.folder, arguments.schema, arguments.dataset_dir, arguments.private + machine_words())
        results = run_checks(bundle)
    arguments.result.write_text(json.dumps(results), encoding="utf-8")
    return int(any(result["status"] == "FAIL" for result in results))


if __name__ == "__main__":
    sys.exit(main())
