"""Folders of nitrous-ema 0.0.1 and ema-pytorch, rewritten as snapshots of ours.

All of the old folder is looked at before anything is written: which files are damaged, whether they hold the same
tensors, what of them the new folder has already. Then one snapshot after the other is committed, each as a trainer
would commit it. An import that was interrupted is a run with fewer snapshots; the next one goes on with it.

A snapshot remembers the files that it came from by a fingerprint of their lists of parts (names, sizes, checksums), so
that another training is never taken for the same one.

I1  Nothing is written before all is checked.             test_refused_import_writes_nothing
I2  The old folder is only read.                          test_old_folder_is_left_as_it_was
I3  What is there already is not written again, and what  test_interrupted_import_goes_on_where_it_stopped,
    was removed from a finished import does not return.   test_what_was_pruned_does_not_come_back
I4  One buffer of a chunk, whatever the model.            test_import_holds_one_chunk_at_a_time
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.profile import gamma_to_sigma_rel
from nitrous_ema.snapshots.header import Stamp, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.legacy.folder import LegacyFolder, LegacySnapshot
from nitrous_ema.snapshots.names import new_run_id
from nitrous_ema.snapshots.readable_snapshot import check_same_tensors
from nitrous_ema.snapshots.reading import OpenFiles
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore

_FINGERPRINT = "imported"
Told = Callable[[Snapshot], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportStep:
    """One step of the old folder, and what it becomes."""

    old: LegacySnapshot
    layout: Layout
    stamp: Stamp

    @property
    def bytes(self) -> int:
        """Size of the new file."""
        return header_bytes(self.layout, self.stamp) + self.layout.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Import:
    """What an import will do."""

    store: SnapshotStore
    run: str
    """Id that the run has in the new folder, or gets."""
    steps: tuple[ImportStep, ...]
    """To be written, ascending."""
    present: tuple[int, ...]
    """Steps that are there already."""
    removed: tuple[int, ...]
    """Steps that an import which was finished has written, and that somebody has removed since: they stay away."""
    partial: tuple[tuple[int, tuple[float, ...]], ...]
    """Steps that lack a profile, each with the sigma_rels that it has."""
    damaged: tuple[SnapshotDamaged, ...]
    """What cannot be taken over."""
    excluded: tuple[int, ...]
    """Steps that are in the old folder and left out on request."""

    @property
    def bytes_to_write(self) -> int:
        """Size of all new files."""
        return sum(each.bytes for each in self.steps)

    def write_missing(self, told: Told = lambda snapshot: None) -> list[SnapshotDamaged]:
        """Write what is missing; called again after an interruption, a new plan goes on with the rest.

        Args:
            told: Called with each snapshot once it is durable.

        Returns:
            All that could not be taken over: ``damaged``, and files whose numbers turned out to be.

        Raises:
            SnapshotWriteError: The new folder cannot be written to; what was written stays.
            NitrousError: A number does not fit into the type that was asked for.
        """
        damaged = list(self.damaged)
        self.store.prepare()
        for step in self.steps:
            try:
                told(self.store.write(step.layout, step.stamp, lambda step=step: _chunks(step)))  # type: ignore[misc]
            except SnapshotDamaged as error:
                damaged.append(error)
        if not damaged and not self.excluded:
            self.store.close_run(self.run)
        return damaged


def plan_import(
    old: LegacyFolder, new: SnapshotStore, *, dtype: str | None = None, exclude: Collection[int] = ()
) -> Import:
    """Look at both folders and decide what is to be written. Changes nothing.

    Args:
        old: The folder to take over.
        new: Where its snapshots go: an empty or new folder, or one with an earlier import of the same files.
        dtype: Type in which averages are stored, as a safetensors code; by default that of the old files.
        exclude: Steps to leave out.

    Raises:
        ValueError: The new folder is the old one, or inside it.
        SnapshotMismatch: Steps of the old folder hold different tensors, or the new one holds something else.
        SnapshotDamaged: A snapshot in the new folder is damaged.
        SnapshotNotFound: Nothing of the old folder can be taken over.
        SnapshotError: A folder cannot be read, or there is no room for the new one.
    """
    if old.root.resolve() in (new.root.resolve(), *new.root.resolve().parents):
        raise ValueError(f"{new.root} is the old folder or inside it, which is left as it is; choose another folder.")
    whole, damaged = _whole(old.snapshots(exclude=exclude))
    if not whole:
        found = damaged[0] if damaged else f"{old.root} has no step that is not excluded."
        raise SnapshotNotFound(f"nothing to import: {found}", path=old.root, nearest=())
    check_same_tensors(whole[-1], whole)
    there, is_finished = _there(new, whole)
    run = next((each.run for each in there.values()), None) or _run_id(whole[0], dtype)
    steps = [_step(each, run, dtype) for each in whole]
    missing = []
    for step in steps:
        if step.stamp.step in there:
            _check_same(there[step.stamp.step], step)
        else:
            missing.append(step)
    removed = [each.stamp.step for each in missing if is_finished and each.stamp.step < max(there)]
    planned = Import(
        store=new,
        run=run,
        steps=tuple(each for each in missing if each.stamp.step not in removed),
        present=tuple(each.step for each in whole if each.step in there),
        removed=tuple(removed),
        partial=tuple(
            (each.step, tuple(map(gamma_to_sigma_rel, each.gammas)))
            for each in whole
            if len(each.gammas) < len(old.gammas)
        ),
        damaged=tuple(damaged),
        excluded=tuple(sorted({*exclude}.intersection(old.steps))),
    )
    _check_room(planned)
    return planned


# ---------------------------------------------------------------------------------------------------------------------
# The old folder


def _whole(snapshots: Sequence[LegacySnapshot]) -> tuple[list[LegacySnapshot], list[SnapshotDamaged]]:
    """Those whose files can be opened, and what is wrong with the others."""
    whole, damaged = [], []
    for snapshot in snapshots:
        try:
            snapshot.check()
            whole.append(snapshot)
        except SnapshotDamaged as error:
            damaged.append(error)
    return whole, damaged


def _step(old: LegacySnapshot, run: str, dtype: str | None) -> ImportStep:
    layout = Layout(
        records=old.records,
        gammas=tuple(old.gammas),
        sigma_rels=tuple(float(gamma_to_sigma_rel(gamma)) for gamma in old.gammas),
        checkpoint_dtype=dtype or old.averages[0].dtype,
    )
    stamp = Stamp(
        step=old.step,
        t=old.step,
        t_first=1,  # both libraries apply the first call of update()
        run=run,
        lineage=((run, None),),
        trainer={_FINGERPRINT: old.fingerprint()},
        created_ns=max(path.stat().st_mtime_ns for path in old.paths),
    )
    return ImportStep(old=old, layout=layout, stamp=stamp)


def _run_id(first: LegacySnapshot, dtype: str | None) -> str:
    """The same one for an import that is begun twice; another one for other profiles or another type."""
    seconds = min(path.stat().st_mtime for path in first.paths)
    started = datetime.fromtimestamp(seconds, tz=timezone.utc)
    how = f"{first.fingerprint()} {first.gammas!r} {dtype or first.averages[0].dtype}"
    return f"{new_run_id(started).rpartition('-')[0]}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"


def _chunks(step: ImportStep) -> Iterator[memoryview]:
    """The data of a new file; the buffer is used again for each chunk."""
    layout, old = step.layout, step.old
    buffer = memoryview(bytearray(max((end - begin for begin, end in layout.chunks), default=0)))
    with OpenFiles(()) as files:
        for section, (section_begin, section_end) in enumerate(layout.sections):
            padding = layout.padding_bytes if section == len(layout.gammas) else 0
            source = old.copied if section == len(layout.gammas) else old.averages[section]
            if source is None:
                raise RuntimeError("copied tensors without a source; this is a bug of nitrous_ema, please report it.")
            is_average = section < len(layout.gammas)
            reader = (replace(source, dtype=layout.checkpoint_dtype) if is_average else source).reader(files)
            for begin in range(section_begin, section_end, layout.chunk_bytes):
                chunk = buffer[: min(layout.chunk_bytes, section_end - begin)]
                zeros = max(0, padding - (begin - section_begin))
                chunk[:zeros] = bytes(zeros)
                reader.read_at(begin - section_begin + zeros - padding, chunk[zeros:])
                if is_average and DTYPE_BYTES[layout.checkpoint_dtype] < DTYPE_BYTES[source.dtype]:
                    _check_finite(chunk, layout.checkpoint_dtype, source.path)
                yield chunk


def _check_finite(chunk: memoryview, dtype: str, path: Path) -> None:
    import torch

    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    if torch.frombuffer(chunk, dtype=TORCH_DTYPES[dtype]).isinf().any():
        raise NitrousError(
            f"{path} holds numbers that are beyond {dtype}, or infinite. Import it in its own type (without --dtype), "
            "or as bfloat16, which reaches as far as float32."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The new folder


def _there(new: SnapshotStore, whole: Sequence[LegacySnapshot]) -> tuple[dict[int, Snapshot], bool]:
    """What an earlier import has written, by step, and whether that one was finished."""
    if not new.root.exists():
        return {}, False
    runs = new.runs()
    if not runs:
        return {}, False
    listing = new.examine(runs[-1])
    if listing.damaged:
        raise listing.damaged[0]
    there = {each.step: each for each in listing.snapshots}
    imported = all(_FINGERPRINT in each.stamp.trainer for each in there.values())
    if len(runs) > 1 or not imported or not there.keys() & {each.step for each in whole}:
        raise SnapshotMismatch(
            f"{new.root} holds run {', '.join(runs)}, which is no import of this folder. Import into "
            "a folder of its own.",
            path=new.root,
        )
    return there, new.files.exists(new.root / f"closed-{runs[-1]}")


def _check_same(there: Snapshot, step: ImportStep) -> None:
    """Refuse to go on with an import of other files, or one that was told otherwise."""
    folder, layout = there.paths[0].parent, there.layout
    for what, found, expected in (
        ("was imported from other files than", there.stamp.trainer[_FINGERPRINT], step.stamp.trainer[_FINGERPRINT]),
        ("was imported with other profiles than are named for", layout.gammas, step.layout.gammas),
        (
            "stores its averages in another type than is asked for",
            layout.checkpoint_dtype,
            step.layout.checkpoint_dtype,
        ),
    ):
        if found != expected:
            raise SnapshotMismatch(
                f"{folder} {what} {', '.join(path.name for path in step.old.paths)}: {found}, expected {expected}. "
                "Import into another folder, or in the same way as before.",
                path=folder,
            )


def _check_room(planned: Import) -> None:
    nearest = next(each for each in (planned.store.root, *planned.store.root.parents) if each.exists())
    needed = planned.bytes_to_write
    try:
        free = planned.store.files.free_bytes(nearest)
    except OSError:
        return  # it does not tell; each file is looked at again when it is written
    if needed > free:
        raise SnapshotError(
            f"{planned.store.root} needs {format_bytes(needed)} for {len(planned.steps)} snapshots, and {format_bytes(free)} are "
            "free. Choose another disk, a smaller type (--dtype), or fewer steps (--exclude). Nothing was written.",
            path=planned.store.root,
        )
