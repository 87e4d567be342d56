"""Convert a folder of nitrous-ema 0.0.1 or ema-pytorch into a folder of snapshots.

An import must not mix two trainings, must survive an interruption, and must not restore snapshots that were pruned
since. It is therefore planned as a whole before anything is written: which legacy files are damaged, whether all hold
the same tensors, and which snapshots the new folder holds already. Then one snapshot after the other is committed as
by a training process. An interrupted import leaves a run with fewer snapshots, and the next import continues it.

Each snapshot stores a fingerprint of its legacy files: a digest of names, sizes and checksums of their archive members.
Files of another training have another fingerprint. Longer than 300 lines because the plan of an import and its writing
share the definition of its steps.

IMPORT-1  Nothing is written before everything is checked.  test_refused_import_writes_nothing
IMPORT-2  The legacy folder is only read.                   test_old_folder_is_left_as_it_was
IMPORT-3  Snapshots that exist are not written again, and   test_interrupted_import_continues_where_it_stopped,
    snapshots that were removed from a finished import are  test_pruned_snapshots_are_not_imported_again
    not restored.
IMPORT-4  Memory holds one chunk, for models of any size.   test_import_holds_one_chunk_at_a_time
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotNotFound, bug
from nitrous_ema.profile import gamma_to_sigma_rel
from nitrous_ema.snapshots.filesystem import FileSystem, is_there
from nitrous_ema.snapshots.header import Stamp, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.legacy.folder import LegacyFolder, LegacySnapshot
from nitrous_ema.snapshots.names import IMPORTED, new_run_id
from nitrous_ema.snapshots.readable_snapshot import with_same_tensors
from nitrous_ema.snapshots.reading import OpenFiles
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportStep:
    """One step of the legacy folder, and the snapshot to write for it."""

    old: LegacySnapshot
    """The legacy files."""
    layout: Layout
    """Layout of the new snapshot."""
    stamp: Stamp
    """Stamp of the new snapshot."""

    @property
    def bytes(self) -> int:
        """Size of the new file."""
        return header_bytes(self.layout, self.stamp) + self.layout.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Import:
    """A planned import: the snapshots to write, and the steps that are not written, by reason."""

    store: SnapshotStore
    """The new folder."""
    run: str
    """Id of the run in the new folder."""
    steps: tuple[ImportStep, ...]
    """Steps to write, ascending."""
    present: tuple[int, ...]
    """Steps that the new folder holds already."""
    removed: tuple[int, ...]
    """Steps that a finished import has written and that were removed since: they are not written again."""
    partial: tuple[tuple[int, tuple[float, ...]], ...]
    """Steps that lack a profile, each with the sigma_rels that it has."""
    damaged: tuple[SnapshotDamaged, ...]
    """Steps that cannot be imported, as the errors of their files."""
    excluded: tuple[int, ...]
    """Steps of the legacy folder that are excluded on request."""

    @property
    def bytes_to_write(self) -> int:
        """Size of all new files."""
        return sum(each.bytes for each in self.steps)

    def write_missing(self, on_written: Callable[[Snapshot], None] = lambda snapshot: None) -> list[SnapshotDamaged]:
        """Write the planned snapshots. After an interruption, a new plan holds the remaining ones.

        Args:
            on_written: Called with each snapshot once it is durable.

        Returns:
            The errors of all steps that could not be imported: ``damaged``, and files whose numbers are damaged.

        Raises:
            SnapshotWriteError: Writing to the new folder failed; snapshots that were written stay.
            NitrousError: A number overflows the requested type.
        """
        damaged = list(self.damaged)
        self.store.prepare()
        for step in self.steps:
            try:
                snapshot = self.store.write(step.layout, step.stamp, lambda step=step: _chunks(step))  # type: ignore[misc]
                on_written(snapshot)
            except SnapshotDamaged as error:
                damaged.append(error)
        # A closed run counts as finished: its missing steps were pruned. A run that lacks steps stays open for them.
        if not damaged and not self.excluded:
            self.store.close_run(self.run)
        return damaged


def plan_import(
    old: LegacyFolder, new: SnapshotStore, *, dtype: str | None = None, exclude: Collection[int] = ()
) -> Import:
    """Check both folders and plan which snapshots to write. Writes nothing.

    Args:
        old: The legacy folder.
        new: The folder for the snapshots: empty, not yet created, or with an earlier import of the same files.
        dtype: Type in which averages are stored, as a safetensors code; by default the type of the legacy files.
        exclude: Steps to leave out.

    Raises:
        ValueError: The new folder is the legacy folder, or inside it.
        SnapshotMismatch: Steps of the legacy folder hold different tensors, or the new folder holds other snapshots.
        SnapshotDamaged: A snapshot in the new folder is damaged.
        SnapshotNotFound: No step of the legacy folder can be imported.
        SnapshotError: A folder cannot be read, or the disk lacks space for the new snapshots.
    """
    if old.root.resolve() in (new.root.resolve(), *new.root.resolve().parents):
        raise ValueError(
            f"{new.root} is the imported folder or inside it, but an import only reads that folder. Choose another one."
        )
    intact, damaged = _intact(old.snapshots(exclude=exclude))
    if not intact:
        reason = damaged[0] if damaged else f"every step of {old.root} is excluded."
        raise SnapshotNotFound(f"nothing to import: {reason}", path=old.root, nearest=())
    if (note := with_same_tensors(intact[-1], intact)[1]) is not None:
        raise SnapshotMismatch(
            f"{intact[-1].path.parent} holds averages of different tensors: {note} Import each model's files from a "
            "folder of their own.",
            path=intact[-1].path.parent,
        )
    existing, is_finished = _existing(new, intact)
    # An earlier import is continued under its own id, also where its first steps are excluded now.
    run = next((each.run for each in existing.values()), None) or _run_id(intact[0], dtype)
    missing = _missing([_step(each, run, dtype) for each in intact], existing)
    # Below the newest existing step, a step is missing from a finished import because it was pruned. Newer steps were
    # added to the legacy folder since.
    removed = [each.stamp.step for each in missing if is_finished and each.stamp.step < max(existing)]
    planned = Import(
        store=new,
        run=run,
        steps=tuple(each for each in missing if each.stamp.step not in removed),
        present=tuple(each.step for each in intact if each.step in existing),
        removed=tuple(removed),
        partial=_partial(intact, len(old.gammas)),
        damaged=tuple(damaged),
        excluded=tuple(sorted({*exclude}.intersection(old.steps))),
    )
    _check_disk_space(planned)
    return planned


# The legacy folder


def _intact(snapshots: Sequence[LegacySnapshot]) -> tuple[list[LegacySnapshot], list[SnapshotDamaged]]:
    """Return the snapshots whose files can be opened, and the errors of the others."""
    intact, damaged = [], []
    for snapshot in snapshots:
        try:
            snapshot.check()
            intact.append(snapshot)
        except SnapshotDamaged as error:
            damaged.append(error)
    return intact, damaged


def _partial(intact: Sequence[LegacySnapshot], profiles: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Return the steps with fewer than ``profiles`` profiles, each with the sigma_rels that it has."""
    return tuple(
        (each.step, tuple(map(gamma_to_sigma_rel, each.gammas))) for each in intact if len(each.gammas) < profiles
    )


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
        trainer={IMPORTED: old.fingerprint()},
        created_ns=max(FileSystem().status(path).st_mtime_ns for path in old.paths),
    )
    return ImportStep(old=old, layout=layout, stamp=stamp)


def _run_id(first: LegacySnapshot, dtype: str | None) -> str:
    """Return a run id that depends on files, profiles and type only, so that a repeated import has the same id."""
    seconds = min(FileSystem().status(path).st_mtime for path in first.paths)
    started = datetime.fromtimestamp(seconds, tz=timezone.utc)
    source = f"{first.fingerprint()} {first.gammas!r} {dtype or first.averages[0].dtype}"
    return f"{new_run_id(started).rpartition('-')[0]}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _chunks(step: ImportStep) -> Iterator[memoryview]:
    """Yield the data of a new file, chunk by chunk; each chunk overwrites the buffer of the one before."""
    layout, old = step.layout, step.old
    buffer = memoryview(bytearray(max((end - begin for begin, end in layout.chunks), default=0)))
    with OpenFiles(()) as files:
        for section, (section_begin, section_end) in enumerate(layout.sections):
            padding = layout.padding_bytes if section == len(layout.gammas) else 0
            source = old.copied if section == len(layout.gammas) else old.averages[section]
            if source is None:
                raise bug("copied tensors without a source")
            is_average = section < len(layout.gammas)
            reader = (replace(source, dtype=layout.checkpoint_dtype) if is_average else source).reader(files)
            for begin in range(section_begin, section_end, layout.chunk_bytes):
                chunk = buffer[: min(layout.chunk_bytes, section_end - begin)]
                # A section is its padding followed by the source, so the first chunks may begin with zeros.
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
            f"{path} holds numbers that overflow {dtype}, or infinities. Import it without --dtype, which stores the "
            "type of the files, or with --dtype bfloat16, which has the range of float32."
        )


# The new folder


def _existing(new: SnapshotStore, intact: Sequence[LegacySnapshot]) -> tuple[dict[int, Snapshot], bool]:
    """Return the snapshots of an earlier import by step, and whether that import was finished."""
    if not is_there(new.root, new.files):
        return {}, False
    runs = new.runs()
    if not runs:
        return {}, False
    listing = new.examine(runs[-1])
    if listing.damaged:
        raise listing.damaged[0]
    existing = {each.step: each for each in listing.snapshots}
    imported = all(IMPORTED in each.stamp.trainer for each in existing.values())
    if len(runs) > 1 or not imported or not existing.keys() & {each.step for each in intact}:
        raise SnapshotMismatch(
            f"{new.root} holds run {', '.join(runs)}, which was not imported from this folder. "
            "Import into a new folder.",
            path=new.root,
        )
    return existing, new.is_closed(runs[-1])


def _missing(steps: Sequence[ImportStep], existing: Mapping[int, Snapshot]) -> list[ImportStep]:
    """Return the steps that the new folder lacks. Raises SnapshotMismatch if an existing one is of another import."""
    for step in steps:
        if step.stamp.step in existing:
            _check_same_import(existing[step.stamp.step], step)
    return [step for step in steps if step.stamp.step not in existing]


def _check_same_import(existing: Snapshot, step: ImportStep) -> None:
    """Refuse to continue an import of other files, or an import with other profiles or another type."""
    folder, layout = existing.paths[0].parent, existing.layout
    for difference, found, expected in (
        ("was imported from other files than", existing.stamp.trainer[IMPORTED], step.stamp.trainer[IMPORTED]),
        ("was imported with other profiles than those given for", layout.gammas, step.layout.gammas),
        ("stores averages in another type than requested for", layout.checkpoint_dtype, step.layout.checkpoint_dtype),
    ):
        if found != expected:
            raise SnapshotMismatch(
                f"{folder} {difference} {', '.join(path.name for path in step.old.paths)}: {found}, "
                f"expected {expected}. Import into another folder, or with the same options as before.",
                path=folder,
            )


def _check_disk_space(planned: Import) -> None:
    root, files = planned.store.root, planned.store.files
    nearest = next(each for each in (root, *root.parents) if is_there(each, files))
    needed = planned.bytes_to_write
    try:
        free = files.free_bytes(nearest)
    except OSError:
        return  # this file system does not report its space; writing checks it again for each snapshot
    if needed > free:
        raise SnapshotError(
            f"{planned.store.root}: not enough disk space for {pluralize(len(planned.steps), 'snapshot')}: "
            f"{format_bytes(needed)} are needed, and {format_bytes(free)} are free. Choose another disk, a smaller "
            "type (--dtype), or fewer steps (--exclude). Nothing was written.",
            path=planned.store.root,
        )
