"""Floating types as bytes, converted with numpy alone (it lacks bfloat16)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Floating types by their safetensors code, as numpy stores them; bfloat16 as its bits."""

_QUIET_NAN = np.uint16(0x7FC0)


def widen(stored: NDArray[np.uint8], code: str, out: NDArray[np.float64]) -> None:
    """Convert stored numbers to float64, which holds every one of them exactly.

    Args:
        stored: Bytes of ``len(out)`` numbers, little-endian and contiguous.
        code: Type they are stored in, a key of ``FLOAT_TYPES``.
        out: Receives the numbers, shape [numbers].
    """
    numbers = stored.view(FLOAT_TYPES[code])
    if code == "BF16":
        numbers = (numbers.astype(np.uint32) << np.uint32(16)).view("<f4")
    with np.errstate(invalid="ignore"):  # said of signalling NaNs, which become quiet ones
        np.copyto(out, numbers)


def narrow(values: NDArray[np.float64], code: str) -> NDArray[np.generic]:
    """Round float64 values to a stored type, to nearest and ties to even.

    Types of 16 bits are rounded through float32, the way torch does it, so that a file in bfloat16 equals the
    float32 average cast by the model.

    Args:
        values: Shape [numbers].
        code: Type to store them in, a key of ``FLOAT_TYPES``.

    Returns:
        Little-endian array of the same length; for "BF16" the bits as uint16. NaN stays NaN, infinities stay.

    Raises:
        FloatingPointError: A finite value is too large for the type.
    """
    with np.errstate(over="raise", invalid="ignore", under="ignore"):
        if code == "F64":
            return values.astype("<f8", copy=False)
        singles = values.astype("<f4")
        if code == "F32":
            return singles
        if code == "F16":
            return singles.astype("<f2")
    return _to_bfloat16(singles)


def _to_bfloat16(singles: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = singles.view("<u4")
    half_less_one_if_even = (bits >> np.uint32(16)) & np.uint32(1)
    half_less_one_if_even += np.uint32(0x7FFF)
    half_less_one_if_even += bits  # a NaN's bits may wrap around here; NaN is put back below
    rounded: NDArray[np.uint16] = (half_less_one_if_even >> np.uint32(16)).astype("<u2")
    rounded[np.isnan(singles)] = _QUIET_NAN
    return rounded
