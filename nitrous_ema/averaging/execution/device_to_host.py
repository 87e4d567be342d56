"""A snapshot's data on its way from the averages of one device to host memory: in the file's type and order.

What lies on the device as the file has it is copied from there. Averages of another type, or in another memory order,
go through scratch on the device first: a copy between types or orders would otherwise make temporaries, and block the
host. The scratch is as large as one chunk, allocated once.

C1  What is copied are the bytes of the file, whatever the       test_pages_have_the_bytes_of_the_file
    averages' types, memory orders and devices.
C2  Nothing is allocated on the device but one chunk of          test_device_memory_is_one_chunk_of_scratch_at_most
    scratch, and that only where types or orders differ.         test_averages_as_the_file_has_them_need_no_scratch
C3  Scratch is written again after it was copied from: all use   test_late_copies_have_the_bytes_of_the_file
    of it is on the stream that copies run on, which is current
    at every call, the allocation included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.snapshots.layout import Layout, Span

_Piece = tuple[int, Tensor]


class ChunkCopier:
    """Copies what is on one device. All calls are made on one stream of it.

    Args:
        device: Where the averages are.
        layout: Of the files.
    """

    def __init__(self, device: torch.device, layout: Layout) -> None:
        self._device = device
        self._scratch_bytes = max((end - begin for begin, end in layout.chunks), default=0)
        self._scratch: Tensor | None = None  # uint8; allocated when first needed
        self._counter: Tensor | None = None

    def copy(self, flat_buffers: FlatBuffers, span: Span, page: Tensor, *, non_blocking: bool) -> None:
        """Copy what a range of the file's data has of this device.

        Args:
            flat_buffers: The averages; read on the current stream.
            span: In one chunk of the file's data; begins at an element.
            page: uint8 on the CPU, contiguous, at least as large.
            non_blocking: Return before the bytes are there (from an accelerator, into pinned memory).
        """
        layout = flat_buffers.layout
        begin, end = span
        profile_bytes = layout.sections[0].end
        if begin >= profile_bytes * len(layout.gammas):
            self._copy_copied(flat_buffers, begin, end, page, non_blocking)
            return
        dtype = TORCH_DTYPES[layout.checkpoint_dtype]
        profile, offset = divmod(begin, profile_bytes)
        first = offset // dtype.itemsize
        elements = page[: end - begin].view(dtype)
        for run in _neighbours(flat_buffers.pieces(profile, first, first + elements.numel(), self._device)):
            self._copy_run(run, elements, non_blocking)

    def yield_copy_engine(self) -> None:
        """Queue a kernel that does next to nothing, so that copies of other streams get their turn before the next one.

        A copy engine runs the copies of one stream that are ready one after another before it turns to another stream,
        however small they are: a trainer's ``loss.item()`` would wait for the whole snapshot. With a kernel in between
        it turns to the others first (shown with traces in meta-pytorch/torchrec, pull requests 4303, 4315 and 4339).
        """
        if self._device.type == "cpu":
            return
        if self._counter is None:
            self._counter = torch.zeros(1, dtype=torch.uint8, device=self._device)
        self._counter.add_(1)

    def _copy_run(self, run: Sequence[_Piece], elements: Tensor, non_blocking: bool) -> None:
        """Copy pieces that are neighbours in the file."""
        begin, end = run[0][0], run[-1][0] + run[-1][1].numel()
        target = elements[begin:end]
        if self._device.type == "cpu":
            _gather(run, target)
        elif all(piece.dtype == target.dtype and piece.is_contiguous() for _, piece in run):
            for first, piece in run:
                elements[first : first + piece.numel()].copy_(piece.view(-1), non_blocking=non_blocking)
        else:
            if self._scratch is None:
                self._scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self._device)
            scratch = self._scratch.view(target.dtype)[: target.numel()]
            _gather(run, scratch)
            target.copy_(scratch, non_blocking=non_blocking)

    def _copy_copied(self, flat_buffers: FlatBuffers, begin: int, end: int, page: Tensor, non_blocking: bool) -> None:
        start = flat_buffers.layout.sections[-1].begin + flat_buffers.layout.padding_bytes
        if begin < start:
            page[: start - begin].zero_()
        shift = max(start - begin, 0)
        for first, piece in flat_buffers.copied_pieces(max(begin - start, 0), end - start, self._device):
            page[shift + first : shift + first + piece.numel()].copy_(piece, non_blocking=non_blocking)


def _neighbours(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that follow each other without a gap, together."""
    run: list[_Piece] = []
    for first, piece in pieces:
        if run and run[-1][0] + run[-1][1].numel() != first:
            yield run
            run = []
        run.append((first, piece))
    if run:
        yield run


def _gather(run: Sequence[_Piece], target: Tensor) -> None:
    """Copy pieces to where they lie in row-major order, on their own device: no copy there needs a temporary."""
    begin = run[0][0]
    for first, piece in run:
        target[first - begin : first - begin + piece.numel()].view(piece.shape).copy_(piece)
