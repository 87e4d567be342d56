"""The averaging kernel: a launch reads every parameter once and moves every profile's average, for all tensors.

Imports Triton, so only ``fused_step`` imports it, and only where the kernel is going to be launched.

**Cut.** A group's flat space is cut on a grid of ``BLOCK_ELEMENTS``; a program averages what one tensor has of one
block of that grid. ``blocks`` names both, a row per program. ``tensors`` has a row per tensor: where the parameter
would begin if it had the elements of the group before it as well (an index into the averages is then one into the
parameter), its first and last element in the group, its type, and how a whole block of it may be accessed. Addresses
and indices have 64 bits.

**Width.** A pointer out of a table has no known alignment, and without one the compiler emits no wide access at all.
Averages of a whole block are aligned by the grid; whether parameters are, the row says: four elements in one access
then, else one by one. At a tensor's two ends everything is one by one, under a mask. All three layouts give each
thread the same elements, so nothing goes through shared memory (``test_averages_move_in_accesses_of_sixteen_bytes``).

**Compiled once.** Numbers that vary are not specialized (Triton compiles anew for 1 and for multiples of 16), floats
never are, so there is one compiled kernel per number of profiles in a launch, and ``rehearse`` has launched them all
(``test_no_launch_compiles_after_the_rehearsal``).

**Bits.** An average ``a`` moves by the formula of ``torch.lerp``, in float32 and with every operation rounded: ``a +
w * (x - a)`` where w < 1/2, ``x - (x - a) * (1 - w)`` from there on, where w is the weight rounded to float32.
Nothing is contracted to fused multiply-adds (``enable_fp_fusion=False``), so every device and Triton's interpreter
give the same bits. ``ForeachStep`` uses the same formula and the same w, but torch's own kernels are contracted (on
CUDA by nvcc's default, on the CPU by hand: ``lerp_vec`` in ATen/native/Lerp.h): they add the exact product where this
kernel adds the rounded one. What the two round last differs by at most half a unit in the last place *of the product*:
one update by the one and by the other may differ in an average's last bit, and in more only where the sum nearly
cancels. Where w is 1 both copy the bits.
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
"""Profiles in one launch; more take another one, which reads the parameters again."""
NUM_WARPS = 4
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters; the kernel knows them by their place here."""
_VECTOR_ELEMENTS = 4


@triton.jit(do_not_specialize=["tensors", "blocks", "first_tensor", "first_block"])
def average_blocks(
    tensors,
    blocks,
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
    stored = tl.load(tensor + 3)
    width = tl.where((start >= begin) & (start + BLOCK <= end), tl.load(tensor + 4), 0)
    if stored == 0:
        _average(address.to(tl.pointer_type(tl.float32)), start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
                 weight_0, weight_1, weight_2, weight_3, PROFILES, BLOCK, 16)  # fmt: skip
    elif stored == 1:
        _average(address.to(tl.pointer_type(tl.bfloat16)), start, begin, end, width, flat_0, flat_1, flat_2, flat_3,
                 weight_0, weight_1, weight_2, weight_3, PROFILES, BLOCK, 8)  # fmt: skip
    else:
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
    # torch.lerp's two forms: each is exact at the end that it is nearer to.
    difference = parameter - average
    near_average = average + weight * difference
    near_parameter = parameter - difference * (1.0 - weight)
    between = tl.where(weight < 0.5, near_average, near_parameter)
    return tl.where(weight == 1.0, parameter, between)


def can_compile_for(backend: str) -> bool:
    """Whether kernels run on devices of this backend of Triton; under its interpreter they run on none."""
    return isinstance(average_blocks, triton.JITFunction) and backend in backends


def knows(dtype: torch.dtype) -> bool:
    """Whether parameters of this type can be read, for float32 averages; complex64 as pairs of float32."""
    return dtype in (*SOURCE_DTYPES, torch.complex64)


def row(parameter: Tensor, begin: int, end: int) -> tuple[int, int, int, int, int]:
    """What the kernel needs to know of a tensor.

    Args:
        parameter: Real, with its average's memory order.
        begin: First element in the group.
        end: Last element in the group.
    """
    address = parameter.data_ptr() - begin * parameter.itemsize
    width = 2 if address % (_VECTOR_ELEMENTS * parameter.itemsize) == 0 else 1
    return address, begin, end, SOURCE_DTYPES.index(parameter.dtype), width


def table(rows: Sequence[tuple[int, int, int, int, int]]) -> Tensor:
    """Rows for a launch, on the host."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5)


def cut(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Blocks of tensors with these first and last elements in the group, in order: int32 [blocks, 2], on the host."""
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
) -> None:
    """Average a range of blocks on the current device's current stream, in as many launches as the profiles take.

    Args:
        tensors: Table of the tensors from ``first_tensor`` on, on the device.
        blocks: What ``cut`` returned, on the device.
        first_tensor: Tensor of the table's first row.
        first_block: First of the range.
        last_block: The one after the last.
        flats: float32 buffers of all profiles.
        weights: Of the parameters, per profile, in (0, 1].
    """
    if first_block == last_block:
        return
    for begin in range(0, len(weights), MOST_PROFILES):
        buffers, numbers = list(flats[begin : begin + MOST_PROFILES]), list(weights[begin : begin + MOST_PROFILES])
        count = len(numbers)
        average_blocks[(last_block - first_block,)](
            tensors,
            blocks,
            first_tensor,
            first_block,
            *buffers,
            *buffers[:1] * (MOST_PROFILES - count),  # not touched
            *(ctypes.c_float(weight).value for weight in numbers),  # Triton's interpreter rounds only some uses of it
            *[1.0] * (MOST_PROFILES - count),
            PROFILES=count,
            BLOCK=BLOCK_ELEMENTS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def rehearse(device: torch.device, num_profiles: int) -> None:
    """Compile and launch all that updates of so many profiles will launch; blocks until the averages were compared.

    Args:
        device: Where; the current one.
        num_profiles: At least 1.

    Raises:
        RuntimeError: The averages are wrong.
        Exception: Whatever Triton raises where it cannot compile or launch.
    """
    sources, rows, begin = [], [], 0
    for dtype in SOURCE_DTYPES:
        for numel in (2 * BLOCK_ELEMENTS, 1):  # whole blocks and ends, the next one off the grid of wide accesses
            sources.append(torch.linspace(-1, 1, numel, dtype=torch.float32, device=device).to(dtype))
            rows.append(row(sources[-1], begin, begin + numel))
            begin += numel
    flats = [torch.linspace(1, -1, begin, dtype=torch.float32, device=device) for _ in range(num_profiles)]
    parameters = torch.cat([source.cpu().double() for source in sources])  # some devices have no float64
    average = flats[0].cpu().double()
    weights = [(profile + 1) / (num_profiles + 1) for profile in range(num_profiles)]
    blocks = cut([(begin, end) for _, begin, end, _, _ in rows]).to(device)
    launch(table(rows).to(device), blocks, 0, 0, len(blocks), flats, weights)
    worst = max(
        (flat.cpu() - torch.lerp(average, parameters, weight)).abs().max().item()
        for flat, weight in zip(flats, weights, strict=True)
    )
    if not worst <= 2.0**-22:
        raise RuntimeError(f"its averages of numbers between -1 and 1 are wrong by {worst}")
