# SPDX-License-Identifier: Apache-2.0
"""The verb ``package``: its options, and the call that they become."""

from __future__ import annotations

import argparse

from monai_synth.commands.shared import options_of, say


def add_package(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a bundle with its weights and the code that it needs as a folder and a zip, which run training and "
        "inference where monai_synth is not installed, and check both as MONAI's model zoo does."
    )
    parser.set_defaults(call=_package)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="name of a bundle, e.g. jdm, or its folder")
    add("--ckpt-dir", required=True, metavar="DIR", help="folder with its trained files, model.pt among them")
    add("--out", required=True, metavar="OUT", help="folder to write to; new or empty")
    add("--model-file", default="model.pt", metavar="NAME", help="trained file in --ckpt-dir that the packaged bundle "
        "loads and samples, as models/model.pt, e.g. model_rflow.pt (default: model.pt)")  # fmt: skip
    add(
        "--depend",
        action="store_true",
        help="pin monai_synth as a dependency (default: copy the modules that the bundle needs into it)",
    )
    add("--version", metavar="X.Y.Z", help="of the packaged bundle (default: that of its metadata)")
    add("--change", metavar="TEXT", help="what is new in --version, for the changelog (default: it is there already)")
    add("--weights-url", metavar="URL", help="folder where weights above 25 MB will lie (default: left empty)")
    add("--dataset-dir", metavar="DIR", help="dataset for checking training and sampling (default: the phantom)")


def _package(arguments: argparse.Namespace) -> None:
    from monai_synth.package import package_bundle

    package_bundle(**options_of(package_bundle, arguments), report=say)
