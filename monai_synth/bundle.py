# SPDX-License-Identifier: Apache-2.0
"""What the JSON configs of the bundles call: places, presets, processes, data and stages.

The stock runner evaluates the configs; each function here is one decision that a config line names.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from torch import nn

from monai_synth.atomic import write_json
from monai_synth.checkpoint import (
    build_network,
    classifier_file,
    load_file,
    require_agreement,
    restore_network,
    sha256_of,
    trained_file,
)
from monai_synth.checks import check_numbers, whole
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.networks.latent_codec import LatentCodec

__all__ = [
    "begin",
    "build_network",
    "bundle_root",
    "by_factor",
    "check_numbers",
    "classifier_file",
    "default_ckpt_dir",
    "default_device",
    "default_preset",
    "end",
    "ensure_dataset",
    "ensure_stages",
    "guided_features",
    "is_main",
    "latest_run",
    "load_codec",
    "load_file",
    "num_processes",
    "parallel",
    "process_rank",
    "read_dataset",
    "remember_run",
    "restore_network",
    "run_sampling",
    "sampling_ckpt_dir",
    "select_preset",
    "sha256_of",
    "trained_file",
]

logger = logging.getLogger(__name__)

LATEST = "latest.json"


# Places


def bundle_root(name: str) -> str:
    """Absolute folder of the bundle whose config is being run.

    The innermost running ``ConfigWorkflow`` knows its config folder. Where there is none (MONAI's verification
    commands parse a config without a workflow) the bundle is looked for at the working directory.

    Args:
        name: the bundle's name, to find ``bundles/<name>`` from the repository root.
    """
    frame = inspect.currentframe()
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow) and getattr(workflow, "config_root_path", None) is not None:
            return str(Path(workflow.config_root_path).absolute().parent)
        frame = frame.f_back
    for candidate in (Path("bundles") / name, Path(name), Path(".")):
        if (candidate / "configs" / "metadata.json").is_file():
            return str(candidate.absolute())
    return str(Path.cwd())


def default_ckpt_dir(root: str, dataset_dir: str, phantom_dir: str) -> str:
    """``models`` for the built-in phantom, ``models/<folder name>`` for a dataset that the user gives."""
    if _same(dataset_dir, phantom_dir):
        return str(Path(root) / "models")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(dataset_dir).expanduser().absolute().name) or "dataset"
    return str(Path(root) / "models" / name)


def _same(a: str | Path, b: str | Path) -> bool:
    return Path(a).expanduser().absolute() == Path(b).expanduser().absolute()


def remember_run(latest_dir: str, ckpt_dir: str, dataset_dir: str) -> None:
    """Note the last finished training, so that sampling without further arguments takes it."""
    if not is_main():
        return
    path = Path(latest_dir) / LATEST
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"ckpt_dir": str(Path(ckpt_dir).absolute()), "dataset_dir": str(Path(dataset_dir).absolute())}
    write_json(path, content)


def latest_run(latest_dir: str, phantom_dir: str) -> dict[str, str]:
    """``ckpt_dir`` and ``dataset_dir`` of the last finished training; ``latest_dir`` and the phantom without one."""
    default = {"ckpt_dir": str(latest_dir), "dataset_dir": str(phantom_dir)}
    try:
        content = json.loads((Path(latest_dir) / LATEST).read_text())
        found = {key: str(content[key]) for key in default}
    except (OSError, ValueError, KeyError, TypeError):
        return default
    return found if Path(found["ckpt_dir"]).is_dir() else default


def sampling_ckpt_dir(root: str, dataset_dir: str, phantom_dir: str, latest: Mapping[str, str]) -> str:
    """Where the trained files for maps of ``dataset_dir`` lie."""
    if _same(dataset_dir, latest["dataset_dir"]):
        return latest["ckpt_dir"]
    return default_ckpt_dir(root, dataset_dir, phantom_dir)


# Presets


def default_preset(dataset_dir: str, phantom_dir: str) -> str:
    """``demo`` on the built-in phantom, ``paper`` on a dataset that the user gives."""
    return "demo" if _same(dataset_dir, phantom_dir) else "paper"


def select_preset(presets: Mapping[str, Mapping[str, Any]], preset: str) -> Mapping[str, Any]:
    """Numbers of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}; give --preset {' or --preset '.join(presets)}")
    return presets[preset]


def by_factor(table: Mapping[str, Any], factor: int) -> Any:
    """Entry of a table that is keyed by the downsampling factor f.

    Raises:
        UserError: the table has no such factor.
    """
    if str(factor) not in table:
        raise UserError(f"autoencoder factor {factor!r} is not supported; give --factor {', '.join(table)}")
    return table[str(factor)]


# Processes


def default_device() -> str:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return "cpu"


def begin(*, seed: int, device: str, distributed: bool = False) -> None:
    """First line of every config: one message per user error, process group, device and seed.

    Raises:
        UserError: the device is not there, or torchrun and ``distributed`` do not go together.
    """
    sys.excepthook = _print_user_errors
    whole("seed", seed, 0)
    try:
        target = torch.device(device)
        torch.zeros(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        there = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise UserError(f"device {device!r} cannot be used ({reason}); allowed here: {there}; give --device") from error
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed and "WORLD_SIZE" not in os.environ:
        msg = "multi_gpu_train.json needs torchrun; give `torchrun --nproc_per_node=N -m monai.bundle run ...`"
        raise UserError(msg)
    if num > 1 and not distributed:
        msg = f"torchrun started {num} processes, but the config is for one; add multi_gpu_train.json to --config_file"
        raise UserError(msg)
    if distributed and not dist.is_initialized():
        backend = "nccl" if target.type == "cuda" else "gloo"
        # other ranks wait for rank 0 while it prepares data and encodes latents
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    if target.type == "cuda":
        torch.cuda.set_device(target)
    torch.manual_seed(int(seed))


def end() -> None:
    """Last line of every config: leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def process_rank() -> int:
    """Rank of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return process_rank() == 0


def parallel(network: nn.Module, device: str) -> nn.Module:
    """Network on the device, wrapped for distributed training when several processes train."""
    network = network.to(device)
    if num_processes() == 1:
        return network
    ids = [torch.device(device).index or 0] if torch.device(device).type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=ids)


def _print_user_errors(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One message for what a user can mend; a traceback for everything else."""
    if issubclass(kind, KeyboardInterrupt):
        print("monai_synth: interrupted; start the same command again to go on", file=sys.stderr)
        return
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) and not os.environ.get("MONAI_SYNTH_TRACEBACK"):
            print(f"monai_synth: error: {cause}", file=sys.stderr)
            return
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            print(f"monai_synth: error: {cause}; free some space, then start the same command again", file=sys.stderr)
            return
        cause = cause.__cause__ or cause.__context__
    traceback.print_exception(kind, error, trace)


# Data and stages


def ensure_dataset(
    dataset_dir: str, phantom_dir: str, phantom: Mapping[str, Any], preset: str, device: str, *, task: str = "lidc"
) -> None:
    """Check the dataset; make the built-in phantom where none was given, through the import that real data take.

    Args:
        dataset_dir: prepared dataset.
        phantom_dir: where the phantom of this bundle lies.
        phantom: arguments of the phantom ("scans" or "images") and of its import ("import"); for the task "classes"
            "kind" names it: "xray", which is the default, or "tissue".
        preset: for the log.
        device: for the log.
        task: what the dataset must have been prepared for; "lidc", "pairs" or "classes".

    Raises:
        UserError: see ``monai_synth.data.datalist.read_dataset``; there is no phantom of that kind.
    """
    main = is_main()
    if _same(dataset_dir, phantom_dir):
        make, what = _phantom(task, phantom)
        if main:
            logger.warning(
                f"NO dataset_dir WAS GIVEN: the built-in {what} phantom is used, which is computed, not measured. "
                f"Give --dataset_dir FOLDER (written by `monai-synth prepare {task} SRC FOLDER`) for real data."
            )
            if not (Path(phantom_dir) / "dataset.json").is_file():
                make(Path(phantom_dir), phantom)
    elif main and preset == "paper" and torch.device(device).type == "cpu":
        logger.warning("preset 'paper' on a CPU takes weeks; give --preset demo for a small model")
    if num_processes() > 1:
        dist.barrier()
    dataset = read_dataset(dataset_dir, task=task)
    if main:
        sizes = ", ".join(f"{len(dataset.content.get(s, []))} {s}" for s in ("training", "validation", "test"))
        logger.info(f"dataset {dataset.name} at {dataset.root}: {sizes} cases; preset {preset}")


def _make_thorax(folder: Path, phantom: Mapping[str, Any]) -> None:
    from monai_synth.data.lidc import prepare_lidc
    from monai_synth.data.phantom import write_phantom

    source = folder.with_name(f"{folder.name}_dicom")
    if not source.is_dir():
        write_phantom(source, **phantom["scans"])
    prepare_lidc(source, folder, **phantom["import"])


def _make_nuclei(folder: Path, phantom: Mapping[str, Any]) -> None:
    from monai_synth.data.pairs import prepare_pairs
    from monai_synth.data.phantom_nuclei import write_nuclei

    source = folder.with_name(f"{folder.name}_source")
    if not source.is_dir():
        write_nuclei(source, **phantom["images"])
    prepare_pairs(source, folder, **phantom["import"])


def _make_xrays(folder: Path, phantom: Mapping[str, Any]) -> None:
    from monai_synth.data.classes import prepare_classes
    from monai_synth.data.phantom_xray import PATIENT_REGEX, write_xrays

    source = folder.with_name(f"{folder.name}_source")
    if not source.is_dir():
        write_xrays(source, **phantom["images"])
    prepare_classes(source, folder, **{"group_regex": PATIENT_REGEX, **phantom["import"]})


def _make_tissue(folder: Path, phantom: Mapping[str, Any]) -> None:
    from monai_synth.data.classes import prepare_classes
    from monai_synth.data.phantom_tissue import write_tissue

    source = folder.with_name(f"{folder.name}_source")
    if not source.is_dir():
        write_tissue(source, **phantom["images"])
    prepare_classes(source, folder, **phantom["import"])


# The kinds of each task, the default first.
_PHANTOMS = {
    "lidc": {"thorax": (_make_thorax, "thorax")},
    "pairs": {"nuclei": (_make_nuclei, "nuclei")},
    "classes": {"xray": (_make_xrays, "chest X-ray"), "tissue": (_make_tissue, "tissue")},
}


def _phantom(task: str, phantom: Mapping[str, Any]) -> tuple[Callable[[Path, Mapping[str, Any]], None], str]:
    """What makes the phantom that ``phantom`` names, and what it shows."""
    kinds = _PHANTOMS[task]
    kind = phantom.get("kind", next(iter(kinds)))
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"phantom kind is {kind!r}; give {' or '.join(map(repr, kinds))}, or leave it out")
    return kinds[kind]


def ensure_stages(
    stages: Sequence[Mapping[str, Any]],
    *,
    ckpt_dir: str,
    contract: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> None:
    """Run the stages whose trained file is missing; say which ones are there and reused.

    Args:
        stages: ``{"file", "config", "overrides"}`` each; configs of the innermost running bundle.
        ckpt_dir: where the trained files lie.
        contract: what a trained file that is there must agree with.
        overrides: config values that every stage gets.

    Raises:
        UserError: a trained file does not fit the dataset or the sizes of this run.
    """
    for stage in stages:
        path = Path(ckpt_dir) / stage["file"]
        if path.is_file():
            there = load_file(path)["contract"]
            remedy = f"Give another --ckpt_dir, or delete {path} to train it again."
            require_agreement({k: there.get(k) for k in contract}, contract, f"trained file {path}", remedy)
            if is_main():
                logger.info(f"stage {path.stem}: reusing {path}")
            continue
        if is_main():
            logger.info(f"stage {path.stem}: {path} is missing, training it with {Path(stage['config']).name}")
        values = {k: v for k, v in {**overrides, **stage["overrides"]}.items() if v is not None}
        workflow = ConfigWorkflow(stage["config"], workflow_type="train", run_id="training", **values)
        workflow.initialize()
        workflow.run()
        # no finalize: the process group, if any, belongs to the run that is under way


def load_codec(ckpt_dir: str, *, device: str = "cpu", scale_factor: float = 1.0) -> LatentCodec:
    """The trained autoencoder of ``ckpt_dir`` with its conventions."""
    path = Path(ckpt_dir) / "autoencoder.pt"
    content = load_file(path, stage="autoencoder")
    contract = content["contract"]
    codec = LatentCodec(
        restore_network(content, path),
        image_channels=contract["image_channels"],
        factor=contract["factor"],
        num_labels=contract["num_labels"],
        scale_factor=scale_factor,
    )
    return codec.to(device)


# Sampling


def guided_features(features: Sequence[str], scale: float | Mapping[str, float]) -> list[str]:
    """Features whose classifier takes part: those with a scale other than 0."""
    if isinstance(scale, Mapping):
        return [f for f in features if scale.get(f, 0) != 0]
    return [] if scale == 0 else list(features)


def run_sampling(dataset: Sized, evaluator: Engine, *, key: str = "num_samples") -> None:
    """Sample what is not there yet.

    Args:
        dataset: what is not there.
        evaluator: samples its batches.
        key: by which more are asked for.
    """
    if not len(dataset):
        logger.info(f"all images that were asked for are there already; raise --{key} for more")
        return
    logger.info(f"sampling {len(dataset)} images")
    evaluator.run()
