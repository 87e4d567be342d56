"""The synthesis process, started from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nitrous_ema._base.arguments import check_sequence
from nitrous_ema.synthesis.worker.job import Job, ProgressCallback
from nitrous_ema.synthesis.worker.output_names import absolute

if TYPE_CHECKING:
    import torch

_MODULE = "nitrous_ema.async_.synthesize_worker"
_OF_ANOTHER_JOB = ("RANK", "WORLD_SIZE")  # a training's under torchrun: the worker would write its part only


def launch(
    snapshots: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    sigma_rels: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    step: int | None = None,
    steps: Sequence[int] | Literal["all"] | None = None,
    run: str | None = None,
    exclude: Sequence[int] = (),
    tolerance: float | None = None,
    dtype: str | torch.dtype | None = None,
    format: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    accumulate: str | None = None,
    skip_existing: bool = False,
    dry_run: bool = False,
    follow: bool = False,
    idle: float | None = None,
    look_every: float | None = None,
    progress: ProgressCallback | None = None,
    tracked_sigma_rels: Sequence[float] | None = None,
    tracked_gammas: Sequence[float] | None = None,
    nice: str = "auto",
    python: str | os.PathLike[str] = sys.executable,
) -> Job:
    """Start a process that synthesizes averages from a snapshot folder into files.

    It reads the folder only: no GPU, no trainer, no code of the user's. It uses the same installation of this package
    as this process.

    Args:
        snapshots: The snapshot folder.
        out: Folder of the outputs, ``step-<step>-sigma-<sigma_rel>.<format>``; or a template of their names with the
            fields run, step, t, sigma_rel and gamma: ``averages/{run}/{step:09d}-{sigma_rel}.safetensors``. Folders
            are made if they are not there.
        sigma_rels: Lengths as fractions of the training time, in (0, 12 ** -0.5), or
        gammas: lengths as exponents. Exactly one of the two.
        step: Step at which the averages end, one with a committed snapshot; the newest by default. Or
        steps: several of them, or "all".
        run: Run whose snapshots are read, with its ancestors; the newest by default.
        exclude: Steps to leave out, damaged ones for example.
        tolerance: Relative profile error that may be added to read fewer snapshots, 1e-3 by default; 0 reads all.
        dtype: Type of floating tensors, by name or as torch's: "float32", "bfloat16" or "bf16", "float16", "float64";
            by default as in the model.
        format: "safetensors" (default), or "pt" for a dict of tensors that ``torch.load(weights_only=True)`` reads.
        memory: Memory to stay within, in bytes or as "1GiB" (the default).
        threads: At most so many; by default one for each core the process may use.
        accumulate: Type of products and sums, "float64" (default) or "float32".
        skip_existing: Leave outputs that are there, whole and of the same recipe. ``.pt`` files are always made anew.
        dry_run: Write nothing; the outputs say what would be read and written, and how good it would be.
        follow: Go on with new snapshots until the run is closed or its trainer, a process of this machine, is gone.
            Without steps it begins with the newest one there is. Skips what exists.
        idle: With follow, also end when nothing new has come for so many seconds.
        look_every: With follow, seconds between looks at the folder, 2 by default.
        progress: Called with the bytes read and those to read, on a thread of the job; starts anew with each step, and
            with each pass over the snapshots where there are more lengths than one makes (128, or less memory).
        tracked_sigma_rels: The profiles, in their order, of a folder of nitrous-ema 0.0.1 or ema-pytorch; or
        tracked_gammas: the same as exponents.
        nice: Low priority: "auto" (while the trainer lives on this machine), "always" or "never".
        python: The interpreter.

    Returns:
        The job; its result() waits, its outputs() are there as they come.

    Raises:
        ValueError: Both or neither of ``sigma_rels`` and ``gammas``, or both of ``step`` and ``steps``; nothing in one
            of them. Other wrong arguments are told by result().
        TypeError: A single number, or text, where a sequence belongs; ``progress`` cannot be called.
    """
    if (sigma_rels is None) == (gammas is None):
        raise ValueError("sigma_rels and gammas: exactly one of them says which averages are wanted.")
    _check_callable(progress)
    if step is not None and steps is not None:
        raise ValueError("step and steps: at most one of them says where the averages end.")
    is_all = isinstance(steps, str) and steps == "all"
    ends = [step] if step is not None else None if is_all else steps
    tracked = {"sigma-rels": tracked_sigma_rels, "gammas": tracked_gammas}
    _check_sequences(sigma_rels=sigma_rels, gammas=gammas, exclude=exclude, steps=ends)
    _check_sequences(tracked_sigma_rels=tracked_sigma_rels, tracked_gammas=tracked_gammas)
    option, lengths = ("--sigma-rel", sigma_rels) if sigma_rels is not None else ("--gamma", gammas)
    arguments = [
        f"{option}={_listed(() if lengths is None else lengths)}",
        f"--out={absolute(out)}",
        f"--nice={nice}",
    ]
    if is_all or ends is not None:
        arguments.append(f"--step={'all' if ends is None else ','.join(map(_plain, ends))}")
    optional = {"run": run, "dtype": dtype, "format": format, "memory": memory, "tolerance": tolerance}
    optional |= {"threads": threads, "accumulate": accumulate, "idle": idle, "look-every": look_every}
    arguments += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    arguments += [f"--exclude={_plain(excluded)}" for excluded in exclude]
    arguments += [f"--{name}={_listed(given)}" for name, given in tracked.items() if given is not None]
    flags = {"skip-existing": skip_existing, "dry-run": dry_run, "follow": follow}
    arguments += [f"--{name}" for name, is_set in flags.items() if is_set]
    arguments += ["--progress-json"] if progress is not None else []
    command = [os.fspath(python), "-m", _MODULE, *arguments, "--", str(Path(snapshots).absolute())]
    return Job(_start(command), progress)


def _listed(lengths: Iterable[float]) -> str:
    return ",".join(repr(float(length)) for length in lengths)


def _plain(step: Any) -> str:
    """A step as text; one of an array or a tensor too."""
    return str(step.item() if hasattr(step, "item") else step)


def _check_sequences(**sequences: Any) -> None:
    for name, given in sequences.items():
        if given is None:
            continue
        check_sequence(name, given)
        if name != "exclude" and isinstance(given, Sized) and len(given) == 0:
            raise ValueError(f"{name} is empty; expected at least one number.")


def _check_callable(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}; expected a function of the bytes read and those to read.")


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    # The child imports the package that this process runs, wherever that lies and whatever the working directory
    # holds: `python -m` looks there first.
    home = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_JOB}
    return subprocess.Popen(
        command,
        cwd=home,
        env={**environment, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
