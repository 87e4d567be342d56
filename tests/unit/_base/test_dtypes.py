"""The table of dtypes agrees with torch, and names are normalized."""

from __future__ import annotations

import pytest
import torch

from nitrous_ema._base.dtypes import STORED_CODES, dtype_code, parse_dtype
from nitrous_ema._base.torch_dtypes import TORCH_DTYPES


@pytest.mark.parametrize("name", STORED_CODES)
def test_names_codes_and_torch_dtypes_agree(name):
    dtype = getattr(torch, name)
    assert TORCH_DTYPES[dtype_code(name)] == TORCH_DTYPES[dtype_code(dtype)] == dtype
    assert parse_dtype(str(dtype)) == name


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("half", "float16"), (" fp32 ", "float32")])
def test_short_names_are_known(short, name):
    assert dtype_code(short) == STORED_CODES[name]


def test_code_of_none_is_none():
    assert dtype_code(None) is None


@pytest.mark.parametrize("wrong", ["F32", "float8", "", torch.int32, torch.float8_e4m3fn, 32])
def test_other_dtypes_are_refused_with_the_expected_names(wrong):
    with pytest.raises(ValueError, match=r"dtype is .*; expected one of float64, float32, float16, bfloat16"):
        dtype_code(wrong)
