# SPDX-License-Identifier: Apache-2.0
"""The verb ``studio``: its options, and the call that they become."""

from __future__ import annotations

import argparse

from monai_synth.commands.shared import Named, named_folder, options_of, say


def add_studio(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a page on this machine for drawing label maps, sampling, downloading and training readers, with each "
        "bundle that has trained files. Needs the extra: pip install 'monai_synth[studio]'."
    )
    parser.set_defaults(call=_studio)
    add = parser.add_argument
    add("--bundles", default="bundles", metavar="DIR", help="folder of the bundles (default: bundles)")
    named = {"type": named_folder, "action": Named, "metavar": "NAME=DIR"}
    add("--ckpt-dir", **named, help="trained files of a bundle, e.g. lsdm=DIR (default: of its latest training)")
    add("--dataset-dir", **named, help="prepared dataset of a bundle (default: of its latest training)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=7860, metavar="N", help="port to listen at; 0 takes a free one (default: 7860)")
    add("--work-dir", metavar="DIR", help="folder for uploads and results (default: a temporary one)")
    add("--device", choices=("cpu", "cuda"), help="where to sample (default: a GPU where there is one)")


def _studio(arguments: argparse.Namespace) -> None:
    from monai_synth.studio.server import serve

    serve(**options_of(serve, arguments), report=say)
