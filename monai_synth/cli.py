# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-synth``: one call per verb; training and sampling are ``python -m monai.bundle run``.

Nothing heavy is imported before a verb needs it, so that help comes at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from monai_synth import __version__
from monai_synth.commands.convert import add_convert
from monai_synth.commands.evaluate import add_evaluate
from monai_synth.commands.experiment import add_experiment
from monai_synth.commands.label_app import add_label_app
from monai_synth.commands.package import add_package
from monai_synth.commands.prepare import add_prepare
from monai_synth.commands.studio import add_studio
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="monai-synth",
        description="Prepare data for the bundles of monai_synth and judge what they generate.",
        epilog="Train and sample with: python -m monai.bundle run --config_file bundles/lsdm/configs/...",
    )
    parser.add_argument("--version", action="version", version=f"monai-synth {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add_prepare(verbs.add_parser("prepare", help="turn a source into a dataset that the bundles train on"))
    add_evaluate(verbs.add_parser("evaluate", help="judge generated images"))
    add_experiment(verbs.add_parser("experiment", help="find out whether synthetic data help"))
    add_package(verbs.add_parser("package", help="make a bundle that runs without monai_synth"))
    add_convert(verbs.add_parser("convert", help="take checkpoints of monai-generative and of MONAI's bundles"))
    add_label_app(verbs.add_parser("label-app", help="serve bundles to viewers through MONAI Label"))
    add_studio(verbs.add_parser("studio", help="serve a local page for drawing maps, sampling and training readers"))
    return parser
