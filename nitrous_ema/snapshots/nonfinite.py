"""Values of averages that are not finite: counted in the bytes of a snapshot, while they are written.

A number is NaN or infinite if all bits of its exponent are set. This is looked up in integers of the stored type's
size: numpy has no bfloat16, and checks float16 slowly. Two maxima decide about a piece without a temporary array. The
largest signed integer is below the bits of +inf if no positive number is infinite or NaN, and the largest unsigned one
is below those of -inf if no negative number is. Copied tensors are not looked at: a mask may well hold -inf.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.arguments import pluralize
from nitrous_ema._base.dtypes import STORED_DTYPES
from nitrous_ema.errors import NonFiniteError
from nitrous_ema.snapshots.header import Header, NonFinite
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PIECE_BYTES = 1 << 18  # the second maximum finds it in the core's cache


class NonFiniteCounter:
    """Counts values that are not finite in the data of one snapshot, per average.

    Args:
        layout: Positions of all tensors in the data.
    """

    def __init__(self, layout: Layout) -> None:
        dtype = STORED_DTYPES[layout.checkpoint_dtype]
        self._layout = layout
        self._item_bytes = dtype.num_bytes
        self._bits = _Bits(dtype.num_bytes, dtype.fraction_bits or 0)
        self._found: list[tuple[int, int] | None] = [None] * len(layout.gammas)  # number, and first element of these
        self._part = b""  # the beginning of a number whose end is in the next range
        self.has_nan = False
        """Whether any of the values is NaN. No cast to a smaller type makes NaN of a finite number, so then the average
        itself was not finite."""

    def add(self, begin: int, view: memoryview) -> None:
        """Count in a range of the data.

        Args:
            begin: Its first byte in the data.
            view: Its bytes, of one section. The ranges are added one after the other.
        """
        section_bytes = self._layout.sections[0].end
        if begin >= section_bytes * len(self._found):
            return
        if self._part or view.nbytes % self._item_bytes:
            begin, view = begin - len(self._part), memoryview(self._part + view)
            whole_bytes = view.nbytes // self._item_bytes * self._item_bytes
            view, self._part = view[:whole_bytes], bytes(view[whole_bytes:])
        profile, offset = divmod(begin, section_bytes)
        for start in range(0, len(view), _PIECE_BYTES):
            if (places := self._bits.places(view[start : start + _PIECE_BYTES])) is None:
                continue
            known = self._found[profile] or (0, (offset + start) // self._item_bytes + int(places[0]))
            self._found[profile] = known[0] + places.size, known[1]
            self.has_nan = self.has_nan or self._bits.has_nan

    def result(self) -> tuple[NonFinite | None, ...]:
        """Return, for each average, its values that are not finite, or None."""
        return tuple(each and NonFinite(each[0], self._record_of(each[1])) for each in self._found)

    def _record_of(self, element: int) -> int:
        """Return the index among all records of the tensor that has an element of the averages."""
        layout = self._layout
        place = bisect_right(layout.average_spans, element, key=lambda span: span.begin) - 1
        return layout.records.index(layout.averaged[place])


class _Bits:
    """Finds numbers that are not finite in the bytes of one floating-point type."""

    def __init__(self, num_bytes: int, fraction_bits: int) -> None:
        self._signed, self._unsigned = f"<i{num_bytes}", f"<u{num_bytes}"
        sign = 1 << (8 * num_bytes - 1)
        self._infinity = (sign - 1) >> fraction_bits << fraction_bits
        self._negative_infinity = sign | self._infinity
        self._fraction = (1 << fraction_bits) - 1
        self.has_nan = False
        """Whether the last call of ``places`` has found NaN."""

    def places(self, view: memoryview) -> NDArray[np.intp] | None:
        """Return the places of the numbers that are not finite; None if all are finite."""
        bits = np.frombuffer(view, self._unsigned)
        if int(bits.max()) < self._negative_infinity and int(bits.view(self._signed).max()) < self._infinity:
            return None
        places = np.flatnonzero(bits & self._infinity == self._infinity)
        self.has_nan = bool((bits[places] & self._fraction).any())
        return places


def has_nan(layout: Layout, chunks: Callable[[], Iterable[ReadableBuffer]]) -> bool:
    """Return whether any average in the data of a snapshot has a value that is NaN.

    Args:
        layout: Positions of all tensors in the data.
        chunks: As in ``SnapshotStore.write``.
    """
    counter, begin = NonFiniteCounter(layout), 0
    for buffer in chunks():
        view = memoryview(buffer).cast("B")
        counter.add(begin, view)
        begin += view.nbytes
        if counter.has_nan:
            return True
    return False


class NonFiniteAverage(NamedTuple):
    """What a snapshot records of an average that has values that are not finite."""

    sigma_rel: float
    """Length of the average."""
    num_values: int
    """Number of these values."""
    tensor: str
    """Canonical name of the first tensor that has one."""

    def __str__(self) -> str:
        return f"sigma_rel {self.sigma_rel:.4g}: {pluralize(self.num_values, 'value')}, the first in {self.tensor!r}"


def nonfinite_averages(header: Header) -> tuple[NonFiniteAverage | None, ...]:
    """Return the record of each average in a file; None for one whose values are finite, or not recorded."""
    layout = header.layout
    recorded = header.nonfinite or (None,) * len(layout.gammas)
    return tuple(
        found and NonFiniteAverage(sigma_rel, found.num_values, layout.records[found.record].name)
        for sigma_rel, found in zip(layout.sigma_rels, recorded, strict=True)
    )


def nonfinite_text(snapshot: Snapshot) -> str:
    """Return the averages of a snapshot with values that are not finite, as text; "" if all are finite."""
    found = (each for header in snapshot.headers for each in nonfinite_averages(header))
    return "; ".join(str(each) for each in found if each is not None)


def nonfinite_error(snapshot: Snapshot, *, has_nan: bool) -> NonFiniteError:
    """Return the error for a snapshot that was just written, with the cause and a remedy.

    Args:
        snapshot: Has values that are not finite.
        has_nan: Whether one of them is NaN.
    """
    name = next(each.tensor for each in nonfinite_averages(snapshot.headers[0]) if each is not None)
    cause = (None if has_nan else _overflow(snapshot.layout, name)) or (
        "Weights were not finite at this step or at an earlier one, and an average does not recover from that. Restore "
        "a snapshot of an earlier step (restore(step=...)); on_nonfinite='skip' leaves updates with such weights out."
    )
    found = f"averages have values that are not finite at step {snapshot.step} ({nonfinite_text(snapshot)})"
    return NonFiniteError(
        f"{snapshot.paths[0]}: {found}. {cause} This is reported once in a run; stats().nonfinite counts snapshots.",
        path=snapshot.paths[0],
        step=snapshot.step,
        name=name,
    )


def _overflow(layout: Layout, name: str) -> str | None:
    """Return what to do if numbers have exceeded the stored type; None if it has the range of the averages' type."""
    dtype = STORED_DTYPES[layout.checkpoint_dtype]
    averaged_in = next(record.dtype for record in layout.averaged if record.name == name)
    if layout.checkpoint_dtype != "F16" and (averaged_in != "F64" or layout.checkpoint_dtype == "F64"):
        return None
    wider = "float64" if averaged_in == "F64" else "bfloat16 or torch.float32"
    exponent_bits = 8 * dtype.num_bytes - 1 - (dtype.fraction_bits or 0)
    largest = (2.0 - 2.0 ** -(dtype.fraction_bits or 0)) * 2.0 ** (2 ** (exponent_bits - 1) - 1)
    return (
        f"The largest number of {dtype.name} is {largest:.5g}. Store averages in another type "
        f"(checkpoint_dtype=torch.{wider}), unless weights were infinite at this step."
    )
