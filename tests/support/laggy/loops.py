"""Training loops made of parts: the model, how weights are written, how the averages are used, and when copies to the
host are held. Their results must not depend on the device.

Longer than 300 lines because the two tables of parts stand with the parts that they list.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import nitrous_ema.averaging.ema
from nitrous_ema import PostHocEMA
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    QuickFiles,
    averages_of,
    backward,
    make_batches,
    make_gradients,
    make_model,
    small_pieces,
    snapshot_bytes,
)
from tests.support.laggy import device as laggy
from tests.support.laggy.without import without
from tests.support.scenarios import make_ema, make_optimizer, switch_stream

STEPS = 6
_IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def _ema(model: nn.Module, folder: str, **options: Any) -> PostHocEMA:
    if "checkpoint_dtype" in options:
        options["checkpoint_dtype"] = getattr(torch, options["checkpoint_dtype"])
    if next(model.parameters()).device.type == "cpu":
        for name in ("scratch", "offload"):
            options.pop(name, None)
    return make_ema(model, folder, **options)


@dataclass(eq=False)
class Loop:
    """The state that the parts of a scenario share."""

    device: str
    model: nn.Module
    ema: PostHocEMA
    optimizer: torch.optim.Optimizer | None
    step: int = 0
    batch: torch.Tensor | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    held: list[nn.Module] = field(default_factory=list)
    may_wait: bool = False
    """Whether the next update may stop the host."""

    @property
    def on_accelerator(self) -> bool:
        return self.device != "cpu"


def train(
    device: str,
    kind: str = "plain",
    writes: str = "optimizer",
    then: str = "nothing",
    hold: Sequence[Sequence[int]] = ((), ()),
    let_through: int = 0,
    is_held_up: bool = False,
    two_devices: bool = False,
    bad: Sequence[int] = (),
    bug: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a training loop; no call in it may stop the host, nor hold up the device behind a copy.

    Args:
        device: The device.
        kind: The kind of model, see ``make_model``.
        writes: How weights are written, see ``WRITERS``.
        then: The action after each update, see ``THEN``.
        hold: The steps at which copies to the host begin to be held, and the steps at which they are released.
        let_through: How many copies run during a hold.
        is_held_up: Whether the trainer is expected to wait for copies.
        two_devices: Whether the model's last layer is on another device.
        bad: The steps whose update finds a NaN in the last parameter, which is gone afterwards.
        bug: The line of the library that is left out, see ``without``.
        options: Arguments of the EMA.
    """
    with (
        tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder,
        small_pieces(),
        quick_files(),
        without(bug if device != "cpu" else None),
    ):
        model = make_model(kind, device)
        if two_devices:
            model[2].to(f"{device}:1" if device != "cpu" else device)
        loop = Loop(device, model, _ema(model, folder, **options), None)
        loop.optimizer = make_optimizer(model) if WRITERS[writes] in _WITH_OPTIMIZER else None
        waits: list[str] = []
        held_up: list[int] = []
        steps = zip(make_batches(STEPS, model), make_gradients(STEPS, model), strict=True)
        for loop.step, (loop.batch, gradients) in enumerate(steps):
            _hold(loop.step, hold, let_through)
            if kind in ("batch norm", "forced norm"):
                model(loop.batch)  # writes buffers, or weights
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            laggy.take_host_waits()
            WRITERS[writes](loop)
            good = _spoil(loop) if loop.step in bad else None
            loop.ema.update()
            if good is not None:
                _repair(loop, good)
            waits += [] if loop.may_wait else laggy.take_host_waits()
            loop.may_wait = False
            held_up += [loop.step] if laggy.is_held_up() else []
            THEN[then](loop)
        laggy.release_copies()
        laggy.take_host_waits()
        loop.ema.checkpoint()
        loop.ema.fence()
        waits += laggy.take_host_waits()
        loop.seen |= averages_of(loop.ema)
        loop.ema.close()
        if loop.on_accelerator:
            torch.accelerator.synchronize()
        seen = {**loop.seen, "snapshots": snapshot_bytes(folder), "host waits": waits, "t": loop.ema.t}
        seen["updates skipped"] = loop.ema.stats().updates_skipped
        return {**seen, "held up": bool(held_up) if loop.on_accelerator else is_held_up}


@contextmanager
def quick_files() -> Iterator[None]:
    """Make file systems of new EMAs that never wait for the disk."""
    with mock.patch.object(nitrous_ema.averaging.ema, "SnapshotStore", partial(SnapshotStore, files=QuickFiles())):
        yield


def _hold(step: int, hold: Sequence[Sequence[int]], let_through: int) -> None:
    if step in hold[0]:
        laggy.hold_copies(let_through)
    if step in hold[1]:
        laggy.release_copies()


# ---- writing weights


@torch.no_grad()
def _spoil(loop: Loop) -> torch.Tensor:
    *_, last = loop.model.parameters()
    good = last.clone()
    last.view(-1)[:1].fill_(torch.nan)
    return good


@torch.no_grad()
def _repair(loop: Loop, good: torch.Tensor) -> None:
    loop.ema.fence()
    *_, last = loop.model.parameters()
    last.copy_(good)


def _step(loop: Loop) -> None:
    loop.optimizer.step()


def _step_with_closure(loop: Loop) -> None:
    loop.optimizer.step(lambda: loop.model[0].bias.sum())


def _step_on_another_stream(loop: Loop) -> None:
    _on_streams(loop, loop.optimizer.step)


def _step_in_another_thread(loop: Loop) -> None:
    thread = threading.Thread(target=loop.optimizer.step)
    thread.start()
    thread.join(TIMEOUT_SECONDS)


def _step_on_two_streams(loop: Loop, *, copies_end: bool = False) -> None:
    """Step each half by an optimizer of its own, with no order between the two."""
    parameters = list(loop.model.parameters())

    def step(half: Sequence[nn.Parameter]) -> None:
        torch.optim.SGD(half, lr=0.3, foreach=True).step()
        if copies_end:
            _end_copies(loop)

    _on_streams(loop, partial(step, parameters[:1]), partial(step, parameters[1:]))


def _step_between_copies(loop: Loop, *, on_two_streams: bool = False) -> None:
    """The last update was deferred: it is averaged from the stash, and the next update is deferred again."""
    if on_two_streams:
        _step_on_two_streams(loop, copies_end=True)
    else:
        loop.optimizer.step()
        _end_copies(loop)
        loop.ema.fence()
    laggy.hold_copies()
    if loop.step:
        loop.ema.checkpoint()


def _end_copies(loop: Loop) -> None:
    """Let the writers see the copies end. No stream waits for anything."""
    laggy.release_copies()
    loop.ema._engine._sink.flush(TIMEOUT_SECONDS)


def _step_in_backward(loop: Loop) -> None:
    """Step an optimizer per parameter, as soon as its gradient exists, on autograd's thread."""

    def step(parameter: nn.Parameter) -> None:
        torch.optim.SGD([parameter], lr=0.3, foreach=True).step()
        parameter.grad = None

    for parameter in loop.model.parameters():
        parameter.grad = None
    hooks = [parameter.register_post_accumulate_grad_hook(step) for parameter in loop.model.parameters()]
    backward(loop.model, loop.batch)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _fence_and_write(loop: Loop) -> None:
    loop.ema.fence()
    for parameter in loop.model.parameters():
        parameter.sub_(parameter.grad)


def _write_unseen_once(loop: Loop) -> None:
    """Write after the first update in a way that no counter sees; later writes are fenced."""
    if loop.step == 1:
        for parameter in loop.model.parameters():
            parameter.data.sub_(parameter.grad)
        loop.ema.fence()
    else:
        _fence_and_write(loop)


def _replace_values(loop: Loop) -> None:
    """Replace the storages instead of writing them; the trainer reuses the old memory for something else."""
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.data = (parameter - parameter.grad).contiguous()
    for parameter in loop.model.parameters():
        torch.full_like(parameter, 7.0)


@torch.no_grad()
def _write(loop: Loop) -> None:
    """Write without a fence: for ``read="copied"``."""
    for parameter in loop.model.parameters():
        parameter.sub_(parameter.grad)


WRITERS: dict[str, Callable[[Loop], None]] = {
    "optimizer": _step,
    "closure": _step_with_closure,
    "other stream": _step_on_another_stream,
    "other thread": _step_in_another_thread,
    "two streams": _step_on_two_streams,
    "in backward": _step_in_backward,
    "fence": _fence_and_write,
    "unseen once": _write_unseen_once,
    "unfenced": _write,
    "replaced storages": _replace_values,
    "optimizer between copies": _step_between_copies,
    "two streams between copies": partial(_step_between_copies, on_two_streams=True),
}
_WITH_OPTIMIZER = (
    _step,
    _step_with_closure,
    _step_on_another_stream,
    _step_in_another_thread,
    _replace_values,
    _step_between_copies,
)


def _on_streams(loop: Loop, *work: Callable[[], Any]) -> None:
    """Run each piece of work on its own stream, after all earlier and before all later work; on the CPU one by one."""
    home = torch.accelerator.current_stream() if loop.on_accelerator else None
    streams = [torch.Stream(device=loop.device) for _ in work] if home else []
    for stream in streams:
        stream.wait_stream(home)
    for index, each in enumerate(work):
        if home:
            torch.accelerator.set_stream(streams[index])
        each()
    for stream in streams:
        home.wait_stream(stream)
    if home:
        torch.accelerator.set_stream(home)


# ---- actions after an update


def _switch_stream(loop: Loop) -> None:
    if loop.on_accelerator:
        switch_stream(loop.device)
    if loop.on_accelerator and loop.step == STEPS - 1:
        torch.accelerator.synchronize()


@torch.no_grad()
def _use_averaged_model(loop: Loop) -> None:
    loop.seen[f"output {loop.step}"] = loop.ema.ema_models[loop.step % 2].ema_model(loop.batch)


def _compile(module: nn.Module) -> nn.Module:
    torch.compiler.reset()  # each run has another module, and the compiler counts what it compiles anew
    return torch.compile(module, backend="eager", fullgraph=True)


@torch.no_grad()
def _use_held_model(loop: Loop, change: Callable[[nn.Module], nn.Module]) -> None:
    """Evaluate with a module that was changed once and is held: only its forward is ordered behind the averaging."""
    if not loop.held:
        loop.held.append(change(loop.ema.ema_models[0].ema_model))
    (held,) = loop.held
    loop.seen[f"output {loop.step}"] = held(loop.batch.to(next(held.parameters()).dtype))


@torch.no_grad()
def _use_swapped_model(loop: Loop) -> None:
    with loop.ema.average_parameters(loop.step % 2):
        loop.seen[f"output {loop.step}"] = loop.model(loop.batch)


def _read_state(loop: Loop) -> None:
    for key, value in averages_of(loop.ema).items():
        loop.seen[f"{key} after step {loop.step}"] = value


def _elsewhere(loop: Loop, use: Callable[[Loop], None]) -> None:
    """Use the averages on another stream than the trainer's, with no wait between the two streams."""
    before = torch.accelerator.current_stream() if loop.on_accelerator else None
    if before is not None:
        torch.accelerator.set_stream(torch.Stream(device=loop.device))
    use(loop)
    if before is not None:
        torch.accelerator.set_stream(before)


def _read_late_state_elsewhere(loop: Loop) -> None:
    """Read the averages when the copies that an update was deferred for have just ended."""
    if loop.step in (2, 4):
        if loop.on_accelerator:
            _end_copies(loop)
        _elsewhere(loop, _read_state)


def _flush_in_the_middle(loop: Loop) -> None:
    if loop.step == 2:
        laggy.release_copies()
        loop.ema.flush()


def _grow_buffer(loop: Loop) -> None:
    """Replace a copied buffer by a larger one; the trainer reuses the old one for something else."""
    if loop.step == 2:
        laggy.release_copies()
        norm = loop.model[1]
        old, norm.num_batches_tracked = norm.num_batches_tracked, torch.arange(2000, device=loop.device)
        old.fill_(7)
        loop.may_wait = True


def _copy_to_model(loop: Loop) -> None:
    loop.ema.copy_params_from_ema_to_model()


def _save_and_load(loop: Loop) -> None:
    if loop.step == 1:
        loop.state = {k: v.clone() if torch.is_tensor(v) else v for k, v in loop.ema.state_dict().items()}
    if loop.step == 3:
        loop.ema.load_state_dict(loop.state)


def _load_other_values(loop: Loop) -> None:
    if loop.step == 3:
        changed = {key: value + 1 for key, value in averages_of(loop.ema).items()}
        loop.ema.load_state_dict({**loop.ema.state_dict(), **changed})
        loop.ema.checkpoint()


def _checkpoint(loop: Loop) -> None:
    loop.ema.checkpoint()


def _checkpoint_and_skip_one(loop: Loop) -> None:
    """The second snapshot finds no free slot."""
    if loop.step == 1 or (loop.step == 3 and loop.on_accelerator):
        assert loop.ema._engine.checkpoint() == (loop.step == 1)
    if loop.step == STEPS - 1:
        _end_copies(loop)


def _checkpoint_once(loop: Loop) -> None:
    if loop.step == 1:
        loop.ema.checkpoint()


def _replace_storages(loop: Loop) -> None:
    """The old memory is free, and the trainer reuses it at once for something else."""
    with torch.no_grad():
        new = [
            torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device) for p in loop.model.parameters()
        ]
        for parameter, values in zip(loop.model.parameters(), new, strict=True):
            values.copy_(parameter)
            parameter.data = values
        for parameter in loop.model.parameters():
            torch.full_like(parameter, 7.0)


def _assign_state(loop: Loop) -> None:
    """Replace the parameters; the trainer reuses the memory of the old parameters for something else."""
    loop.model.load_state_dict({k: v.clone() for k, v in loop.model.state_dict().items()}, assign=True)
    loop.optimizer = make_optimizer(loop.model)
    for parameter in loop.model.parameters():
        torch.full_like(parameter, 7.0)


THEN: dict[str, Callable[[Loop], None]] = {
    "nothing": lambda loop: None,
    "switch stream": _switch_stream,
    "ema_model": _use_averaged_model,
    "compiled ema_model": partial(_use_held_model, change=_compile),
    "cast ema_model": partial(_use_held_model, change=lambda module: module.bfloat16()),
    "average_parameters": _use_swapped_model,
    "state_dict": _read_state,
    "state_dict elsewhere": partial(_elsewhere, use=_read_state),
    "late state_dict elsewhere": _read_late_state_elsewhere,
    "checkpoint elsewhere": partial(_elsewhere, use=lambda loop: _checkpoint(loop)),
    "flush": _flush_in_the_middle,
    "copy to the model": _copy_to_model,
    "grow a buffer": _grow_buffer,
    "save and load": _save_and_load,
    "load other values": _load_other_values,
    "checkpoint": _checkpoint,
    "skipped checkpoint": _checkpoint_and_skip_one,
    "checkpoint once": _checkpoint_once,
    "replace storages": _replace_storages,
    "assign": _assign_state,
}
