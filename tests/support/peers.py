"""The libraries with which nitrous_ema is compared.

ema-pytorch is an ordinary dependency of the tests. nitrous-ema 0.0.1 has our import name, so the Makefile puts it into
a folder of its own, from where it is loaded here under another name.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
# The environment that runs the tests, then the environment that `make` builds here (for tests with another Python).
_FOLDERS = (Path(sys.prefix) / "peers", REPOSITORY / ".venv" / "peers")
ABSENT = f"nitrous-ema 0.0.1 is in none of {', '.join(map(str, _FOLDERS))}: `make test` installs it"


def load_nitrous_001() -> ModuleType:
    """Return nitrous-ema 0.0.1 as module ``nitrous_ema_001``, with its ``PostHocEMA`` and ``KarrasEMA``.

    Where it is not installed the calling test is skipped, and in continuous integration it fails.
    """
    return find_nitrous_001() or _absent()


def find_nitrous_001() -> ModuleType | None:
    """Return the same, or None where it is not installed: for benches, which run without pytest."""
    name = "nitrous_ema_001"
    if name in sys.modules:
        return sys.modules[name]
    for folder in _FOLDERS:
        # Not its __init__, which imports from `nitrous_ema`: that name is this repository's package here.
        file = folder / "nitrous_ema" / "ema.py"
        if file.is_file() and (folder / "nitrous_ema-0.0.1.dist-info").is_dir():
            return _load(name, file)
    return None


def _absent() -> NoReturn:
    import pytest

    if "CI" in os.environ:
        pytest.fail(ABSENT)
    pytest.skip(ABSENT)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its classes must be found again by pickle and copy
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
