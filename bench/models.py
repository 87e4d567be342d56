"""Models of several sizes to average: plain torch, so that nothing has to be installed or fetched."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a skip connection, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x))


class VisionTransformer(nn.Module):
    """As in torchvision, with the same tensors; by default ViT-B/16."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, image: int = 224, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))


class Flat(nn.Module):
    """One parameter."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((elements,), 0.5))


def tiny() -> nn.Module:
    """About a thousand parameters in many tiny tensors: all overhead, no arithmetic."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(32)))


def many() -> nn.Module:
    """A thousand tensors of a million parameters, as deep U-Nets have them."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(45, 45), nn.Tanh()) for _ in range(500)))


def resnet() -> nn.Module:
    """ResNet-18 for small images."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(Residual(*each) for each in [*widths, (512, 512, 1)]),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)),
    )


def vit_ti() -> nn.Module:
    """ViT-Ti/16: 5.7 million parameters."""
    return VisionTransformer(width=192, heads=3)


def vit_s() -> nn.Module:
    """ViT-S/16: 22 million parameters."""
    return VisionTransformer(width=384, heads=6)


def vit() -> nn.Module:
    """ViT-B/16: 87 million parameters."""
    return VisionTransformer()


def flat() -> nn.Module:
    """300 million parameters in one tensor."""
    return Flat(300_000_000)


def averaged_elements(model: nn.Module) -> int:
    """Floating-point parameters and buffers: what every library here averages."""
    return sum(each.numel() for each in [*model.parameters(), *model.buffers()] if each.is_floating_point())


def averaged_tensors(model: nn.Module) -> int:
    """How many tensors these are."""
    return sum(each.is_floating_point() for each in [*model.parameters(), *model.buffers()])
