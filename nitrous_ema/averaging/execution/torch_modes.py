"""Switching off the caller's torch modes around the package's own tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def neutral_modes() -> Iterator[None]:
    """Run the block outside inference mode and without gradients, whatever modes the caller has enabled.

    A buffer allocated in inference mode would be an inference tensor for good, and could not be written outside it.
    Autocast affects none of the operations used here; default device and dtype are always passed explicitly.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
