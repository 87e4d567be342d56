"""Bytes that averaging moves, and what they are of a training step (python -m bench.tables_bytes).

Nothing is measured here. Times are the least that the stated bandwidths allow, steps are 6 floating point operations
per parameter and token at a stated share of the stated peak: what a run on a device is to be held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PROFILES = 2
AVERAGE_BYTES = 4  # float32
MODEL_FLOPS_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to do one update; bytes per parameter of device memory, read and written."""

    name: str
    moved: Callable[[int, int], int]
    """From bytes of a parameter and number of profiles."""


def _moves_averages(profiles: int) -> int:
    return 2 * AVERAGE_BYTES * profiles  # each is read and written


VARIANTS = (
    Variant(name="one kernel", moved=lambda own, profiles: own + _moves_averages(profiles)),
    Variant(name="foreach, float32", moved=lambda own, profiles: profiles * own + _moves_averages(profiles)),
    Variant(
        name="foreach, other types",  # cast to scratch, read from there once per profile
        moved=lambda own, profiles: own + AVERAGE_BYTES * (1 + profiles) + _moves_averages(profiles),
    ),
    Variant(
        name='one kernel, read="copied"', moved=lambda own, profiles: 3 * own + _moves_averages(profiles)
    ),  # copied, then read
    Variant(name="one kernel, stashed first", moved=lambda own, profiles: 3 * own + _moves_averages(profiles)),
    Variant(name='offload="host"', moved=lambda own, profiles: own),  # and as many over the bus
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What its maker states of it."""

    name: str
    bytes_per_second: float
    """Of its memory."""
    bus_bytes_per_second: float
    """To the host, one way; what such a bus gives, not its nominal rate."""
    flops: float
    """bfloat16, dense."""
    float32_flops: float
    """Without tensor cores: torch's default for float32 (torch.set_float32_matmul_precision)."""
    memory_bytes: float


DEVICES = (
    Device(
        name="A100 80GB",
        bytes_per_second=2.04e12,
        bus_bytes_per_second=25e9,
        flops=312e12,
        float32_flops=19.5e12,
        memory_bytes=80e9,
    ),
    Device(
        name="H100 SXM",
        bytes_per_second=3.35e12,
        bus_bytes_per_second=50e9,
        flops=989e12,
        float32_flops=67e12,
        memory_bytes=80e9,
    ),
    Device(
        name="MI300X",
        bytes_per_second=5.3e12,
        bus_bytes_per_second=50e9,
        flops=1307e12,
        float32_flops=163.4e12,
        memory_bytes=192e9,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and a batch of one device."""

    name: str
    parameters: float
    own_bytes: int
    tokens: int
    computes_in_float32: bool = False
    """Instead of bfloat16."""

    def step_seconds(self, device: Device) -> float:
        flops = device.float32_flops if self.computes_in_float32 else device.flops
        return 6 * self.parameters * self.tokens / (MODEL_FLOPS_SHARE * flops)

    def fits(self, device: Device) -> bool:
        """Whether weights, gradients and averages do, before anything else."""
        return self.parameters * (2 * self.own_bytes + AVERAGE_BYTES * PROFILES) < device.memory_bytes


MODELS = (
    Model(
        name="ViT-H/14, all in float32 (the speed test)",
        parameters=632e6,
        own_bytes=4,
        tokens=8 * 257,
        computes_in_float32=True,
    ),
    Model(name="ViT-H/14, float32 weights, 8 images of 224²", parameters=632e6, own_bytes=4, tokens=8 * 257),
    Model(name="DiT-XL/2, float32 weights, 32 images of 256²", parameters=675e6, own_bytes=4, tokens=32 * 256),
    Model(name="2 B transformer, bfloat16, 8 images of 1024²", parameters=2e9, own_bytes=2, tokens=8 * 4096),
    Model(name="8 B transformer, bfloat16, 8 images of 1024²", parameters=8e9, own_bytes=2, tokens=8 * 4096),
)


def bytes_table() -> list[str]:
    """Per variant and type of parameter."""
    lines = ["| variant | float32 parameters | bfloat16 parameters |", "|---|---|---|"]
    for variant in VARIANTS:
        cells = []
        for own in (4, 2):
            fits = variant.name != "foreach, float32" if own == 2 else variant.name != "foreach, other types"
            cells.append(f"{variant.moved(own, PROFILES)} bytes" if fits else "–")
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return lines


def steps_table() -> list[str]:
    """Per model and device: what an update and a snapshot cost at least, and what that is of a step."""
    lines = [
        "| model and batch | device | step | update | of a step | snapshot to the host | steps that it lasts |",
        "|---|---|---|---|---|---|---|",
    ]
    moved = VARIANTS[0].moved
    for model in MODELS:
        for device in filter(model.fits, DEVICES):
            step = model.step_seconds(device)
            update = model.parameters * moved(model.own_bytes, PROFILES) / device.bytes_per_second
            copy = model.parameters * AVERAGE_BYTES * PROFILES / device.bus_bytes_per_second
            lines.append(
                f"| {model.name} | {device.name} | {step * 1e3:.0f} ms | {update * 1e3:.1f} ms | {update / step:.1%} "
                f"| {copy * 1e3:.0f} ms | {copy / step:.1f} |"
            )
    return lines


def main() -> None:
    """Print both tables."""
    print(f"Bytes of device memory moved per parameter and update of {PROFILES} float32 averages:\n")
    print("\n".join(bytes_table()))
    print(
        f"\nThe least that they cost (one kernel; training in bfloat16 where nothing else is stated, at "
        f"{MODEL_FLOPS_SHARE:.0%} of the peak; snapshots in float32; where weights, gradients and averages fit):\n"
    )
    print("\n".join(steps_table()))


if __name__ == "__main__":
    main()
