from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = sorted((Path(__file__).parent / "native").glob("*.[ch]pp"))
BUILDS = Path(__file__).parents[3] / "build" / "laggy"  # git ignores build/
COMPILER = "g++"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra"]
COMPILE_TIMEOUT_SECONDS = 300


class NoCompiler(Exception):
    """The laggy device needs g++, which is not installed."""


class BuildFailed(Exception):
    """g++ refused the sources, with its messages."""


@functools.cache
def library() -> Path:
    """Return the shared library that `device.register` loads; it is built in about 15 s if it does not exist.

    Safe for several processes at once: one process builds, the others wait, and a library appears whole or not at all.

    Raises:
        NoCompiler: there is no g++.
        BuildFailed: the sources do not compile against the headers of the torch that is installed.
    """
    built = BUILDS / _key() / "liblaggy.so"
    if built.exists():
        return built
    if shutil.which(COMPILER) is None:
        raise NoCompiler(f"the laggy device is built from C++ when the tests run, and there is no {COMPILER} here")
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a killed process
        if not built.exists():
            _compile(built)
    return built


def _compile(built: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    unfinished = built.with_suffix(f".{os.getpid()}")
    command: list[str | Path] = [COMPILER, *FLAGS]
    for folder in headers:
        command += ["-isystem", folder]
    command += [*(source for source in SOURCES if source.suffix == ".cpp"), "-o", unfinished]
    command += ["-L", torch_folder / "lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise BuildFailed(f"{COMPILER} could not build laggy for torch {torch.__version__}:\n{done.stderr[-8000:]}")
    unfinished.rename(built)


def _key() -> str:
    digest = hashlib.sha256(repr((torch.__version__, torch.__file__, COMPILER, FLAGS)).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
