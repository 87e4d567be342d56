"""Skipping updates whose tensors are not finite (``on_nonfinite="skip"``): one flag per update, on the device.

A NaN that reaches an average stays there, so an update with one is left out as a whole: the tensors of one step belong
together, and half of an update would be an average of no model. The flag is computed from all averaged tensors before
the first batch of the update, by the lane that averages. The batches then read it wherever they run, be it after later
updates (``deferred_updates.py``). The host never reads it: on an accelerator the steps select between the new average
and the old one.

SKIP-1  The flag is computed from every averaged tensor as it was at   test_update_is_skipped_as_a_whole
    its update, before any batch is averaged.                          test_late_batches_follow_the_flag_of_their_update
SKIP-2  No wait for a readback stands between the parameters and the   test_flag_does_not_wait_for_a_copy
    flag: the optimizer waits until the flag was computed.
SKIP-3  The memory of a flag belongs to the lane that reads it. Each   test_flags_are_right_in_every_order
    flag has memory of its own, which is reused in the lane's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nitrous_ema.averaging.kernels.finite import all_finite


@dataclass(slots=True, eq=False)
class UpdateFlag:
    """Whether an update is applied to the averages. Passed to its batches before it is computed."""

    value: Tensor | None = None
    """Bool, without axes; set by the lane before the first batch of the update runs."""


def check(flag: UpdateFlag, tensors: Sequence[Tensor], num_skipped: Tensor | None) -> None:
    """Compute the flag of an update on the current stream, and count the update if it is skipped.

    Args:
        flag: The flag.
        tensors: All tensors that the update averages, on one device.
        num_skipped: The count, on the same device; None if another lane counts.
    """
    flag.value = all_finite(tensors)
    if num_skipped is not None:
        count_skipped(flag.value, num_skipped)


def count_skipped(is_applied: Tensor, num_skipped: Tensor) -> None:
    """Count an update if it is skipped, on the current stream."""
    num_skipped.add_(is_applied.logical_not())


def allowed(flag: UpdateFlag | None) -> Tensor | None:
    """Return the flag's value for a step's ``run``, or None where updates are never skipped."""
    return None if flag is None else flag.value
