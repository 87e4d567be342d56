"""The averaging step of one group by one launch: every parameter is read once, and all profiles move.

Where Triton and the device allow it, this step replaces ``ForeachStep``, whose foreach calls read the parameters once
per profile and need many launches. It needs averages in float32, and parameters in float32, bfloat16 or float16
(complex64 counts as pairs) in their averages' memory order. An update with any other parameter is left to
``ForeachStep`` as a whole. The docstring of ``fused_kernel`` describes the bits in which the two steps may differ;
``run`` and ``run_stashed`` of one update never differ.

FUSED-1  New addresses are copied to the device from pinned   nothing_waits_for_new_addresses
         memory, on the stream of the launch; the host does
         not wait.
FUSED-2  A table is read only on the stream that uploaded     tables_stay_on_their_stream
         it, so that the allocator may reuse its memory once  stashed_parameters_are_found_from_the_stream_
         it is dropped; ``stash`` makes no table.              that_averages_them
FUSED-3  Stashed parameters give the bits of ``run``.         stashed_parameters_give_the_bits_of_run
FUSED-4  Memory is pinned at construction, and where a        stash_pins_no_memory
         parameter's storage was replaced; not for a stash,
         whose rows differ by the address of the scratch only.

The tests are cases of ``test_fused_step.py``, in ``tests/support/fused_step_cases.py``.

The pinned memory may be dropped at once as well: torch does not reuse it before the copy has run (events of the caching
host allocator, recorded by ``copy_``: ATen/native/cuda/Copy.cu and ATen/core/CachingHostAllocator.h). The caller that
queues the step holds parameters and averages.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.copied_step import ALIGNED_BYTES, aligned
from nitrous_ema.averaging.kernels.flat_buffers import Group
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep, ForeachStep, are_same
from nitrous_ema.errors import warn

_BATCH_ELEMENTS = 1 << 23
_OLDEST_CAPABILITY = (8, 0)  # the oldest that Triton's README lists; bfloat16 needs it too


@dataclass(frozen=True, slots=True, eq=False)
class _Addresses:
    """The addresses of the parameters that one update reads."""

    tensors: Sequence[Tensor]
    rows: Tensor
    """The kernel's table, on the host; pinned where the device copies from pinned memory."""


@dataclass(frozen=True, slots=True, eq=False)
class _FusedStash:
    """Stashed parameters of a batch."""

    batch: int
    scratch: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Neighbours in the scratch of a stash, of one type."""

    begin: int
    """First byte."""
    end: int
    dtype: torch.dtype
    sizes: list[int]
    """Elements of each tensor, and after each but the last those of the gap behind it."""
    pieces: list[int]
    """Which of the batch's pieces are stashed here."""


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """The tensors and blocks of one batch: first, and the one after the last."""

    first_tensor: int
    last_tensor: int
    first_block: int
    last_block: int


def step_for(group: Group) -> AveragingStep:
    """Return the fastest averaging step that a group's device and types allow.

    The first call for a device and number of profiles compiles the kernel, compares its results, and waits for both. If
    the kernel fails, one warning is issued and ``ForeachStep`` is used.
    """
    if _is_candidate(group) and _works(group.flats[0].device, len(group.flats)):
        from nitrous_ema.averaging.kernels.fused_kernel import knows

        if all(knows(tensor.tracked.dtype) for tensor in group.tensors):
            return FusedStep(group)
    return ForeachStep(group)


class FusedStep:
    """The ``AveragingStep`` of one group as one launch per run of batches.

    Args:
        group: Of types that ``fused_kernel.knows``. Its buffers must not be replaced while this object is used.
        batch_elements: Elements of one profile per batch, a multiple of the kernel's block.

    Raises:
        ImportError: There is no Triton.
    """

    def __init__(self, group: Group, batch_elements: int = _BATCH_ELEMENTS) -> None:
        from nitrous_ema.averaging.kernels import fused_kernel

        self._kernel = fused_kernel
        self._group = group
        self._device = group.flats[0].device
        self._plain = ForeachStep(group, batch_elements)
        self.batches = self._plain.batches
        self._found: Sequence[Tensor] | None = None
        self._rows: Tensor | None = None  # the table of _found; None where the kernel cannot read one of them
        self._uploaded: tuple[Tensor, Any, Tensor] | None = None  # rows, the stream of FUSED-2, table
        blocks = fused_kernel.cut([(tensor.begin, tensor.end) for tensor in group.tensors])
        self._launches = [self._launch_of(blocks, *batch) for batch in self.batches]
        self._blocks = blocks.to(self._device)
        layouts = [self._layout_of(*arguments) for arguments in zip(self._launches, self.batches, strict=True)]
        self._runs = [runs for runs, _ in layouts]
        # On the device from the start: a launch adds the address of its scratch (FUSED-4).
        rows = fused_kernel.table([row for _, of_batch in layouts for row in of_batch]).to(self._device)
        self._tables = torch.split(rows, [len(of_batch) for _, of_batch in layouts])
        self._is_address = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int64, device="cpu").to(self._device)
        self._read_by_stash: tuple[_Addresses, list[list[Tensor]]] | None = None  # flat views, of every batch
        self._always = torch.ones((), dtype=torch.bool, device=self._device)

    def sources(self, tensors: Sequence[Tensor]) -> Any:
        """Return the addresses of this group's parameters; see ``AveragingStep``."""
        if self._found is None or not are_same(tensors, self._found):
            self._found, self._rows = [*tensors], self._find(tensors)
        return self._plain.sources(tensors) if self._rows is None else _Addresses(tensors, self._rows)

    def run(
        self,
        sources: Any,
        weights: Sequence[float],
        batches: Sequence[int] | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        """Move averages towards parameters; see ``AveragingStep``."""
        if not isinstance(sources, _Addresses):
            self._plain.run(sources, weights, batches, allowed)
            return
        allowed = self._always if allowed is None else allowed
        with _current(self._device) as stream:
            table = self._table(sources.rows, stream)
            for first, last in _runs(range(len(self.batches)) if batches is None else batches):
                blocks = self._launches[first].first_block, self._launches[last].last_block
                self._kernel.launch(table, self._blocks, 0, *blocks, self._group.flats, weights, allowed)

    def stash_bytes(self, batch: int) -> int:
        """Return the bytes of scratch that ``stash`` needs; see ``AveragingStep``."""
        launch = self._launches[batch]
        return self._plain.stash_bytes(batch) + ALIGNED_BYTES * (launch.last_tensor - launch.first_tensor)

    def stash(self, sources: Any, batch: int, scratch: Tensor) -> Any:
        """Copy the parameters of a batch; see ``AveragingStep``."""
        if not isinstance(sources, _Addresses):
            return self._plain.stash(sources, batch, scratch)
        if self._read_by_stash is None or self._read_by_stash[0] is not sources:
            # No view is missing: the kernel reads every tensor as it is.
            flat = cast("list[list[Tensor]]", self._plain.sources(sources.tensors).flat)
            self._read_by_stash = sources, flat
        read = self._read_by_stash[1][batch]
        for run in self._runs[batch]:
            # One call for all views: a call for each takes longer on the host than everything else here.
            views = torch.split(scratch[run.begin : run.end].view(run.dtype), run.sizes)[::2]
            torch._foreach_copy_(views, [read[piece] for piece in run.pieces])
        return _FusedStash(batch, scratch)

    def run_stashed(self, stashed: Any, weights: Sequence[float], allowed: Tensor | None = None) -> None:
        """Move averages towards stashed parameters; see ``AveragingStep``."""
        if not isinstance(stashed, _FusedStash):
            self._plain.run_stashed(stashed, weights, allowed)
            return
        allowed = self._always if allowed is None else allowed
        launch = self._launches[stashed.batch]
        with _current(self._device):
            # Made here and not in stash(): the table must be read on the stream that makes it (FUSED-2).
            table = torch.add(self._tables[stashed.batch], self._is_address, alpha=stashed.scratch.data_ptr())
            blocks = launch.first_block, launch.last_block
            self._kernel.launch(table, self._blocks, launch.first_tensor, *blocks, self._group.flats, weights, allowed)

    def _table(self, rows: Tensor, stream: Any) -> Tensor:
        """Return the rows on the device; uploaded once for each stream that launches."""
        if self._uploaded is None or self._uploaded[0] is not rows or self._uploaded[1] != stream:
            self._uploaded = rows, stream, rows.to(self._device, non_blocking=True)
        return self._uploaded[2]

    def _find(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return a row per tensor for the kernel; None if it cannot read one of the tensors."""
        rows = []
        for tensor, like in zip(tensors, self._group.tensors, strict=True):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if real.stride() != like.strides or real.device != self._device:
                return None
            rows.append(self._kernel.row(real, like.begin, like.end))
        return self._pinned(self._kernel.table(rows))

    def _pinned(self, rows: Tensor) -> Tensor:
        return rows if self._device.type == "cpu" else rows.pin_memory()

    def _layout_of(
        self, launch: _Launch, batch: tuple[int, int]
    ) -> tuple[list[_Run], list[tuple[int, int, int, int, int]]]:
        """Return where a batch's parameters lie in scratch memory, and the kernel's rows for scratch at address 0."""
        indices = range(launch.first_tensor, launch.last_tensor)
        ends = {index: self._ends(index, *batch) for index in indices}
        rows = dict.fromkeys(indices, (0, 0, 0, 0, 1))  # an empty tensor's row is not read
        by_dtype: dict[torch.dtype, list[tuple[int, int]]] = {}
        for piece, index in enumerate(index for index in indices if ends[index][0] < ends[index][1]):
            dtype = self._group.tensors[index].tracked.dtype
            by_dtype.setdefault(torch.float32 if dtype.is_complex else dtype, []).append((piece, index))
        runs, last = [], 0
        for dtype, members in by_dtype.items():
            edges: list[int] = []
            for _, index in members:
                begin, end = ends[index]
                # The stash is aligned as the average is, so that the kernel can read it in wide accesses.
                place = aligned(last) + begin * dtype.itemsize % ALIGNED_BYTES
                last = place + (end - begin) * dtype.itemsize
                edges += [place, last]
                rows[index] = self._kernel.row_at(place, dtype, begin, end)
            sizes = [(after - before) // dtype.itemsize for before, after in pairwise(edges)]
            runs.append(_Run(edges[0], last, dtype, sizes, [piece for piece, _ in members]))
        return runs, list(rows.values())

    def _ends(self, index: int, low: int, high: int) -> tuple[int, int]:
        like = self._group.tensors[index]
        return max(like.begin, low), max(min(like.end, high), low)

    def _launch_of(self, blocks: Tensor, begin: int, end: int) -> _Launch:
        numbers = blocks[:, 1].contiguous()
        size = self._kernel.BLOCK_ELEMENTS
        edges = torch.tensor([begin // size, -(-end // size)], dtype=numbers.dtype, device="cpu")
        first, last = torch.searchsorted(numbers, edges).tolist()
        return _Launch(int(blocks[first, 0]), int(blocks[last - 1, 0]) + 1, first, last)


@functools.cache
def _works(device: torch.device, num_profiles: int) -> bool:
    """Return whether the kernel computes right averages on a device; warn, once, with the reason if it does not."""
    try:
        from nitrous_ema.averaging.kernels import fused_kernel

        if not fused_kernel.can_compile_for(triton_backend(device) or ""):
            return False
        with _current(device):
            fused_kernel.rehearse(device, num_profiles)
    except Exception as error:  # Triton, its compilers and the driver raise any class, and training must go on
        warn(
            f"the fused averaging kernel does not work on {device}: {type(error).__name__}: {str(error)[:500]}. "
            "The EMA uses torch's own operations instead, which take more time on the device and give the same "
            "averages up to rounding. Install a release of triton that fits this torch and its driver."
        )
        return False
    return True


def _is_candidate(group: Group) -> bool:
    """Return whether the kernel may work for a group, without importing Triton."""
    return (
        group.numel > 0
        and all(type(flat) is Tensor and flat.data_ptr() % ALIGNED_BYTES == 0 for flat in group.flats)
        and triton_backend(group.flats[0].device) is not None
        and importlib.util.find_spec("triton") is not None
    )


def triton_backend(device: torch.device) -> str | None:
    """Return the name of Triton's backend for a device; None where Triton has no backend to try."""
    if device.type == "cuda" and torch.cuda.is_available():
        if torch.version.hip is not None:
            return "amd"
        return "nvidia" if torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY else None
    return "intel" if device.type == "xpu" else None


def _runs(batches: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last batch of each run of neighbouring batches."""
    runs: list[tuple[int, int]] = []
    for batch in batches:
        if runs and batch == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], batch
        else:
            runs.append((batch, batch))
    return runs


@contextmanager
def _current(device: torch.device) -> Iterator[Any]:
    """Make a device the current one, and yield its current stream: Triton launches on both."""
    module = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else module.device(device):
        yield module.current_stream()
