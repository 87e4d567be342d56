"""Outputs of a synthesis, read by the safetensors package and by the rule in the docs, not by our own reader."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch


def load_output(path: Path) -> dict[str, torch.Tensor]:
    """Return what ``load_state_dict`` takes: pairs of numbers are joined where the metadata names a complex tensor."""
    with safetensors.safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        joined = json.loads((file.metadata() or {}).get("complex", "[]"))
    return {key: torch.view_as_complex(each) if key in joined else each for key, each in state.items()}
