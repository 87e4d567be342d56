"""Synthesized averages as files, under the keys of the model's ``state_dict()``.

A file comes to exist whole or not at all: it is written under a temporary name that starts with a dot, in the folder of
its final name, made durable and renamed. Its space is reserved before anything is computed. It is filled at offsets
while the average streams by, by several threads, so its size does not matter; the disk is told to begin meanwhile.
What a process that was killed has left in that folder is removed first.

Several processes may share the work, each writing one file of every average (``write_shard``); they need not know of
each other. What is whose is a function of the plan and their number.

Longer than the house's 300 lines because how a file is filled, made durable and named belong on one page.
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
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.filesystem import FileSystem, hint_writeback, reserve, write_fully
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
_ROUNDED_OUTPUTS = 8  # at a time: rounding a tile of these takes at most 1.8 MB
_FSYNC_THREADS = 8
_WRITEBACK_BYTES = 8 << 20  # the disk is told to begin with so many, while the next ones are computed

Committed = Callable[[int, Path], None]
"""Called with the index of each output and its path once it is durable, on the calling thread."""


def output_name(step: int, sigma_rel: float, suffix: str = ".safetensors") -> str:
    """File name of the average of one length at one step."""
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

    ``.safetensors`` and ``.pt`` (a dict of tensors, for ``torch.load(weights_only=True)``) hold what the unwrapped
    model's ``load_state_dict(strict=True)`` takes: tied tensors under all their keys, no non-persistent buffers, copied
    tensors as the target's snapshot has them. Skipped tensors are in no snapshot, so they are absent; the metadata of a
    ``.safetensors`` file names them.

    Args:
        plan: The averages.
        paths: One per output. The suffix decides the format. A file of that name is replaced, atomically.
        dtype: Type of the floating tensors, as a safetensors code ("F32", "BF16", "F16", "F64"); by default each has
            the model's own. Complex and integer tensors always have the model's own.
        memory_bytes: Memory to stay within.
        progress: Told of the bytes read.
        committed: Called with the index of each output and its path once it is durable.
        files: The file system to write to.
        threads: At most so many; by default one for each core this process may use. No bit depends on it.
        accumulate: Type of products and sums, "float64" or "float32".

    Raises:
        ValueError: Wrong number of paths, unknown suffix or dtype, or a budget that is too small for
            GROUP_OUTPUTS of the averages. More are written in as few passes over the snapshots as it allows.
        SnapshotDamaged: A chunk's checksum is wrong. No output of that pass is left behind.
        NitrousError: A value does not fit into the type.
        OSError: The folder cannot be written to.
    """
    check_outputs(plan, paths, dtype=dtype, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    contents = {
        suffix: OutputLayout(plan, dtype, tied_once=suffix == ".pt") for suffix in {each.suffix for each in paths}
    }
    outputs = [_Output(index, path, contents[path.suffix], files or FileSystem()) for index, path in enumerate(paths)]
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

    For ``<stem>.safetensors``, part 0 of 4 writes ``<stem>-00001-of-00004.safetensors``, and
    ``<stem>.safetensors.index.json``, which says in which file each tensor is, as transformers and diffusers expect it.
    The parts may be written in any order, by any processes, at any time. What is missing then is told by
    ``load_average``. Bits are those of ``write_outputs``.

    Args:
        plan: The averages; the same plan for all parts.
        paths: One ``.safetensors`` name per output, as for ``write_outputs``; none of them is written itself.
        part: Which one, in [0, parts).
        parts: How many there are.
        dtype: As in ``write_outputs``; so are the others.
        memory_bytes: Memory to stay within.
        progress: Told of the bytes read.
        committed: Called with the index of each output and the path of its part once it is durable.
        files: The file system to write to.
        threads: At most so many.
        accumulate: Type of products and sums.

    Raises:
        ValueError: As ``write_outputs``; or no such part, or a path that does not end in .safetensors.
        SnapshotDamaged: As ``write_outputs``; so are the others.
        NitrousError: A value does not fit into the type.
        OSError: The folder cannot be written to.
    """
    check_outputs(plan, paths, dtype=dtype, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    if not 0 <= part < parts <= 99999:
        raise ValueError(f"part {part} of {parts}: expected 0 <= part < parts <= 99999.")
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: only .safetensors files are written in parts; choose such a name.")
    files = files or FileSystem()
    names = part_names(plan, dtype, parts)
    contents = OutputLayout(plan, dtype, names=names[part])
    outputs = [_Output(index, part_path(path, part, parts), contents, files) for index, path in enumerate(paths)]
    _remove_stale(files, paths)
    _write(plan, outputs, contents.elements, committed, memory_bytes, progress, threads, accumulate)
    if part == 0:
        for path in paths:
            _replace(files, index_path(path), index_text(plan, dtype, names, path).encode())


def check_outputs(
    plan: Plan,
    paths: Sequence[Path],
    *,
    dtype: str | None,
    memory_bytes: int,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> int:
    """Refuse what write_outputs() could not do, before anything is touched.

    Returns:
        The memory that it will take at most, in bytes.

    Raises:
        ValueError: As write_outputs().
    """
    if len(paths) != len(plan.gammas):
        raise ValueError(f"paths: {len(paths)} for {len(plan.gammas)} averages; one per average is expected.")
    if len(set(paths)) != len(paths):
        raise ValueError("paths: two averages would be written to one file; give each its own name.")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file; expected a name that ends in {' or '.join(SUFFIXES)}.")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise ValueError(f"dtype: {dtype!r} is not a floating type; expected one of {', '.join(FLOAT_TYPES)}.")
    return max(
        engine_sizes(plan.only(indices), memory_bytes, threads=threads, accumulate=accumulate).memory_bytes
        for indices in passes(plan, memory_bytes, accumulate=accumulate)
    )


def _write(
    plan: Plan,
    outputs: Sequence[_Output],
    elements: tuple[int, int] | None,
    committed: Committed | None,
    memory_bytes: int,
    progress: Progress | None,
    threads: int | None,
    accumulate: Accumulate,
) -> None:
    """Read the snapshots, once per pass, into these files, and make them durable."""
    for indices in passes(plan, memory_bytes, accumulate=accumulate):
        now = outputs[indices.start : indices.stop]
        try:
            for output in now:  # one after the other: a header of thousands of tensors takes megabytes
                output.open(metadata_of(plan, output.index, accumulate))
            fill = _Fill(now)
            stream(
                plan.only(indices),
                fill.take,
                memory_bytes=memory_bytes,
                progress=progress,
                threads=threads,
                accumulate=accumulate,
                elements=elements,
            )
            if any(output.contents.copied for output in now):
                stream_copied(plan, fill.take_copied)
            _commit(now, committed)
        finally:
            for output in now:
                output.discard()


def _commit(outputs: Sequence[_Output], committed: Committed | None) -> None:
    """Make files durable, several at a time: the disk orders their blocks better than we could."""
    with ThreadPoolExecutor(min(_FSYNC_THREADS, len(outputs)), thread_name_prefix="synthesis-fsync") as pool:
        durable: list[Future[None]] = []
        try:
            for output in outputs:
                if output.path.suffix == ".pt":
                    output.become_torch_file()  # one after the other: torch holds kilobytes for each tensor meanwhile
                durable.append(pool.submit(output.make_durable))
            for output, future in zip(outputs, durable, strict=True):
                future.result()
                output.publish()
                if committed is not None:
                    committed(output.index, output.path)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # their files are closed or removed next


class _Fill:
    """Rounds what the engine hands out, and writes it where it belongs. Any thread may call: offsets are disjoint."""

    def __init__(self, outputs: Sequence[_Output]) -> None:
        self._groups: list[tuple[OutputLayout, int, list[_Output]]] = []  # with the row of the first one
        for row, output in enumerate(outputs):
            last = self._groups[-1] if self._groups else None
            if last is not None and last[0] is output.contents and len(last[2]) < _ROUNDED_OUTPUTS:
                last[2].append(output)
            else:
                self._groups.append((output.contents, row, [output]))

    def take(self, begin_element: int, block: NDArray[np.floating], /) -> None:
        """Write a tile of all averages."""
        for contents, row, outputs in self._groups:
            for segment, begin, end in contents.averaged(begin_element, begin_element + block.shape[1]):
                values = block[row : row + len(outputs), begin - begin_element : end - begin_element]
                offset = segment.offset + (begin - segment.begin) * DTYPE_BYTES[segment.dtype]
                for output, rounded in zip(outputs, _rounded(values, segment.dtype, outputs), strict=True):
                    output.write(rounded, offset)

    def take_copied(self, begin_byte: int, piece: memoryview) -> None:
        """Write a piece of the copied tensors."""
        for contents, _, outputs in self._groups:
            for segment in contents.copied:
                begin, end = max(segment.begin, begin_byte), min(segment.end, begin_byte + len(piece))
                if begin >= end:
                    continue
                stored = piece[begin - begin_byte : end - begin_byte]
                width = DTYPE_BYTES[segment.stored]
                offset = segment.offset + (begin - segment.begin) // width * DTYPE_BYTES[segment.dtype]
                if segment.stored != segment.dtype:
                    values = np.empty((1, (end - begin) // width), dtype=np.float64)
                    widen(np.frombuffer(stored, dtype=np.uint8), segment.stored, values[0])
                    stored = memoryview(_rounded(values, segment.dtype, outputs[:1])[0])
                for output in outputs:
                    output.write(stored, offset)


def _rounded(values: NDArray[np.floating], dtype: str, outputs: Sequence[_Output]) -> NDArray[np.generic]:
    """Rows of numbers in the type of their files."""
    try:
        return narrow(values, dtype)
    except FloatingPointError as error:
        largest = np.nanmax(np.where(np.isfinite(values), np.abs(values), 0), axis=1)
        output = int(np.argmax(largest))
        raise NitrousError(
            f"{outputs[output].path}: a value of {float(largest[output])} is too large for {dtype}; "
            "choose a wider type for this output (--dtype bfloat16 or float32)."
        ) from error


def _replace(files: FileSystem, path: Path, content: bytes) -> None:
    """Give a small file new content, durably and atomically."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        descriptor = files.open_exclusive(temporary)
        try:
            write_fully(files, descriptor, content, 0)
            files.fsync(descriptor)
        finally:
            files.close(descriptor)
        files.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            files.unlink(temporary)
        raise
    files.fsync_folder(path.parent)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """What the system refuses is told with the name of the output, not with that of the unfinished file."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, os.strerror(error.errno or 0), str(path))


class _Output:
    """One file under its temporary name, until publish() or discard()."""

    def __init__(self, index: int, path: Path, contents: OutputLayout, files: FileSystem) -> None:
        self.index = index
        self.path = path
        self.contents = contents
        self._files = files
        self._data_begin = 0  # set by open()
        self._is_paced = True  # until the system takes no hint; any thread may find that out
        self._temporaries: list[Path] = []
        self._descriptor: int | None = None

    def open(self, metadata: dict[str, str]) -> None:
        """Create the temporary file, with its header. Whatever comes after this, discard() removes it."""
        header = self.contents.header(metadata)
        self._data_begin = len(header)
        with _told_of(self.path):
            self._check_name()
            self._descriptor = self._create()
            reserve(self._files, self._descriptor, self._data_begin + self.contents.data_bytes)
        self.write(header, -len(header))

    def write(self, piece: ReadableBuffer, offset: int) -> None:
        """Write bytes at an offset in the tensors."""
        descriptor, begin = self._open_descriptor(), self._data_begin + offset
        end = begin + memoryview(piece).nbytes
        try:
            write_fully(self._files, descriptor, piece, begin)
            if self._is_paced and begin // _WRITEBACK_BYTES != end // _WRITEBACK_BYTES:
                part = max(0, end // _WRITEBACK_BYTES - 1) * _WRITEBACK_BYTES
                self._is_paced = hint_writeback(self._files, descriptor, part, _WRITEBACK_BYTES)
        except OSError as error:  # not by a with block, of which there would be thousands
            raise _refused(self.path, error) from error

    def make_durable(self) -> None:
        """Write everything to disk and close the file."""
        descriptor = self._open_descriptor()
        self._files.fsync(descriptor)
        self._descriptor = None
        self._files.close(descriptor)

    def publish(self) -> None:
        """Give it its name."""
        with _told_of(self.path):
            self._files.rename(self._temporaries[-1], self.path)
        self._temporaries.pop()
        self._files.fsync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was not published. Does nothing after publish()."""
        if self._descriptor is not None:
            with suppress(OSError):
                self._files.close(self._descriptor)
            self._descriptor = None
        while self._temporaries:
            with suppress(OSError):
                self._files.unlink(self._temporaries.pop())

    def _check_name(self) -> None:
        """Refuse one that could not be given in the end: of a folder, or too long."""
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(self._files.lstat(self.path).st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))

    def _create(self) -> int:
        self._temporaries.append(
            self.path.with_name(temporary_name(self.path.name))
        )  # before it exists: an interrupt may come in between
        return self._files.open_exclusive(self._temporaries[-1])

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise RuntimeError(
                f"{self.path}: used after it was closed; this is a bug of nitrous_ema, please report it."
            )
        return self._descriptor

    def become_torch_file(self) -> None:
        """Replace the temporary file by one of torch's, tensor by tensor: neither is ever whole in memory."""
        import torch

        from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

        # One mapping for all: each keeps a descriptor open, and models have thousands of tensors.
        plain = np.memmap(self._temporaries[-1], np.uint8, "c")
        tensors: dict[str, torch.Tensor] = {}
        for entry in self.contents.entries:
            tensor = torch.empty(entry.record.shape, dtype=TORCH_DTYPES[entry.dtype], device="cpu")
            if entry.begin < entry.end:
                own = plain[self._data_begin + entry.begin : self._data_begin + entry.end]
                tensor = torch.from_numpy(own).view(TORCH_DTYPES[entry.dtype]).reshape(entry.record.shape)
            tensors.update(dict.fromkeys(entry.record.keys, tensor))
        descriptor, self._descriptor = self._open_descriptor(), None
        self._files.close(descriptor)
        self._descriptor = self._create()
        with os.fdopen(os.dup(self._descriptor), "wb") as file:
            torch.save(tensors, file)
        self._files.unlink(self._temporaries.pop(0))


def _remove_stale(files: FileSystem, paths: Sequence[Path]) -> None:
    """Remove unfinished outputs of processes that have ended, in the folders of these outputs."""
    for folder in dict.fromkeys(path.parent for path in paths):
        with suppress(OSError):  # it may not exist yet
            remove_stale(
                folder,
                files.list(folder),
                untouched_seconds=lambda path: time.time() - files.lstat(path).st_ctime,
                remove=files.unlink,
            )
