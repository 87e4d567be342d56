"""The results that a sweep need not evaluate again: those in its file that the same evaluation has returned.

A result is the same if metric, run, step, length, tolerance, exclusions and type are, and if the evaluation function
has the same fingerprint. A function that was changed must not get the results of the earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nitrous_ema.errors import warn
from nitrous_ema.search.fingerprint import OWN_STATE, differences, fingerprint
from nitrous_ema.search.results import ResultsFile
from nitrous_ema.search.table import Row

_MOST_NAMED = 3


class KnownResults:
    """The results of a file that an evaluation function may share, and the new ones.

    Args:
        file: The file of results; it is read here.
        evaluate: The evaluation function.
        maximize: Whether higher values are better, for all results.
    """

    def __init__(self, file: ResultsFile, evaluate: Callable[..., Any], *, maximize: bool) -> None:
        self.file = file
        self._evaluate = evaluate
        self._fingerprint = dict(fingerprint(evaluate))
        self._own_state: set[str] = set()
        self._rows: dict[tuple[object, ...], Row] = {}
        self._outdated: dict[tuple[object, ...], list[str]] = {}
        for row in file.read():
            if changed := differences(dict(row.evaluate), self._fingerprint):
                self._outdated[row.identity] = changed
            else:
                self._rows[row.identity] = replace(row, maximize=maximize)
        self._before = frozenset(self._rows)
        self._has_warned = False

    def get(self, identity: tuple[object, ...]) -> Row | None:
        """Return a result by ``Row.identity``, or None."""
        return self._rows.get(identity)

    def reuse(self, identities: Collection[tuple[object, ...]]) -> None:
        """Warn, once, that results are read from the file instead of evaluated."""
        if not self._has_warned and not self._before.isdisjoint(identities):
            self._has_warned = True
            warn(
                f"sweep() reads results from {self.file.path} instead of evaluating again, because neither the code of "
                "evaluate nor the plain values that it uses have changed since. If its data or its model has changed, "
                "pass another metric= or results=."
            )

    def fingerprint_after(self) -> tuple[tuple[str, str], ...]:
        """Return the fingerprint for a result that was just evaluated; parts that evaluations change are marked."""
        now = dict(fingerprint(self._evaluate))
        self._own_state.update(differences(self._fingerprint, now))
        self._fingerprint = now
        return tuple((name, OWN_STATE if name in self._own_state else digest) for name, digest in now.items())

    def add(self, row: Row) -> None:
        """Record a new result. It is on disk when this returns."""
        self.file.add(row)
        self._rows[row.identity] = row

    def replace(self, row: Row) -> None:
        """Change a known result in this sweep only, not in the file."""
        self._rows[row.identity] = row

    def notes(self, rows: Sequence[Row]) -> Iterator[str]:
        """Yield notes on results that were read from the file, and on results there that ``evaluate`` has outlived."""
        if reused := sum(row.identity in self._before for row in rows):
            yield f"{reused} of {len(rows)} results were read from {self.file.path} instead of evaluated again."
        outdated = [self._outdated[row.identity] for row in rows if row.identity in {*self._outdated} - self._before]
        if outdated:
            parts = list(dict.fromkeys(name for changed in outdated for name in changed))
            more = f" and {len(parts) - _MOST_NAMED} more parts" if len(parts) > _MOST_NAMED else ""
            yield (
                f"{len(outdated)} of {len(rows)} results in {self.file.path} were evaluated again, because evaluate "
                f"has changed since: {', '.join(parts[:_MOST_NAMED])}{more}."
            )
