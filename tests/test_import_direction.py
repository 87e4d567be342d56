"""Who may import whom, read from the source of every module of the package.

A module may import only what stands above it in LAYERS, wherever in the module the import stands: at its top, inside a
function or under TYPE_CHECKING. The rules on what start-up costs (no torch, lazy ``__init__``) do not look at
TYPE_CHECKING: such an import never runs. ``from nitrous_ema import ...`` is for those who use the library as its users
do (and for ``__version__``); everybody else imports a name from the module that defines it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

PACKAGE = "nitrous_ema"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# Lowest first. A new module gets its line here; one that is planned may have it already. A package that re-exports its
# own modules stands above them (below, in this list), the two lazy ones nowhere.
LAZY = ("", "async_")
LAYERS = (
    "errors",
    "exits",
    "given",
    "dtypes",
    "processes",
    "sizes",
    "resources",
    "profile",
    "posthoc.intervals",
    "posthoc.interval_cost",
    "posthoc.least_squares",
    "posthoc.amplification",
    "posthoc.report",
    "posthoc.coverage",
    "posthoc.kept_paths",
    "posthoc.path_search",
    "posthoc.selection",
    "posthoc.mixed_steps",
    "posthoc.keep_rules",
    "posthoc.retention",
    "posthoc",
    "snapshots.bounded_json",
    "snapshots.format",
    "snapshots.torch_files",
    "snapshots.safetensors_header",
    "snapshots.files",
    "snapshots.snapshot",
    "snapshots.commit",
    "snapshots.retire",
    "snapshots.examine",
    "snapshots.store",
    "snapshots.legacy",
    "snapshots",
    "trackable",
    "tracked",
    "live",
    "guard",
    "arena",
    "chunks",
    "foreach",
    "copies",
    "step",
    "fused_kernel",
    "fused_step",
    "copy_step",
    "schedule",
    "history",
    "stats",
    "room",
    "keeping",
    "pipeline",
    "following",
    "host_memory",
    "offload",
    "dispatch",
    "ending",
    "averager",
    "averaged_model",
    "settings",
    "state",
    "swap",
    "averages",
    "synthesis.numbers",
    "synthesis.sources",
    "synthesis.choice",
    "synthesis.stored",
    "synthesis.plan",
    "synthesis.products",
    "synthesis.streaming",
    "synthesis.arrays",
    "synthesis",
    "restoring",
    "importing",
    "loading",
    "output_contents",
    "shards",
    "unfinished",
    "outputs",
    "existing",
    "ema",
    "distributed",
    "search.refinement",
    "search.table",
    "search.results",
    "search.scratch",
    "search.sweep",
    "plot",
    "demo",
    "integrations.lightning",
    "integrations.transformers",
    "async_.parts",
    "async_.arguments",
    "async_.output_names",
    "async_.telling",
    "async_.job",
    "async_.launch",
    "async_.folders",
    "async_.making",
    "async_.following_runs",
    "async_.synthesize_worker",
    "async_.capture",
    "async_.lane",
    "async_.staging",
    "async_.writer",
    "async_.service",
    "commands.terminal",
    "commands.folder",
    "commands.verify",
    "commands.lengths",
    "commands.inspect",
    "commands.importing",
    "commands.thinning",
    "commands.prune",
    "commands.plot",
    "cli",
    "__main__",
)
MAY_IMPORT_ASYNC = ("cli", "__main__")
USE_THE_LIBRARY = ("demo", "integrations.lightning", "integrations.transformers", "cli", "__main__")
WITHOUT_TORCH = (
    "errors",
    "exits",
    "given",
    "processes",
    "sizes",
    "resources",
    "profile",
    "posthoc.intervals",
    "posthoc.interval_cost",
    "posthoc.least_squares",
    "posthoc.amplification",
    "posthoc.report",
    "posthoc.coverage",
    "posthoc.kept_paths",
    "posthoc.path_search",
    "posthoc.selection",
    "posthoc.mixed_steps",
    "posthoc.keep_rules",
    "posthoc.retention",
    "posthoc",
    "snapshots.bounded_json",
    "snapshots.format",
    "snapshots.files",
    "search.refinement",
    "search.table",
    "search.results",
    "search.scratch",
    "search.sweep",
    "plot",
    "commands.terminal",
    "commands.folder",
    "commands.verify",
    "commands.lengths",
    "commands.inspect",
    "commands.importing",
    "commands.thinning",
    "commands.prune",
    "commands.plot",
)
WORKER = "async_.synthesize_worker"
NOT_IN_THE_WORKER = ("ema", "async_.lane")


@dataclass(frozen=True)
class Import:
    importer: str  # relative to the package, "" for its __init__
    target: str  # absolute
    names: tuple[str, ...]  # of a `from target import names` that are no modules
    line: int
    when: Literal["load", "call", "types"]

    @property
    def ours(self) -> str | None:
        """The imported module, relative to the package; None if it is somebody else's."""
        if self.target == PACKAGE:
            return ""
        return self.target.removeprefix(PACKAGE + ".") if self.target.startswith(PACKAGE + ".") else None

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}, line {self.line}, imports {self.target}"


@dataclass(frozen=True)
class House:
    """All modules of a package, by their names relative to it, and what they import."""

    modules: tuple[str, ...]
    imports: tuple[Import, ...]

    @classmethod
    def read(cls, root: Path) -> House:
        files = {_module_name(root, file): file for file in sorted(root.rglob("*.py"))}
        imports = [found for name, file in files.items() for found in _imports(name, file, set(files))]
        return cls(tuple(files), tuple(imports))

    def homeless(self) -> set[str]:
        """Modules that should stand in LAYERS and do not; a package that imports nothing of ours need not."""
        importing = {found.importer for found in self.imports if found.ours is not None}
        packages = {name.rpartition(".")[0] for name in self.modules}
        return {name for name in self.modules if name in importing or name not in packages} - {*LAYERS, *LAZY}

    def reached_from(self, module: str, *, when: tuple[str, ...]) -> set[str]:
        """All that runs when ``module`` is imported: our modules by absolute name, others by their top name."""
        edges: dict[str, set[str]] = {_absolute(name): set() for name in self.modules}
        for name in self.modules:
            if name:
                edges[_absolute(name)].add(_absolute(name.rpartition(".")[0]))  # its package runs first
        for found in self.imports:
            # What a lazy package imports when it is asked is up to those who ask.
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
    """Every node below ``nodes``, with when it runs."""
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
    """Imports that point the wrong way."""
    height = {name: position for position, name in enumerate(LAYERS)}
    faults = []
    for found in house.imports:
        if found.importer in LAZY or found.ours is None:
            continue
        known = found.importer in height and found.ours in height
        if known and height[found.ours] >= height[found.importer]:
            faults.append(f"{found}, which does not stand above it in LAYERS")
        is_async = found.ours.split(".")[0] == "async_"
        if is_async and found.importer.split(".")[0] != "async_" and found.importer not in MAY_IMPORT_ASYNC:
            faults.append(f"{found}: only {', '.join(MAY_IMPORT_ASYNC)} and __init__ may import async_")
    return faults


def package_faults(house: House) -> list[str]:
    """Names taken from a lazy ``__init__`` by our own modules, which should know where a name lives."""
    return [
        f"{found}: take {', '.join(found.names) or 'what it needs'} from the module that defines it"
        for found in house.imports
        if found.ours in LAZY
        and found.importer not in LAZY
        and found.importer not in USE_THE_LIBRARY
        and found.names != ("__version__",)
    ]


def lazy_faults(house: House) -> list[str]:
    """Work done when a lazy ``__init__`` is imported."""
    return [
        f"{found} when it is loaded: look it up when it is first used"
        for found in house.imports
        if found.importer in LAZY and found.when == "load" and (found.ours is not None or found.target == "torch")
    ]


def cost_faults(house: House) -> list[str]:
    """Modules that bring in what they are meant to work without."""
    faults = [
        f"{module} imports torch when it is loaded, itself or by what it imports"
        for module in (*WITHOUT_TORCH, WORKER)
        if "torch" in house.reached_from(module, when=("load",))
    ]
    faults += [
        f"{found}: it works without torch"
        for found in house.imports
        if found.importer in WITHOUT_TORCH and found.when == "call" and found.target.split(".")[0] == "torch"
    ]
    reached = house.reached_from(WORKER, when=("load", "call"))
    faults += [
        f"{WORKER} imports {module}, itself or by what it imports"
        for module in NOT_IN_THE_WORKER
        if _absolute(module) in reached
    ]
    return faults


@pytest.fixture(scope="module")
def house() -> House:
    return House.read(ROOT)


def test_every_module_has_its_place(house):
    assert len(LAYERS) == len(set(LAYERS))
    assert not house.homeless(), f"give {sorted(house.homeless())} a line in LAYERS, below whatever they import"


def test_imports_point_one_way(house):
    assert not direction_faults(house)


def test_our_own_modules_import_from_where_a_name_lives(house):
    assert not package_faults(house)


def test_packages_are_lazy(house):
    assert not lazy_faults(house)


def test_modules_meant_to_work_without_torch_ema_or_lane_do(house):
    assert not cost_faults(house)


@pytest.mark.parametrize(
    ("file", "source", "faults"),
    [
        ("profile", "from nitrous_ema.posthoc import solve_weights", direction_faults),
        ("profile", "def f():\n    from nitrous_ema import posthoc", direction_faults),
        ("profile", "def f():\n    from . import posthoc", direction_faults),
        ("profile", "if TYPE_CHECKING:\n    from .posthoc import solve_weights", direction_faults),
        ("snapshots/format", "from ..snapshots.store import SnapshotStore", direction_faults),
        ("snapshots/format", "from .store import SnapshotStore", direction_faults),
        ("profile", "import_module('nitrous_ema.ema')", direction_faults),
        ("ema", "import nitrous_ema.async_.lane", direction_faults),
        ("ema", "from nitrous_ema import PostHocEMA", package_faults),
        ("ema", "import nitrous_ema", package_faults),
        ("snapshots/__init__", "from nitrous_ema.tracked import names", cost_faults),
        ("async_/__init__", "from nitrous_ema.async_.lane import Lane", lazy_faults),
        ("__init__", "try:\n    import torch\nexcept ImportError:\n    pass", lazy_faults),
        ("posthoc", "def f():\n    import torch.nn", cost_faults),
        ("posthoc", "from nitrous_ema.errors import NitrousError\nfrom nitrous_ema import tracked", cost_faults),
        ("synthesis", "import torch", cost_faults),
        ("async_/synthesize_worker", "def main():\n    import nitrous_ema.ema", cost_faults),
    ],
)
def test_a_fault_is_found(tmp_path, file, source, faults):
    root = _small_house(tmp_path)
    assert not faults(House.read(root))
    with (root / f"{file}.py").open("a") as module:
        module.write("\n" + source)
    assert len(faults(House.read(root))) >= 1


def test_what_only_type_checkers_read_costs_nothing(tmp_path):
    root = _small_house(tmp_path)
    (root / "posthoc.py").write_text("if typing.TYPE_CHECKING:\n    import torch\nelse:\n    import numpy")
    assert not cost_faults(House.read(root))


def _small_house(folder: Path) -> Path:
    sources = {
        "__init__": "if TYPE_CHECKING:\n    from nitrous_ema.ema import PostHocEMA",
        "profile": "import numpy",
        "posthoc": "from nitrous_ema import __version__, profile",
        "snapshots/__init__": "from nitrous_ema.snapshots.store import SnapshotStore",
        "snapshots/format": "",
        "snapshots/store": "from nitrous_ema.snapshots.format import Layout",
        "tracked": "import torch",
        "synthesis": "def f():\n    import torch",
        "ema": "from nitrous_ema.tracked import names",
        "async_/__init__": "def __getattr__(name):\n    import_module('nitrous_ema.async_.lane')",
        "async_/lane": "import torch",
        "async_/synthesize_worker": "from nitrous_ema import synthesis",
    }
    for name, source in sources.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    return folder


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("nitrous_ema", ["torch", "numpy", "nitrous_ema.ema"]),
        ("nitrous_ema.async_", ["torch", "nitrous_ema.async_.service", "nitrous_ema.async_.synthesize_worker"]),
        ("nitrous_ema.posthoc", ["torch"]),
        ("nitrous_ema.snapshots.store", ["torch"]),
        ("nitrous_ema.cli", ["torch", "numpy"]),  # numpy reads the synthesis' thread limits once, when it is loaded
        ("nitrous_ema.commands.inspect", ["torch"]),
        ("nitrous_ema.commands.prune", ["torch"]),
        ("nitrous_ema.commands.plot", ["torch", "matplotlib"]),
        ("nitrous_ema.search.sweep", ["torch"]),
        ("nitrous_ema.async_.synthesize_worker", ["torch", "nitrous_ema.ema", "nitrous_ema.async_.lane"]),
    ],
)
def test_importing_a_light_module_does_not_load(module, absent):
    program = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
