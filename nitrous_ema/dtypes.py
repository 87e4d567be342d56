"""What users call the types that averages are rounded to, and what files call them."""

from __future__ import annotations

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def parse_dtype(text: str) -> str:
    """The name that ``DTYPES`` has for a type: ``bf16`` and ``torch.bfloat16`` are ``bfloat16``."""
    name = text.strip().removeprefix("torch.")
    return _SHORT.get(name, name)


def rounded_code(given: object) -> str | None:
    """What files call a type that is given by name or as torch's; None if none is given.

    Raises:
        ValueError: It is no type that averages can be rounded to.
    """
    if given is None:
        return None
    code = DTYPES.get(parse_dtype(str(given)))
    if code is None:
        raise ValueError(f"dtype is {given!r}; expected one of {', '.join(DTYPES)}, by name or as torch's.")
    return code
