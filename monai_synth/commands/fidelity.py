# SPDX-License-Identifier: Apache-2.0
"""``monai-synth evaluate fidelity``: its options and its call."""

from __future__ import annotations

import argparse
from typing import Any

from monai_synth.commands.shared import say, settings_of


def add_fidelity(metrics: Any) -> None:
    """Add the command to those of ``evaluate``.

    Args:
        metrics: subparsers of ``evaluate``.
    """
    parser = metrics.add_parser(
        "fidelity",
        help="how close are synthetic images to real ones?",
        description="Compare synthetic images (classes, pairs of image and mask, CT slices, plain folders) with real "
        "ones, those with each other, and all with a control: FID and KID with Inception weights, distances, precision "
        "and recall of other features, SSIM, MS-SSIM and LPIPS, unpaired and of images of the same map; HU of CT, "
        "statistics of masks, and whether images show their masks. Each with n and a 95 % interval.",
    )
    parser.set_defaults(call=_evaluate_fidelity)
    add = parser.add_argument
    add(
        "--real",
        required=True,
        metavar="DIR",
        help="dataset of monai-synth prepare, best with a test split; or an nnU-Net raw dataset or a folder of images",
    )
    add("--synthetic", required=True, metavar="DIR", help="folder that sampling wrote, finished; or one of images")
    add("--out", required=True, metavar="OUT", help="folder to write fidelity.json, fidelity.csv, report.html to")
    add("--control", metavar="DIR", help="another dataset, such as Fashion-MNIST, for comparison (default: none)")
    add(
        "--inception",
        metavar="FILE",
        help="Inception weights for FID and KID: pt_inception-2015-12-05-6726825d.pth, "
        "weights-inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt (default: no FID)",
    )
    add(
        "--inception-resize",
        choices=("tensorflow", "clean"),
        default="tensorflow",
        help="how images become 299 x 299: tensorflow is what FID is defined by; clean filters where it shrinks, and "
        "its numbers are not called FID (default: %(default)s)",
    )
    add(
        "--radimagenet",
        metavar="FILE",
        help="ResNet50.pt of RadImageNet (PyTorch), for distances of features learned from CT, MR and ultrasound "
        "(default: none)",
    )
    add(
        "--lpips",
        metavar="FILE",
        help="alexnet-owt-7be5be79.pth or vgg16-397923af.pth of torchvision, the trunk of LPIPS (default: no LPIPS)",
    )
    add(
        "--extractor",
        metavar="FILE",
        help="OUT/classifiers/*.pt of monai-synth experiment classifier, for distances of its features, which are not "
        "FID (default: none)",
    )
    add(
        "--allow-unknown-weights",
        action="store_true",
        help="take weights whose SHA-256 is not a published one, from a source you trust; the numbers are then named "
        "so (default: refuse them)",
    )
    add(
        "--consistency",
        action="store_true",
        help="train a small segmenter on the real pairs and let it judge synthetic images against their masks; a "
        "minute or two (default: no)",
    )
    for option, default, text in (
        ("--consistency-steps", 400, "of its training, 8 images each; 1 or more"),
        ("--consistency-size", 96, "pixels of the longer side that it sees; 16 or more"),
        ("--max-images", 1000, "of each set, a random choice where there are more; 2 or more"),
        ("--num-pairs", 1000, "pairs of images for SSIM, MS-SSIM and LPIPS; 1 or more"),
        ("--seed", 0, "of everything that is drawn; 0 or more"),
        ("--batch-size", 64, "images at once; 1 or more"),
    ):
        add(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add("--per-class", action="store_true", help="compare each class by itself too (default: all together)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU where there is one)")
    add("--cache", metavar="DIR", help="folder of features, which may serve several reports (default: OUT/features)")
    add("--overwrite", action="store_true", help="replace a report that is in OUT (default: keep it and stop)")
    add("--show-real", action="store_true", help="show real images in the page too (default: synthetic ones only)")
    add(
        "--mlflow",
        metavar="URI",
        help="server or folder of MLflow for a copy of the results (default: MLFLOW_TRACKING_URI, or none)",
    )


def _evaluate_fidelity(arguments: argparse.Namespace) -> None:
    from monai_synth.evaluate.fidelity import Settings, evaluate_fidelity

    evaluate_fidelity(settings_of(Settings, arguments), report=say)
