"""Spectral norms of averaged weights: torch's layers divide a weight by its largest singular value.

The layers estimate that value with two unit vectors, which a power iteration moves on in each training forward. The
average of unit vectors is shorter than 1, and the online model's vectors fit the online weights: with averaged weights
the estimate is too small, so that the layer's norm exceeds 1. The vectors are therefore computed from the averaged
weights, exactly: power iteration may need thousands of steps where two singular values are close.

Both forms of torch are recognized: ``torch.nn.utils.parametrizations.spectral_norm``, and ``torch.nn.utils.
spectral_norm`` with its hook. Neither class has a public name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm


def spectral_vectors(module: Module) -> list[tuple[Tensor, Tensor]]:
    """Return the left and the right vector of each spectral norm in a module. Calls no code of the model."""
    return [(left, right) for _, left, right in _spectral_norms(module)]


def fit_spectral_norms(module: Module) -> None:
    """Set the vectors of each spectral norm to the singular vectors of the largest singular value of its weight."""
    with torch.no_grad():
        for matrix, left, right in _spectral_norms(module):
            u, v = _largest_singular_vectors(matrix())
            left.copy_(u)
            right.copy_(v)


def _spectral_norms(module: Module) -> Iterator[tuple[Callable[[], Tensor], Tensor, Tensor]]:
    """Yield each spectral norm: a function that returns its matrix, and its left and its right vector.

    A weight of one dimension has no vectors, and its norm is exact.
    """
    for submodule in module.modules():
        for hook in submodule._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight = getattr(submodule, f"{hook.name}_orig")
                vectors = getattr(submodule, f"{hook.name}_u"), getattr(submodule, f"{hook.name}_v")
                yield partial(hook.reshape_weight_to_matrix, weight.detach()), *vectors
        for parametrizations in getattr(submodule, "parametrizations", {}).values():
            for place, each in enumerate(parametrizations):
                if isinstance(each, _SpectralNorm) and hasattr(each, "_u"):
                    yield partial(_matrix_before, parametrizations, place), each._u, each._v


def _matrix_before(parametrizations: ParametrizationList, place: int) -> Tensor:
    """Return the matrix that a spectral norm divides: the weight, after the parametrizations before the norm."""
    before, norm = list(parametrizations)[:place], cast(Any, parametrizations[place])  # of a class without public names
    originals = [parametrizations.original] if parametrizations.is_tensor else []
    originals += [getattr(parametrizations, f"original{i}") for i in range(parametrizations.ntensors - len(originals))]
    values = tuple(original.detach() for original in originals)
    # In train mode a spectral norm would move its vectors on, and other parametrizations may draw random numbers.
    modes = [(module, module.training) for each in before for module in each.modules()]
    try:
        for module, _ in modes:
            module.training = False
        for each in before:
            values = (each(*values),)
    finally:
        for module, is_training in modes:
            module.training = is_training
    matrix: Tensor = norm._reshape_weight_to_matrix(*values)
    return matrix


def _largest_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular vectors of the largest singular value, as the eigenvector of the smaller Gram matrix."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    rows, columns = wide.shape
    if rows <= columns:
        u = torch.linalg.eigh(wide @ wide.mT)[1][:, -1]
        v = wide.mT @ u
        return u, v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    v, u = _largest_singular_vectors(wide.mT)
    return u, v
