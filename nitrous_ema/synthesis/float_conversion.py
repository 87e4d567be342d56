"""Floating types as bytes, converted with numpy alone (it lacks bfloat16)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.dtypes import AVERAGE_DTYPES

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(dtype.numpy) for code, dtype in AVERAGE_DTYPES.items() if dtype.numpy is not None
}
"""Floating types by their safetensors code, as numpy stores them; bfloat16 as its bits."""

_QUIET_NAN = np.uint16(0x7FC0)
_INFINITE_HALF, _HALF_SIGN = 0x7C00, 0x8000
_WITHOUT_REPEATED_SIGNS = np.int32(-0x70000001)
_SMALLEST = np.full(1, 2.0**-149, np.float32)
_EXPONENT_OF_HALVES = np.float32(2.0**112)  # float32 counts exponents from 127, float16 from 15


def widen(
    stored: NDArray[np.generic], code: str, out: NDArray[np.floating], *, scratch: NDArray[np.uint32] | None = None
) -> None:
    """Convert stored numbers to float64, which holds every one of them exactly, or round them to float32.

    Args:
        stored: The numbers, little-endian: as bytes, or in the type that ``FLOAT_TYPES`` has for the code. The last
            axis must be contiguous.
        code: Type they are stored in, a key of ``FLOAT_TYPES``.
        out: Receives the numbers, float64 or float32, of the numbers' shape.
        scratch: Memory for 16-bit types, of the same shape; made if it is not given.
    """
    numbers = stored.view(FLOAT_TYPES[code])
    with np.errstate(invalid="ignore", over="ignore"):  # said of signalling NaNs, and of float64 beyond float32
        if code == "BF16":
            bits = np.empty(numbers.shape, np.uint32) if scratch is None else scratch
            np.copyto(bits, numbers)
            np.left_shift(bits, np.uint32(16), out=bits)
            numbers = bits.view("<f4")
        elif code == "F16":
            bits = np.empty(numbers.shape, np.uint32) if scratch is None else scratch
            if _widen_halves(numbers, out, bits.view(np.int32)):
                return
        np.copyto(out, numbers, casting="same_kind")


def _widen_halves(halves: NDArray[np.generic], out: NDArray[np.floating], bits: NDArray[np.int32]) -> bool:
    """Move the bits of finite float16 to where float32 has them; faster than numpy's own conversion.

    False, with nothing done, where one of them is infinite or NaN, or where this thread takes the smallest float32 for
    zeros (``torch.set_flush_denormal``): on their way all float16 below 2**-14 are such numbers.
    """
    if not (_SMALLEST * _EXPONENT_OF_HALVES).all():
        return False
    signed = halves.view("<i2")
    if signed.size and (signed.max() >= _INFINITE_HALF or signed.view("<u2").max() >= _INFINITE_HALF | _HALF_SIGN):
        return False
    np.copyto(bits, signed)  # which repeats the sign
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _WITHOUT_REPEATED_SIGNS, out=bits)
    singles = out if out.dtype == np.float32 else bits.view(np.float32)
    np.multiply(bits.view(np.float32), _EXPONENT_OF_HALVES, out=singles)
    if singles is not out:
        np.copyto(out, singles)
    return True


def narrow(values: NDArray[np.floating], code: str) -> NDArray[np.generic]:
    """Round float64 or float32 values to a stored type, to nearest and ties to even.

    Types of 16 bits are rounded through float32, the way torch does it, so that a file in bfloat16 equals the
    float32 average cast by the model.

    Args:
        values: Any shape.
        code: Type to store them in, a key of ``FLOAT_TYPES``.

    Returns:
        Little-endian array of the same shape; for "BF16" the bits as uint16. NaN stays NaN, infinities stay.

    Raises:
        FloatingPointError: A finite value is too large for the type.
    """
    with np.errstate(over="raise", invalid="ignore", under="ignore"):
        if code == "F64":
            return values.astype("<f8", copy=False)
        singles: NDArray[np.float32] = values.astype("<f4", order="C")
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
