"""The table of ``dtypes`` as torch's own types. Imports torch, which nothing else in this package does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrous_ema._base.dtypes import AVERAGE_CODES, DTYPES

# Models may hold all types but float8_e8m0fnu, which torch 2.6 does not have.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    dtype.code: getattr(torch, dtype.name) for dtype in DTYPES if dtype.code != "F8_E8M0"
}
"""Torch's type for each code in a file."""

TORCH_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}
"""The code of each of torch's types that a file may hold."""

CHECKPOINT_DTYPES = tuple(getattr(torch, name) for name in AVERAGE_CODES)
"""Torch's types in which averages can be stored."""
