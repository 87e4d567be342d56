"""All scenarios of `loops.py` on the laggy device, by name: correct programs, whose results are the CPU's.

Programs that lack a line are in `without.py`.
"""

from __future__ import annotations

from typing import Any

HELD: dict[str, Any] = {"hold": [[1], [4]], "scratch": 1 << 20}
"""The readbacks of the snapshot of step 2 take until step 5; the readbacks of step 4 wait behind them."""
HELD_AGAIN: dict[str, Any] = {"hold": [[1, 3], [2, 4]], "scratch": 1 << 20}
MANUAL: dict[str, Any] = {"checkpoint_every_num_steps": "manual"}
HALF: dict[str, Any] = {
    **MANUAL,
    "hold": [[1], []],
    "let_through": 4,
    "then": "skipped checkpoint",
    "max_pending": 1,
    "on_full": "skip",
    "scratch": 1 << 20,
}
"""Some readbacks of the snapshot of step 2 have finished; step 4 makes the lane wait for the others."""
SKIPPED: dict[str, Any] = {"on_nonfinite": "skip", "bad": [2, 3]}
"""The updates of two steps are skipped, in which readbacks of ``HELD`` are held."""
ONCE: dict[str, Any] = {**MANUAL, "then": "checkpoint once"}

SCENARIOS: dict[str, dict[str, Any]] = {
    # how parameters are read, and which tensors are averaged
    "guarded": {"read": "guarded"},
    "guarded, every third": {"read": "guarded", "update_every": 3},
    "copied": {"read": "copied"},
    "copied, every third": {"read": "copied", "update_every": 3},
    "auto, snapshot at every step": {"read": "auto", "checkpoint_every_num_steps": 1},
    "bfloat16": {"kind": "bfloat16"},
    "bfloat16, copied": {"kind": "bfloat16", "read": "copied"},
    "batch norm": {"kind": "batch norm"},
    "tied": {"kind": "tied"},
    "transposed": {"kind": "transposed"},
    "weights written in forward": {"kind": "forced norm", "read": "copied"},
    "weights written by hand, copied": {"read": "copied", "writes": "unfenced"},
    "snapshots in bfloat16": {"checkpoint_dtype": "bfloat16"},
    "snapshots in float16, transposed": {"kind": "transposed", "checkpoint_dtype": "float16"},
    "two devices": {"two_devices": True},
    # readbacks that take longer than several steps
    "long copy": HELD,
    "long copies": HELD_AGAIN,
    "long copy, copied": {**HELD, "read": "copied"},
    "long copy, auto": {**HELD, "read": "auto"},
    "long copy, batch norm": {**HELD, "kind": "batch norm"},
    "long copy, bfloat16": {**HELD, "kind": "bfloat16"},
    "long copy, transposed": {**HELD, "kind": "transposed"},
    "long copy in bfloat16": {**HELD, "checkpoint_dtype": "bfloat16"},
    "long copy, tied": {**HELD, "kind": "tied"},
    "long copy, two devices": {**HELD, "two_devices": True},
    "long copy, every third": {**HELD, "update_every": 3},
    "long copy, little scratch": {**HELD, "scratch": 2000, "is_held_up": True},
    "long copy, no scratch": {**HELD, "scratch": 0, "is_held_up": True},
    "no scratch": {"scratch": 0},
    "long copies, snapshot at every step": {**HELD_AGAIN, **MANUAL, "then": "checkpoint", "max_pending": 7},
    "long copy, weights written by hand": {**HELD, "writes": "fence"},
    "long copy, other stream": {**HELD, "writes": "other stream"},
    "long copy, other thread": {**HELD, "writes": "other thread"},
    "long copy, two streams": {**HELD_AGAIN, "writes": "two streams"},
    "long copy, optimizer in backward": {**HELD, "writes": "in backward"},
    "long copy, replaced storages": {**HELD, "then": "replace storages"},
    "long copy, assigned parameters": {**HELD, "then": "assign"},
    "half a copy": HALF,
    "scratch used again at once": {**MANUAL, "writes": "optimizer between copies"},
    "scratch used again at once, two streams": {**MANUAL, "writes": "two streams between copies"},
    "long copy, flushed": {**HELD, "then": "flush"},
    # reading the averages during a readback waits for it, on the device
    "long copy, ema_model": {**HELD, "then": "ema_model", "is_held_up": True},
    "long copy, average_parameters": {**HELD, "then": "average_parameters", "is_held_up": True},
    "long copy, state_dict": {**HELD, "then": "state_dict", "is_held_up": True},
    "long copy, grown buffer": {**HELD, "then": "grow a buffer", "kind": "batch norm"},
    "long copy, loaded": {**HELD, "then": "save and load"},
    # other uses of the EMA between updates
    "no optimizer": {"writes": "fence"},
    "unseen once": {"writes": "unseen once"},
    "closure": {"writes": "closure"},
    "other stream": {"writes": "other stream"},
    "other thread": {"writes": "other thread"},
    "optimizer in backward": {"writes": "in backward"},
    "streams": {"then": "switch stream"},
    "streams, copied": {"then": "switch stream", "read": "copied"},
    "ema_model": {"then": "ema_model"},
    "compiled ema_model": {"then": "compiled ema_model"},
    "cast ema_model": {"then": "cast ema_model"},
    "average_parameters": {"then": "average_parameters"},
    "state_dict": {"then": "state_dict"},
    "state_dict elsewhere": {"then": "state_dict elsewhere"},
    "checkpoint elsewhere": {"then": "checkpoint elsewhere", **MANUAL, "max_pending": 7},
    "long copy, state_dict elsewhere": {**HELD, "then": "state_dict elsewhere"},
    "long copies, checkpoint elsewhere": {**HELD_AGAIN, **MANUAL, "then": "checkpoint elsewhere", "max_pending": 7},
    "late state_dict elsewhere": {"hold": [[1, 3], []], "then": "late state_dict elsewhere"},
    "copies to the model": {"then": "copy to the model"},
    "grown buffer": {"then": "grow a buffer", "kind": "batch norm"},
    "grown buffer, copied": {"then": "grow a buffer", "kind": "batch norm", "read": "copied"},
    "saved and loaded": {"then": "save and load"},
    "other values loaded": {**MANUAL, "then": "load other values"},
    "replaced storages": {"then": "replace storages"},
    "replaced storages, transposed": {"then": "replace storages", "kind": "transposed"},
    "storages replaced by other values": {"writes": "replaced storages"},
    "storages replaced by other values, transposed": {"writes": "replaced storages", "kind": "transposed"},
    "assigned parameters": {"then": "assign"},
    # updates that are skipped
    "skipped": SKIPPED,
    "skipped, first": {**SKIPPED, "bad": [0]},
    "skipped, copied": {**SKIPPED, "read": "copied"},
    "skipped, batch norm": {**SKIPPED, "kind": "batch norm"},
    "skipped, bfloat16": {**SKIPPED, "kind": "bfloat16"},
    "skipped, transposed": {**SKIPPED, "kind": "transposed"},
    "skipped, snapshot at every step": {**SKIPPED, "checkpoint_every_num_steps": 1},
    "skipped, long copy": {**HELD, **SKIPPED},
    "skipped, long copy, batch norm": {**HELD, **SKIPPED, "kind": "batch norm"},
    "skipped, long copy, no scratch": {**HELD, **SKIPPED, "scratch": 0, "is_held_up": True},
    "skipped, half a copy": {**HALF, **SKIPPED, "bad": [4]},
    "skipped, host": {**SKIPPED, "offload": "host"},
    "skipped, host, batch norm": {**SKIPPED, "offload": "host", "kind": "batch norm"},
    # averages in host memory
    "host": {"offload": "host"},
    "host, every third": {"offload": "host", "update_every": 3},
    "host, copied": {"offload": "host", "read": "copied", "writes": "unfenced"},
    "host, bfloat16": {"offload": "host", "kind": "bfloat16"},
    "host, batch norm": {"offload": "host", "kind": "batch norm"},
    "host, grown buffer": {"offload": "host", "then": "grow a buffer", "kind": "batch norm"},
    "host, transposed": {"offload": "host", "kind": "transposed"},
    "host, tied": {"offload": "host", "kind": "tied"},
    "host, snapshot at every step": {"offload": "host", **MANUAL, "then": "checkpoint", "on_full": "wait"},
    "host, state_dict": {"offload": "host", "then": "state_dict"},
    "host, replaced storages": {"offload": "host", "then": "replace storages"},
    "host, optimizer in backward": {"offload": "host", "writes": "in backward"},
}

IN_DEPTH = (
    "guarded", "copied", "auto, snapshot at every step", "bfloat16", "batch norm", "transposed",
    "weights written in forward", "snapshots in bfloat16", "two devices", "long copy", "long copies",
    "long copy, batch norm", "long copy, transposed", "long copy, little scratch", "no scratch", "half a copy",
    "scratch used again at once", "scratch used again at once, two streams", "long copies, snapshot at every step",
    "long copy, two streams", "long copy, optimizer in backward", "long copy, state_dict", "streams", "ema_model",
    "state_dict elsewhere", "late state_dict elsewhere", "long copies, checkpoint elsewhere",
    "cast ema_model",
    "grown buffer", "long copy, grown buffer",
    "saved and loaded", "unseen once", "storages replaced by other values", "assigned parameters", "host",
    "host, copied", "host, batch norm", "host, transposed", "skipped", "skipped, batch norm", "skipped, long copy",
    "skipped, half a copy", "skipped, snapshot at every step", "skipped, host",
)  # fmt: skip
"""Scenarios to which the tests give many schedules; the others get a few. The campaign gives all of them many."""
