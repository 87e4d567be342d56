"""Compare two checkouts, side by side: ``python -m tests.same_bytes OLD NEW``.

A refactor changes no bit. This script runs the same training, synthesis, worker, sweep and commands with each checkout,
on this machine and with this Python, and compares every file, every JSON object and every exit status byte for byte.
The suite cannot hold such bytes as digests: averages differ with the CPU's capability, and weights of a synthesis with
the kernel of OpenBLAS.

What a run takes from its surroundings is the same for both: a ``sitecustomize`` module replaces clocks, random names,
host and process ids. Durations and the free space of the disk are left out. Only public names are used, so that both
checkouts know them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SURROUNDINGS = """
import datetime, itertools, os, secrets, socket, sys, time

if os.environ.get("SAME_BYTES"):
    PID = 4_000_000  # of no process
    _names, _ticks, _pid = itertools.count(), itertools.count(), os.getpid
    secrets.token_hex = lambda size=32: f"{next(_names):0{2 * size}x}"
    socket.gethostname = lambda: "host"
    _datetime = datetime.datetime

    class Fixed(_datetime):
        @classmethod
        def now(cls, tz=None):
            return _datetime(2026, 1, 1, tzinfo=datetime.timezone.utc) + datetime.timedelta(seconds=next(_ticks))

    datetime.datetime = Fixed
    time.time_ns = lambda: 1_700_000_000_000_000_000
    try:
        import psutil

        class Process(psutil.Process):
            def __init__(self, pid=None):
                super().__init__(None if pid == PID and os.environ["SAME_BYTES"] == "trainer" else pid)

            def create_time(self):
                return 1_700_000_000.0

        psutil.Process = Process
    except ImportError:
        pass
    if os.environ["SAME_BYTES"] == "trainer":

        def getpid():
            return PID if sys._getframe(1).f_globals.get("__name__", "").startswith("nitrous_ema") else _pid()

        os.getpid = getpid
"""

LENGTHS = "0.04,0.06,...,0.2"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("checkouts", nargs="*", type=Path, help="the two checkouts")
    options.add_argument("--subject", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--save", type=Path, help="keep what both produced in this folder")
    chosen = options.parse_args()
    if chosen.subject:
        subject(chosen.subject)
        return 0
    if len(chosen.checkouts) != 2:
        options.error("two checkouts are compared")
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as folder:
        results = [run(checkout.resolve(), Path(folder), number) for number, checkout in enumerate(chosen.checkouts)]
        if chosen.save:
            shutil.copytree(folder, chosen.save, dirs_exist_ok=True)
        return compare(*results)


def run(checkout: Path, folder: Path, number: int) -> dict[str, bytes]:
    """Every file that a checkout produces, by its path."""
    work = folder / "work"  # the same path for both: it stands in JSON
    work.mkdir()
    (folder / "surroundings").mkdir(exist_ok=True)
    (folder / "surroundings" / "sitecustomize.py").write_text(SURROUNDINGS)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'surroundings'}:{checkout}",
        "SAME_BYTES": "trainer",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--subject", str(work)]
    subprocess.run(command, env=environment, check=True, cwd=work, timeout=3000)
    files = {str(path.relative_to(work)): path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}
    (work / "checkout").write_text(str(checkout))
    work.rename(folder / f"work-{number}")
    return files


def compare(old: dict[str, bytes], new: dict[str, bytes]) -> int:
    """Print what differs; 1 if anything does."""
    differences = [f"only in the old: {path}" for path in sorted(old.keys() - new.keys())]
    differences += [f"only in the new: {path}" for path in sorted(new.keys() - old.keys())]
    for path in sorted(old.keys() & new.keys()):
        before, after = (_without_chance(path, files[path]) for files in (old, new))
        if before != after:
            same = (a == b for a, b in zip(before, after, strict=False))
            at = next((place for place, is_same in enumerate(same) if not is_same), min(len(before), len(after)))
            around = slice(max(0, at - 40), at + 40)
            differences.append(f"{path}: byte {at}: {before[around]!r} became {after[around]!r}")
    print("\n".join(differences))
    print(f"{len(old)} files of {sum(map(len, old.values()))} bytes, {len(differences)} differences")
    return 1 if differences else 0


def _without_chance(path: str, content: bytes) -> bytes:
    if not path.endswith((".json", ".jsonl", ".csv")):
        return content
    if path.endswith(".csv"):
        names, *rows = content.decode().splitlines()
        place = names.split(",").index("seconds")
        return "\n".join(",".join(row.split(",")[:place] + row.split(",")[place + 1 :]) for row in rows).encode()
    return re.sub(rb'("(?:\w*seconds|free_bytes|snapshots_that_fit)": )[-0-9.e]+', rb"\g<1>0", content)


# ---------------------------------------------------------------------------------------------------------------------
# The subject, which runs with one of the checkouts


def subject(work: Path) -> None:
    """Produce everything that is compared, in ``work``."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, train in TRAININGS.items():
        _log(name)
        train(work / name)
    folder = work / "sync default" / "snapshots"
    for name, arguments in WORKERS.items():
        _log(f"worker {name}")
        _program(work / "worker" / name, ["nitrous_ema.async_.synthesize_worker", str(folder), *arguments])
    for name, arguments in COMMANDS.items():
        _log(f"command {name}")
        place = work / "command" / name
        place.mkdir(parents=True)
        shutil.copytree(folder, place / "snapshots")
        _old_folder(place / "old")
        _program(place, ["nitrous_ema", *arguments])
    _sweeps(work / "sweep", folder)
    _loads(work / "loads", work / "worker")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _model(kind: str) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 400 if kind == "large" else 12),
        nn.Tanh(),
    )
    model.add_module("head", nn.Linear(400 if kind == "large" else 12, 200 if kind == "large" else 4))
    model.add_module("tied", nn.Linear(400 if kind == "large" else 12, 200 if kind == "large" else 4))
    model.tied.weight = model.head.weight
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.register_buffer("scale", torch.ones(3), persistent=False)
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    if kind == "complex":
        model.register_parameter("phase", nn.Parameter(torch.randn(5, dtype=torch.complex64)))
    if kind in ("bfloat16", "float64", "float16"):
        model.to(getattr(torch, kind))
    return model


def _train(
    folder: Path, make: Callable[..., Any], kind: str = "small", steps: int = 30, resume: bool = False, **options: Any
) -> None:
    import warnings

    import torch

    folder.mkdir(parents=True)
    warnings.simplefilter("ignore")
    model, generator = _model(kind), torch.Generator().manual_seed(1)
    options = {"checkpoint_every_num_steps": 5, "checkpoint_folder": str(folder / "snapshots"), **options}
    ema = make(model, **options)

    def step(number: int, **delta: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                ema.fence()
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
            model.count.add_(1)
            model[1].running_mean.add_(0.25)
        ema.update(**delta)

    for number in range(steps):
        step(number)
    ema.checkpoint()
    ema.flush()
    ema.pin(ema.snapshots.snapshots()[-2].step)
    torch.save(ema.state_dict(), folder / "state.pt")
    for index, each in enumerate(ema.ema_models):
        torch.save(dict(each.ema_model.state_dict()), folder / f"average-{index}.pt")
    with ema.average_parameters(0):
        torch.save(dict(model.state_dict()), folder / "swapped.pt")
    for sigma_rel in (0.06, 0.13):
        synthesized = ema.synthesize_ema_model(sigma_rel=sigma_rel)
        torch.save(dict(synthesized.ema_model.state_dict()), folder / f"synthesized-{sigma_rel}.pt")
    if resume:
        saved = ema.state_dict()
        for number in range(4):
            step(number)
        ema.close()
        ema = make(model, **options)
        ema.load_state_dict(saved)
        for number in range(7):
            step(number)
        ema.checkpoint()
        ema.flush()
        ema.restore(ema.snapshots.snapshots()[-2].step)
        for number in range(6):
            step(number)
        ema.checkpoint()
    ema.close()
    facts = {"step": ema.step, "t": ema.t, "run": ema.run, "steps": [each.step for each in ema.snapshots.snapshots()]}
    stats = ema.stats()
    counted = ("updates", "snapshots", "pending", "skipped", "failed", "dropped", "bytes_written", "bytes_freed")
    facts["stats"] = {name: getattr(stats, name) for name in counted}
    (folder / "facts.json").write_text(json.dumps(facts))


def _trainings() -> Iterator[tuple[str, Callable[[Path], None]]]:
    def lazily(name: str, **options: Any) -> Callable[[Path], None]:
        def train(folder: Path) -> None:
            import torch

            import nitrous_ema

            chosen = {
                key: getattr(torch, value.removeprefix("torch.")) if str(value).startswith("torch.") else value
                for key, value in options.items()
            }
            if chosen.get("keep") == "geometric":
                chosen["keep"] = nitrous_ema.KeepGeometric(1.3)
            _train(folder, getattr(nitrous_ema, name), **chosen)

        return train

    both = {
        "default": {"update_every": 1, "resume": True},
        "stride": {"update_every": 3},
        "stride uncorrected": {"update_every": 3, "step_size_correction": False},
        "stride geometric mean": {"update_every": 3, "step_size_correction": True},
        "gammas": {"gammas": (3.0, 16.97, 40.0), "update_every": 1},
        "keep a count": {"keep": 4, "update_every": 1},
        "keep geometric": {"keep": "geometric", "update_every": 1, "resume": True},
        "half": {"checkpoint_dtype": "torch.float16", "update_every": 1},
        "bfloat16": {"checkpoint_dtype": "torch.bfloat16", "update_every": 1, "kind": "bfloat16"},
        "float64": {"checkpoint_dtype": "torch.float64", "update_every": 1, "kind": "float64"},
        "complex": {"kind": "complex", "update_every": 1},
        "large": {"kind": "large", "update_every": 1, "steps": 12},
        "filters": {
            "ignore_names": ("head.bias",),
            "param_or_buffer_names_no_ema": ("0.bias",),
            "ignore_startswith_names": ("1.",),
            "update_every": 1,
        },
        "frozen": {"frozen": True, "update_every": 1},
    }
    for name, options in both.items():
        yield f"sync {name}", lazily("PostHocEMA", **options)
        yield f"async {name}", lazily("AsyncPostHocEMA", **options)
    yield "async copied", lazily("AsyncPostHocEMA", read="copied", update_every=1)
    yield "async large copied", lazily("AsyncPostHocEMA", read="copied", update_every=1, kind="large", steps=12)
    yield "async offload", lazily("AsyncPostHocEMA", offload="host", update_every=1)


TRAININGS = dict(_trainings())

WORKERS: dict[str, Sequence[str]] = {
    "all lengths": ("--sigma-rel", LENGTHS, "--out", "out"),
    "gammas": ("--gamma", "5,12.5", "--out", "out"),
    "all columns": ("--sigma-rel", LENGTHS, "--out", "out", "--tolerance", "0"),
    "single precision": ("--sigma-rel", "0.07,0.11", "--out", "out", "--accumulate", "float32"),
    "bfloat16": ("--sigma-rel", "0.07,0.11", "--out", "out", "--dtype", "bf16"),
    "torch files": ("--sigma-rel", "0.07", "--out", "out", "--format", "pt"),
    "steps": ("--sigma-rel", "0.07", "--out", "out", "--step", "20,25", "--step", "10"),
    "every step": ("--sigma-rel", "0.1", "--out", "out", "--step", "all"),
    "template": ("--sigma-rel", "0.07", "--out", "a-{step}-{sigma_rel}.safetensors"),
    "first part": ("--sigma-rel", "0.07,0.2", "--out", "out", "--part", "1/2"),
    "second part": ("--sigma-rel", "0.07,0.2", "--out", "out", "--part", "2/2"),
    "dry run": ("--sigma-rel", LENGTHS, "--out", "out", "--dry-run"),
    "excluded": ("--sigma-rel", "0.07", "--out", "out", "--exclude", "15"),
    "little memory": ("--sigma-rel", "0.07", "--out", "out", "--memory", "20MiB", "--threads", "2"),
    "no such step": ("--sigma-rel", "0.07", "--out", "out", "--step", "17"),
    "no such run": ("--sigma-rel", "0.07", "--out", "out", "--run", "x"),
    "wrong length": ("--sigma-rel", "0.7", "--out", "out"),
    "no length": ("--out", "out"),
    "too little memory": ("--sigma-rel", "0.07", "--out", "out", "--memory", "1000"),
}

COMMANDS: dict[str, Sequence[str]] = {
    "inspect": ("inspect", "snapshots", "--json"),
    "inspect lengths": ("inspect", "snapshots", "--json", "--sigma-rel", LENGTHS, "--step", "20,25"),
    "inspect old": ("inspect", "old", "--json", "--tracked-sigma-rel", "0.05,0.1", "--sigma-rel", "0.07"),
    "inspect nothing": ("inspect", "nothing", "--json"),
    "prune": ("prune", "snapshots", "--keep", "4", "--json"),
    "prune by error": ("prune", "snapshots", "--error", "0.05", "--json", "--dry-run"),
    "prune by bytes": ("prune", "snapshots", "--budget", "30KB", "--json", "--dry-run", "--sigma-rel", "0.05-0.2"),
    "prune pins": ("prune", "snapshots", "--pin", "20", "--unpin", "10", "--json"),
    "prune wrongly": ("prune", "snapshots", "--keep", "-1"),
    "verify": ("verify", "snapshots"),
    "verify old": ("verify", "old"),
    "import": ("import", "old", "new", "--tracked-sigma-rel", "0.05,0.1", "--json"),
    "import as half": ("import", "old", "new", "--tracked-sigma-rel", "0.05,0.1", "--dtype", "fp16", "--json"),
    "synthesize": ("synthesize", "snapshots", "--sigma-rel", "0.09", "--out", "out"),
    "synthesize old": ("synthesize", "old", "--tracked-sigma-rel", "0.05,0.1", "--sigma-rel", "0.09", "--out", "out"),
    "version": ("--version",),
    "unknown": ("unknown",),
}


def _program(place: Path, arguments: Sequence[str]) -> None:
    """Run a program in a folder; its stdout, where that is JSON, and its exit status become files."""
    place.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SAME_BYTES": "worker"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )
    (place / "status").write_text(str(done.returncode))
    lines = done.stdout.splitlines()
    try:
        objects = [json.loads(line) for line in lines]
    except ValueError:
        try:
            objects = [json.loads(done.stdout)]
        except ValueError:
            objects = []
    (place / "stdout.json").write_text("\n".join(json.dumps(each) for each in objects))
    if objects:
        (place / "stdout.raw.json").write_text(done.stdout)


def _old_folder(folder: Path) -> None:
    """Files of nitrous-ema 0.0.1, with dates of their own."""
    import torch

    folder.mkdir()
    for profile in range(2):
        for step in range(100, 600, 100):
            generator = torch.Generator().manual_seed(step + profile)
            tensors = {
                "step": torch.tensor(step),
                "initted": torch.tensor(True),
                "ema_model.0.weight": torch.randn(4, 3, generator=generator),
                "ema_model.0.bias": torch.randn(4, generator=generator),
                "ema_model.count": torch.tensor(step),
            }
            path = folder / f"{profile}.{step}.pt"
            torch.save(tensors, path)
            os.utime(path, (1_600_000_000 + step, 1_600_000_000 + step))


def _sweeps(folder: Path, snapshots: Path) -> None:
    import torch

    import nitrous_ema

    folder.mkdir()
    os.chdir(folder)

    def evaluate(weights: Any) -> float:
        state = weights if isinstance(weights, dict) else weights.state_dict()
        return float(
            sum((value.double() - 0.05).square().mean() for value in state.values() if value.is_floating_point())
        )

    table = nitrous_ema.sweep(
        snapshots,
        evaluate,
        sigma_rels=[0.04, 0.07, 0.1, 0.15, 0.2],
        steps=[20, 30],
        results="r.jsonl",
        refine=3,
        averages="kept",
    )
    table.to_csv("table.csv")
    model = _model("small")
    nitrous_ema.sweep(
        snapshots, evaluate, sigma_rels=[0.05, 0.1], model=model, results="m.jsonl", dtype="bf16", maximize=True
    )
    torch.save(dict(model.state_dict()), "model.pt")


def _loads(folder: Path, workers: Path) -> None:
    import torch

    import nitrous_ema

    folder.mkdir()
    for name in ("all lengths", "torch files", "bfloat16", "first part"):
        for path in sorted((workers / name / "out").iterdir()):
            model = _model("small")
            try:
                metadata = nitrous_ema.load_average(model, path)
            except Exception as error:
                metadata = {"error": type(error).__name__}
            (folder / f"{name}-{path.name}.json").write_text(json.dumps(metadata))
            torch.save(dict(model.state_dict()), folder / f"{name}-{path.name}.state.pt")


if __name__ == "__main__":
    sys.exit(main())
