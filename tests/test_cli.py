# SPDX-License-Identifier: Apache-2.0
"""The command line: each verb reaches its function unchanged, failures are one line, help comes at once."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import monai_synth
from monai_synth import cli
from monai_synth.errors import UserError

VERBS = {
    "prepare lidc": ("monai_synth.data.lidc", "prepare_lidc"),
    "prepare pairs": ("monai_synth.data.pairs", "prepare_pairs"),
    "prepare classes": ("monai_synth.data.classes", "prepare_classes"),
    "prepare phantom": ("monai_synth.data.phantom", "write_phantom"),
    "evaluate semantic": ("monai_synth.evaluate.folders", "evaluate_folders"),
}
PLACES = {
    "prepare lidc": ["SRC", "OUT"],
    "prepare pairs": ["SRC", "OUT"],
    "prepare classes": ["SRC", "OUT"],
    "prepare phantom": ["OUT"],
    "evaluate semantic": ["A", "B"],
}


def call_of(verb: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the function behind a verb gets, by parameter name."""
    module, name = VERBS[verb]
    function = getattr(importlib.import_module(module), name)
    calls = []

    def record(*args: Any, **kwargs: Any) -> tuple[()]:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return ()

    monkeypatch.setattr(f"{module}.{name}", record)
    assert cli.main([*verb.split(), *PLACES[verb], *options]) == 0
    (arguments,) = calls
    return arguments


@pytest.mark.parametrize("verb", VERBS)
def test_the_defaults_are_those_of_the_function(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = VERBS[verb]
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    arguments = call_of(verb, [], monkeypatch)
    for parameter in signature.parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            assert arguments[parameter.name] == parameter.default, parameter.name


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        ("prepare lidc", [], {"source": "SRC", "out": "OUT"}),
        ("prepare lidc", ["--max-slice-thickness", "1.25"], {"max_slice_thickness": 1.25}),
        ("prepare lidc", ["--slice-fraction", "1"], {"slice_fraction": 1.0}),
        ("prepare lidc", ["--consensus", "0.75"], {"consensus": 0.75}),
        ("prepare lidc", ["--min-nodule-area", "3"], {"min_nodule_area": 3}),
        ("prepare lidc", ["--splits", "0.5", "0.2", "0.3"], {"splits": (0.5, 0.2, 0.3)}),
        ("prepare lidc", ["--seed", "4", "--workers", "2"], {"seed": 4, "num_workers": 2}),
        ("prepare lidc", ["--skip-bad", "--overwrite"], {"skip_bad": True, "overwrite": True}),
        ("prepare lidc", ["--link-table", "t.csv"], {"link_table": "t.csv"}),
        ("prepare pairs", ["--image-dir", "a", "--label-dir", "b"], {"image_dir": "a", "label_dir": "b"}),
        ("prepare pairs", ["--label-suffix", "_mask", "--labels", "x", "y"], {"label_suffix": "_mask"}),
        ("prepare pairs", ["--labels", "x", "y", "--label-values", "128", "255"], {"label_values": [128, 255]}),
        ("prepare pairs", ["--labels", "x", "y"], {"labels": ["x", "y"]}),
        ("prepare pairs", ["--threshold", "9.5", "--size", "64", "96"], {"threshold": 9.5, "size": [64, 96]}),
        ("prepare pairs", ["--patch-size", "8", "9", "7", "--stride", "4"], {"patch_size": [8, 9, 7], "stride": 4}),
        ("prepare pairs", ["--window", "-160", "240"], {"window": [-160.0, 240.0]}),
        ("prepare pairs", ["--percentiles", "1", "99", "--grey"], {"percentiles": [1.0, 99.0], "grey": True}),
        ("prepare pairs", ["--modality", "MR", "--name", "n"], {"modality": "MR", "name": "n"}),
        ("prepare pairs", ["--group-regex", "^.", "--anonymize-ids"], {"group_regex": "^.", "anonymize_ids": True}),
        ("prepare pairs", ["--splits", "0.5", "0", "0.5", "--seed", "3"], {"splits": (0.5, 0.0, 0.5), "seed": 3}),
        ("prepare pairs", ["--test-dir", "t", "--workers", "2"], {"test_dir": "t", "num_workers": 2}),
        ("prepare pairs", ["--skip-bad", "--overwrite"], {"skip_bad": True, "overwrite": True}),
        ("prepare classes", ["--classes", "a", "b", "--class-names", "x", "y"], {"classes": ["a", "b"]}),
        ("prepare classes", ["--class-names", "x", "y"], {"class_names": ["x", "y"]}),
        ("prepare classes", ["--csv", "t.csv", "--path-column", "p"], {"table": "t.csv", "path_column": "p"}),
        ("prepare classes", ["--label-column", "l", "--split-column", "s"], {"label_column": "l", "split_column": "s"}),
        ("prepare classes", ["--patient-column", "p"], {"patient_column": "p"}),
        ("prepare classes", ["--chexpert", "--observation", "Edema"], {"chexpert": True, "observation": "Edema"}),
        ("prepare classes", ["--uncertain", "ignore", "--size", "64"], {"uncertain": "ignore", "size": [64]}),
        ("prepare classes", ["--text-transform", "--grey"], {"text_transform": True, "grey": True}),
        ("prepare classes", ["--window", "0", "9", "--modality", "CR"], {"window": [0.0, 9.0], "modality": "CR"}),
        ("prepare classes", ["--percentiles", "1", "99", "--name", "n"], {"percentiles": [1.0, 99.0], "name": "n"}),
        ("prepare classes", ["--group-regex", "^.", "--anonymize-ids"], {"group_regex": "^.", "anonymize_ids": True}),
        ("prepare classes", ["--splits", "1", "0", "0", "--seed", "3"], {"splits": (1.0, 0.0, 0.0), "seed": 3}),
        ("prepare classes", ["--workers", "2"], {"num_workers": 2}),
        ("prepare classes", ["--skip-bad", "--overwrite"], {"skip_bad": True, "overwrite": True}),
        (
            "prepare phantom",
            ["--patients", "3", "--slices", "5"],
            {"out": "OUT", "num_patients": 3, "num_slices": 5},
        ),
        ("prepare phantom", ["--matrix", "64", "--seed", "1"], {"matrix": 64, "seed": 1}),
        ("prepare phantom", ["--workers", "1"], {"num_workers": 1}),
        ("evaluate semantic", [], {"folders": ["A", "B"]}),
        (
            "evaluate semantic",
            ["--split", "training", "--max-cases", "5"],
            {"split": "training", "max_cases": 5},
        ),
        ("evaluate semantic", ["--bootstrap", "10", "--seed", "2"], {"num_bootstrap": 10, "seed": 2}),
        ("evaluate semantic", ["--report", "r.json"], {"report": "r.json"}),
    ],
)
def test_each_option_reaches_the_function(
    verb: str, options: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = call_of(verb, options, monkeypatch)
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "function", "given"),
    [
        ("nuclei", "monai_synth.data.phantom_nuclei.write_nuclei", {"num_images": 7, "size": 40}),
        ("xray", "monai_synth.data.phantom_xray.write_xrays", {"num_images": 7, "size": 40}),
        ("xray", "monai_synth.data.phantom_xray.write_xrays", {}),
    ],
)
def test_a_phantom_of_another_kind_gets_what_is_given_and_its_own_defaults(
    kind: str, function: str, given: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(function, lambda *args, **kwargs: calls.append((args, kwargs)))
    options = [word for name, value in given.items() for word in (f"--{name.removeprefix('num_')}", str(value))]
    assert cli.main(["prepare", "phantom", "OUT", "--kind", kind, "--seed", "3", *options]) == 0
    assert calls == [(("OUT",), {"seed": 3, **given})]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("got 3,\n allowed is 2"), 2, "monai-synth: error: got 3, allowed is 2\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.dcm"), 2, "x.dcm"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.png"), 2, "free some space"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_failure_that_a_user_can_mend_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("monai_synth.data.lidc.prepare_lidc", fail)
    assert cli.main(["prepare", "lidc", "SRC", "OUT"]) == status
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_synth.data.lidc.prepare_lidc", lambda *a, **k: [][0])
    with pytest.raises(IndexError):
        cli.main(["prepare", "lidc", "SRC", "OUT"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prepare"],
        ["prepare", "lidc"],
        ["prepare", "x", "OUT"],
        ["evaluate", "semantic"],
        ["prepare", "phantom", "O", "--seed", "a"],
        ["prepare", "lidc", "S", "O", "--splits", "1"],
        ["prepare", "lidc", "S", "O", "--nonsense"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: monai-synth" in capsys.readouterr().err


def leaf_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for sub in subs:
        for child in sub.choices.values():
            yield from leaf_parsers(child)
    if not subs:
        yield parser


def test_every_option_says_its_default_and_every_number_its_range() -> None:
    parsers = list(leaf_parsers(cli._parser()))
    assert {" ".join(parser.prog.split()[1:]) for parser in parsers} == {
        *VERBS,
        "evaluate fidelity",
        "evaluate memorization",
        "experiment nnunet",
        "experiment classifier",
        "experiment expert",
        "experiment alignment",
        "experiment lsdm",
        "package",
        "convert",
        "label-app",
        "studio",
    }
    for parser in parsers:
        parser.format_help()  # a stray % would raise here
        for action in parser._actions:
            if action.dest == "help":
                continue
            assert action.help, action.dest
            if action.option_strings:
                assert action.required or "default" in action.help, action.dest
            if action.type in (int, float):
                assert any(word in action.help for word in ("more", "to", "at most")), action.dest


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, **options)


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from monai_synth.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['prepare', 'lidc', '--help']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as done:\n"
        "        assert done.code == 0\n"
        "heavy = {'torch', 'monai', 'numpy', 'scipy', 'pydicom', 'skimage', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert f"monai-synth {monai_synth.__version__}" in done.stdout


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "monai_synth", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"monai-synth {monai_synth.__version__}\n")
    done = run(sys.executable, "-m", "monai_synth", "evaluate", "semantic", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("monai-synth: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_phantom_import_and_evaluation_follow_one_another(tmp_path: Path) -> None:
    phantom, data, report = tmp_path / "phantom", tmp_path / "data", tmp_path / "report.json"
    few = ["--patients", "4", "--slices", "12", "--matrix", "128"]
    assert cli.main(["prepare", "phantom", str(phantom), *few]) == 0
    every = ["--slice-fraction", "1", "--splits", "0.5", "0.25", "0.25"]
    assert cli.main(["prepare", "lidc", str(phantom), str(data), *every]) == 0
    assert cli.main(["evaluate", "semantic", str(data), "--report", str(report)]) == 0
    (result,) = json.loads(report.read_text())
    assert result["num_images"] == len(json.loads((data / "dataset.json").read_text())["test"])
    assert result["classes"]["lung"]["value"] > 0.95
    assert cli.main(["prepare", "lidc", str(phantom), str(data)]) == 2  # kept unless --overwrite


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as SIGINT")
def test_ctrl_c_while_preparing_says_interrupted_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai_synth", "prepare", "phantom", "out", "--patients", "500"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.rglob("*.dcm")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a console sends it to the whole group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())
