# SPDX-License-Identifier: Apache-2.0
"""The verb ``experiment``: its protocols, their options, and the calls that they become."""

from __future__ import annotations

import argparse
import sys

from monai_synth.commands.experiment_lsdm import add_lsdm
from monai_synth.commands.shared import (
    ImageSize,
    Named,
    add_results,
    image_size,
    named_files,
    named_folder,
    say,
    settings_of,
    whole_numbers,
)


def add_experiment(parser: argparse.ArgumentParser) -> None:
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
    add_results(nnunet)
    add(
        "--ratios",
        type=whole_numbers,
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
        type=named_folder,
        action=Named,
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
    add("--fold-list", type=whole_numbers, metavar="N,N,...", help="run these folds only; from 0 (default: all)")
    add(
        "--seeds",
        dest="num_seeds",
        type=int,
        metavar="N",
        help="repetitions with other initial weights and data order; 1 or more (default: 1)",
    )
    add(
        "--image-size",
        type=image_size,
        nargs="+",
        action=ImageSize,
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
    add_lsdm(experiments)


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
        type=named_files,
        metavar="NAME=FILE[,FILE...]",
        help="arms to compare: files of trained models of bundles fad or cfg_ddpm, or folders with model.pt; several "
        "files are several trainings of the arm, compared in the order in which they are given",
    )
    add_results(expert)
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
    add_results(classifier)
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


def _experiment_nnunet(arguments: argparse.Namespace) -> int:
    from monai_synth.experiments.nnunet import Settings, run_experiment

    outcome = run_experiment(settings_of(Settings, arguments), report=say)
    if outcome.failed or outcome.skipped:
        names = ", ".join(outcome.failed)
        text = f"{len(outcome.failed)} jobs failed ({names}), {len(outcome.skipped)} that need them were skipped"
        print(f"monai-synth: {text}; the others are done, run the command again to try these", file=sys.stderr)
        return 1
    return 0


def _experiment_classifier(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.classifier import Settings, run_experiment

    run_experiment(settings_of(Settings, arguments), report=say)


def _experiment_expert(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.expert import Settings, run_experiment

    run_experiment(settings_of(Settings, arguments), report=say)


def _experiment_alignment(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.alignment import Settings, run_experiment

    run_experiment(settings_of(Settings, arguments), report=say)
