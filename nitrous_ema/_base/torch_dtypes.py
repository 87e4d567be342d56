"""The table of ``dtypes`` as ``torch.dtype``. The only module of ``_base`` that imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrous_ema._base.dtypes import DTYPES, STORED_CODES

# Without float8_e8m0fnu, which stores scales: it cannot be averaged, and torch 2.6 does not have it.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    dtype.code: getattr(torch, dtype.name) for dtype in DTYPES if dtype.code != "F8_E8M0"
}
"""torch.dtype for each code in a file."""

READABLE_DTYPES: Mapping[str, torch.dtype] = {
    dtype.code: getattr(torch, dtype.name) for dtype in DTYPES if hasattr(torch, dtype.name)
}
"""The same, with all types that this torch can read."""

TORCH_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}
"""Code in a file for each torch.dtype."""

CHECKPOINT_DTYPES = tuple(getattr(torch, name) for name in STORED_CODES)
"""Each torch.dtype in which a file can store averages. In memory, ``accumulation_dtype`` chooses the type."""
