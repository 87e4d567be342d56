"""Remove each line of the protocol in turn; a check must notice it: ``python -m tests.crash.mutations``.

Prints the table of docs/crash-safety.md. Exit status 1 if a removal is not noticed, or if the unchanged code fails a
check.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotWriteError
from tests.crash import runs
from tests.crash.checks import (
    Depth,
    Violation,
    check_crashes,
    check_disagreement,
    check_end,
    check_forgetful_disk,
    check_rot,
    check_taken_name,
)
from tests.crash.subject import Edits, load_modules, load_subject

SHARDED = "snapshots.sharded"
COMMIT, REMOVAL, VALIDATION, STORE, HEADER, FILESYSTEM, READING, NAMES = (
    f"snapshots.{name}"
    for name in ("commit", "removal", "validation", "store", "header", "filesystem", "reading", "names")
)
WRITER = "async_.background_writer"
_SEEDS = {
    "twins": range(8),
    "twins without renameat2": range(8),
    "ranks that start together": range(4),
    runs.KILLED: (1, 3, 18),
    runs.KILLED_THINNING: (8, 13),
    runs.KILLED_BY_FILES: (10, 15, 22),
}
_ENDS = {name: range(100) for name in runs.RACES}
"""Seeds of runs whose faults are rare, and are seen without a crash."""
_SHALLOW = Depth(subsets=128, samples=2, second_crash_of=1000)


@dataclass(frozen=True)
class Mutation:
    """One line of the protocol, and the check that notices its removal."""

    removed: str
    noticed_by: str
    edits: Edits


def _crashes(name: str, edits: Edits, folder: Path) -> None:
    subject = load_subject(edits)
    for seed in _ENDS.get(name, ()):
        check_end(runs.record(name, subject, seed), subject)
    for seed in _SEEDS.get(name, (0,)):
        check_crashes(runs.record(name, subject, seed), subject, _SHALLOW)


def _forgetful(edits: Edits, folder: Path, *, orderly: bool) -> None:
    subject = load_subject(edits)
    check_forgetful_disk(runs.record("one rank", subject), subject, orderly=orderly, every=1 if orderly else 3)


def _streamed(edits: Edits, folder: Path) -> None:
    """Check that a chunk that changed on disk does not reach a sum."""
    sources = load_modules(READING, edits)[READING]
    from zlib import crc32

    path = folder / "source"
    path.write_bytes(bytes(90) + b"\1" + bytes(9))
    chunks = tuple(crc32(bytes(size)) for size in (64, 36))
    source = sources.FileSource(
        path=path, begin=0, num_bytes=100, dtype="U8", chunk_bytes=64, crc32=chunks, first_chunk=0
    )
    with sources.OpenFiles([path]) as files:
        try:
            source.reader(files).read_into(memoryview(bytearray(100)))
        except SnapshotDamaged:
            return
    raise Violation("a chunk with a wrong checksum was summed")


def _slots(edits: Edits, folder: Path) -> None:
    """Check that a failed write releases its slot."""
    from unittest import mock

    import torch

    from nitrous_ema.async_ import ema as service

    sink = load_modules(WRITER, edits)[WRITER].BackgroundSnapshotSink
    with mock.patch.object(service, "BackgroundSnapshotSink", sink):
        root = folder / "training"
        model = torch.nn.Linear(2, 2)
        ema = service.AsyncPostHocEMA(
            model, checkpoint_every_num_steps="manual", checkpoint_folder=root, wait_timeout=0.1
        )
    root.rmdir()
    root.write_bytes(b"")  # a file in place of the folder, so that every write fails
    ema.update()
    ema.checkpoint()
    try:
        ema.flush(timeout=3)
    except SnapshotWriteError:
        root.unlink()
        root.mkdir()
        ema.close(timeout=2)
        return
    except TimeoutError as error:
        raise Violation("a failed write keeps its slot") from error
    raise Violation("a failed write is not reported")


def _killed_in_one_pass(edits: Edits, folder: Path) -> None:
    subject = load_subject(edits)
    for seed in range(60):
        check_end(runs.record(runs.KILLED_IN_ONE_PASS, subject, seed), subject)


CHECKS: dict[str, Callable[[Edits, Path], None]] = {
    **{name: functools.partial(_crashes, name) for name in runs.NAMES},
    runs.KILLED_IN_ONE_PASS: _killed_in_one_pass,
    "disk that forgets": functools.partial(_forgetful, orderly=False),
    "disk that forgets, in order": functools.partial(_forgetful, orderly=True),
    "flipped bits, cut and moved files": lambda edits, folder: check_rot(load_subject(edits), every=7) and None,
    "ranks that disagree": lambda edits, folder: check_disagreement(load_subject(edits)),
    "taken temporary name": lambda edits, folder: check_taken_name(load_subject(edits), folder / "real"),
    "streaming a changed chunk": _streamed,
    "slot of a failed write": _slots,
}
"""Every check by its name. It takes the edits and an empty folder; it raises ``Violation`` or a ``NitrousError``."""

_FSYNC = "            self.files.fsync(descriptor)\n"
_FILL_AND_FSYNC = "            filled = fill()\n" + _FSYNC
_FINISH_AND_PUBLISH = """\
            header = self._finish(descriptor, lambda: self._fill(descriptor, layout, stamp, chunks))
            self._publish(temporary, final, stamp.step)
"""
_BOTH_FOLDERS = """\
            sync_folder(self.files, final.parent)
            sync_folder(self.files, self.root)
"""
_WRITES = """\
        sums, is_paced = _Sums(layout), True
        for chunk, begin, view in _matched(layout, chunks()):
            sums.add(chunk, begin, view)
            write_fully(self.files, descriptor, view, data_begin + begin)
            is_paced = is_paced and hint_writeback(self.files, descriptor, data_begin + begin, len(view))
"""
_HEADER_LAST = """\
        write_fully(self.files, descriptor, sums.encoded(stamp), 0)
        return sums.header(stamp)
"""
_HEADER_FIRST = """\
        views = list(_matched(layout, chunks()))
        sums = _Sums(layout)
        for each in views:
            sums.add(*each)
        write_fully(self.files, descriptor, sums.encoded(stamp), 0)
        for _, begin, view in views:
            write_fully(self.files, descriptor, view, data_begin + begin)
"""
_CLOSE_FAILED = """\
            with contextlib.suppress(OSError):
                self.files.close(descriptor)
            raise
"""
_LOOKUP = """\
        if files.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from error
"""
_TEMPORARY = "temporary = final.with_name(temporary_name(final.name))"
_MAKE_FOLDER = """\
        self._make_folder(final.parent)
"""
_NOTE_FIRST = "        self._committer.write_note(note)\n"
_LOOK = """\
        if not is_dropped and (exists() or self._unhide(hidden) or exists()):
            return True
"""
_LOOK_THEN_NOTE = """\
        if exists():
            self._committer.write_note(note)
            return True
"""
_PINNED = "        if self.files.exists(self._note(snapshot.step, snapshot.run)):\n"
_WRITE = "            path, header = self._write_file(final"


def _in_commit(removed: str, noticed_by: str, *changes: tuple[str, str]) -> Mutation:
    return Mutation(removed, noticed_by, {COMMIT: changes})


def _in_removal(removed: str, noticed_by: str, *changes: tuple[str, str]) -> Mutation:
    return Mutation(removed, noticed_by, {REMOVAL: changes})


def _in_validation(removed: str, noticed_by: str, *changes: tuple[str, str]) -> Mutation:
    return Mutation(removed, noticed_by, {VALIDATION: changes})


def _in_store(removed: str, noticed_by: str, *changes: tuple[str, str]) -> Mutation:
    return Mutation(removed, noticed_by, {STORE: changes})


# fmt: off
MUTATIONS: Sequence[Mutation] = (
    _in_commit("fsync of the file", "one rank", (_FSYNC, "")),
    _in_commit("fsync of the snapshot's folder", "one rank", (_BOTH_FOLDERS, _BOTH_FOLDERS.splitlines(True)[1])),
    _in_commit("fsync of ROOT", "one rank", (_BOTH_FOLDERS, _BOTH_FOLDERS.splitlines(True)[0])),
    _in_commit("fsync of ROOT's parents", "one rank", ("            sync_folder(self.files, folder.parent)\n", "")),
    _in_commit("fsync of parents that exist already", runs.KILLED,
        ("                self.files.fsync_folder(folder.parent)\n", "                pass\n")),
    _in_commit(
        "fsync of ROOT after a note (a run is closed, a snapshot is pinned)",
        "one rank",
        ("                self._finish(descriptor, lambda: None)\n            sync_folder(self.files, self.root)\n",
         "                self._finish(descriptor, lambda: None)\n"),
    ),
    Mutation("a failed fsync of a folder is raised", "fsync of ROOT fails", {
        FILESYSTEM: [("        if error.errno not in _NO_FOLDER_FSYNC:\n            raise\n", "")]}),
    _in_commit("a temporary name, and the rename", "one rank", (_TEMPORARY, "temporary = final"), (
        "            self._publish(temporary, final, stamp.step)\n", "")),
    _in_commit("rename after the fsync", "one rank", (_FINISH_AND_PUBLISH, """\
            def fill():
                header = self._fill(descriptor, layout, stamp, chunks)
                self._publish(temporary, final, stamp.step)
                return header
            header = self._finish(descriptor, fill)
""")),
    _in_commit("no fsync after a failed one", "fsync fails once", (_FSYNC, """\
            try:
                self.files.fsync(descriptor)
            except OSError:
                self.files.fsync(descriptor)
""")),
    _in_commit("a new file after a failed fsync", "fsync fails once", (_FILL_AND_FSYNC, """\
            try:
                filled = fill()
                self.files.fsync(descriptor)
            except OSError:
                filled = fill()
                self.files.fsync(descriptor)
""")),
    _in_commit("one fsync, not two", "one rank", (_FSYNC, 2 * _FSYNC)),
    _in_commit("a failed close is a failed write", "close fails once", (
        "        self.files.close(descriptor)\n        return filled",
        "        with contextlib.suppress(OSError):\n            self.files.close(descriptor)\n        return filled")),
    _in_commit("a second attempt", "fsync fails once", ("            first = error\n", "            raise\n")),
    _in_commit("close after a failure", "fsync fails once", (_CLOSE_FAILED, "            raise\n")),
    _in_commit("unlink after a failure", "fsync fails once", (
        "                self.files.unlink(temporary)\n", "                pass\n")),
    Mutation("O_EXCL", "taken temporary name", {FILESYSTEM: [("os.O_CREAT | os.O_EXCL | ", "os.O_CREAT | ")]}),
    Mutation("a rename that does not replace", "twins", {
        FILESYSTEM: [("files.rename_new(source", "files.rename(source")]}),
    Mutation("the lookup where renames always replace", "twins without renameat2", {FILESYSTEM: [(_LOOKUP, "")]}),
    Mutation("all of a write, in as many calls as it takes", "short writes and reads", {
        FILESYSTEM: [("        view, offset = view[written:], offset + written\n", "        return\n")]}),
    Mutation("all of a read, in as many calls as it takes", "short writes and reads", {
        FILESYSTEM: [("        filled += count\n    return", "        filled += count\n        break\n    return")]}),
    _in_commit("header after the data", "disk that forgets, in order", (
        _HEADER_LAST, "        return sums.header(stamp)\n"), (_WRITES, _HEADER_FIRST)),
    _in_commit("checksums of the chunks, written", "one rank", ("zlib.crc32(view, self._crc32[chunk])", "0")),
    _in_validation("checksums of the chunks, compared by verify()", "flipped bits, cut and moved files", (
        "                    if found != expected:\n                        message",
        "                    if False:\n                        message")),
    Mutation("checksums of the chunks, compared in synthesis", "streaming a changed chunk", {
        READING: [("if is_whole and running.crc != source.crc32[chunk]:", "if False:")]}),
    Mutation("checksum of the header, compared", "flipped bits, cut and moved files", {
        HEADER: [('    if blob[_CRC_BEGIN:crc_end] != b"%08x" % crc32:\n', "    if False:\n")]}),
    Mutation("size of the file, compared", "flipped bits, cut and moved files", {
        HEADER: [("    if file_bytes != end + layout.data_bytes:\n", "    if False:\n")]}),
    _in_validation("name of the file, compared", "flipped bits, cut and moved files", (
        "        if own != (path.parent.name, without_one_pass(path.name)):\n", "        if False:\n")),
    _in_validation("all ranks", "two ranks",
        ("if len(ranks[world_size]) == world_size]", "if ranks[world_size]]"),
        ("for rank in range(complete[0]))", "for rank in sorted(ranks[complete[0]]))")),
    Mutation("ranks that agree", "ranks that disagree", {
        SHARDED: [("                if found != expected:\n", "                if False:\n")]}),
    _in_store("no abandoned snapshots", "resumed, later forgotten", (
        " or step <= left_at\n", " or True\n")),
    _in_validation("size of a file in one pass, compared before it is called damaged", runs.KILLED_IN_ONE_PASS, (
        "if _is_unfinished(error) else error", "if False else error")),
    _in_commit("header before the data of a file in one pass", runs.KILLED_IN_ONE_PASS, (
        "            write_fully(self.files, descriptor, sums.encoded(stamp), 0)\n            for",
        "            write_fully(self.files, descriptor, bytes(header.data_begin), 0)\n            for")),
    _in_removal("fsync of ROOT before snapshots are called hidden", "thinned", (
        '                self._sync_root("hidden', '                0 and self._sync_root("hidden')),
    _in_removal("fsync of ROOT between hiding and unlinking", "killed while thinning", (
        '        self._sync_root("nothing was removed")\n', "")),
    _in_removal("a snapshot's folder is renamed before its files are unlinked", "killed while thinning", (
        "            rename_to_new(self.files, folder, hidden)\n", "            self._remove(folder)\n")),
    _in_removal("only folders called .trash-* are removed", "thinned",
        ("or name in noted]", 'or name.startswith("step-")]')),
    _in_removal("the newest snapshot is not hidden", "thinned", (
        "        if newest is not None and (", "        if False and (")),
    _in_removal("a pinned snapshot is not hidden", "thinned", (_PINNED, "        if False:\n")),
    _in_removal("pins are checked before a snapshot is removed", "pinned too late", (
        "            elif self._is_pinned(folder):\n", "            elif False:\n")),
    _in_removal("a pin is noted before the snapshot is looked for", "pinned meanwhile", (
        _NOTE_FIRST, ""), (_LOOK, _LOOK_THEN_NOTE)),
    _in_removal("one rename decides whether a snapshot is removed or comes back", "pinned meanwhile", (
        "claimed += self._claim(folder)", "claimed += [folder]")),
    _in_removal("a note hides a snapshot before its files are unlinked one by one", runs.KILLED_BY_FILES, (
        "            self._committer.write_note(self.root / dropped_note_name(snapshot.step, snapshot.run))\n",
        "            self._remove(folder)\n")),
    _in_removal("a pin fails where a note hides its snapshot", "pinned meanwhile, file by file", (
        "        if not is_dropped and (", "        if (")),
    Mutation("a pinned snapshot is listed in spite of a note", "pinned meanwhile, file by file", {
        NAMES: [("    return found.difference(", "    return found or found.difference(")]}),
    _in_removal("fsync of ROOT before the note on a removed snapshot is removed", runs.KILLED_BY_FILES, (
        '        self._sync_root("notes of', '        0 and self._sync_root("notes of')),
    _in_removal("fsync of ROOT after a pin is removed", "thinned", (
        "                self.files.unlink(note)\n            sync_folder(self.files, self.root)\n",
        "                self.files.unlink(note)\n")),
    _in_removal("ten minutes for readers of snapshots that others have hidden", "thinned", (
        "self.remove_hidden(_GRACE_SECONDS)", "self.remove_hidden()")),
    _in_removal("snapshots hidden long ago are removed", "thinned", (
        "            self.remove_hidden(_GRACE_SECONDS)\n", "            pass\n")),
    _in_removal("temporary files of dead processes are removed", runs.KILLED, ('temporary.writer == "gone"', "False")),
    _in_removal("temporary files of living processes are not removed", "ranks that start together", (
        'temporary.writer == "gone"', "True")),
    _in_commit("a folder that was removed while it was empty is made again", "swept while writing",
        (_MAKE_FOLDER, ""), (_WRITE, f"            self._make_folder(final.parent)\n{_WRITE}")),
    Mutation("the slot of a failed write is released", "slot of a failed write", {
        WRITER: [("            pool.release(slot)\n", "            pass\n")]}),
)
# fmt: on


def notices(check: str, edits: Edits) -> str | None:
    """Return the message of a check that notices these edits, or ``None``."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[check](edits, Path(folder))
        except (Violation, NitrousError) as error:  # any other error: the mutation breaks more than one line
            return str(error).splitlines()[0] if isinstance(error, Violation) else repr(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.mutations", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every check on every mutation: the whole matrix")
    parser.add_argument("--only", default="", help="run only mutations whose name contains this text")
    options = parser.parse_args(argv)
    logging.disable(logging.ERROR)
    started, blind = time.monotonic(), 0
    for check in CHECKS:
        if found := notices(check, {}):
            print(f"The unchanged code fails {check!r}: {found}", file=sys.stderr)
            return 1
    print("| removed | noticed by | message |\n|---|---|---|")
    for mutation in MUTATIONS:
        if options.only not in mutation.removed:
            continue
        checks = [mutation.noticed_by, *(check for check in CHECKS if options.all and check != mutation.noticed_by)]
        seen = {check: found for check in checks if (found := notices(check, mutation.edits))}
        blind += mutation.noticed_by not in seen
        found = seen.get(mutation.noticed_by, "**nothing**")
        print(f"| {mutation.removed} | {', '.join(seen) or '**no check**'} | {_brief(found)} |", flush=True)
    print(f"\n{len(MUTATIONS)} mutations, {blind} unnoticed, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if blind else 0


def _brief(found: str) -> str:
    for run, name in ((runs.A, "A"), (runs.B, "B"), (runs.C, "C"), (runs.D, "D")):
        found = found.replace(run, name)
    found = found.replace(f"{runs.ROOT}/", "").replace("/rank-00000-of-00001.safetensors", "").replace("|", "/")
    return found if len(found) < 100 else f"{found[:100]}..."


if __name__ == "__main__":
    sys.exit(main())
