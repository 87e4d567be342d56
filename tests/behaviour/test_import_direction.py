"""Rules on imports, checked in the source of every module.

Imports between packages go one way, in the order of ``ORDER``. Inside a package there are no cycles. Both rules apply
to every import: at the top of a module, inside a function, or under TYPE_CHECKING. The rules on start-up time (no
torch, no EMA classes in the worker) ignore imports under TYPE_CHECKING, because they never run.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

PACKAGE = "nitrous_ema"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

ORDER = (
    ("_version", "errors"),
    ("_base",),
    ("profile",),
    ("posthoc",),
    ("snapshots",),
    ("synthesis",),
    ("averaging",),
    ("async_", "search"),
    ("cli", "integrations", "compat"),
    ("__main__",),
)
"""A package imports from packages in earlier lines only; packages in one line do not import each other."""

LAZY = ("", "async_")
"""Packages whose names are looked up when they are first used. Only users and the command line import from them."""
MAY_USE_THE_LIBRARY = ("cli", "integrations", "compat", "__main__")

WITHOUT_TORCH = ("_version", "errors", "_base", "profile", "posthoc", "snapshots", "synthesis", "search", "cli")
"""Packages whose modules do not import torch when they are loaded, except for ``NEEDS_TORCH``."""
NEEDS_TORCH = ("_base.torch_dtypes", "cli.demo")
"""Modules of these packages that import torch. No other module of these packages loads them."""
NEVER_TORCH = ("errors", "_version", "profile", "posthoc", "search")
"""Packages that do not import torch inside a function either."""
WORKER = "async_.synthesize_worker"


@dataclass(frozen=True)
class Import:
    importer: str  # relative to the package, "" for its __init__
    target: str  # absolute
    names: tuple[str, ...]  # names in `from target import names`, except for modules
    line: int
    when: Literal["load", "call", "types"]

    @property
    def ours(self) -> str | None:
        """Return the imported module, relative to the package; None for a module of another library."""
        if self.target == PACKAGE:
            return ""
        return self.target.removeprefix(PACKAGE + ".") if self.target.startswith(PACKAGE + ".") else None

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}, line {self.line}, imports {self.target}"


@dataclass(frozen=True)
class House:
    """All modules of a package, by their names relative to it, and their imports."""

    modules: tuple[str, ...]
    imports: tuple[Import, ...]

    @classmethod
    def read(cls, root: Path) -> House:
        files = {_module_name(root, file): file for file in sorted(root.rglob("*.py"))}
        imports = [found for name, file in files.items() for found in _imports(name, file, set(files))]
        return cls(tuple(files), tuple(imports))

    def reached_from(self, module: str, *, when: tuple[str, ...]) -> set[str]:
        """Return all modules that are loaded with ``module``: ours by absolute name, others by top-level name."""
        edges: dict[str, set[str]] = {_absolute(name): set() for name in self.modules}
        for name in self.modules:
            if name:
                edges[_absolute(name)].add(_absolute(name.rpartition(".")[0]))  # its package is loaded first
        for found in self.imports:
            # A lazy package's imports inside functions run on demand, not when the package is loaded.
            if found.when in (("load",) if found.importer in LAZY else when):
                edges[_absolute(found.importer)].add(found.target.split(".")[0] if found.ours is None else found.target)
        reached, waiting = set(), [_absolute(module)]
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting.extend(edges.get(name, ()))
        return reached


def _absolute(name: str) -> str:
    return f"{PACKAGE}.{name}" if name else PACKAGE


def _package(module: str) -> str:
    return module.split(".")[0]


def _module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(importer: str, file: Path, known: set[str]) -> Iterator[Import]:
    absolute = _absolute(importer)
    folder = absolute if file.name == "__init__.py" else absolute.rpartition(".")[0]
    modules = set(map(_absolute, known))
    for node, when in _statements(ast.parse(file.read_text()).body, "load"):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, (), node.lineno, when)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder.split(".")[: len(folder.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = [alias.name for alias in node.names]
            for name in names:
                if f"{source}.{name}" in modules:
                    yield Import(importer, f"{source}.{name}", (), node.lineno, when)
            values = tuple(name for name in names if f"{source}.{name}" not in modules)
            if values:
                yield Import(importer, source, values, node.lineno, when)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            for name in node.args[:1]:
                if isinstance(name, ast.Constant):
                    yield Import(importer, str(name.value), (), node.lineno, when)


def _statements(nodes: list[ast.AST], when: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield every node below ``nodes``, with the time at which it runs: load, call, or types."""
    for node in nodes:
        yield node, when
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _statements(node.body, "types")
            yield from _statements(node.orelse, when)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and when == "load":
            yield from _statements(list(ast.iter_child_nodes(node)), "call")
        else:
            yield from _statements(list(ast.iter_child_nodes(node)), when)


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", None) == "TYPE_CHECKING" or getattr(test, "attr", None) == "TYPE_CHECKING"


def _called(call: ast.Call) -> str | None:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", None)


def direction_faults(house: House) -> list[str]:
    """Return imports between packages against ``ORDER``, and packages that ``ORDER`` does not list."""
    height = {package: line for line, packages in enumerate(ORDER) for package in packages}
    faults = [
        f"{name}: give its package a place in ORDER" for name in house.modules if name and _package(name) not in height
    ]
    for found in house.imports:
        if found.importer in LAZY or not found.ours or _package(found.ours) == _package(found.importer):
            continue
        if height.get(_package(found.ours), 0) >= height.get(_package(found.importer), len(ORDER)):
            faults.append(f"{found}, which does not stand before it in ORDER")
    return faults


def cycle_faults(house: House) -> list[str]:
    """Return cycles of imports between modules of one package."""
    graph: dict[str, set[str]] = {name: set() for name in house.modules}
    for found in house.imports:
        same_package = found.ours and _package(found.ours) == _package(found.importer)
        if same_package and found.ours != found.importer and found.importer not in LAZY:
            graph[found.importer].add(found.ours)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"these modules import each other: {' -> '.join(error.args[1])}"]
    return []


def lazy_package_faults(house: House) -> list[str]:
    """Return imports that a lazy package makes when it is loaded, and imports from lazy packages by our own modules."""
    faults = [
        f"{found} when it is loaded: look it up when it is first used"
        for found in house.imports
        if found.importer in LAZY
        and found.when == "load"
        and (found.target == "torch" or (found.ours is not None and found.ours != "_version"))
    ]
    faults += [
        f"{found}: import {', '.join(found.names) or 'it'} from the module that defines it"
        for found in house.imports
        if found.ours in LAZY and found.importer not in LAZY and _package(found.importer) not in MAY_USE_THE_LIBRARY
    ]
    return faults


def cost_faults(house: House) -> list[str]:
    """Return modules that load libraries or modules they must work without."""
    light = [name for name in house.modules if _package(name) in WITHOUT_TORCH and name not in NEEDS_TORCH]
    faults = [
        f"{module} imports torch when it is loaded, itself or by what it imports"
        for module in (*light, WORKER)
        if "torch" in house.reached_from(module, when=("load",))
    ]
    faults += [
        f"{found}: it works without torch"
        for found in house.imports
        if _package(found.importer) in NEVER_TORCH and found.when == "call" and found.target.split(".")[0] == "torch"
    ]
    for name in house.reached_from(WORKER, when=("load", "call")):
        relative = name.removeprefix(PACKAGE + ".")
        if name.startswith(PACKAGE + ".") and (
            _package(relative) == "averaging" or (_package(relative) == "async_" and relative not in ("async_", WORKER))
        ):
            faults.append(f"{WORKER} imports {name}, itself or by what it imports")
    return faults


RULES = (direction_faults, cycle_faults, lazy_package_faults, cost_faults)


@pytest.fixture(scope="module")
def house() -> House:
    return House.read(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(house, rule):
    assert not rule(house)


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("profile", "from nitrous_ema.posthoc import solve_weights", direction_faults),
        ("profile", "def f():\n    from nitrous_ema import posthoc", direction_faults),
        ("profile", "def f():\n    from . import posthoc", direction_faults),
        ("profile", "if TYPE_CHECKING:\n    from .posthoc import solve_weights", direction_faults),
        ("profile", "import_module('nitrous_ema.averaging.ema')", direction_faults),
        ("search", "import nitrous_ema.async_.lanes", direction_faults),
        ("averaging/ema", "import nitrous_ema.async_.lanes", direction_faults),
        ("unlisted", "", direction_faults),
        ("snapshots/header", "from ..snapshots.store import SnapshotStore", cycle_faults),
        ("snapshots/header", "def f():\n    from .store import SnapshotStore", cycle_faults),
        ("averaging/ema", "from nitrous_ema import PostHocEMA", lazy_package_faults),
        ("averaging/ema", "import nitrous_ema", lazy_package_faults),
        ("async_/__init__", "from nitrous_ema.async_.lanes import Lane", lazy_package_faults),
        ("__init__", "try:\n    import torch\nexcept ImportError:\n    pass", lazy_package_faults),
        ("snapshots/store", "from nitrous_ema.averaging.tracking import names", cost_faults),
        ("posthoc", "def f():\n    import torch.nn", cost_faults),
        ("synthesis", "import torch", cost_faults),
        ("synthesis", "from nitrous_ema._base import torch_dtypes", cost_faults),
        ("async_/synthesize_worker", "def main():\n    import nitrous_ema.averaging.ema", cost_faults),
        ("async_/synthesize_worker", "def main():\n    import nitrous_ema.async_.lanes", cost_faults),
    ],
)
def test_a_fault_is_found(tmp_path, file, source, rule):
    root = _small_house(tmp_path)
    assert not [fault for each in RULES for fault in each(House.read(root))]
    with (root / f"{file}.py").open("a") as module:
        module.write("\n" + source)
    assert rule(House.read(root))


def test_an_import_for_type_checkers_costs_nothing(tmp_path):
    root = _small_house(tmp_path)
    (root / "posthoc.py").write_text("if typing.TYPE_CHECKING:\n    import torch\nelse:\n    import numpy")
    assert not cost_faults(House.read(root))


def _small_house(folder: Path) -> Path:
    sources = {
        "__init__": "from nitrous_ema._version import __version__\n"
        "if TYPE_CHECKING:\n    from nitrous_ema.averaging.ema import X",
        "_version": "",
        "_base/__init__": "",
        "_base/torch_dtypes": "import torch",
        "profile": "import numpy",
        "posthoc": "from nitrous_ema import profile",
        "snapshots/__init__": "",
        "snapshots/header": "",
        "snapshots/store": "from nitrous_ema.snapshots.header import Layout",
        "synthesis": "def f():\n    import torch",
        "averaging/__init__": "",
        "averaging/tracking": "import torch",
        "averaging/ema": "from nitrous_ema.averaging.tracking import names",
        "async_/__init__": "def __getattr__(name):\n    import_module('nitrous_ema.async_.lanes')",
        "async_/lanes": "import torch",
        "async_/synthesize_worker": "from nitrous_ema import synthesis",
        "search": "from nitrous_ema import synthesis",
    }
    for name, source in sources.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    return folder


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("nitrous_ema", ["torch", "numpy", "nitrous_ema.averaging"]),
        ("nitrous_ema.async_", ["torch", "nitrous_ema.async_.ema", "nitrous_ema.async_.synthesize_worker"]),
        ("nitrous_ema.posthoc", ["torch"]),
        ("nitrous_ema.snapshots.store", ["torch"]),
        ("nitrous_ema.cli", ["torch", "numpy"]),  # numpy reads the synthesis' thread limits once, when it is loaded
        ("nitrous_ema.cli.inspect", ["torch"]),
        ("nitrous_ema.cli.prune", ["torch"]),
        ("nitrous_ema.cli.plot", ["torch", "matplotlib"]),
        ("nitrous_ema.search.sweep", ["torch"]),
        ("nitrous_ema.synthesis", ["torch", "numpy"]),
        (
            "nitrous_ema.async_.synthesize_worker",
            ["torch", "numpy", "nitrous_ema.averaging", "nitrous_ema.async_.lanes"],
        ),
    ],
)
def test_importing_a_light_module_does_not_load(module, absent):
    program = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
