# SPDX-License-Identifier: Apache-2.0
"""The verb ``prepare``: its sources, their options, and the calls that they become."""

from __future__ import annotations

import argparse
from typing import Any

from monai_synth.commands.shared import add_workers
from monai_synth.errors import UserError


def add_prepare(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(metavar="SOURCE", required=True)

    lidc = sources.add_parser(
        "lidc",
        help="LIDC-IDRI: CT as DICOM with the readers' XML",
        description="Read LIDC-IDRI (DICOM, XML, in any nesting); write slices, semantic maps and nodules.",
    )
    lidc.set_defaults(call=_prepare_lidc)
    lidc.add_argument("source", metavar="SRC", help="folder that holds the DICOM and XML files")
    lidc.add_argument("out", metavar="OUT", help="folder to write; dataset.json, images/ and labels/ go into it")
    lidc.add_argument(
        "--max-slice-thickness",
        type=float,
        default=2.5,
        metavar="MM",
        help="skip series with thicker slices; mm, more than 0 (default: %(default)s)",
    )
    lidc.add_argument(
        "--slice-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="part of the slices of a series to take; more than 0, at most 1 (default: %(default)s)",
    )
    lidc.add_argument(
        "--consensus",
        type=float,
        default=0.5,
        metavar="F",
        help="share of a nodule's readers to include a pixel; more than 0, at most 1 (default: %(default)s)",
    )
    lidc.add_argument(
        "--min-nodule-area",
        type=int,
        default=8,
        metavar="N",
        help="leave out nodules smaller than this in a slice; pixels, 1 or more (default: %(default)s)",
    )
    lidc.add_argument(
        "--splits",
        type=float,
        nargs=3,
        default=(0.86, 0.03, 0.11),
        metavar=("TRAIN", "VAL", "TEST"),
        help="parts of the patients, each from 0 to 1, together 1 (default: 0.86 0.03 0.11)",
    )
    lidc.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the split; 0 or more (default: 0)",
    )
    add_workers(lidc)
    lidc.add_argument(
        "--skip-bad",
        action="store_true",
        help="report unreadable scans and go on (default: report them and stop)",
    )
    lidc.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that is in OUT (default: keep it and stop)",
    )
    lidc.add_argument(
        "--link-table",
        metavar="FILE",
        help="also write which serial number is which patient to this CSV file, which must not be shared "
        "(default: written nowhere)",
    )

    _add_pairs(
        sources.add_parser(
            "pairs",
            help="images with masks: PNG, JPEG, TIFF, BMP, NIfTI, DICOM, or an nnU-Net raw dataset",
            description="Read images and masks with equal file names (SRC/images/a.png, SRC/masks/a.png; also below "
            "SRC/train, SRC/val, SRC/test), or a raw dataset of nnU-Net or MSD; write pairs of one form with a split.",
        )
    )

    _add_classes(
        sources.add_parser(
            "classes",
            help="images with one class each: MedMNIST npz, a folder per class, CSV, CheXpert",
            description="Read a MedMNIST npz file, a folder for each class (SRC/normal/a.png; also below SRC/train, "
            "SRC/val, SRC/test), images listed in a CSV file, or CheXpert; write images of one form with a split.",
        )
    )

    phantom = sources.add_parser(
        "phantom",
        help="artificial data to try out: thorax CT in the form of LIDC-IDRI, stained nuclei, chest X-rays, or tissue",
        description="Write DICOM series of artificial chests with the XML of four readers, pictures of stained "
        "tissue with the masks of their nuclei, or grey pictures in a folder for each class: chest X-rays, normal and "
        "pneumonia, or histology tiles, tumor, stroma, lympho and adipose.",
    )
    phantom.set_defaults(call=_prepare_phantom)
    phantom.add_argument(
        "out", metavar="OUT", help="folder to write; read it with: monai-synth prepare lidc (pairs, classes) OUT ..."
    )
    phantom.add_argument(
        "--kind",
        choices=("lidc", "nuclei", "xray", "tissue"),
        default="lidc",
        help="what to compute: CT for prepare lidc, pictures and masks for prepare pairs, X-rays of two classes "
        r"for prepare classes, best with --group-regex '(p\d+)_\d+$', or tissue of four classes for prepare classes "
        "(default: %(default)s)",
    )
    for option, text in {
        "--patients": "lidc: patients; 1 to 9999 (default: 24)",
        "--slices": "lidc: slices of 2.5 mm per patient; 4 to 80 (default: 24)",
        "--matrix": "lidc: rows and columns of a slice; pixels, 64 to 512 (default: 256)",
        "--workers": "processes; 1 to 4096 (default: as many as pay off, at most one per CPU core)",
        "--images": "nuclei: pictures; 1 to 99999 (default: 40); xray: 4 to 99999 (default: 600); "
        "tissue: 4 to 99999 (default: 800)",
        "--size": "nuclei: rows and columns of a picture; pixels, 32 to 2048 (default: 128); xray and "
        "tissue: 16 to 1024 (default: 64)",
    }.items():
        phantom.add_argument(option, type=int, metavar="N", help=text)
    phantom.add_argument("--seed", type=int, default=0, metavar="N", help="of everything in it; 0 or more (default: 0)")


def _add_pairs(pairs: argparse.ArgumentParser) -> None:
    pairs.set_defaults(call=_prepare_pairs)
    pairs.add_argument("source", metavar="SRC", help="folder that holds the images and the masks")
    pairs.add_argument("out", metavar="OUT", help="folder to write; dataset.json, images/ and labels/ go into it")
    pairs.add_argument("--image-dir", default="images", metavar="DIR", help="folder of images (default: %(default)s)")
    pairs.add_argument("--label-dir", default="masks", metavar="DIR", help="folder of masks (default: %(default)s)")
    pairs.add_argument(
        "--label-suffix",
        default="",
        metavar="TEXT",
        help="what the names of masks have after those of their images, such as _mask (default: nothing)",
    )
    pairs.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of what the masks show, without the background (default: those of SRC/dataset.json)",
    )
    pairs.add_argument(
        "--label-values",
        type=int,
        nargs="+",
        metavar="N",
        help="value of each label in the masks; 1 to 255 (default: 1 2 ...; for one label any one value but 0)",
    )
    pairs.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="masks of one label are foreground above this; 0 or more (default: none; 127 for JPEG)",
    )
    pairs.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="resize to H W or X Y Z; pixels, 1 or more (default: keep the size)",
    )
    pairs.add_argument(
        "--patch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="cut into tiles of H W or X Y Z, after --size; pixels, 1 or more (default: whole images)",
    )
    pairs.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="distance of tiles; pixels, 1 or more, at most the patch size (default: the patch size)",
    )
    _add_intensities(pairs)
    pairs.add_argument(
        "--test-dir",
        metavar="DIR",
        help="another folder like SRC, all of it for the test split (default: none)",
    )
    _add_patients_and_run(pairs)


def _add_classes(classes: argparse.ArgumentParser) -> None:
    classes.set_defaults(call=_prepare_classes)
    classes.add_argument("source", metavar="SRC", help="npz file, or folder that holds the images")
    classes.add_argument("out", metavar="OUT", help="folder to write; dataset.json and images/ go into it")
    classes.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="folders or labels in the order of the classes; for npz the names of 0, 1, ... (default: all, sorted)",
    )
    classes.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="what to call the classes, in the same order (default: as SRC does)",
    )
    classes.add_argument(
        "--csv",
        dest="table",
        metavar="FILE",
        help="CSV file with a line for each image of SRC (default: a folder for each class)",
    )
    for option, text in {
        "--path-column": "paths, below SRC (default: path)",
        "--label-column": "classes (default: label)",
        "--patient-column": "patients (default: patient, where it is there)",
        "--split-column": "train, val and test (default: split, where it is there)",
    }.items():
        classes.add_argument(option, metavar="NAME", help=f"column of the CSV file with the {text}")
    classes.add_argument(
        "--chexpert",
        action="store_true",
        help="SRC is CheXpert, with train.csv and valid.csv; lateral images are left out (default: it is not)",
    )
    classes.add_argument(
        "--observation",
        default="Pneumonia",
        metavar="NAME",
        help="column of CheXpert; the classes are without (0, blank) and with it (default: %(default)s)",
    )
    classes.add_argument(
        "--uncertain",
        choices=("zeros", "ones", "ignore"),
        default="zeros",
        help="take CheXpert's -1 as without, as with, or leave the image out (default: %(default)s)",
    )
    classes.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="scale to cover N x N or H W and cut the centre; pixels, 1 or more (default: keep the size; 28 with "
        "--text-transform)",
    )
    classes.add_argument(
        "--text-transform",
        action="store_true",
        help="as the X-ray text: short side to 256, centre 224 x 224, then --size (default: --size alone)",
    )
    _add_intensities(classes)
    _add_patients_and_run(classes)


def _add_intensities(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values to become 0 and 255, for CT in HU (default: 8-bit images are kept, see --percentiles)",
    )
    parser.add_argument(
        "--percentiles",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of each image, to become 0 and 255; 0 to 100 (default: 0.5 99.5 unless all images have 8 bits)",
    )
    parser.add_argument("--grey", action="store_true", help="make RGB images grey (default: keep the colours)")
    parser.add_argument(
        "--modality", metavar="NAME", help="what the images are, such as MR (default: what their files say)"
    )


def _add_patients_and_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-regex",
        metavar="RE",
        help="names the patient in an image's name by its first group, or the whole match; a patient is in one split "
        "only (default: the PatientID of DICOM, the patient of a CSV file, else each image)",
    )
    parser.add_argument(
        "--anonymize-ids",
        action="store_true",
        help="number patients and cases (default: keep the files' names; DICOM is always numbered)",
    )
    parser.add_argument(
        "--splits",
        type=float,
        nargs=3,
        default=(0.8, 0.1, 0.1),
        metavar=("TRAIN", "VAL", "TEST"),
        help="parts of the patients, each from 0 to 1, together 1; splits that SRC gives are kept "
        "(default: 0.8 0.1 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split; 0 or more (default: 0)")
    add_workers(parser)
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="report unusable files and go on (default: report them and stop)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that is in OUT (default: keep it and stop)",
    )
    parser.add_argument("--name", metavar="NAME", help="of the dataset (default: that of SRC)")


def _prepare_lidc(arguments: argparse.Namespace) -> None:
    from monai_synth.data.lidc import prepare_lidc

    prepare_lidc(**_parameters(arguments))


def _prepare_pairs(arguments: argparse.Namespace) -> None:
    from monai_synth.data.pairs import prepare_pairs

    prepare_pairs(**_parameters(arguments))


def _prepare_classes(arguments: argparse.Namespace) -> None:
    from monai_synth.data.classes import prepare_classes

    prepare_classes(**_parameters(arguments))


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a ``prepare`` verb passes on: each argument under its name, which is that of the function's parameter."""
    given = {name: value for name, value in vars(arguments).items() if name != "call"}
    return {**given, "splits": tuple(arguments.splits)}


def _prepare_phantom(arguments: argparse.Namespace) -> None:
    given = {name: value for name in _PHANTOM_KIND if (value := getattr(arguments, name)) is not None}
    for name in given:
        if arguments.kind not in _PHANTOM_KIND[name]:
            kinds = " and ".join(_PHANTOM_KIND[name])
            raise UserError(f"--{name} is of --kind {kinds}, got --kind {arguments.kind}; leave it out")
    values = {_PHANTOM_PARAMETER.get(name, name): value for name, value in given.items()}
    if arguments.kind == "nuclei":
        from monai_synth.data.phantom_nuclei import write_nuclei

        write_nuclei(arguments.out, seed=arguments.seed, **values)
    elif arguments.kind == "xray":
        from monai_synth.data.phantom_xray import write_xrays

        write_xrays(arguments.out, seed=arguments.seed, **values)
    elif arguments.kind == "tissue":
        from monai_synth.data.phantom_tissue import write_tissue

        write_tissue(arguments.out, seed=arguments.seed, **values)
    else:
        from monai_synth.data.phantom import write_phantom

        write_phantom(arguments.out, seed=arguments.seed, **values)


_PHANTOM_KIND = dict.fromkeys(("patients", "slices", "matrix"), ("lidc",))
_PHANTOM_KIND |= dict.fromkeys(("images", "size"), ("nuclei", "xray", "tissue"))
_PHANTOM_KIND["workers"] = ("lidc", "nuclei", "xray", "tissue")


_PHANTOM_PARAMETER = {
    "patients": "num_patients",
    "slices": "num_slices",
    "workers": "num_workers",
    "images": "num_images",
}
