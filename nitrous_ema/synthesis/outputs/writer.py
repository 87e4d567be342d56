"""Write synthesized averages to files, under the keys of the model's ``state_dict()``.

A file appears whole or not at all. It is written under a temporary name that starts with a dot, in the folder of its
final name, then made durable and renamed. Its space is reserved before anything is computed, so a full disk is reported
early. Several threads fill it at offsets while the engine computes tile after tile, so an average never has to fit in
memory. Temporary files of processes that were killed are removed from the folder first.

Several processes may share the work, each writing one file of every average (``write_shard``). They do not communicate:
the parts follow from the plan and the number of processes.

Longer than 300 lines because how a file is filled, made durable and named belong on one page.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema._base.temporary_files import remove_stale, temporary_name
from nitrous_ema._base.threads import thread_errors
from nitrous_ema.errors import NitrousError, bug
from nitrous_ema.snapshots.filesystem import FileSystem, hint_writeback, reserve, sync_folder, write_fully
from nitrous_ema.synthesis.float_conversion import FLOAT_TYPES, narrow, widen
from nitrous_ema.synthesis.outputs.layout import OutputLayout, metadata_of
from nitrous_ema.synthesis.outputs.shards import index_path, index_text, part_names, part_path
from nitrous_ema.synthesis.plan import Plan
from nitrous_ema.synthesis.streaming import (
    DEFAULT_MEMORY_BYTES,
    Accumulate,
    Progress,
    engine_sizes,
    passes,
    stream,
    stream_copied,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SUFFIXES = (".safetensors", ".pt")
"""Suffixes of the file formats that are written."""
_ROUNDED_OUTPUTS = 8  # rounded together: one tile of them takes at most 1.8 MB
_FSYNC_THREADS = 8
# After this many bytes of a file the system is asked to write them to disk, while the next bytes are computed.
# Otherwise most of the file would be written only when it is made durable.
_WRITEBACK_BYTES = 8 << 20

Committed = Callable[[int, Path], None]
"""Called with the index of each output and its path once it is durable, on the calling thread."""


def output_name(step: int, sigma_rel: float, suffix: str = ".safetensors") -> str:
    """Return the default file name of the average of one length at one target step."""
    return f"step-{step}-sigma-{sigma_rel!r}{suffix}"


def write_outputs(
    plan: Plan,
    paths: Sequence[Path],
    *,
    dtype: str | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
    committed: Committed | None = None,
    files: FileSystem | None = None,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> None:
    """Synthesize the averages of a plan into one file each.

    ``.safetensors`` and ``.pt`` files (a dict of tensors, for ``torch.load(weights_only=True)``) hold the tensors that
    the unwrapped model's ``load_state_dict(strict=True)`` takes: tied tensors under all their keys, no non-persistent
    buffers, copied tensors as in the target snapshot. Skipped tensors are absent, because snapshots do not contain
    them; the metadata of a ``.safetensors`` file names them.

    Args:
        plan: The averages.
        paths: One file per output. The suffix selects the format. An existing file is replaced atomically.
        dtype: Type of the floating tensors, as a safetensors code ("F32", "BF16", "F16", "F64"); by default each
            tensor's own type in the model. Complex and integer tensors always have their own type.
        memory_bytes: Memory budget, in bytes.
        progress: Called with the bytes read and the bytes to read.
        committed: Called with the index of each output and its path once it is durable.
        files: The file system to write to.
        threads: Maximum number of threads; by default one for each core this process may use. No bit depends on it.
        accumulate: Type of products and sums, "float64" or "float32".

    Raises:
        ValueError: Wrong number of paths, unknown suffix or dtype, or a budget that is too small for GROUP_OUTPUTS of
            the averages. More averages are written in further passes over the snapshots, as few as the budget allows.
        SnapshotDamaged: A chunk's checksum does not match. No output of that pass remains.
        NitrousError: A value is too large for the type.
        OSError: The folder cannot be written to.
    """
    check_outputs(plan, paths, dtype=dtype, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    layouts = {
        suffix: OutputLayout(plan, dtype, tied_once=suffix == ".pt") for suffix in {each.suffix for each in paths}
    }
    outputs = [
        _OutputFile(index, path, layouts[path.suffix], files or FileSystem()) for index, path in enumerate(paths)
    ]
    # Before space is reserved: the leftovers of a killed process may be as large as the outputs.
    _remove_stale(files or FileSystem(), paths)
    _write(plan, outputs, None, committed, memory_bytes, progress, threads, accumulate)


def write_shard(
    plan: Plan,
    paths: Sequence[Path],
    *,
    part: int,
    parts: int,
    dtype: str | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
    committed: Committed | None = None,
    files: FileSystem | None = None,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> None:
    """Synthesize one part of each average of a plan: some of its tensors, as one of several files.

    For ``<stem>.safetensors``, part 0 of 4 writes ``<stem>-00001-of-00004.safetensors`` and
    ``<stem>.safetensors.index.json``. The index names the file of each tensor, as transformers and diffusers expect it.
    The parts may be written in any order, by any processes, at any time; ``load_average`` reports a missing part. The
    bits are those of ``write_outputs``.

    Args:
        plan: The averages; the same plan for all parts.
        paths: One ``.safetensors`` path per output, as for ``write_outputs``; no file of exactly this name is written.
        part: Index of the part, in [0, parts).
        parts: Number of parts.
        dtype: As in ``write_outputs``, like all arguments that follow.
        memory_bytes: Memory budget, in bytes.
        progress: Called with the bytes read and the bytes to read.
        committed: Called with the index of each output and the path of its part once it is durable.
        files: The file system to write to.
        threads: Maximum number of threads.
        accumulate: Type of products and sums.

    Raises:
        ValueError: As ``write_outputs``; also if there is no such part, or a path does not end in .safetensors.
        SnapshotDamaged, NitrousError, OSError: As ``write_outputs``.
    """
    check_outputs(plan, paths, dtype=dtype, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    if not 0 <= part < parts <= 99999:
        raise ValueError(f"part {part} of {parts}: expected 0 <= part < parts <= 99999.")
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: only .safetensors files can be written in parts. Use this suffix.")
    files = files or FileSystem()
    names = part_names(plan, dtype, parts)
    layout = OutputLayout(plan, dtype, names=names[part])
    outputs = [_OutputFile(index, part_path(path, part, parts), layout, files) for index, path in enumerate(paths)]
    _remove_stale(files, paths)
    _write(plan, outputs, layout.elements, committed, memory_bytes, progress, threads, accumulate)
    if part == 0:
        # After the part is durable. Other parts may still be missing then; readers of the index report them.
        for path in paths:
            _replace_content(files, index_path(path), index_text(plan, dtype, names, path).encode())


def check_outputs(
    plan: Plan,
    paths: Sequence[Path],
    *,
    dtype: str | None,
    memory_bytes: int,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> int:
    """Check the arguments of write_outputs() before anything is written; arguments as there.

    Returns:
        Upper bound of the memory that write_outputs() will use, in bytes.

    Raises:
        ValueError: As write_outputs().
    """
    if len(paths) != len(plan.gammas):
        raise ValueError(f"paths has {len(paths)} paths for {len(plan.gammas)} averages; expected one per average.")
    if len(set(paths)) != len(paths):
        raise ValueError("paths: two averages would be written to the same file; expected one name per average.")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown file format; expected a name that ends in {' or '.join(SUFFIXES)}.")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise ValueError(f"dtype {dtype!r} is not a floating type; expected one of {', '.join(FLOAT_TYPES)}.")
    return max(
        engine_sizes(plan.only(indices), memory_bytes, threads=threads, accumulate=accumulate).memory_bytes
        for indices in passes(plan, memory_bytes, accumulate=accumulate)
    )


def _write(
    plan: Plan,
    outputs: Sequence[_OutputFile],
    elements: tuple[int, int] | None,
    committed: Committed | None,
    memory_bytes: int,
    progress: Progress | None,
    threads: int | None,
    accumulate: Accumulate,
) -> None:
    """Read the snapshots once per pass, fill the files of that pass and commit them."""
    for indices in passes(plan, memory_bytes, accumulate=accumulate):
        opened = outputs[indices.start : indices.stop]
        try:
            # One after the other: the header of thousands of tensors takes megabytes while it is written.
            for output in opened:
                output.open(metadata_of(plan, output.index, accumulate))
            filler = _Filler(opened)
            stream(
                plan.only(indices),
                filler.write_tile,
                memory_bytes=memory_bytes,
                progress=progress,
                threads=threads,
                accumulate=accumulate,
                elements=elements,
            )
            if any(output.layout.copied for output in opened):
                stream_copied(plan, filler.write_copied)
            _commit(opened, committed)
        finally:
            for output in opened:
                output.discard()


def _commit(outputs: Sequence[_OutputFile], committed: Committed | None) -> None:
    """Make files durable and give them their names, in order.

    Several are made durable at a time, because the disk can order the blocks of all of them.
    """
    with ThreadPoolExecutor(min(_FSYNC_THREADS, len(outputs)), thread_name_prefix="synthesis-fsync") as pool:
        durable: list[Future[None]] = []
        try:
            for output in outputs:
                if output.path.suffix == ".pt":
                    # One after the other: torch.save holds kilobytes for each tensor.
                    output.convert_to_torch()
                with thread_errors():
                    durable.append(pool.submit(output.make_durable))
            # In the order of the outputs, which is the order in which the caller reports them. A file must be durable
            # before its rename: after a power failure a final name could otherwise lead to missing bytes.
            for output, future in zip(outputs, durable, strict=True):
                future.result()
                output.publish()
                if committed is not None:
                    committed(output.index, output.path)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # discard() closes and removes the files next


class _Filler:
    """Rounds the tiles of the engine and writes them to the files.

    Several threads call its methods at once. Each element arrives once, so their writes do not overlap.

    Args:
        outputs: The open files, in the order of the rows of a tile.
    """

    def __init__(self, outputs: Sequence[_OutputFile]) -> None:
        self._groups: list[tuple[OutputLayout, int, list[_OutputFile]]] = []
        """Outputs that are rounded together: their layout, the row of the first of them, and the outputs."""
        for row, output in enumerate(outputs):
            last = self._groups[-1] if self._groups else None
            if last is not None and last[0] is output.layout and len(last[2]) < _ROUNDED_OUTPUTS:
                last[2].append(output)
            else:
                self._groups.append((output.layout, row, [output]))

    def write_tile(self, begin_element: int, block: NDArray[np.floating], /) -> None:
        """Write a tile of all outputs, shape [outputs, elements]."""
        for layout, row, outputs in self._groups:
            for segment, begin, end in layout.averaged(begin_element, begin_element + block.shape[1]):
                values = block[row : row + len(outputs), begin - begin_element : end - begin_element]
                offset = segment.offset + (begin - segment.begin) * DTYPE_BYTES[segment.dtype]
                for output, rounded in zip(outputs, _round(values, segment.dtype, outputs), strict=True):
                    output.write(rounded, offset)

    def write_copied(self, begin_byte: int, piece: memoryview) -> None:
        """Write a piece of the copied tensors to all outputs, converted to the type of their files."""
        for layout, _, outputs in self._groups:
            for segment in layout.copied:
                begin, end = max(segment.begin, begin_byte), min(segment.end, begin_byte + len(piece))
                if begin >= end:
                    continue
                stored = piece[begin - begin_byte : end - begin_byte]
                width = DTYPE_BYTES[segment.stored]
                offset = segment.offset + (begin - segment.begin) // width * DTYPE_BYTES[segment.dtype]
                # Floating buffers are rounded to --dtype like averaged tensors; all others are copied as bytes.
                if segment.stored != segment.dtype:
                    values = np.empty((1, (end - begin) // width), dtype=np.float64)
                    widen(np.frombuffer(stored, dtype=np.uint8), segment.stored, values[0])
                    stored = memoryview(_round(values, segment.dtype, outputs[:1])[0])
                for output in outputs:
                    output.write(stored, offset)


def _round(values: NDArray[np.floating], dtype: str, outputs: Sequence[_OutputFile]) -> NDArray[np.generic]:
    """Return rows of numbers in the type of their files; raise for a number that is too large, with the file's name."""
    try:
        return narrow(values, dtype)
    except FloatingPointError as error:
        # Infinite values are stored as they are, so the error is about the largest finite one.
        largest = np.nanmax(np.where(np.isfinite(values), np.abs(values), 0), axis=1)
        output = int(np.argmax(largest))
        raise NitrousError(
            f"{outputs[output].path}: the value {float(largest[output])} is too large for {dtype}. "
            "Choose a type with a larger range (--dtype bfloat16 or float32)."
        ) from error


def _replace_content(files: FileSystem, path: Path, content: bytes) -> None:
    """Replace a small file durably and atomically."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        descriptor = files.open_exclusive(temporary)
        try:
            write_fully(files, descriptor, content, 0)
            files.fsync(descriptor)  # before the rename: after a power failure the name could lead to missing bytes
        finally:
            files.close(descriptor)
        files.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            files.unlink(temporary)
        raise
    sync_folder(files, path.parent)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Raise OSErrors with the name of the output instead of the name of its temporary file."""
    try:
        yield
    except OSError as error:
        raise _with_path(error, path) from error


def _with_path(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, os.strerror(error.errno or 0), str(path))


class _OutputFile:
    """One file under a temporary name, until publish() or discard().

    Args:
        index: Which output of the plan.
        path: The final name.
        layout: The tensors of the file.
        files: The file system to write to.
    """

    def __init__(self, index: int, path: Path, layout: OutputLayout, files: FileSystem) -> None:
        self.index = index
        self.path = path
        self.layout = layout
        self._files = files
        self._data_begin = 0  # set by open()
        self._hints_writeback = True  # until the system refuses a hint; any thread may clear it
        self._temporaries: list[Path] = []  # to be removed by discard()
        self._descriptor: int | None = None

    def open(self, metadata: dict[str, str]) -> None:
        """Create the temporary file, reserve its space and write its header. discard() removes it after any error."""
        header = self.layout.header(metadata)
        self._data_begin = len(header)
        with _errors_of(self.path):
            self._check_name()
            self._descriptor = self._create()
            reserve(self._files, self._descriptor, self._data_begin + self.layout.data_bytes)
        self.write(header, -len(header))  # offsets count from the first byte of the tensors

    def write(self, piece: ReadableBuffer, offset: int) -> None:
        """Write bytes at an offset that counts from the first byte of the tensors. Several threads may call it."""
        descriptor, begin = self._open_descriptor(), self._data_begin + offset
        end = begin + memoryview(piece).nbytes
        try:
            write_fully(self._files, descriptor, piece, begin)
            if self._hints_writeback and begin // _WRITEBACK_BYTES != end // _WRITEBACK_BYTES:
                part = max(0, end // _WRITEBACK_BYTES - 1) * _WRITEBACK_BYTES
                self._hints_writeback = hint_writeback(self._files, descriptor, part, _WRITEBACK_BYTES)
        except OSError as error:  # _errors_of would enter a context manager for every write, thousands of times
            raise _with_path(error, self.path) from error

    def make_durable(self) -> None:
        """Write the file to disk (fsync) and close it."""
        descriptor = self._open_descriptor()
        self._files.fsync(descriptor)
        self._descriptor = None  # before close(): discard() must not close a descriptor that another file may have now
        self._files.close(descriptor)

    def publish(self) -> None:
        """Rename the file to its final name, durably. The file must be durable before (``make_durable``)."""
        with _errors_of(self.path):
            self._files.rename(self._temporaries[-1], self.path)
        self._temporaries.pop()
        sync_folder(self._files, self.path.parent)  # the new name is durable only with its folder

    def discard(self) -> None:
        """Remove the temporary file. Does nothing after publish()."""
        if self._descriptor is not None:
            with suppress(OSError):
                self._files.close(self._descriptor)
            self._descriptor = None
        while self._temporaries:
            with suppress(OSError):
                self._files.unlink(self._temporaries.pop())

    def _check_name(self) -> None:
        """Raise the OSError that publish() would raise at the end of the work: the name is a folder, or too long."""
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(self._files.lstat(self.path).st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))

    def _create(self) -> int:
        # Recorded before it exists: an interrupt between the two statements must not leave a file behind.
        self._temporaries.append(self.path.with_name(temporary_name(self.path.name)))
        return self._files.open_exclusive(self._temporaries[-1])

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise bug(f"{self.path}: the file is not open")
        return self._descriptor

    def convert_to_torch(self) -> None:
        """Replace the temporary file by one that torch.save writes. It maps the tensors: no file is whole in memory."""
        import torch

        from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

        # One mapping for all tensors: each mapping keeps a descriptor open, and models have thousands of tensors. It is
        # copy-on-write ("c"), because torch.from_numpy warns about arrays that are not writable.
        with open(self._files.open_read(self._temporaries[-1]), "rb") as own_file:
            # Others who may write to this folder may have put another file, or a link to one, in its place.
            if not os.path.samestat(*map(self._files.stat, (own_file.fileno(), self._open_descriptor()))):
                raise OSError(errno.ESTALE, "another file has taken the name", os.fspath(self._temporaries[-1]))
            plain = np.memmap(own_file, np.uint8, "c")
        tensors: dict[str, torch.Tensor] = {}
        for entry in self.layout.entries:
            tensor = torch.empty(entry.record.shape, dtype=TORCH_DTYPES[entry.dtype], device="cpu")
            if entry.begin < entry.end:
                own = plain[self._data_begin + entry.begin : self._data_begin + entry.end]
                tensor = torch.from_numpy(own).view(TORCH_DTYPES[entry.dtype]).reshape(entry.record.shape)
            tensors.update(dict.fromkeys(entry.record.keys, tensor))
        descriptor, self._descriptor = self._open_descriptor(), None
        self._files.close(descriptor)
        self._descriptor = self._create()
        with open(self._descriptor, "wb", closefd=False) as file:  # make_durable() needs the descriptor
            torch.save(tensors, file)
        self._files.unlink(self._temporaries.pop(0))


def _remove_stale(files: FileSystem, paths: Sequence[Path]) -> None:
    """Remove temporary files of processes that have ended from the folders of these outputs."""
    for folder in dict.fromkeys(path.parent for path in paths):
        with suppress(OSError):  # the folder may not exist yet
            remove_stale(
                folder,
                files.list(folder),
                untouched_seconds=lambda path: time.time() - files.lstat(path).st_ctime,
                remove=files.unlink,
            )
