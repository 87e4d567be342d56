"""Device-to-host readback of averages into a snapshot's pages, in the file's type and memory order.

Copying between types or memory orders across devices makes a temporary of the tensor's size and blocks the host. This
module avoids both. Averages that lie on the device as the file has them are copied directly. Averages of another type,
or in another memory order, are first gathered into a staging chunk on the device, and copied from there. The staging
chunk is as large as one chunk of the file and is allocated once.

READBACK-1  The copied bytes are the bytes of the file, for all    test_pages_have_the_bytes_of_the_file
    types, memory orders and devices of the averages.
READBACK-2  Nothing is allocated on the device but one chunk,      test_device_memory_is_one_staging_chunk_at_most
    and the chunk only where types or orders differ.               test_averages_as_the_file_has_them_need_no_chunk
READBACK-3  The chunk is written again only after it was copied    test_late_copies_have_the_bytes_of_the_file
    from. No event is needed: all uses of it, its allocation
    included, are on the stream that copies run on, which is
    current at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.snapshots.layout import Layout, Span

_Piece = tuple[int, Tensor]
"""First element in the range to be copied, and the elements."""


class ChunkCopier:
    """Copies the averages of one device to the host. All calls are made on one stream of that device.

    Args:
        device: Where the averages are.
        layout: The layout of the files.
    """

    def __init__(self, device: torch.device, layout: Layout) -> None:
        self._device = device
        self._chunk_bytes = max((end - begin for begin, end in layout.chunks), default=0)
        self._chunk: Tensor | None = None  # uint8; allocated when first needed
        self._counter: Tensor | None = None

    def copy(self, flat_buffers: FlatBuffers, span: Span, page: Tensor, *, non_blocking: bool) -> None:
        """Copy the part of a range of the file's data that is on this device; leave the rest of the page unchanged.

        Args:
            flat_buffers: The averages; read on the current stream.
            span: In one chunk of the file's data; begins at an element.
            page: uint8 on the CPU, contiguous, at least as large as the range.
            non_blocking: Return before the bytes have arrived (from an accelerator, into pinned memory).
        """
        layout = flat_buffers.layout
        begin, end = span
        profile_bytes = layout.sections[0].end
        if begin >= profile_bytes * len(layout.gammas):
            self._copy_copied_tensors(flat_buffers, begin, end, page, non_blocking)
            return
        dtype = TORCH_DTYPES[layout.checkpoint_dtype]
        profile, offset = divmod(begin, profile_bytes)
        first = offset // dtype.itemsize
        elements = page[: end - begin].view(dtype)
        for run in _neighbours(flat_buffers.pieces(profile, first, first + elements.numel(), self._device)):
            self._copy_run(run, elements, non_blocking)

    def yield_copy_engine(self) -> None:
        """Queue a kernel of one element, so that copies of other streams can run before the next chunk.

        A copy engine runs the ready copies of one stream one after another before it turns to another stream, however
        small they are: a trainer's ``loss.item()`` would wait for the whole snapshot. With a kernel in between it turns
        to the other streams first (shown with traces in meta-pytorch/torchrec, pull requests 4303, 4315 and 4339).
        """
        if self._device.type == "cpu":
            return
        if self._counter is None:
            self._counter = torch.zeros(1, dtype=torch.uint8, device=self._device)
        # An addition, because a memset or a copy would itself be work of the copy engine.
        self._counter.add_(1)

    def _copy_run(self, run: Sequence[_Piece], elements: Tensor, non_blocking: bool) -> None:
        """Copy pieces that are neighbors in the file."""
        begin, end = run[0][0], run[-1][0] + run[-1][1].numel()
        target = elements[begin:end]
        if self._device.type == "cpu":
            _gather(run, target)
        elif all(piece.dtype == target.dtype and piece.is_contiguous() for _, piece in run):
            for first, piece in run:
                elements[first : first + piece.numel()].copy_(piece.view(-1), non_blocking=non_blocking)
        else:
            if self._chunk is None:
                # On the current stream, which is the stream of all later uses: the allocator's reuse is ordered on it.
                self._chunk = torch.empty(self._chunk_bytes, dtype=torch.uint8, device=self._device)
            chunk = self._chunk.view(target.dtype)[: target.numel()]
            _gather(run, chunk)
            target.copy_(chunk, non_blocking=non_blocking)

    def _copy_copied_tensors(
        self, flat_buffers: FlatBuffers, begin: int, end: int, page: Tensor, non_blocking: bool
    ) -> None:
        start = flat_buffers.layout.sections[-1].begin + flat_buffers.layout.padding_bytes
        if begin < start:
            # Zeros are written anew, because a page still holds the bytes of the snapshot before.
            page[: start - begin].zero_()
        shift = max(start - begin, 0)
        for first, piece in flat_buffers.copied_pieces(max(begin - start, 0), end - start, self._device):
            page[shift + first : shift + first + piece.numel()].copy_(piece, non_blocking=non_blocking)


def _neighbours(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces that follow each other without a gap."""
    run: list[_Piece] = []
    for first, piece in pieces:
        if run and run[-1][0] + run[-1][1].numel() != first:
            yield run
            run = []
        run.append((first, piece))
    if run:
        yield run


def _gather(run: Sequence[_Piece], target: Tensor) -> None:
    """Copy pieces into row-major order on their own device, where a copy between types needs no temporary."""
    begin = run[0][0]
    for first, piece in run:
        target[first - begin : first - begin + piece.numel()].view(piece.shape).copy_(piece)
