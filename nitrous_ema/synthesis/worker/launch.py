"""Start the synthesis process from Python: ``launch`` turns its arguments into a command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nitrous_ema._base.arguments import check_sequence
from nitrous_ema._base.paths import local_path
from nitrous_ema._base.threads import LIMIT_REMEDY
from nitrous_ema.errors import NitrousError
from nitrous_ema.synthesis.worker.job import Job, ProgressCallback
from nitrous_ema.synthesis.worker.output_names import absolute

if TYPE_CHECKING:
    import torch

_PACKAGE = Path(__file__).resolve().parents[2]
# The worker must run this very package, and find the standard library before any folder of installed packages, which
# may have old copies of standard modules. `python -m` with PYTHONPATH or a working directory guarantees neither: both
# precede the standard library. So the package is imported from its own file; its folder follows all others, for numpy
# and torch that are installed beside it.
_PROGRAM = f"""\
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
from importlib.util import module_from_spec, spec_from_file_location
from runpy import run_module
spec = spec_from_file_location("nitrous_ema", {str(_PACKAGE / "__init__.py")!r})
sys.modules["nitrous_ema"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["nitrous_ema"])
sys.path.append({str(_PACKAGE.parent)!r})
run_module("nitrous_ema.async_.synthesize_worker", run_name="__main__", alter_sys=True)
"""
# Removed from the environment of the worker: in a training process under torchrun these belong to the training, and the
# worker would write only one part of each average.
_OF_ANOTHER_JOB = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def launch(
    snapshots: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    sigma_rels: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    step: int | str | None = None,
    steps: Sequence[int | str] | Literal["all"] | None = None,
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

    The process reads only the snapshot folder. It needs no GPU, no trainer and no code of the user. It uses the same
    installation of this package as the calling process.

    Args:
        snapshots: The snapshot folder.
        out: Output folder, for files ``step-<step>-sigma-<sigma_rel>.<format>``; or a template of file names with the
            fields run, step, t, sigma_rel and gamma: ``averages/{run}/{step:09d}-{sigma_rel}.safetensors``. Missing
            folders are created.
        sigma_rels: Lengths as fractions of the training time, in (0, 12 ** -0.5), or
        gammas: lengths as exponents. Exactly one of the two.
        step: Target step, one with a committed snapshot; the newest by default. ``"nearest:1234"`` is the step nearest
            to 1234; a warning names it. Or
        steps: several target steps, or "all".
        run: Run whose snapshots are read, together with its ancestors; the newest run by default.
        exclude: Steps of snapshots to ignore, for example damaged ones.
        tolerance: Relative profile error that may be added to read fewer snapshots, 1e-3 by default; 0 reads all.
        dtype: Type of floating tensors, by name or as torch's: "float32", "bfloat16" or "bf16", "float16", "float64";
            by default as in the model.
        format: "safetensors" (default), or "pt" for a dict of tensors that ``torch.load(weights_only=True)`` reads.
        memory: Memory limit, in bytes or as text such as "1GiB" (the default).
        threads: Maximum number of threads; by default one for each core that the process may use.
        accumulate: Type of products and sums, "float64" (default) or "float32".
        skip_existing: Reuse outputs that exist, are whole and have the same recipe. ``.pt`` files are always written.
        dry_run: Write nothing; the outputs report what would be read and written, and the expected accuracy.
        follow: Wait for new snapshots until the run is closed or its trainer, a process of this machine, has ended.
            Without steps the first target is the newest existing snapshot. Implies skip_existing.
        idle: With follow, end after this many seconds without a new snapshot.
        look_every: With follow, seconds between two polls of the folder, 2 by default.
        progress: Called with the bytes read and the bytes to read, on a thread of the job. It restarts with each target
            step, and with each pass over the snapshots if one pass cannot make all lengths (at most 128 per pass, fewer
            with less memory).
        tracked_sigma_rels: Tracked profiles, in their order, of a folder of nitrous-ema 0.0.1 or ema-pytorch; or
        tracked_gammas: the same profiles as exponents.
        nice: Low priority: "auto" (while the trainer runs on this machine), "always" or "never".
        python: The interpreter.

    Returns:
        The job: its result() waits for the process, its outputs() iterates over outputs as they are written.

    Raises:
        ValueError: Both or neither of ``sigma_rels`` and ``gammas``, or both of ``step`` and ``steps``, or an empty
            sequence. The process checks all other arguments, and result() raises what it reports.
        TypeError: A single number or text instead of a sequence, or a ``progress`` that cannot be called.
        NitrousError: The system does not start more processes or threads.
    """
    if (sigma_rels is None) == (gammas is None):
        raise ValueError(
            f"pass exactly one of sigma_rels and gammas; got {'neither' if gammas is None else 'both'} of them."
        )
    _check_callable(progress)
    if step is not None and steps is not None:
        raise ValueError("pass at most one of step and steps; got both of them.")
    is_all = isinstance(steps, str) and steps == "all"
    target_steps = [step] if step is not None else None if is_all else steps
    tracked = {"tracked-sigma-rel": tracked_sigma_rels, "tracked-gamma": tracked_gammas}
    _check_sequences(sigma_rels=sigma_rels, gammas=gammas, exclude=exclude, steps=target_steps)
    _check_sequences(tracked_sigma_rels=tracked_sigma_rels, tracked_gammas=tracked_gammas)
    option, lengths = ("--sigma-rel", sigma_rels) if sigma_rels is not None else ("--gamma", gammas)
    arguments = [
        f"{option}={_format_numbers(() if lengths is None else lengths)}",
        f"--out={absolute(out)}",
        f"--nice={nice}",
    ]
    if is_all or target_steps is not None:
        arguments.append(f"--step={'all' if target_steps is None else ','.join(map(_format_step, target_steps))}")
    optional = {"run": run, "dtype": dtype, "format": format, "memory": memory, "tolerance": tolerance}
    optional |= {"threads": threads, "accumulate": accumulate, "idle": idle, "look-every": look_every}
    arguments += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    arguments += [f"--exclude={_format_step(excluded)}" for excluded in exclude]
    arguments += [f"--{name}={_format_numbers(values)}" for name, values in tracked.items() if values is not None]
    flags = {"skip-existing": skip_existing, "dry-run": dry_run, "follow": follow}
    arguments += [f"--{name}" for name, is_set in flags.items() if is_set]
    arguments += ["--progress-json"] if progress is not None else []
    command = [os.fspath(python), "-c", _PROGRAM, *arguments, "--", str(local_path("snapshots", snapshots).absolute())]
    return Job(_start(command), progress)


def _format_numbers(numbers: Iterable[float]) -> str:
    return ",".join(repr(float(number)) for number in numbers)


def _format_step(step: Any) -> str:
    """Return a step as text. Elements of arrays and tensors print their number alone."""
    return str(step.item() if hasattr(step, "item") else step)


def _check_sequences(**sequences: Any) -> None:
    for name, sequence in sequences.items():
        if sequence is None:
            continue
        check_sequence(name, sequence)
        if name != "exclude" and isinstance(sequence, Sized) and len(sequence) == 0:
            raise ValueError(f"{name} is empty; expected at least one number.")


def _check_callable(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}; expected a function of the bytes read and the bytes to read.")


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_JOB}
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except BlockingIOError as error:  # EAGAIN of fork()
        raise NitrousError(f"The synthesis process could not be started: {error.strerror}. {LIMIT_REMEDY}") from error
