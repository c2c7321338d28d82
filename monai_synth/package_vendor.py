# SPDX-License-Identifier: Apache-2.0
"""Code that goes into a packaged bundle: found by what its configs name, put under the bundle's own package name.

A config has no word for the folder it lies in, and its imports are done before any of its expressions. So a packaged
config finds its folder by the running workflow (``bundle_root``), adds it to Python's search path, and reaches each
module by an item of ``code``; components of the package require that path.
"""

from __future__ import annotations

import ast
import copy
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.errors import UserError

OWN = __name__.partition(".")[0]
_DOTTED = re.compile(rf"(?<![\w./-]){OWN}((?:\.[A-Za-z_]\w*)+)")
_IMPORT = re.compile(rf"\$import\s+({OWN}(?:\.\w+)*)(?:\s+as\s+(\w+))?\s*$")
_REFERENCE = re.compile(r"[@%][\w:#]+")

_NEEDED = ("inspect", "os", "pkgutil", "sys", "monai")
# The innermost running workflow knows its config's folder; without one (verification) the bundle is looked for.
_ROOT = (
    "$next((str(w.config_root_path.absolute().parent) for w in (s.frame.f_locals.get('self') for s in "
    "inspect.stack(0)) if isinstance(w, monai.bundle.ConfigWorkflow) and getattr(w, 'config_root_path', None)), "
    "next((os.path.abspath(p) for p in ('{name}', '.', 'models/{name}', 'bundles/{name}') "
    "if os.path.isfile(os.path.join(p, 'configs', 'metadata.json'))), os.getcwd()))"
)
_PATH = "$None if os.path.abspath(@bundle_root) in sys.path else sys.path.insert(0, os.path.abspath(@bundle_root))"


@dataclass
class Code:
    """Modules that a bundle needs.

    Attributes:
        modules: dotted name -> file; packages are named without ``__init__``.
        always: packages of others that are imported with a module.
        sometimes: those that a function imports when it needs them.
    """

    modules: dict[str, Path] = field(default_factory=dict)
    always: set[str] = field(default_factory=set)
    sometimes: set[str] = field(default_factory=set)


def module_file(name: str, root: Path) -> Path | None:
    """File of a module of this package; ``None`` where there is no such module."""
    parts = name.split(".")[1:]
    folder = root.joinpath(*parts)
    if (folder / "__init__.py").is_file():
        return folder / "__init__.py"
    return folder.with_suffix(".py") if parts and folder.with_suffix(".py").is_file() else None


def modules_named(text: str, root: Path) -> set[str]:
    """Modules of this package that a text names, by themselves or as the place of a class."""
    found = set()
    for match in _DOTTED.finditer(text):
        parts = match.group(0).split(".")
        while len(parts) > 1 and module_file(".".join(parts), root) is None:
            parts.pop()
        if len(parts) > 1:
            found.add(".".join(parts))
    return found


def needed_code(configs: Mapping[str, Any], root: Path) -> Code:
    """Follow the imports of what the configs name.

    Args:
        configs: contents of a bundle's configs, by file name.
        root: folder of this package.

    Raises:
        UserError: a config names nothing of this package.
    """
    waiting = {name for text in _texts(configs) for name in modules_named(text, root)}
    if not waiting:
        raise UserError(f"no config of the bundle names a module of {OWN}; give a bundle of this package")
    code = Code()
    while waiting:
        name = waiting.pop()
        path = module_file(name, root)
        if name in code.modules or path is None:
            continue
        code.modules[name] = path
        if "." in name:
            waiting.add(name.rpartition(".")[0])  # importing a module runs its package
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, late in _nodes(tree):
            for imported in _imported(node, name, is_package=path.name == "__init__.py"):
                top = imported.partition(".")[0]
                if top == OWN:
                    waiting.add(imported)
                elif top not in sys.stdlib_module_names:
                    (code.sometimes if late else code.always).add(top)
    code.modules = dict(sorted(code.modules.items()))
    code.sometimes -= code.always
    return code


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes of a module, each with whether a function or a condition decides that it runs."""
    waiting = [(tree, False)]
    while waiting:
        node, late = waiting.pop()
        yield node, late
        late = late or isinstance(node, ast.FunctionDef | ast.If)
        waiting += [(child, late) for child in ast.iter_child_nodes(node)]


def _imported(node: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a node may import; names of a module's content among them do no harm."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            up = module.split(".")
            up = up[: len(up) - node.level + is_package]
            base = ".".join([*up, base] if base else up)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
        yield node.value


def renamed_source(source: str, package: str, root: Path) -> str:
    """Source whose imports and names of modules lead to ``package``; everything else stays as it is."""
    lines = source.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(source).readline))):
        (row, begin), (last, end) = token.start, token.end
        kind = tokenize.tok_name[token.type]
        if kind == "NAME" and token.string == OWN:
            lines[row - 1] = lines[row - 1][:begin] + package + lines[row - 1][end:]
        elif kind in ("STRING", "FSTRING_MIDDLE") and OWN in token.string:
            for number in range(row - 1, last):
                low = begin if number == row - 1 else 0
                high = end if number == last - 1 else len(lines[number])
                line = lines[number]
                lines[number] = line[:low] + renamed_text(line[low:high], package, root) + line[high:]
    return "".join(lines)


def renamed_text(text: str, package: str, root: Path) -> str:
    """Text whose names of modules of this package lead to ``package``."""
    return _DOTTED.sub(lambda m: package + m.group(1) if modules_named(m.group(0), root) else m.group(0), text)


def write_code(code: Code, folder: Path, package: str, root: Path) -> None:
    """Write the modules below ``folder/package``."""
    for name, path in code.modules.items():
        target = folder.joinpath(package, *name.split(".")[1:])
        target = target / "__init__.py" if path.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed_source(path.read_text(encoding="utf-8"), package, root), encoding="utf-8")


# Configs


def renamed_configs(configs: Mapping[str, Any], name: str, package: str, root: Path) -> dict[str, Any]:
    """Configs that reach the modules in their own folder.

    Args:
        configs: contents by file name; those without ``imports`` are overlays of the others.
        name: the bundle's name.
        package: name of the vendored package.
        root: folder of this package.

    Raises:
        UserError: an overlay uses a name that stands for different modules in different configs.
    """
    aliases = {file: _aliases(content) for file, content in configs.items()}
    shared: dict[str, set[str]] = {}
    for own in aliases.values():
        for alias, module in own.items():
            shared.setdefault(alias, set()).add(module)
    made = {}
    for file, content in configs.items():
        content = copy.deepcopy(content)
        known = aliases[file] or shared
        if aliases[file]:
            content = _with_code(content, aliases[file], name, package)
        content = _renamed(content, known, package, root)
        used = {a for text in _texts(content) for a in re.findall(r"@code::(\w+)", text)} - {"path"}
        unclear = sorted(a for a in used if len(shared[a]) > 1) if not aliases[file] else []
        if unclear:
            raise UserError(
                f"{file} uses {unclear[0]!r}, which is {' or '.join(shared[unclear[0]])}; rename one of them"
            )
        made[file] = content
    return made


def _aliases(content: Mapping[str, Any]) -> dict[str, str]:
    found = [_IMPORT.match(text) for text in content.get("imports", [])]
    return {m.group(2): m.group(1) for m in found if m is not None and m.group(2)}


def _with_code(content: dict[str, Any], aliases: Mapping[str, str], name: str, package: str) -> dict[str, Any]:
    """Content with the folder's place and its modules in front."""
    kept = [text for text in content.pop("imports") if not _IMPORT.match(text)]
    needed = [f"$import {m}" for m in _NEEDED]
    modules = {
        # "import" in an expression with a reference would be taken for a statement
        alias: f"$@code::path or pkgutil.resolve_name('{module.replace(OWN, package, 1)}')"
        for alias, module in aliases.items()
    }
    content.pop("bundle_root", None)
    return {
        "imports": kept + [text for text in needed if text not in kept],
        "bundle_root": _ROOT.format(name=name),
        "code": {"path": _PATH, **modules},
        **content,
    }


def _renamed(value: Any, aliases: Iterable[str], package: str, root: Path) -> Any:
    if isinstance(value, dict):
        made = {key: _renamed(item, aliases, package, root) for key, item in value.items()}
        target = value.get("_target_")
        if isinstance(target, str) and modules_named(target, root):
            made["_requires_"] = "@code::path"
        return made
    if isinstance(value, list):
        return [_renamed(item, aliases, package, root) for item in value]
    if not isinstance(value, str):
        return value
    return renamed_text(_reached(value, set(aliases)) if value.startswith("$") else value, package, root)


def _reached(expression: str, aliases: set[str]) -> str:
    """Expression in which free names of modules are references to items of ``code``."""
    text = expression[1:]
    try:
        # references become names of the same length, so that places stay
        tree = ast.parse(_REFERENCE.sub(lambda m: "_" * len(m.group(0)), text).encode("ascii", "replace"), mode="eval")
    except SyntaxError:
        return expression
    places = [n.col_offset for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in aliases]
    for place in sorted(places, reverse=True):
        text = f"{text[:place]}@code::{text[place:]}"
    return f"${text}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def read_configs(folder: Path) -> dict[str, Any]:
    """The configs of a bundle by file name, without its metadata."""
    paths = sorted(p for p in folder.glob("*.json") if p.name != "metadata.json")
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
