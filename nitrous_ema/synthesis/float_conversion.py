"""Convert floating types with numpy alone, which has no bfloat16.

``widen`` converts stored numbers for summing, ``narrow`` rounds sums for storing. Finite float16 numbers have a
conversion of their own, which is faster than numpy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.dtypes import STORED_DTYPES

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(dtype.numpy) for code, dtype in STORED_DTYPES.items() if dtype.numpy is not None
}
"""numpy's type for each floating type, by its safetensors code; bfloat16 as its bits."""

_QUIET_NAN = np.uint16(0x7FC0)  # in bfloat16
_INFINITE_HALF, _HALF_SIGN = 0x7C00, 0x8000
# An int16 that is widened to int32 repeats its sign in the upper 16 bits. After a shift by 13, bits 28 to 30 repeat it,
# which belong to the exponent of a float32. This mask clears them. Bit 31 repeats it too, and is the float32's sign.
_WITHOUT_REPEATED_SIGNS = np.int32(-0x70000001)
_SMALLEST = np.full(1, 2.0**-149, np.float32)
_EXPONENT_OF_HALVES = np.float32(2.0**112)  # exponents have a bias of 127 in float32 and of 15 in float16


def widen(
    stored: NDArray[np.generic], code: str, out: NDArray[np.floating], *, scratch: NDArray[np.uint32] | None = None
) -> None:
    """Convert stored numbers to float64, which represents all of them exactly, or round them to float32.

    Args:
        stored: The numbers, little-endian: as bytes, or in the type that ``FLOAT_TYPES`` has for the code. The last
            axis must be contiguous.
        code: Their stored type, a key of ``FLOAT_TYPES``.
        out: Receives the numbers; float64 or float32, of the numbers' shape.
        scratch: Buffer for 16-bit types, of the same shape; allocated if None.
    """
    numbers = stored.view(FLOAT_TYPES[code])
    # numpy would warn about signaling NaNs, and about float64 numbers beyond the range of float32.
    with np.errstate(invalid="ignore", over="ignore"):
        if code == "BF16":  # the upper 16 bits of a float32
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
    """Convert finite float16 numbers by moving their bits to their places in float32, faster than numpy converts them.

    Args:
        halves: The numbers.
        out: Receives the numbers, float64 or float32.
        bits: Buffer of the same shape.

    Returns:
        False, with nothing converted, if a number is infinite or NaN, or if this thread flushes the smallest float32
        numbers to zero (``torch.set_flush_denormal``). Before the multiplication all float16 below 2**-14 are such
        numbers.
    """
    if not (_SMALLEST * _EXPONENT_OF_HALVES).all():  # 0 where the thread flushes
        return False
    signed = halves.view("<i2")
    # As signed numbers, positive infinity and NaNs are at least 0x7C00. Negative ones are recognized unsigned.
    if signed.size and (signed.max() >= _INFINITE_HALF or signed.view("<u2").max() >= _INFINITE_HALF | _HALF_SIGN):
        return False
    np.copyto(bits, signed)
    np.left_shift(bits, 13, out=bits)  # float32 has 13 bits more of fraction
    np.bitwise_and(bits, _WITHOUT_REPEATED_SIGNS, out=bits)
    # The bits now have the exponent bias of float16. A multiplication by a power of two corrects it exactly, and turns
    # subnormal float16 numbers into normal float32 numbers.
    singles = out if out.dtype == np.float32 else bits.view(np.float32)
    np.multiply(bits.view(np.float32), _EXPONENT_OF_HALVES, out=singles)
    if singles is not out:
        np.copyto(out, singles)
    return True


def narrow(values: NDArray[np.floating], code: str) -> NDArray[np.generic]:
    """Round float64 or float32 values to a stored type, to nearest and ties to even.

    Types of 16 bits are rounded through float32, as torch does it. So a file in bfloat16 equals the float32 average
    that the model casts to bfloat16.

    Args:
        values: Any shape.
        code: The stored type, a key of ``FLOAT_TYPES``.

    Returns:
        Little-endian array of the same shape; for "BF16" its bits as uint16. NaN and infinities are preserved.

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
    """Round float32 to the upper 16 bits of its representation, to nearest and ties to even."""
    bits = singles.view("<u4")
    # Adding 0x7FFF carries into the upper bits for more than half of their unit. The lowest upper bit is added as well,
    # so that exactly half carries only if that bit is 1, which rounds ties to even.
    carried = (bits >> np.uint32(16)) & np.uint32(1)
    carried += np.uint32(0x7FFF)
    carried += bits  # the bits of a NaN may wrap around here; NaN is restored below
    rounded: NDArray[np.uint16] = (carried >> np.uint32(16)).astype("<u2")
    rounded[np.isnan(singles)] = _QUIET_NAN
    return rounded
