"""Small models that several tests share, each with one trait that averaging must get right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution, batch norm and a linear layer: parameters, averaged buffers and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose weight is the weight of the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens))


class Vector(nn.Module):
    """A model with a single parameter."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class SelfPickling(nn.Module):
    """A class whose pickles hold the whole state as arguments of a function, as EDM2's persistent classes do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct, ({"state": super().__reduce__()[2]},), None


def _reconstruct(meta: dict[str, Any]) -> SelfPickling:
    model = SelfPickling.__new__(SelfPickling)
    model.__dict__.update(meta["state"])
    return model


class Locked(nn.Module):
    """A model that cannot be deep-copied, because it holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        self.body[1].lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Generating(nn.Module):
    """A model that cannot be deep-copied, because it holds a running generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.batches: Iterator[int] = (number for number in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def patched() -> nn.Module:
    """Return a model with a layer whose forward was replaced by a closure over the layer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    forward = model[1].forward
    model[1].forward = lambda x: 2 * forward(x)
    return model


def uncopyable_models() -> list[Callable[[], nn.Module]]:
    return [Locked, Generating, patched]


@torch.no_grad()
def set_weights(model: nn.Module, seed: int) -> None:
    """Set new weights and buffers, as an optimizer and a forward in train mode do: random, but reproducible."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if any(stride == 0 for stride in tensor.stride()):
                tensor = tensor[:1]  # an expanded tensor repeats its first row
                values = values[:1]
            tensor.copy_(values.abs() if name.endswith("running_var") else values)
        else:
            tensor.fill_(seed)


def safetensors_of(folder: Path, step: int) -> dict[str, Tensor]:
    """Return the tensors that the safetensors package reads from the only snapshot of a step."""
    from safetensors.torch import load_file

    (path,) = folder.glob(f"step-{step:012d}-*/rank-00000-of-00001.safetensors")
    return load_file(path)
