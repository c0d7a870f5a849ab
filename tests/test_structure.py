"""The structure of the repository: direction of imports, maps of the folders, length and dialect of files, doctests.

Nothing is imported but the modules that have doctests: the tests read the source.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "simpo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(
    path for folder in ("simpo_megatron", "tools", "examples", "tests") for path in (ROOT / folder).rglob("*.py")
)

# The floors of the package, ground floor first. A module imports from lower floors and from its own folder alone.
FLOORS = (
    ("errors",),
    ("settings", "files", "disk"),
    ("program", "compat", "cpu"),
    ("parallel", "objectives"),
    ("data", "head"),
    ("config", "models"),
    ("batch", "metrics", "diagnose"),
    ("checkpoint", "step", "planning"),
    ("trainer",),
    ("verify", "dry_run", "megatron_lm", "on_policy"),
    ("train", "self_test"),
)
# What can be imported where a package is absent: the modules, and the packages that nothing they import may import.
WITHOUT = {
    "models.architecture": ("torch", "megatron"),
    "models.families.registry": ("torch", "megatron"),
    "models.hf_checkpoint": ("torch", "megatron"),
    "config.arguments": ("megatron",),
    "objectives": ("megatron",),
    "data": ("torch", "megatron"),
    "checkpoint.to_megatron": ("megatron",),
    "checkpoint.to_hf": ("megatron",),
    "checkpoint.verify": ("megatron",),
    "planning.layouts": ("torch", "megatron"),
    "diagnose": ("megatron",),
}
MOST_LINES = 320
LONGER: dict[str, int] = {}  # files with a limit of their own


def name_of(path: Path) -> str:
    """The path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """`head.layer` of simpo_megatron/head/layer.py, `head` of simpo_megatron/head/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in MODULES}


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    """The modules that a file imports, such as `torch` or `simpo_megatron.head.layer`; none for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("simpo_megatron.")
                yield f"simpo_megatron.{inner}" if inner in PATHS else node.module
        elif not _for_types_alone(node) and (inside_functions or not isinstance(node, ast.FunctionDef)):
            yield from _imports(node, inside_functions)


@cache
def own_imports(module: str, inside_functions: bool = True) -> frozenset[str]:
    """The modules of this package that a module imports, by `module_name`."""
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    names = {name.removeprefix("simpo_megatron.") for name in _imports(tree, inside_functions)}
    return frozenset(name for name in names if name in PATHS and name)


@cache
def other_imports(module: str) -> frozenset[str]:
    """The packages that importing a module imports, without those of this package's other modules."""
    names = _imports(ast.parse(PATHS[module].read_text(encoding="utf-8")), inside_functions=False)
    return frozenset(name.split(".")[0] for name in names)


def test_imports_point_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {name.split(".")[0] for name in PATHS if name}
    assert rooms == set(floor), "a folder or module of the top level has no floor, or a floor names one that is gone"
    upwards = [
        f"{module} imports {imported}"
        for module in PATHS
        if module
        for imported in own_imports(module)
        if module.split(".")[0] != imported.split(".")[0]
        and floor[module.split(".")[0]] <= floor[imported.split(".")[0]]
    ]
    assert not upwards


def test_no_circle_of_files() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in sorted(own_imports(module)):
                visit(imported, (*path, module))
            done.add(module)

    for module in PATHS:
        visit(module, ())


@pytest.mark.parametrize("module", WITHOUT)
def test_what_is_not_needed_is_not_imported(module: str) -> None:
    found, queue = {module}, [module]
    while queue:
        at = queue.pop()
        assert not other_imports(at) & set(WITHOUT[module]), f"{module} imports {at}"
        packages = {at.rpartition(".")[0]} - {""}  # importing a.b.c runs a.b too
        for imported in (own_imports(at, inside_functions=False) | packages) - found:
            found.add(imported)
            queue.append(imported)


def test_the_maps_of_the_folders_are_complete() -> None:
    faults = []
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        named = set(re.findall(r"(?<![\w/.])(\w+\.py|\w+/)(?!\w)", text))
        files = {file.name for file in path.parent.glob("*.py")} - {"__init__.py"}
        folders = {inner.parent.name + "/" for inner in path.parent.glob("*/__init__.py")}
        gone = {name for name in named if name.endswith(".py")} - files
        if missing := (files | folders) - named:
            faults.append(f"{name_of(path)} does not name {', '.join(sorted(missing))}")
        if gone:
            faults.append(f"{name_of(path)} names {', '.join(sorted(gone))}, which are not there")
    assert not faults


def test_the_top_level_has_a_dozen_modules_at_most() -> None:
    assert len(list(PACKAGE.glob("*.py"))) - 1 <= 12


def test_files_read_in_one_sitting() -> None:
    lengths = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in CODE}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGER.get(name, MOST_LINES)}
    assert not {name for name in LONGER if lengths[name] <= MOST_LINES}, "exceptions that are not needed any more"


def test_every_file_opens_alike() -> None:
    faults = []
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if text and not ast.get_docstring(tree):
            faults.append(f"{name_of(path)} does not say what it is")
        if tree.body[1:] and "from __future__ import annotations" not in text:
            faults.append(f"{name_of(path)} lacks `from __future__ import annotations`")
    assert not faults


def _last_text(node: ast.AST) -> str:
    """The end of a text or an f-string; empty where it ends in a value."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[-1]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_errors_are_sentences_without_a_full_stop() -> None:
    faults = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "require", "required")
            if is_error and node.args and _last_text(node.args[-1]).rstrip().endswith("."):
                faults.append(f"{name_of(path)}:{node.lineno}")
    assert not faults


WITH_DOCTESTS = [name for name, path in PATHS.items() if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", WITH_DOCTESTS)
def test_doctests(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"simpo_megatron.{module}"))
    assert results.attempted and not results.failed
