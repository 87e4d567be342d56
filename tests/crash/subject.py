"""Fresh copies of the modules that are checked, unchanged or with one line of the protocol changed."""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.crash.disk import NOW

PACKAGE = Path(__file__).resolve().parents[2] / "nitrous_ema"
_IMPORT = re.compile(r"from nitrous_ema\.((?:snapshots|synthesis|async_)(?:\.\w+)+) import")
_number = itertools.count()

Edits = Mapping[str, Sequence[tuple[str, str]]]


class NoSuchLine(Exception):
    """The source has no line that a mutation expects, or has it several times."""


@dataclass(frozen=True)
class Subject:
    """The modules of the store."""

    store: ModuleType
    commit: ModuleType
    removal: ModuleType
    header: ModuleType
    filesystem: ModuleType
    processes: Processes


@dataclass
class Processes:
    """The processes that write. Each has a signature of its own; all but the last are dead."""

    random: Callable[[int], str]
    """Return random digits for names: so many bytes, in hexadecimal."""
    number: int = 0

    def start(self) -> None:
        """Let another process write from now on; the one before has died."""
        self.number += 1

    def signature(self) -> str:
        return f"{self.number:x}"

    def temporary_name(self, name: str) -> str:
        """Return a temporary name as ``temporary_files`` draws it, from this signature and random digits."""
        return f".{name}.{self.signature()}-{self.random(8)}"

    def writer_state(self, name: str, *, untouched_seconds: float) -> str:
        found = re.fullmatch(r"\..+\.([0-9a-f]+)-[0-9a-f]+", name)
        return "unknown" if found is None else "alive" if found[1] == self.signature() else "gone"


def load_subject(edits: Edits | None = None) -> Subject:
    """Return copies of the modules, with these replacements made in their source.

    Random names are drawn from a counter and processes are numbered, so that every run has the same log. Decoded
    headers are cached: a state of the disk costs a fraction of a millisecond instead of many.

    Args:
        edits: For a module such as ``"snapshots.store"``: pairs of a text that its source has once, and a replacement.
    """
    modules = load_modules("snapshots.store", edits or {})
    store, commit, removal = (modules[f"snapshots.{name}"] for name in ("store", "commit", "removal"))
    names = itertools.count()
    processes = Processes(random=lambda size_bytes: f"{next(names):0{2 * size_bytes}x}")
    removal.secrets = SimpleNamespace(token_hex=processes.random)
    commit.temporary_name, removal.writer_state = processes.temporary_name, processes.writer_state
    moments = itertools.count(1)
    commit.time = SimpleNamespace(time_ns=lambda: next(moments))
    removal.time = SimpleNamespace(time=lambda: NOW)
    validation = modules["snapshots.validation"]
    validation.decode_header = _cached(validation.decode_header)
    return Subject(store, commit, removal, modules["snapshots.header"], modules["snapshots.filesystem"], processes)


def load_modules(name: str, edits: Edits) -> dict[str, ModuleType]:
    """Return copies of a module, and of the modules of the package that it imports, by name."""
    prefix, modules = f"subject_{next(_number)}", {}
    _load(name, edits, prefix, modules)
    return modules


def _load(name: str, edits: Edits, prefix: str, modules: dict[str, ModuleType]) -> None:
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    source = path.read_text()
    for found, replacement in edits.get(name, ()):
        if source.count(found) != 1:
            raise NoSuchLine(f"{path} has {source.count(found)} times, expected once:\n{found}")
        source = source.replace(found, replacement)
    modules[name] = module = ModuleType(f"{prefix}_{name.replace('.', '_')}")
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    for needed in dict.fromkeys(_IMPORT.findall(source)):
        if needed not in modules:
            _load(needed, edits, prefix, modules)
    source = _IMPORT.sub(lambda found: f"from {prefix}_{found[1].replace('.', '_')} import", source)
    exec(compile(source, str(path), "exec"), module.__dict__)


def _cached(decode: Callable[..., object]) -> Callable[..., object]:
    """Return ``decode_header`` with a cache: its result depends on its arguments alone."""

    @functools.lru_cache(maxsize=1 << 14)
    def outcome(blob: bytes, path: Path, file_bytes: int) -> tuple[object, Exception | None]:
        try:
            return decode(blob, path=path, file_bytes=file_bytes), None
        except Exception as error:
            return None, error

    def decode_header(blob: bytes, *, path: Path, file_bytes: int) -> object:
        header, error = outcome(blob, path, file_bytes)
        if error is not None:
            raise error.with_traceback(None)
        return header

    return decode_header
