"""The averaging kernel: a launch reads every parameter once and moves every profile's average, for all tensors.

This module imports Triton, so only ``fused_step`` imports it, and only where the kernel will be launched.

**Cut.** A group's flat space is cut on a grid of ``BLOCK_ELEMENTS``. A program averages the part of one tensor that
lies in one block of that grid. ``blocks`` has a row per program with both numbers. ``tensors`` has a row per tensor:
the address that the parameter would have if the group's elements before it preceded it (so that an index into the
averages is an index into the parameter), its first and last element in the group, its type, and the width of accesses
to a whole block of it. Addresses and indices have 64 bits.

**Width.** A pointer from a table has no known alignment, and without one the compiler emits no wide access at all.
Averages of a whole block are aligned by the grid. The row records whether the parameter is aligned too: four elements
per access then, else one. At a tensor's two ends elements are accessed one by one, under a mask. All three layouts give
each thread the same elements, so no data passes through shared memory
(``test_averages_move_in_accesses_of_sixteen_bytes``).

**Compiled once.** Numbers that vary are not specialized (Triton compiles anew for 1 and for multiples of 16), floats
never are, so there is one compiled kernel per number of profiles in a launch, and ``rehearse`` has launched them all
(``test_no_launch_compiles_after_the_rehearsal``).

**Bits.** An average ``a`` moves by the formula of ``torch.lerp``, in float32 and with every operation rounded: ``a +
w * (x - a)`` where w < 1/2, ``x - (x - a) * (1 - w)`` from there on, where w is the weight rounded to float32.
Nothing is contracted to fused multiply-adds (``enable_fp_fusion=False``), so every device and Triton's interpreter
give the same bits. ``ForeachStep`` uses the same formula and the same w, but torch's own kernels are contracted (on
CUDA by nvcc's default, on the CPU by hand: ``lerp_vec`` in ATen/native/Lerp.h): they add the exact product where this
kernel adds the rounded one. The sums differ by at most half a unit in the last place *of the product*: one update by
the two steps may differ in an average's last bit, and in more bits only where the sum nearly cancels. Where w is 1
both copy the bits of the parameter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends import backends

BLOCK_ELEMENTS = 2048
MOST_PROFILES = 4
"""Profiles in one launch; more profiles need another launch, which reads the parameters again."""
NUM_WARPS = 4
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters; the kernel distinguishes them by their index here."""
_VECTOR_ELEMENTS = 4


@triton.jit(do_not_specialize=["tensors", "blocks", "allowed", "first_tensor", "first_block"])
def average_blocks(
    tensors,
    blocks,
    allowed,
    first_tensor,
    first_block,
    flat_0,
    flat_1,
    flat_2,
    flat_3,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Average the blocks from ``first_block`` on, one per program.

    Args:
        tensors: int64 [tensors, 5]: address of the parameter, less ``begin`` elements; ``begin`` and ``end``, its first
            and last element in the group; type, as in ``SOURCE_DTYPES``; width of accesses to whole blocks of it: 2
            where four of its elements may be read at once, else 1.
        blocks: int32 [blocks, 2]: tensor, and number of the block in the grid.
        allowed: uint8 [1]: where it is 0, nothing is read or written.
        first_tensor: Tensor of the first row of ``tensors``.
        first_block: Block of the first program.
        flat_0, ...: float32 buffers of the profiles; those past PROFILES are not touched.
        weight_0, ...: float32 weight of the parameters, in (0, 1]; at 1 they are copied.
        PROFILES: Number of profiles, 1 to 4.
        BLOCK: Elements of a block, a power of two.
    """
    block = blocks + 2 * (first_block + tl.program_id(0)).to(tl.int64)
    tensor = tensors + 5 * (tl.load(block) - first_tensor).to(tl.int64)
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    address, begin, end = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2)
    # Not one of the types below where the update is skipped. The load depends on no other one, so it adds no time.
    stored = tl.where(tl.load(allowed) != 0, tl.load(tensor + 3), -1)
    width = tl.where((start >= begin) & (start + BLOCK <= end), tl.load(tensor + 4), 0)
    if stored == 0:
        _average(address.to(tl.pointer_type(tl.float32)), start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
                 weight_0, weight_1, weight_2, weight_3, PROFILES, BLOCK, 16)  # fmt: skip
    elif stored == 1:
        _average(address.to(tl.pointer_type(tl.bfloat16)), start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
                 weight_0, weight_1, weight_2, weight_3, PROFILES, BLOCK, 8)  # fmt: skip
    elif stored == 2:
        _average(address.to(tl.pointer_type(tl.float16)), start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
                 weight_0, weight_1, weight_2, weight_3, PROFILES, BLOCK, 8)  # fmt: skip


@triton.jit
def _average(
    source, start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
    weight_0, weight_1, weight_2, weight_3, PROFILES: tl.constexpr, BLOCK: tl.constexpr, VECTOR_BYTES: tl.constexpr,
):  # fmt: skip
    place = start + tl.arange(0, BLOCK)
    if width == 2:
        parameter = tl.load(tl.multiple_of(source + place, VECTOR_BYTES)).to(tl.float32)
        _move_all(parameter, place, flat_0, flat_1, flat_2, flat_3, weight_0, weight_1, weight_2, weight_3, PROFILES)
    elif width == 1:
        parameter = tl.load(source + place).to(tl.float32)
        _move_all(parameter, place, flat_0, flat_1, flat_2, flat_3, weight_0, weight_1, weight_2, weight_3, PROFILES)
    else:
        mask = (place >= begin) & (place < end)
        parameter = tl.load(source + place, mask=mask).to(tl.float32)
        _move_masked(flat_0 + place, parameter, weight_0, mask)
        if PROFILES > 1:
            _move_masked(flat_1 + place, parameter, weight_1, mask)
        if PROFILES > 2:
            _move_masked(flat_2 + place, parameter, weight_2, mask)
        if PROFILES > 3:
            _move_masked(flat_3 + place, parameter, weight_3, mask)


@triton.jit
def _move_all(
    parameter, place, flat_0, flat_1, flat_2, flat_3, weight_0, weight_1, weight_2, weight_3, PROFILES: tl.constexpr
):
    _move(flat_0 + place, parameter, weight_0)
    if PROFILES > 1:
        _move(flat_1 + place, parameter, weight_1)
    if PROFILES > 2:
        _move(flat_2 + place, parameter, weight_2)
    if PROFILES > 3:
        _move(flat_3 + place, parameter, weight_3)


@triton.jit
def _move(average, parameter, weight):
    tl.store(average, _between(tl.load(average), parameter, weight))


@triton.jit
def _move_masked(average, parameter, weight, mask):
    tl.store(average, _between(tl.load(average, mask=mask), parameter, weight), mask=mask)


@triton.jit
def _between(average, parameter, weight):
    # torch.lerp's two forms: each is exact at the end (weight 0 or 1) that it is nearer to.
    difference = parameter - average
    near_average = average + weight * difference
    near_parameter = parameter - difference * (1.0 - weight)
    between = tl.where(weight < 0.5, near_average, near_parameter)
    return tl.where(weight == 1.0, parameter, between)


def can_compile_for(backend: str) -> bool:
    """Return whether kernels can run on devices of this backend of Triton; under its interpreter they run on none."""
    return isinstance(average_blocks, triton.JITFunction) and backend in backends


def knows(dtype: torch.dtype) -> bool:
    """Return whether the kernel reads parameters of this type, for float32 averages; complex64 as pairs of float32."""
    return dtype in (*SOURCE_DTYPES, torch.complex64)


def row(parameter: Tensor, begin: int, end: int) -> tuple[int, int, int, int, int]:
    """Return a tensor's row of the kernel's table.

    Args:
        parameter: Real, with its average's memory order.
        begin: First element in the group.
        end: Last element in the group.
    """
    return row_at(parameter.data_ptr(), parameter.dtype, begin, end)


def row_at(place: int, dtype: torch.dtype, begin: int, end: int) -> tuple[int, int, int, int, int]:
    """Return the row of a tensor at an address, or at a place relative to an address that is a multiple of 16."""
    address = place - begin * dtype.itemsize
    width = 2 if address % (_VECTOR_ELEMENTS * dtype.itemsize) == 0 else 1
    return address, begin, end, SOURCE_DTYPES.index(dtype), width


def table(rows: Sequence[tuple[int, int, int, int, int]]) -> Tensor:
    """Return rows as the table of a launch, on the host."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5)


def cut(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return the blocks of tensors with these element ranges in the group, in order: int32 [blocks, 2], on the host."""
    parts = []
    for index, (begin, end) in enumerate(ranges):
        if begin < end:
            numbers = torch.arange(
                begin // BLOCK_ELEMENTS, (end - 1) // BLOCK_ELEMENTS + 1, dtype=torch.int32, device="cpu"
            )
            parts.append(torch.stack([torch.full_like(numbers, index), numbers], dim=1))
    return torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.int32, device="cpu")


def launch(
    tensors: Tensor,
    blocks: Tensor,
    first_tensor: int,
    first_block: int,
    last_block: int,
    flats: Sequence[Tensor],
    weights: Sequence[float],
    allowed: Tensor,
) -> None:
    """Average a range of blocks on the current device's current stream, in one launch per ``MOST_PROFILES`` profiles.

    Args:
        tensors: Table of the tensors from ``first_tensor`` on, on the device.
        blocks: What ``cut`` returned, on the device.
        first_tensor: Tensor of the table's first row.
        first_block: First of the range.
        last_block: The block after the last of the range.
        flats: float32 buffers of all profiles.
        weights: Of the parameters, per profile, in (0, 1].
        allowed: Bool, one element, on the device; where it is False, the averages stay.
    """
    if first_block == last_block:
        return
    for begin in range(0, len(weights), MOST_PROFILES):
        buffers, numbers = list(flats[begin : begin + MOST_PROFILES]), list(weights[begin : begin + MOST_PROFILES])
        count = len(numbers)
        average_blocks[(last_block - first_block,)](
            tensors,
            blocks,
            allowed.view(torch.uint8),
            first_tensor,
            first_block,
            *buffers,
            *buffers[:1] * (MOST_PROFILES - count),  # never accessed by a kernel with fewer PROFILES
            *(ctypes.c_float(weight).value for weight in numbers),  # Triton's interpreter rounds only some uses of it
            *[1.0] * (MOST_PROFILES - count),
            PROFILES=count,
            BLOCK=BLOCK_ELEMENTS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def rehearse(device: torch.device, num_profiles: int) -> None:
    """Compile and launch every kernel that updates of so many profiles need; block until the averages are compared.

    Args:
        device: The current device.
        num_profiles: At least 1.

    Raises:
        RuntimeError: The averages are wrong.
        Exception: Any error of Triton where it cannot compile or launch.
    """
    sources, rows, begin = [], [], 0
    for dtype in SOURCE_DTYPES:
        # Whole blocks, and then one element, which moves the next tensor off the grid of wide accesses.
        for numel in (2 * BLOCK_ELEMENTS, 1):
            sources.append(torch.linspace(-1, 1, numel, dtype=torch.float32, device=device).to(dtype))
            rows.append(row(sources[-1], begin, begin + numel))
            begin += numel
    flats = [torch.linspace(1, -1, begin, dtype=torch.float32, device=device) for _ in range(num_profiles)]
    parameters = torch.cat([source.cpu().double() for source in sources])  # some devices have no float64
    average = flats[0].cpu().double()
    weights = [(profile + 1) / (num_profiles + 1) for profile in range(num_profiles)]
    blocks = cut([(begin, end) for _, begin, end, _, _ in rows]).to(device)
    for is_allowed in (True, False):  # the second one changes nothing
        allowed = torch.full((), is_allowed, dtype=torch.bool, device=device)
        launch(table(rows).to(device), blocks, 0, 0, len(blocks), flats, weights, allowed)
    worst = max(
        (flat.cpu() - torch.lerp(average, parameters, weight)).abs().max().item()
        for flat, weight in zip(flats, weights, strict=True)
    )
    if not worst <= 2.0**-22:
        raise RuntimeError(f"averages of numbers between -1 and 1 are wrong by {worst}")
