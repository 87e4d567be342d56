"""One module calls the file system for the folders of snapshots, outputs and results: ``snapshots.filesystem``.

So tests can record these calls or let any of them fail, and the calls that change something follow no links
(``snapshots.filesystem``, FILES-2). The rule is checked in the source, by the names of functions and methods.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nitrous_ema"
PACKAGES = ("snapshots", "synthesis", "search", "cli")
FILE_SYSTEM = "snapshots/filesystem.py"
ELSEWHERE = {
    ("search/table.py", "open"): "a table for other programs, at a path of the caller's own",
    ("search/step_search.py", "replace"): "of a result, which is no file",
    ("cli/demo.py", "exists"): "a folder that the demo makes for itself",
}
"""Calls that may stay, with the reason."""

MODULES = ("os", "os.path", "shutil", "tempfile", "fcntl")
PURE = frozenset(
    ("fspath", "fsencode", "fsdecode", "strerror", "getpid", "geteuid", "getcwd", "sched_getaffinity", "cpu_count")
)
PURE |= {"join", "basename", "dirname", "splitext", "isabs", "normpath", "samestat"}
"""Functions of ``os`` and ``os.path`` that look at no file of a folder."""
OTHERS = frozenset(("path", "PathLike", "environ", "stat_result", "get_terminal_size", "devnull"))
METHODS = frozenset(
    (
        *("chmod", "exists", "glob", "group", "hardlink_to", "is_dir", "is_file", "is_symlink"),
        *("iterdir", "lstat", "mkdir", "owner", "read_bytes", "read_text", "readlink", "rglob", "rmdir"),
        *("samefile", "stat", "symlink_to", "touch", "unlink", "write_bytes", "write_text"),
    )
)
"""Methods of ``Path`` that call the system. ``rename``, ``replace`` and ``open`` have other meanings as well."""


def bypasses(source: str) -> Iterator[tuple[str, int]]:
    """Yield name and line of each use of the file system that does not go through a ``FileSystem``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield f"from {node.module}", node.lineno
        elif isinstance(node, ast.Attribute) and (owner := ast.unparse(node.value)) in MODULES:
            # A function that is passed on is found as well as one that is called.
            if node.attr not in PURE | OTHERS and not (owner == "os" and node.attr.isupper()):
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and is_bypass(node):
            yield ast.unparse(node.func).rpartition(".")[2], node.lineno


def is_bypass(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        # open() with a descriptor makes a file object, and opens nothing.
        return call.func.id == "open" and not is_descriptor(call.args[0])
    if not isinstance(call.func, ast.Attribute):
        return False
    owner, name = ast.unparse(call.func.value), call.func.attr
    if owner in MODULES or owner.endswith(("files", "FileSystem()")):
        return False
    return name in METHODS or (name in ("rename", "replace") and len(call.args) == 1 and not call.keywords)


def is_descriptor(argument: ast.expr) -> bool:
    text = ast.unparse(argument)
    return "descriptor" in text or "open_read(" in text


def test_only_one_module_calls_the_file_system():
    found = [
        f"{file}, line {line}: {name}()"
        for package in PACKAGES
        for path in sorted((PACKAGE / package).rglob("*.py"))
        if (file := path.relative_to(PACKAGE).as_posix()) != FILE_SYSTEM
        for name, line in bypasses(path.read_text())
        if (file, name) not in ELSEWHERE
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "os.rename(a, b)",
        "os.open(path, 0)",
        "def f():\n    os.path.exists(path)",
        "path.unlink()",
        "self.path.parent.mkdir(exist_ok=True)",
        "path.replace(other)",
        "partial(shutil.rmtree, ignore_errors=True)",
        "from os import rename",
        "open(path)",
        "Path(name).read_text()",
    ],
)
def test_a_bypass_is_found(source):
    assert list(bypasses(source))


@pytest.mark.parametrize(
    "source",
    [
        "self._files.rename(a, b)",
        "FileSystem().exists(path)",
        "open(descriptor, 'rb')",
        "name.replace('a', 'b')",
        "replace(row, path=path)",
        "os.path.basename(name)",
        "os.fspath(path)",
    ],
)
def test_other_calls_are_allowed(source):
    assert not list(bypasses(source))
