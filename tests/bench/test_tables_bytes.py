"""The bytes of the tables are those that the operations really touch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import tables_bytes
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from tests.support.memory_orders import flat_buffers_of

ELEMENTS = 1 << 20


class Moved(TorchDispatchMode):
    """Counts the bytes that in-place operations read and write; those of a lerp read what they write."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("copy_", "_foreach_copy_", "_foreach_lerp_", "lerp_"):
            written, read = tree_leaves(args[0]), tree_leaves(args[1])
            self.num_bytes += sum(each.nbytes for each in [*written, *read] if isinstance(each, torch.Tensor))
            self.num_bytes += sum(each.nbytes for each in written) if "lerp" in name else 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "dtype"), [("foreach, float32", torch.float32), ("foreach, other types", torch.bfloat16)]
)
def test_bytes_of_foreach_are_those_that_it_moves(name, dtype):
    flat_buffers = flat_buffers_of(nn.ParameterList([nn.Parameter(torch.ones(ELEMENTS, dtype=dtype))]), profiles=2)
    flat_buffers.groups[0].together = None  # the CPU alone moves all profiles in one operation
    step = ForeachStep(flat_buffers.groups[0])
    sources = step.sources([tensor.tracked.live().detach() for tensor in flat_buffers.groups[0].tensors])
    with Moved() as moved, torch.no_grad():
        step.run(sources, [0.1, 0.2])
    (variant,) = (each for each in tables_bytes.VARIANTS if each.name == name)
    assert moved.num_bytes == ELEMENTS * variant.moved(dtype.itemsize, 2)


def test_one_kernel_moves_no_byte_twice():
    own_read, averages_read_and_written = 2, 2 * 2 * 4
    assert tables_bytes.VARIANTS[0].moved(2, 2) == own_read + averages_read_and_written


def test_tables_have_a_cell_for_each_column():
    for table in (tables_bytes.bytes_table(), tables_bytes.steps_table()):
        assert len({line.count("|") for line in table}) == 1
