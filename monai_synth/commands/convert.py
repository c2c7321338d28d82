# SPDX-License-Identifier: Apache-2.0
"""The verb ``convert``: its options, and the call that they become."""

from __future__ import annotations

import argparse

from monai_synth.commands.shared import say, settings_of


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.description = (
        "Turn a checkpoint of monai-generative or of a bundle of MONAI (AutoencoderKL, DiffusionModelUNet, "
        "SPADEDiffusionModelUNet, ControlNet) into a trained file of this package. Both libraries are run on the same "
        "input and the largest difference is printed; where weights do not fit or outputs differ nothing is written."
    )
    parser.set_defaults(call=_convert)
    add = parser.add_argument
    add("source", metavar="SRC", help="checkpoint: a state dict, or a dictionary that holds one")
    add("--network", required=True, metavar="FILE", help="JSON or YAML that describes the network: _target_ and its "
        "arguments, or the configuration of the bundle that trained it")  # fmt: skip
    add("--out", required=True, metavar="OUT", help="file to write: autoencoder.pt for an autoencoder, else model.pt, "
        "in the folder that the bundle gets as --ckpt_dir")  # fmt: skip
    add("--network-id", metavar="ID", help="the network's id in FILE, autoencoder_def say (default: the only one)")
    add("--schedule", metavar="FILE2", help="JSON or YAML with the noise scheduler (default: that of --network)")
    add("--schedule-id", metavar="ID", help="the scheduler's id in FILE2 (default: the only one)")
    add("--key", metavar="KEY", help="where in SRC the weights are, a.b for one dictionary in another (default: the "
        "only place)")  # fmt: skip
    add("--dataset", metavar="DIR", help="prepared dataset like that of the training; its task decides the bundle "
        "(default: none, for a ControlNet only)")  # fmt: skip
    add("--image-size", type=int, nargs="+", metavar="N", help="size of the training's images, along each axis; "
        "pixels, 1 or more (default: that of the dataset's images)")  # fmt: skip
    add("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values of the training's images; lsdm and "
        "cfg_ddpm: -1 to 1, jdm: 0 to 1 too (default: -1 1)")  # fmt: skip
    add("--scale-factor", type=float, metavar="F", help="factor on the latents of the training of a network for lsdm; "
        "more than 0 (default: none, it must be given there)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace OUT (default: keep it and stop)")


def _convert(arguments: argparse.Namespace) -> None:
    from monai_synth.convert import Settings, convert_checkpoint

    convert_checkpoint(settings_of(Settings, arguments), report=say)
