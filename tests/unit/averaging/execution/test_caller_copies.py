from __future__ import annotations

import torch

from nitrous_ema.averaging.execution.caller_copies import CallerSideCopies

CPU = torch.device("cpu")


def take(copies, order_writers=lambda: None, **live):
    """Copy tensors to the CPU."""
    return copies.take(live, dict.fromkeys(live, CPU), order_writers)


def test_copies_hold_the_values_of_the_call():
    copies, live = CallerSideCopies(), torch.arange(6.0)
    taken = take(copies, a=live)
    live.zero_()
    assert taken["a"].tolist() == [0, 1, 2, 3, 4, 5]


def test_copies_are_made_in_the_same_memory_again():
    copies = CallerSideCopies()
    first = take(copies, a=torch.zeros(3), b=torch.zeros(2, dtype=torch.int64))
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = take(copies, a=torch.ones(3), b=torch.ones(2, dtype=torch.int64))
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert second["b"].tolist() == [1, 1]


def test_copies_are_not_overwritten_while_they_are_read():
    """The caller is ordered before the write: at that moment the last copy still has its old values."""
    seen = []
    copies = CallerSideCopies()

    def order():
        seen.append(taken["a"].tolist())

    taken = take(copies, order, a=torch.tensor([1.0]))
    assert seen == []  # nothing to wait for yet
    take(copies, order, a=torch.tensor([2.0]))
    take(copies, order, a=torch.tensor([3.0]))
    assert seen == [[1.0], [2.0]]


def test_a_copy_has_the_type_and_memory_order_of_its_original():
    live = torch.randn(3, 4, dtype=torch.bfloat16).t()
    taken = take(CallerSideCopies(), a=live)["a"]
    assert (taken.dtype, taken.stride()) == (live.dtype, live.stride())


def test_a_tensor_that_changed_its_shape_or_type_gets_new_memory():
    copies = CallerSideCopies()
    take(copies, a=torch.zeros(3))
    assert take(copies, a=torch.ones(4))["a"].tolist() == [1] * 4
    assert take(copies, a=torch.ones(4, dtype=torch.float64))["a"].dtype == torch.float64


def test_copies_of_parameters_need_no_gradients():
    taken = take(CallerSideCopies(), a=torch.nn.Parameter(torch.zeros(2)).detach())
    assert not taken["a"].requires_grad


def test_no_tensor_to_copy_needs_no_wait():
    copies = CallerSideCopies()
    assert take(copies, lambda: 1 / 0) == {}
    assert take(copies, lambda: 1 / 0) == {}
