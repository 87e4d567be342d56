"""The command ``nitrous-ema``.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such folder or snapshot, 4 damaged snapshot, 130 interrupted. What
was asked for goes to stdout, all else to stderr. Only the subcommands that need torch import it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema import __version__
from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotError, SnapshotNotFound

if TYPE_CHECKING:
    from nitrous_ema.snapshots.snapshot import Problem, Snapshot
    from nitrous_ema.snapshots.store import SnapshotStore

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_DAMAGED, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as the module says.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        # These two read the rest by themselves, also what argparse would take for an option of ours.
        if given[:1] == ["synthesize"]:
            return _synthesize(given[1:])
        if given[:1] == ["demo"]:
            return _demo(given[1:])
        options = _parser().parse_args(given)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except SystemExit as stop:  # argparse has said what is wrong, or has printed the help
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        return _failed("interrupted.", EXIT_INTERRUPTED)
    except SnapshotNotFound as error:
        return _failed(str(error), EXIT_NOT_FOUND)
    except SnapshotDamaged as error:
        return _failed(str(error), EXIT_DAMAGED)
    except BrokenPipeError:
        # The reader has seen enough; without this the interpreter complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (NitrousError, OSError) as error:
        return _failed(str(error), EXIT_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nitrous-ema",
        description="Post-hoc EMA: average while training, choose the EMA length afterwards.",
        epilog="nitrous-ema COMMAND --help tells more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nitrous-ema {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="train on handwritten digits, then choose an EMA length (about two minutes)")
    commands.add_parser("synthesize", help="write averages of any length from a folder of snapshots")

    verify = commands.add_parser(
        "verify", help="read every byte of a folder's snapshots and compare checksums", description=_VERIFY
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="the snapshot folder")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="list the runs and snapshots in a folder", description=_INSPECT)
    inspect.add_argument("folder", type=Path, metavar="DIR", help="the snapshot folder")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of text")
    inspect.set_defaults(run=_inspect)
    return parser


_VERIFY = "Reads every byte of every snapshot. One line per damaged file; exit status 4 if there is one, else 0."
_INSPECT = "Lists runs, snapshots, profiles and sizes by the files' headers; damage in the data is seen by verify only."


def _demo(arguments: Sequence[str]) -> int:
    from nitrous_ema import demo

    return demo.main(arguments)


def _synthesize(arguments: Sequence[str]) -> int:
    from nitrous_ema.async_ import synthesize_worker

    synthesize_worker.use_one_thread_per_product()
    return synthesize_worker.main(arguments)


# ---- verify


def _verify(options: argparse.Namespace) -> int:
    from nitrous_ema.snapshots.store import SnapshotStore

    store = SnapshotStore(options.folder)
    by_file: dict[Path, list[Problem]] = {}
    for problem in store.verify():
        by_file.setdefault(problem.path, []).append(problem)
    for problems in by_file.values():
        more = f" {len(problems) - 1} more of its chunks are damaged." if len(problems) > 1 else ""
        _print(problems[0].message + more)
    for incomplete in store.incomplete():
        _say(f"{incomplete.path} is not a snapshot (yet) and was passed over: {incomplete.reason}.")
    if by_file:
        return EXIT_DAMAGED
    _print("every snapshot is whole" if store.runs() else f"{options.folder} holds no snapshot")
    return 0


# ---- inspect


def _inspect(options: argparse.Namespace) -> int:
    from nitrous_ema.snapshots.store import SnapshotStore

    store = SnapshotStore(options.folder)
    damaged: dict[str, str] = {}
    runs = [_described_run(store, run, damaged) for run in store.runs()]
    found = {
        "folder": str(store.root),
        "runs": runs,
        "incomplete": [{"path": str(each.path), "reason": each.reason} for each in store.incomplete()],
        "damaged": [{"path": path, "message": message} for path, message in damaged.items()],
    }
    if options.json:
        _print(json.dumps(found, indent=2))
    else:
        _print("\n".join(_lines(found)))
    return 0


def _described_run(store: SnapshotStore, run: str, damaged: dict[str, str]) -> dict[str, Any]:
    """A run and its own snapshots; what is wrong with any of them is added to ``damaged``, by path."""
    snapshots = [each for each in _readable(store, run, damaged) if each.run == run]
    described: dict[str, Any] = {"run": run, "closed": (store.root / f"closed-{run}").exists()}
    if snapshots:
        layout = snapshots[-1].layout
        described |= {
            "lineage": [list(ancestor) for ancestor in snapshots[-1].stamp.lineage],
            "sigma_rels": list(layout.sigma_rels),
            "gammas": list(layout.gammas),
            "checkpoint_dtype": layout.checkpoint_dtype,
            "tensors": len(layout.records),
            "average_elements": layout.average_elements,
            "bytes": sum(each.bytes for each in snapshots),
        }
    described["snapshots"] = [
        {"step": each.step, "t": each.t, "bytes": each.bytes, "path": str(each.paths[0].parent)} for each in snapshots
    ]
    return described


def _readable(store: SnapshotStore, run: str, damaged: dict[str, str]) -> list[Snapshot]:
    """The history of a run without the snapshots that cannot be read."""
    from nitrous_ema.snapshots.format import parse_folder_name

    excluded: set[int] = set()
    while True:
        try:
            return store.snapshots(run, exclude=excluded)
        except SnapshotNotFound:
            return []  # nothing but damaged ones
        except SnapshotError as error:  # damaged, or of another history
            folders = (error.path.parent.name, error.path.name)
            steps = {named[0] for named in map(parse_folder_name, folders) if named} - excluded
            if not steps:
                raise
            damaged[str(error.path)] = str(error)
            excluded |= steps


def _lines(found: dict[str, Any]) -> list[str]:
    """What ``inspect`` found, for people."""
    lines = [found["folder"] if found["runs"] else f"{found['folder']} holds no snapshot"]
    for run in found["runs"]:
        lines += ["", f"run {run['run']}{' (closed)' if run['closed'] else ''}"]
        if not run["snapshots"]:
            continue
        ancestors = [f"{name} up to step {step}" for name, step in run["lineage"][:-1]]
        if ancestors:
            lines.append(f"  continues  {', '.join(ancestors)}")
        profiles = zip(run["sigma_rels"], run["gammas"], strict=True)
        lines += [
            f"  profiles   {', '.join(f'sigma_rel {sigma:g} (gamma {gamma:.4g})' for sigma, gamma in profiles)}",
            f"  tensors    {run['tensors']}; {run['average_elements']:,} averaged numbers per profile as "
            f"{run['checkpoint_dtype']}",
            f"  snapshots  {len(run['snapshots'])}, {run['bytes'] / 1e6:,.1f} MB",
        ]
        lines += [f"    step {each['step']:>9}   t {each['t']:>9}   {each['bytes'] / 1e6:>9,.1f} MB"
                  for each in run["snapshots"]]  # fmt: skip
    for title, entries, key in (("incomplete", "incomplete", "reason"), ("damaged", "damaged", "message")):
        lines += [f"\n{title}"] * bool(found[entries])
        lines += [f"  {each['path']}: {each[key]}" for each in found[entries]]
    return lines


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(f"nitrous-ema: {line}\n")


def _failed(why: str, status: int) -> int:
    _say(f"error: {why}")
    return status


if __name__ == "__main__":
    sys.exit(main())
