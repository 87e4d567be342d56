"""The table of tensor dtypes: names, codes in files, sizes. ``torch_dtypes`` maps the same table to ``torch.dtype``."""

from __future__ import annotations

from typing import Literal, NamedTuple

from nitrous_ema.errors import bug

Kind = Literal["floating", "complex", "integer", "boolean"]


class DType(NamedTuple):
    """One row of the table."""

    name: str
    """Torch's name, without ``torch.``."""
    code: str
    """The code in safetensors files and in snapshots."""
    num_bytes: int
    """Bytes per element."""
    kind: Kind
    """Kind of its elements."""
    numpy: str | None = None
    """For dtypes in which averages are stored: numpy's type string; for bfloat16, which numpy lacks, uint16."""
    fraction_bits: int | None = None
    """For the same dtypes: stored bits of the fraction, without the implicit leading bit."""

    @property
    def half_unit(self) -> float:
        """The largest relative error of rounding a normal number to this dtype.

        Raises:
            RuntimeError: The dtype has no ``fraction_bits``.
        """
        if self.fraction_bits is None:
            raise bug(f"averages are not stored as {self.name}")
        return 2.0 ** -(self.fraction_bits + 1)


DTYPES = (
    DType("float64", "F64", 8, "floating", "<f8", 52),
    DType("float32", "F32", 4, "floating", "<f4", 23),
    DType("float16", "F16", 2, "floating", "<f2", 10),
    DType("bfloat16", "BF16", 2, "floating", "<u2", 7),
    DType("float8_e4m3fn", "F8_E4M3", 1, "floating"),
    DType("float8_e5m2", "F8_E5M2", 1, "floating"),
    DType("float8_e8m0fnu", "F8_E8M0", 1, "floating"),
    DType("complex64", "C64", 8, "complex"),
    DType("int64", "I64", 8, "integer"),
    DType("int32", "I32", 4, "integer"),
    DType("int16", "I16", 2, "integer"),
    DType("int8", "I8", 1, "integer"),
    DType("uint64", "U64", 8, "integer"),
    DType("uint32", "U32", 4, "integer"),
    DType("uint16", "U16", 2, "integer"),
    DType("uint8", "U8", 1, "integer"),
    DType("bool", "BOOL", 1, "boolean"),
)
"""Every dtype that a file may contain."""

DTYPE_BYTES = {dtype.code: dtype.num_bytes for dtype in DTYPES}
"""Bytes per element, by code."""

CODES = {dtype.name: dtype.code for dtype in DTYPES}
"""Code of each dtype, by torch's name."""

STORED_DTYPES = {dtype.code: dtype for dtype in DTYPES if dtype.numpy is not None}
"""The dtypes of averages in files, by code. A new one also needs ``widen`` and ``narrow`` in ``synthesis``."""

STORED_CODES = {dtype.name: code for code, dtype in STORED_DTYPES.items()}
"""Code of the same dtypes, by torch's name."""

AVERAGEABLE = frozenset(dtype.code for dtype in DTYPES if dtype.kind in ("floating", "complex")) - {"F8_E8M0"}
"""Codes of the dtypes whose tensors can be averaged. F8_E8M0 stores scales: it has neither sign nor fraction."""

_SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def parse_dtype(text: str) -> str:
    """Return torch's name of a dtype: ``bf16`` and ``torch.bfloat16`` give ``bfloat16``; other names stay."""
    name = text.strip().removeprefix("torch.")
    return _SHORT_NAMES.get(name, name)


def dtype_code(dtype: object) -> str | None:
    """Return the code of a dtype in which averages can be stored; None for None.

    Args:
        dtype: A name such as ``"bfloat16"`` or ``"bf16"``, or a ``torch.dtype``.

    Raises:
        ValueError: Averages cannot be stored in this dtype.
    """
    if dtype is None:
        return None
    code = STORED_CODES.get(parse_dtype(str(dtype)))
    if code is None:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(STORED_CODES)}, as a name or a torch.dtype.")
    return code
