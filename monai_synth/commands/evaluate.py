# SPDX-License-Identifier: Apache-2.0
"""The verb ``evaluate``: its measures, their options, and the calls that they become."""

from __future__ import annotations

import argparse


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
    _add_fidelity(
        metrics.add_parser(
            "fidelity",
            help="how close are synthetic images of classes to real ones?",
            description="Compare synthetic images with the real training and test images, those with each other, and "
            "all with a control: FID and KID with Inception weights, distances of a trained classifier's features, "
            "SSIM and MS-SSIM of random pairs; each with n and a 95 % interval.",
        )
    )


def _add_fidelity(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(call=_evaluate_fidelity)
    add = parser.add_argument
    add("--real", required=True, metavar="DIR", help="dataset of monai-synth prepare classes, best with a test split")
    add("--synthetic", required=True, metavar="DIR", help="folder that sampling with cfg_ddpm wrote, finished")
    add("--out", required=True, metavar="OUT", help="folder to write fidelity.json, fidelity.csv, report.html to")
    add("--control", metavar="DIR", help="another prepared dataset of classes, such as Fashion-MNIST (default: none)")
    add(
        "--inception",
        metavar="FILE",
        help="Inception weights for FID and KID: pt_inception-2015-12-05-6726825d.pth, "
        "weights-inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt (default: no FID)",
    )
    add(
        "--allow-unknown-weights",
        action="store_true",
        help="take Inception weights whose SHA-256 is not a published one, from a source you trust; the numbers are "
        "then not called FID (default: refuse them)",
    )
    add(
        "--extractor",
        metavar="FILE",
        help="OUT/classifiers/*.pt of monai-synth experiment classifier, for distances of its features, which are not "
        "FID (default: none)",
    )
    for option, default, text in (
        ("--max-images", 1000, "of each set, a random choice where there are more; 2 or more"),
        ("--num-pairs", 1000, "pairs of images for SSIM and MS-SSIM; 1 or more"),
        ("--seed", 0, "of everything that is drawn; 0 or more"),
        ("--batch-size", 64, "images at once; 1 or more"),
    ):
        add(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add("--per-class", action="store_true", help="compare each class by itself too (default: all together)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU where there is one)")
    add("--cache", metavar="DIR", help="folder of features, which may serve several reports (default: OUT/features)")
    add("--overwrite", action="store_true", help="replace a report that is in OUT (default: keep it and stop)")
    add("--show-real", action="store_true", help="show real images in the page too (default: synthetic ones only)")


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


def _evaluate_fidelity(arguments: argparse.Namespace) -> None:
    from monai_synth.evaluate.fidelity import Settings, evaluate_fidelity

    evaluate_fidelity(
        Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__}),
        report=lambda text: print(text, flush=True),
    )
