# SPDX-License-Identifier: Apache-2.0
"""The verb ``label-app``: its options, and the call that it becomes."""

from __future__ import annotations

import argparse

from monai_synth.commands.shared import say


def add_label_app(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a folder from which MONAI Label serves bundles: images for maps and masks, pairs, batches, a queue of "
        "synthetic cases for review, and training from annotated cases. Its README.md says which environment it needs."
    )
    parser.set_defaults(call=_label_app)
    parser.add_argument("out", metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace main.py, requirements.txt and README.md in DIR (default: keep what is there and stop)",
    )


def _label_app(arguments: argparse.Namespace) -> None:
    from monai_synth.label.folder import write_label_app

    folder = write_label_app(arguments.out, overwrite=arguments.overwrite)
    say(f"wrote {folder}; start it with:")
    say(f"monailabel start_server --app {folder} --studies STUDIES --host 127.0.0.1 --conf bundles lsdm,jdm")
