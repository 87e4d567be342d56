"""The table of ``dtypes`` as ``torch.dtype``. The only module of ``_base`` that imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrous_ema._base.dtypes import DTYPES, STORED_CODES

# torch 2.6 has no float8_e8m0fnu, so no model contains it.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    dtype.code: getattr(torch, dtype.name) for dtype in DTYPES if dtype.code != "F8_E8M0"
}
"""torch.dtype for each code in a file."""

TORCH_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}
"""Code in a file for each torch.dtype."""

CHECKPOINT_DTYPES = tuple(getattr(torch, name) for name in STORED_CODES)
"""Each torch.dtype in which a file can store averages. In memory, ``accumulation_dtype`` chooses the type."""
