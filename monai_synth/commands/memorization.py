# SPDX-License-Identifier: Apache-2.0
"""The verb ``evaluate memorization``: its options, and the call that they become."""

from __future__ import annotations

import argparse
from typing import Any

from monai_synth.commands.shared import say, settings_of


def add_memorization(metrics: Any) -> None:
    """Add the verb to those of ``evaluate``."""
    parser = metrics.add_parser(
        "memorization",
        help="are synthetic images copies of training images?",
        description="Find for every synthetic image its nearest training image, over flips, quarter turns, small "
        "shifts and changes of brightness, and call it a near copy where it resembles more than images of other "
        "patients do; a score for membership inference; and a dataset without the copies. Of fewer than 20 held-out "
        "patients too many fresh images would be called copies, so there only copies nearly to the pixel are.",
    )
    parser.set_defaults(call=_evaluate_memorization)
    add = parser.add_argument
    add("--train", required=True, metavar="DIR", help="images the model was trained on: prepared dataset, nnU-Net raw "
        "dataset, or folder of images")  # fmt: skip
    add("--heldout", metavar="DIR", help="real images of other patients, in any of these forms (default: the test or "
        "validation split of --train)")  # fmt: skip
    add("--synthetic", required=True, metavar="DIR", help="folder that a bundle sampled, or one of images")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="folder to write memorization.json, memorization.csv, report.html to",
    )
    add("--remove", metavar="OUT2", help="also write the synthetic dataset without its near copies here; of fewer "
        "than 20 held-out patients without copies nearly to the pixel only (default: write none)")  # fmt: skip
    add("--level", type=float, default=0.01, metavar="A",
        help="share of false alarms that is allowed; more than 0 and less than 0.5 (default: %(default)s)")  # fmt: skip
    add("--size", type=int, nargs="+", metavar="N",
        help="resize all images to N x N or H W; pixels, 16 or more (default: their size, at most 256)")  # fmt: skip
    add("--extractor", metavar="FILE", help="also compare features of this classifier of experiment classifier "
        "(default: none)")  # fmt: skip
    add("--inception", metavar="FILE", help="also compare features of these Inception weights (default: none)")
    add(
        "--allow-unknown-weights",
        action="store_true",
        help="take Inception weights of an unknown hash (default: refuse)",
    )
    add("--device", choices=("cpu", "cuda"), help="of extractors (default: a GPU where there is one)")
    add("--max-heldout", type=int, default=2000, metavar="N",
        help="held-out images to score, drawn at random; 2 or more (default: %(default)s)")  # fmt: skip
    add("--max-membership", type=int, default=2000, metavar="N",
        help="training and held-out images for the membership score; 2 or more (default: %(default)s)")  # fmt: skip
    add("--candidates", type=int, default=12, metavar="N",
        help="training images that the coarse search finds for each; 1 or more (default: %(default)s)")  # fmt: skip
    add("--exact", type=int, default=3, metavar="N",
        help="of these, how many are compared pixel by pixel; 1 or more (default: %(default)s)")  # fmt: skip
    add("--cache", metavar="DIR", help="folder of features, by which the next run is quicker; as private as the images "
        "(default: none is kept)")  # fmt: skip
    add("--show-real", action="store_true", help="put the nearest pairs into the page, real images and copies of them "
        "(default: the page holds no image)")  # fmt: skip
    add("--pictures", dest="num_pictures", type=int, default=12, metavar="N",
        help="pairs on the page with --show-real; 0 or more (default: %(default)s)")  # fmt: skip
    add(
        "--seed", type=int, default=0, metavar="N", help="of everything that is drawn; 0 or more (default: %(default)s)"
    )
    add("--workers", type=int, metavar="N", help="processes; 1 or more (default: one per CPU core)")
    add("--overwrite", action="store_true", help="replace a report in OUT and a cleaned dataset in OUT2 "
        "(default: keep them and stop)")  # fmt: skip
    add("--mlflow", metavar="URI", help="log results here too: an address, or a folder for mlruns.db "
        "(default: MLFLOW_TRACKING_URI, where set)")  # fmt: skip


def _evaluate_memorization(arguments: argparse.Namespace) -> None:
    from monai_synth.evaluate.memorization import Settings, evaluate_memorization

    evaluate_memorization(settings_of(Settings, arguments), report=say)
