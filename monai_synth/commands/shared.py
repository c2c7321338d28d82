# SPDX-License-Identifier: Apache-2.0
"""What options of several verbs share: types of arguments, and settings from arguments."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any


def settings_of(kind: type, arguments: argparse.Namespace) -> Any:
    """An experiment's settings: what was given under their names, and their own defaults."""
    given = {name: getattr(arguments, name, None) for name in kind.__dataclass_fields__}
    return kind(**{name: value for name, value in given.items() if value is not None})


def options_of(call: Callable[..., Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of a function's own arguments."""
    return {name: getattr(arguments, name) for name in inspect.signature(call).parameters if hasattr(arguments, name)}


def say(text: str) -> None:
    print(text, flush=True)


def add_results(parser: argparse.ArgumentParser) -> None:
    """The option ``--out`` of experiments."""
    text = "folder to write; results.json, results.csv, report.html go there"
    parser.add_argument("--out", required=True, metavar="OUT", help=text)


class Named(argparse.Action):
    """Collects NAME=DIR."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        name, folder = values
        collected = dict(getattr(namespace, self.dest) or {})
        if name in collected:
            parser.error(f"{option_string} {name} is given twice")
        setattr(namespace, self.dest, {**collected, name: folder})


class ImageSize(argparse.Action):
    """Turns "native" into an empty size."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        if 0 in values and len(values) > 1:
            parser.error(f"{option_string} takes whole numbers, or the word native")
        setattr(namespace, self.dest, tuple(value for value in values if value))


def named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder or not name.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with letters, digits, '-' and '_' in NAME")
    return name, folder


def named_files(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, files = text.partition("=")
    if not name or not all(files.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE or NAME=FILE,FILE")
    return name, tuple(files.split(","))


def image_size(text: str) -> int:
    if text == "native":
        return 0
    if not text.isdecimal() or int(text) < 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 8, nor native")
    return int(text)


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 100,250") from None


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", dest="num_workers", type=int, metavar="N", help="processes; 1 or more (default: one per CPU core)"
    )
