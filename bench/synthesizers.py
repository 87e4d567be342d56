"""One way to synthesize averages from a folder of snapshots into files, in a process of its own.

    python -m bench.synthesizers NAME SNAPSHOTS OUT SIGMA_RELS [THREADS]

Prints how far its memory grew above what it had after all imports, then the seconds that it took: two numbers, each on
its line. All of it is timed but the start of the process, its imports and the making of the model that peers want.
Outputs are float32 and durable when the time is taken.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the worker has it; before numpy is imported

import numpy as np
import torch
from torch import nn

from bench import contestants, models
from nitrous_ema.snapshots import store as _  # noqa: F401 - imported before the clock starts
from nitrous_ema.snapshots.reading import FileSource
from nitrous_ema.synthesis import plan_from_store
from nitrous_ema.synthesis.outputs import writer as outputs
from nitrous_ema.synthesis.plan import Plan

Synthesize = Callable[[Path, Path, Sequence[float]], Any]
BLOCK_ELEMENTS = 1 << 15

OURS = "nitrous_ema"
OURS_SINGLE = "nitrous_ema, float32 sums"
OURS_TOLERANT = "nitrous_ema, tolerance 0.001"
LOOP = "plain loop, float64"
LOOP_SINGLE = "plain loop, float32"


def main() -> None:
    name, snapshots, out, lengths, *threads = sys.argv[1:]
    if threads:
        torch.set_num_threads(int(threads[0]))
    synthesize, folder = synthesizer(name), Path(out)
    folder.mkdir(exist_ok=True)
    before = _peak_bytes()
    begin = time.perf_counter()
    synthesize(Path(snapshots), folder, [float(each) for each in lengths.split(",")])
    seconds = time.perf_counter() - begin
    print(_peak_bytes() - before)
    print(seconds)


def synthesizer(name: str) -> Synthesize:
    """What is timed."""
    plain: dict[str, Synthesize] = {
        OURS: partial(_ours, tolerance=0.0, accumulate="float64"),
        OURS_SINGLE: partial(_ours, tolerance=0.0, accumulate="float32"),
        OURS_TOLERANT: partial(_ours, tolerance=1e-3, accumulate="float64"),
        LOOP: partial(_loop, dtype=torch.float64),
        LOOP_SINGLE: partial(_loop, dtype=torch.float32),
    }
    return plain[name] if name in plain else partial(_peer, peer_of(name))


def _ours(snapshots: Path, out: Path, lengths: Sequence[float], *, tolerance: float, accumulate: Any) -> None:
    plan = plan_from_store(snapshots, sigma_rels=lengths, tolerance=tolerance)
    paths = [out / f"{each}.safetensors" for each in lengths]
    outputs.write_outputs(plan, paths, accumulate=accumulate, threads=torch.get_num_threads())


def _loop(snapshots: Path, out: Path, lengths: Sequence[float], *, dtype: torch.dtype) -> None:
    """Read, checksum, convert, multiply and write, block after block: what one writes who wants no library."""
    plan = plan_from_store(snapshots, sigma_rels=lengths, tolerance=0.0)
    weights = torch.from_numpy(plan.weights.T.copy()).to(dtype)
    columns = _Columns(plan)
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    written = [os.open(out / f"{each}.bin", flags, 0o666) for each in lengths]
    for begin in range(0, plan.elements, BLOCK_ELEMENTS):
        stored = columns.read(begin, min(begin + BLOCK_ELEMENTS, plan.elements))
        averages = (weights @ stored.to(dtype)).float().numpy()
        for descriptor, row in zip(written, averages, strict=True):
            os.pwrite(descriptor, row.data, begin * 4)
    for descriptor in written:
        os.fsync(descriptor)
        os.close(descriptor)


class _Columns:
    """The columns of a plan in float16, read front to back."""

    def __init__(self, plan: Plan) -> None:
        self._sources = [column.source for column in plan.columns]
        self._files = {source.path: os.open(source.path, os.O_RDONLY) for source in self._sources}
        self._sums = [0] * len(self._sources)
        self._raw = np.empty((len(self._sources), BLOCK_ELEMENTS), dtype=np.float16)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Elements of all columns, verified wherever a chunk ends; a block lies in one chunk."""
        for row, source in enumerate(self._sources):
            assert isinstance(source, FileSource)
            part = self._raw[row, : end - begin]
            os.preadv(self._files[source.path], [part.data], source.begin + begin * 2)
            self._sums[row] = crc32(part.data, self._sums[row])
            if end * 2 % source.chunk_bytes == 0 or end * 2 == source.num_bytes:
                if self._sums[row] != source.crc32[begin * 2 // source.chunk_bytes]:
                    raise RuntimeError(f"{source.path}: wrong checksum")
                self._sums[row] = 0
        return torch.from_numpy(self._raw[:, : end - begin])


# ---- peers


def peer_of(name: str) -> Any:
    """A peer's PostHocEMA class, from the name it has in tables."""
    if name == contestants.NITROUS_001:
        return contestants.nitrous_001()[0].PostHocEMA
    import ema_pytorch

    return ema_pytorch.PostHocEMA


def make_peer(peer: Any, model: nn.Module, folder: Path) -> Any:
    """A peer's averages of a model."""
    options = {} if _is_ema_pytorch(peer) else {"step_size_correction": False}
    return peer(
        model,
        sigma_rels=contestants.SIGMA_RELS,
        checkpoint_every_num_steps=10**10,
        checkpoint_folder=str(folder),
        update_every=1,
        **options,
    )


def _is_ema_pytorch(peer: Any) -> bool:
    return str(peer.__module__).startswith("ema_pytorch")


def _peer(peer: Any, snapshots: Path, out: Path, lengths: Sequence[float]) -> None:
    """Its own loop over one length after another, its results saved and synced as ours are."""
    ema = make_peer(peer, model_of(snapshots), snapshots)
    place = {} if _is_ema_pytorch(peer) else {"device": "cpu"}
    for length in lengths:
        state = ema.synthesize_ema_model(sigma_rel=length, **place).ema_model.state_dict()
        with (out / f"{length}.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def model_of(snapshots: Path) -> nn.Module:
    """The model of a folder that the bench has filled; the folder above names the model."""
    return MODELS[(snapshots.parent / "model").read_text()]()


def transformer() -> nn.Module:
    """ViT-S/16 with ten classes: 21.7 million parameters."""
    return models.VisionTransformer(width=384, heads=6, classes=10)


def small_transformer() -> nn.Module:
    """A transformer of 0.4 million parameters."""
    return models.VisionTransformer(width=96, depth=3, heads=3, image=64, classes=10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": transformer,
    "small_transformer": small_transformer,
    "tiny": models.tiny,
}


def _peak_bytes() -> int:
    """The most memory this process ever had, files that it has mapped included."""
    status = Path("/proc/self/status")
    if status.exists():  # what the system counts for resource usage also holds the copy of its parent that it was
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
