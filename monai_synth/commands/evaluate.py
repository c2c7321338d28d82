# SPDX-License-Identifier: Apache-2.0
"""The verb ``evaluate``: its measures, their options, and the calls that they become."""

from __future__ import annotations

import argparse

from monai_synth.commands.fidelity import add_fidelity
from monai_synth.commands.memorization import add_memorization


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_subparsers(metavar="METRIC", required=True)
    semantic = metrics.add_parser(
        "semantic",
        help="do CT slices show the tissue that their maps ask for?",
        description="Dice of lung and high-dense tissue between each map and the HU bands of its image, with "
        "95 % intervals. A prepared dataset of real images gives the ceiling.",
    )
    semantic.set_defaults(call=_evaluate_semantic)
    semantic.add_argument(
        "folders", nargs="+", metavar="DIR", help="nnU-Net raw dataset (DatasetNNN_Name) or prepared dataset"
    )
    semantic.add_argument(
        "--split",
        choices=("training", "validation", "test"),
        default="test",
        help="of a prepared dataset (default: %(default)s)",
    )
    semantic.add_argument(
        "--max-cases",
        type=int,
        metavar="N",
        help="look at the first N cases only; 1 or more (default: all)",
    )
    semantic.add_argument(
        "--bootstrap",
        type=int,
        default=2000,
        metavar="N",
        help="resamplings for the interval; 1 or more (default: %(default)s)",
    )
    semantic.add_argument("--seed", type=int, default=0, metavar="N", help="of the resampling; 0 or more (default: 0)")
    semantic.add_argument("--report", metavar="FILE", help="also write the results to this JSON file (default: none)")
    add_fidelity(metrics)
    add_memorization(metrics)


def _evaluate_semantic(arguments: argparse.Namespace) -> None:
    from monai_synth.evaluate.folders import evaluate_folders

    for text in evaluate_folders(
        arguments.folders,
        split=arguments.split,
        max_cases=arguments.max_cases,
        num_bootstrap=arguments.bootstrap,
        seed=arguments.seed,
        report=arguments.report,
    ):
        print(text, flush=True)
