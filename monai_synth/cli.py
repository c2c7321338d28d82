# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-synth``: one call per verb; training and sampling are ``python -m monai.bundle run``.

Nothing heavy is imported before a verb needs it, so that help comes at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import Any

from monai_synth import __version__
from monai_synth.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the command's name. Default: those of the process.

    Returns:
        Exit status: 0 done; 1 a part of an experiment failed, the rest is done; 2 a failure that the user can mend,
        told in one line on stderr; 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.call(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"monai-synth: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space and run the command again"
    return text


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


def _experiment_nnunet(arguments: argparse.Namespace) -> int:
    from monai_synth.experiments.nnunet import Settings, run_experiment

    outcome = run_experiment(_settings(Settings, arguments), report=_say)
    if outcome.failed or outcome.skipped:
        names = ", ".join(outcome.failed)
        text = f"{len(outcome.failed)} jobs failed ({names}), {len(outcome.skipped)} that need them were skipped"
        print(f"monai-synth: {text}; the others are done, run the command again to try these", file=sys.stderr)
        return 1
    return 0


def _experiment_classifier(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.classifier import Settings, run_experiment

    run_experiment(_settings(Settings, arguments), report=_say)


def _experiment_expert(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.expert import Settings, run_experiment

    run_experiment(_settings(Settings, arguments), report=_say)


def _experiment_alignment(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.alignment import Settings, run_experiment

    run_experiment(_settings(Settings, arguments), report=_say)


def _settings(kind: type, arguments: argparse.Namespace) -> Any:
    """An experiment's settings: what was given under their names, and their own defaults."""
    given = {name: getattr(arguments, name, None) for name in kind.__dataclass_fields__}
    return kind(**{name: value for name, value in given.items() if value is not None})


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="monai-synth",
        description="Prepare data for the bundles of monai_synth and judge what they generate.",
        epilog="Train and sample with: python -m monai.bundle run --config_file bundles/lsdm/configs/...",
    )
    parser.add_argument("--version", action="version", version=f"monai-synth {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_prepare(verbs.add_parser("prepare", help="turn a source into a dataset that the bundles train on"))
    _add_evaluate(verbs.add_parser("evaluate", help="judge generated images"))
    _add_experiment(verbs.add_parser("experiment", help="find out whether synthetic data help"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
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
    _add_workers(lidc)
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
    _add_workers(parser)
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


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
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


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    experiments = parser.add_subparsers(metavar="EXPERIMENT", required=True)
    nnunet = experiments.add_parser(
        "nnunet",
        help="segmentation by nnU-Net trained on real, synthetic and both",
        description="Train nnU-Net on real pairs, on synthetic ones, on synthetic then real ones and on both mixed; "
        "score all on the same real test images. The same command resumes a stopped experiment.",
    )
    nnunet.set_defaults(call=_experiment_nnunet)
    add = nnunet.add_argument
    add("--real", required=True, metavar="DIR", help="dataset of monai-synth prepare pairs, with a test split")
    add("--synthetic", required=True, metavar="DIR", help="nnU-Net raw dataset, or a folder that holds just one")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="folder to write; results.json, results.csv, report.html go there",
    )
    add(
        "--ratios",
        type=_whole_numbers,
        metavar="N,N,...",
        help="synthetic pairs in percent of the real training set; each 1 or more (default: 100,250,500,1000)",
    )
    add(
        "--mode",
        dest="modes",
        type=lambda text: tuple(text.split(",")),
        metavar="M,M,...",
        help="synthetic-only, pretrain, mix, control (real data for as many steps as pretrain); control brings "
        "pretrain, and that synthetic-only; real only always runs (default: synthetic-only,pretrain)",
    )
    add(
        "--test",
        dest="tests",
        type=_named_folder,
        action=_Named,
        metavar="NAME=DIR",
        help="a further test set, a dataset of monai-synth prepare pairs; may be repeated (default: none)",
    )
    add(
        "--preset",
        choices=("paper", "paper-nuclei", "demo"),
        help="paper: 400 epochs, then 150 at 0.01; paper-nuclei: 1000, then 100 at 5e-6; demo: a tiny check that all "
        "parts work, no result (default: paper)",
    )
    add("--folds", type=int, metavar="N", help="folds of the real set, by patient; 2 or more (default: 5)")
    add("--fold-list", type=_whole_numbers, metavar="N,N,...", help="run these folds only; from 0 (default: all)")
    add(
        "--seeds",
        dest="num_seeds",
        type=int,
        metavar="N",
        help="repetitions with other initial weights and data order; 1 or more (default: 1)",
    )
    add(
        "--image-size",
        type=_image_size,
        nargs="+",
        action=_ImageSize,
        metavar="N",
        help="rows columns (or X Y Z) of all images that nnU-Net sees, or: native (default: that of the synthetic set)",
    )
    for option, kind, text in (
        ("--epochs", int, "of training from scratch; 1 or more (default: the preset's)"),
        ("--iterations", int, "steps per epoch; 1 or more (default: 250)"),
        ("--val-iterations", int, "validation batches per epoch; 1 or more (default: 50)"),
        ("--lr", float, "initial rate; more than 0 (default: 0.01)"),
        ("--finetune-epochs", int, "epochs on real data after synthetic data; 1 or more (default: the preset's)"),
        ("--finetune-lr", float, "their initial rate; more than 0 (default: the preset's)"),
        ("--batch-size", int, "images per step; 1 or more (default: nnU-Net's plan)"),
        ("--num-features", int, "channels of the network's first level; 1 or more (default: 32)"),
        ("--num-gpus", int, "jobs at a time, one per GPU; 1 or more (default: 1)"),
        ("--num-processes", int, "of nnU-Net per job; 1 or more (default: 2, up to 8 beside a GPU)"),
        ("--dataset-id", int, "nnU-Net's number of the real set in OUT; 1 to 950 (default: 501)"),
    ):
        add(option, type=kind, metavar="N" if kind is int else "F", help=text)
    add(
        "--patch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="rows columns (or X Y Z) of a training patch; each 8 or more (default: nnU-Net's plan)",
    )
    add("--device", choices=("cpu", "cuda"), help="where to train (default: a GPU where there is one)")
    add("--disable-tta", action="store_true", default=None, help="predict without mirrored images (default: with)")
    add("--show-real", action="store_true", help="put real test images into the report (default: none)")

    _add_classifier(
        experiments.add_parser(
            "classifier",
            help="classification trained on real, synthetic and both: the 18 rows of Table 2",
            description="Train classifiers on real images, on synthetic ones, and on synthetic then real ones, with "
            "and without augmentation and weighted loss; all classify the same real test images. The same command "
            "resumes a stopped experiment.",
        )
    )
    _add_experiment_expert(
        experiments.add_parser(
            "expert",
            help="generated classes judged by a trained classifier: baseline, aligned and other models",
            description="Sample images of each class from every model, all from the same noise, and let a trained "
            "classifier say what they show: accuracy over seeds, confusion, similarity, paired tests. The same command "
            "resumes a stopped experiment; more seeds, further arms and other experts go into the same folder.",
        )
    )
    _add_experiment_alignment(
        experiments.add_parser(
            "alignment",
            help="feature alignment with several weights: trainings and the expert's judgement",
            description="Train the bundle fad without alignment and with each of the weights, sample all models from "
            "the same noise and let trained classifiers judge them. The same command resumes a stopped experiment.",
        )
    )


def _add_experiment_alignment(alignment: argparse.ArgumentParser) -> None:
    alignment.set_defaults(call=_experiment_alignment)
    add = alignment.add_argument
    add("--expert", required=True, metavar="FILE", help="trained classifier that steers the trainings, and judges")
    add("--second-expert", metavar="FILE", help="another one, which only judges (default: none)")
    add("--real", required=True, metavar="DIR", help="dataset of monai-synth prepare classes to train on")
    add("--out", required=True, metavar="OUT", help="folder to write; sweep.csv, sweep.png and compared/ go there")
    add("--bundle", metavar="DIR", help="folder of the bundle fad (default: bundles/fad)")
    add("--w1", type=float, nargs="+", metavar="W", help="weights of the denoising loss; 0 or more (default: 1)")
    add(
        "--w2",
        type=float,
        nargs="+",
        metavar="W",
        help="weights of the alignment; 0 or more; the baseline, 0, always comes with them (default: 0.5 1 2)",
    )
    add("--align-on", nargs="+", metavar="WHAT", help="what the expert sees: noisy, clean, or both (default: noisy)")
    add("--trainings", type=int, metavar="N", help="of each setting, with other seeds; 1 or more (default: 1)")
    add(
        "--set",
        dest="options",
        nargs="+",
        metavar="KEY=VALUE",
        help="further keys of the bundle's training, such as preset=demo max_epochs=5 (default: none)",
    )
    add("--seeds", type=int, metavar="N", help="repetitions of the sampling with other noise; 1 to 4000 (default: 5)")
    add("--per-class", type=int, metavar="N", help="images of each class for each seed; 2 to 1000 (default: 10)")
    add("--exclude", nargs="+", metavar="CLASS", help="classes that are neither sampled nor answers (default: none)")
    add("--num-steps", type=int, metavar="N", help="calls of the network for an image; 1 or more (default: 20)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU where there is one)")
    add("--bootstrap", dest="num_bootstrap", type=int, metavar="N", help="resamplings; 1 or more (default: 2000)")
    add("--show-real", action="store_true", help="put real training images into the page (default: none)")


def _add_experiment_expert(expert: argparse.ArgumentParser) -> None:
    expert.set_defaults(call=_experiment_expert)
    add = expert.add_argument
    add("--expert", required=True, metavar="FILE", help="trained classifier, as train_expert.json of bundle fad writes")
    add("--second-expert", metavar="FILE", help="another one, best one that steered no training (default: none)")
    add("--real", required=True, metavar="DIR", help="dataset of monai-synth prepare classes that the models are of")
    add(
        "--models",
        required=True,
        nargs="+",
        type=_named_files,
        metavar="NAME=FILE[,FILE...]",
        help="arms to compare: files of trained models of bundles fad or cfg_ddpm, or folders with model.pt; several "
        "files are several trainings of the arm, compared in the order in which they are given",
    )
    add("--out", required=True, metavar="OUT", help="folder to write; results.json, results.csv, report.html go there")
    add("--baseline", metavar="NAME", help="arm that the others are compared with (default: the first)")
    for option, default, text in (
        ("--seeds", 15, "repetitions with other noise; 1 to 4000"),
        ("--per-class", 10, "images of each class for each seed; 2 to 1000, with --mean-filter to 50"),
    ):
        add(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    names = {"nargs": "+", "default": (), "metavar": "CLASS"}
    add(
        "--exclude",
        **names,
        help="classes that are neither sampled nor answers; the text leaves out empty (default: none)",
    )
    add(
        "--only",
        **names,
        help="sample these classes only, the others stay answers; for DreamBooth its class (default: all)",
    )
    add(
        "--mean-filter",
        action="store_true",
        help="draw images again, at most 19 times, whose mean is more than 0.1 below that of the real ones of their "
        "class, as the text's code does and the text does not say (default: keep all)",
    )
    add("--sampler", default="dpm++", help="dpm++, ddim, unipc, or ddpm as in the text (default: %(default)s)")
    add("--num-steps", type=int, metavar="N", help="calls of the network; 1 or more (default: 20; ddpm: all)")
    add(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="of classifier-free guidance, for models that learned without class; 0 or more, 1 is none (default: 1)",
    )
    add("--batch-size", type=int, metavar="N", help="images at once; 1 or more (default: 64; 256 on a GPU)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU where there is one)")
    add(
        "--bootstrap",
        dest="num_bootstrap",
        type=int,
        default=2000,
        metavar="N",
        help="resamplings for the intervals; 1 or more (default: %(default)s)",
    )
    add("--show-real", action="store_true", help="put real training images into the page (default: none)")


def _add_classifier(classifier: argparse.ArgumentParser) -> None:
    classifier.set_defaults(call=_experiment_classifier)
    add = classifier.add_argument
    add("--real", required=True, metavar="DIR", help="dataset of monai-synth prepare classes, with all three splits")
    add("--synthetic", required=True, metavar="DIR", help="folder that the sampling of bundle cfg_ddpm wrote")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="folder to write; results.json, results.csv, report.html go there",
    )
    add(
        "--preset",
        choices=("paper", "demo"),
        help="paper: the text's values (20 epochs); demo: rows 1 and 3, a short check that all parts work, no result "
        "(default: paper)",
    )
    add(
        "--seeds",
        type=int,
        metavar="N",
        help="repetitions with other initial weights, order, augmentation and subsets; 1 or more (default: 5; demo: 1)",
    )
    add(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these rows and those that they start from; numbers of Table 2, or names of further rows such as "
        "mix50-real10-geo (default: all; demo: 1 3)",
    )
    percents = {"type": int, "nargs": "+", "metavar": "N"}
    add("--fractions", **percents, help="percents of the real training images; 1 to 100 (default: 100 10)")
    add(
        "--mix",
        **percents,
        help="further rows that train on real images and so many synthetic ones together, in percent of the real ones; "
        "1 to 10000 (default: none)",
    )
    add(
        "--oversample",
        action="store_true",
        help="further rows: synthetic images fill up the rarer classes (default: none)",
    )
    add(
        "--control",
        action="store_true",
        help="further rows: real images for as many steps as the synthetic pretraining takes, then as the others "
        "(default: none)",
    )
    add(
        "--backbone",
        metavar="NAME",
        help="resnet18, 50, densenet121, efficientnet-b0, vit_ti_16, ... (default: resnet18)",
    )
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (default: train from scratch)")
    for option, kind, text in (
        ("--epochs", int, "of every training; 1 or more (default: 20; demo: 8)"),
        ("--batch-size", int, "images per step; 2 or more (default: 32)"),
        ("--lr", float, "initial rate; more than 0 (default: 0.001; demo: 0.003)"),
    ):
        add(option, type=kind, metavar="N" if kind is int else "F", help=text)
    add(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="resize all images; pixels, each 8 or more (default: keep the size)",
    )
    add(
        "--select-on",
        choices=("real", "synthetic"),
        help="validation images by which synthetic only chooses its epoch: real ones, as the text's code does, or a "
        "held out tenth of the synthetic ones (default: real)",
    )
    add(
        "--geo",
        choices=("paper", "seed-code"),
        help="geometric augmentation of the text, or of its code, which also cuts out parts of real images at random "
        "(default: paper)",
    )
    add(
        "--positive",
        metavar="CLASS",
        help="also give precision, recall and F1 of this class (default: the last one where there are two)",
    )
    add("--device", choices=("cpu", "cuda"), help="where to train (default: a GPU where there is one)")
    add("--workers", type=int, metavar="N", help="processes; 1 or more (default: one per CPU core; one for a GPU)")
    add(
        "--bootstrap",
        dest="num_bootstrap",
        type=int,
        metavar="N",
        help="resamplings for the intervals; 1 or more (default: 2000)",
    )
    add("--show-real", action="store_true", help="put real test images into the report (default: none)")


class _Named(argparse.Action):
    """Collects NAME=DIR."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        name, folder = values
        collected = dict(getattr(namespace, self.dest) or {})
        if name in collected:
            parser.error(f"{option_string} {name} is given twice")
        setattr(namespace, self.dest, {**collected, name: folder})


class _ImageSize(argparse.Action):
    """Turns "native" into an empty size."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        if 0 in values and len(values) > 1:
            parser.error(f"{option_string} takes whole numbers, or the word native")
        setattr(namespace, self.dest, tuple(value for value in values if value))


def _named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder or not name.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with letters, digits, '-' and '_' in NAME")
    return name, folder


def _named_files(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, files = text.partition("=")
    if not name or not all(files.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE or NAME=FILE,FILE")
    return name, tuple(files.split(","))


def _image_size(text: str) -> int:
    if text == "native":
        return 0
    if not text.isdecimal() or int(text) < 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 8, nor native")
    return int(text)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 100,250") from None


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", dest="num_workers", type=int, metavar="N", help="processes; 1 or more (default: one per CPU core)"
    )


if __name__ == "__main__":
    sys.exit(main())
