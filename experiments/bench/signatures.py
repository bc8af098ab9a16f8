"""The arguments of a function or class, read in its source: importing it may take seconds."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path


def arguments(target: str) -> list[str] | None:
    """What a function or class takes, by its full name; None if it takes any, or if its source does not say.

    `**unknown: Never` takes none: it is there to tell the cure.
    """
    found = _definition(target)
    if found is None:
        return None
    node, module = found
    return _fields(node, module) if isinstance(node, ast.ClassDef) else _named(node.args)


def _definition(target: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """Where a name is defined, and the module: names that a module imports are followed."""
    module, _, name = target.rpartition(".")
    source = _source(module)
    for node in ast.walk(ast.parse(source.read_text("utf-8"))) if source else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name and node.col_offset == 0:
            return node, module
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _definition(f"{node.module}.{alias.name}")
    return None


def _source(module: str) -> Path | None:
    """The file of a module. Packages around it are not imported, as `find_spec` would do with those of a full name."""
    package, *parts = module.split(".")
    spec = find_spec(package) if package else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if spec and spec.origin and not parts:
        return Path(spec.origin) if spec.origin.endswith(".py") else None
    files = (path for folder in folders for path in (Path(folder, *parts[:-1], f"{parts[-1]}.py"),
                                                      Path(folder, *parts, "__init__.py")))  # fmt: skip
    return next((path for path in files if path.is_file()), None)


def _fields(node: ast.ClassDef, module: str) -> list[str] | None:
    """The arguments of a class: those of its `__init__`; without one, those of its first base and its own fields."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            named = _named(part.args)
            return None if named is None else named[1:]
    bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("ABC", "NamedTuple")]
    inherited = arguments(f"{module}.{bases[0]}") if bases else []
    own = (
        part for part in node.body if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation)
    )
    is_data = "NamedTuple" in map(ast.unparse, node.bases) or "dataclass" in " ".join(
        map(ast.unparse, node.decorator_list)
    )
    return None if inherited is None else [*inherited, *(ast.unparse(part.target) for part in own if is_data)]


def _named(args: ast.arguments) -> list[str] | None:
    if args.vararg or (args.kwarg and ast.unparse(args.kwarg.annotation or args.kwarg) != "Never"):
        return None
    return [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
