# SPDX-License-Identifier: Apache-2.0
"""``experiment lsdm``: its options, and the call that they become."""

from __future__ import annotations

import argparse

from monai_synth.commands.shared import add_results, named_folder, say, settings_of


def add_lsdm(experiments: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the experiment to ``monai-synth experiment``."""
    parser = experiments.add_parser(
        "lsdm",
        help="lung CT slices from label maps: SPADE, LDM, LSDM and classifier guidance compared",
        description="Every model makes an image of each held-out slice with a nodule, all from the same noise, the "
        "latent diffusion model also under each classifier's guidance. Tables 5.1 and 5.2 of the lung CT text, "
        "sweeps of "
        "guidance scale and features, gradient pictures, reconstructions, comparisons. The same command resumes a "
        "stopped experiment; more seeds and models go into the same folder.",
    )
    parser.set_defaults(call=_experiment_lsdm)
    add = parser.add_argument
    add("--dataset", required=True, metavar="DIR", help="dataset of monai-synth prepare lidc, with a test split")
    add(
        "--models",
        required=True,
        nargs="+",
        type=named_folder,
        metavar="NAME=PATH",
        help="models of bundles lsdm and spade_gan: a file, or a folder with model.pt; autoencoder and classifiers are "
        "read from beside it",
    )
    add_results(parser)
    add(
        "--guidance",
        type=lambda text: tuple(text.split(",")),
        metavar="G,G,...",
        help="none, mali, lobu, spic, text, all (default: none, and each whose classifier is there)",
    )
    add("--guided", metavar="NAME", help="model that is guided (default: the last diffusion model with SPADE)")
    add("--scale", type=float, metavar="S", help="s of the guidance; more than 0 (default: 1)")
    add("--baseline", metavar="NAME", help="arm that the others are compared with (default: the first)")
    add("--seeds", type=int, metavar="N", help="images of each map from other noise; 1 to 4000 (default: 3)")
    add("--max-cases", type=int, metavar="N", help="take N slices, evenly spread; 2 or more (default: all)")
    add("--crop", type=int, metavar="N", help="side of a nodule crop, pixels; 11 or more (default: 64)")
    add("--inception", metavar="FILE", help="Inception weights for FID and KID (default: none)")
    add("--radimagenet", metavar="FILE", help="RadImageNet's ResNet50.pt, for its distances (default: none)")
    add("--extractor", metavar="FILE", help="classifier trained by this package, for its distances (default: none)")
    add("--lpips", metavar="FILE", help="torchvision's AlexNet or VGG16 weights for LPIPS (default: none)")
    add("--allow-unknown-weights", action="store_true", help="take weights with another hash (default: refuse)")
    add("--sampler", help="dpm++, ddim, unipc or ddpm (default: dpm++)")
    add("--num-steps", type=int, metavar="N", help="calls of the network for an image; 1 or more (default: 20)")
    add("--sweep-cases", type=int, metavar="N", help="slices of the sweeps; 0 or more, 0 is none (default: 2)")
    add(
        "--sweep-scales",
        type=float,
        nargs="+",
        metavar="S",
        help="s of the scale sweep; each more than 0 (default: 0.5 1 2 4 8 16 32)",
    )
    add("--gradient-cases", type=int, metavar="N", help="slices of the gradients; 0 or more (default: 16)")
    add(
        "--gradient-times",
        type=float,
        nargs="+",
        metavar="T",
        help="timesteps of the gradients as shares of the schedule; 0 to below 1 (default: 0.05 0.2 0.5 0.8)",
    )
    add(
        "--convergence-steps",
        type=int,
        metavar="N",
        help="train a classifier of each of the nine nodule features for N steps; 0 or more, 0 is none (default: 0)",
    )
    add("--show-real", action="store_true", help="put real slices into the page (default: none)")
    add("--mlflow", metavar="URI", help="also log results there (default: MLFLOW_TRACKING_URI, if it is set)")
    add("--batch-size", type=int, metavar="N", help="images at once; 1 or more (default: 8; 16 on a GPU)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU where there is one)")


def _experiment_lsdm(arguments: argparse.Namespace) -> None:
    from monai_synth.experiments.lsdm import Settings, run_experiment

    run_experiment(settings_of(Settings, arguments), report=say)
