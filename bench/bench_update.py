"""One averaging step and one update() call, of two profiles, for models of several sizes.

Four kinds of table:
  one update         from the call of update() until the averages have moved; for a library that averages in the
                     background also the time until update() returns, which is all that training waits for
  one update, bf16   ours with bfloat16 parameters; averages stay float32 (the peers' become bfloat16: no comparison)
  one update, skip   ours with on_nonfinite="skip", which first looks whether every weight is finite
  one training step  forward, backward, optimizer step and update(), several in a row, ending when everything is done

The floor is two flat lerp_ over float32 buffers of the same number of elements, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench import contestants, models
from bench.contestants import ASYNC, EMA_PYTORCH, FLOOR, FOREACH, NITROUS_001, SYNC, Averaging
from bench.harness import Comparison, Measure, Report, compare, duration, parser, start, synchronizer, timed

NO_EMA = "no EMA"
SKIPPING = f"{SYNC}, on_nonfinite='skip'"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model to be averaged, and how long to look at it."""

    name: str
    make: Callable[[], nn.Module]
    rounds: int
    repeats: int
    """Updates per sample (their median); timed one by one."""
    everyone: bool = True
    """False: only those that fit into memory together."""


SIZES = (
    Size(name="tiny MLP", make=models.tiny, rounds=25, repeats=21),
    Size(name="1000 tensors", make=models.many, rounds=12, repeats=3),
    Size(name="ResNet-18", make=models.resnet, rounds=15, repeats=3),
    Size(name="ViT-Ti/16", make=models.vit_ti, rounds=25, repeats=5),
    Size(name="ViT-S/16", make=models.vit_s, rounds=15, repeats=3),
    Size(name="ViT-B/16", make=models.vit, rounds=10, repeats=1),
)
LARGE = Size(name="300M in one tensor", make=models.flat, rounds=8, repeats=1, everyone=False)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model to be trained while it is averaged."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: int
    rounds: int
    steps: int
    """Training steps per sample."""


TRAININGS = (
    Training(name="tiny MLP", make=models.tiny, inputs=(32, 5), outputs=5, rounds=15, steps=20),
    Training(name="ResNet-18", make=models.resnet, inputs=(4, 3, 16, 16), outputs=10, rounds=12, steps=4),
)


def main() -> None:
    options = parser(__doc__).parse_args()
    report = start("bench_update", options)
    device = torch.device(options.device)
    libraries, absent = contestants.makers()
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    sizes, trainings = (*SIZES, LARGE) if options.large else SIZES, TRAININGS
    if options.quick:  # without the model that takes seconds to make
        sizes = tuple(replace(size, rounds=3, repeats=1) for size in SIZES[:3])
        trainings = tuple(replace(training, rounds=3, steps=4) for training in TRAININGS[:1])
    for size in sizes:
        one_update(report, size, libraries, options.rounds or size.rounds, device)
    for size in sizes[2:]:
        one_update_bf16(report, size, libraries, options.rounds or size.rounds, device)
    for size in sizes[1:]:
        one_update_skip(report, size, libraries, options.rounds or size.rounds, device)
    for training in trainings:
        one_training_step(report, training, libraries, options.rounds or training.rounds, device)
    report.write(options.json)


def one_update(
    report: Report, size: Size, libraries: dict[str, contestants.Make], rounds: int, device: torch.device
) -> None:
    """Every library, until the averages have moved and until update() returns."""
    model = size.make().to(device)
    names = [*libraries] if size.everyone else [name for name in (SYNC, ASYNC, NITROUS_001) if name in libraries]
    with ExitStack() as stack:
        rivals = {FLOOR: contestants.floor(models.averaged_elements(model), device)}
        if size.everyone:
            rivals[FOREACH] = contestants.foreach(model)
        rivals.update({name: libraries[name](model, stack) for name in names})
        comparison = compare(_measures(rivals, size.repeats, device), rounds=rounds)
    baseline = next(name for name in (EMA_PYTORCH, NITROUS_001, SYNC) if name in rivals)
    report.add(f"one update: {_described(size, model)}", comparison, floor=FLOOR, baseline=baseline)


def one_update_bf16(
    report: Report, size: Size, libraries: dict[str, contestants.Make], rounds: int, device: torch.device
) -> None:
    """Ours, where parameters must be cast on their way into the averages."""
    model = size.make().to(device, torch.bfloat16)
    with ExitStack() as stack:
        rivals = {FLOOR: contestants.floor(models.averaged_elements(model), device)}
        rivals.update({name: libraries[name](model, stack) for name in (SYNC, ASYNC)})
        comparison = compare(_measures(rivals, size.repeats, device), rounds=rounds)
    note = "The floor reads float32 parameters, as everywhere: twice the bytes of these."
    report.add(f"one update, bf16: {_described(size, model)}", comparison, floor=FLOOR, note=note)


def one_update_skip(
    report: Report, size: Size, libraries: dict[str, contestants.Make], rounds: int, device: torch.device
) -> None:
    """Ours, with and without a look at every weight before the averages move."""
    model = size.make().to(device)
    with ExitStack() as stack:
        rivals = {SYNC: libraries[SYNC](model, stack), SKIPPING: contestants.skipping(model, stack)}
        comparison = compare(_measures(rivals, size.repeats, device), rounds=rounds)
    report.add(f"one update, skip: {_described(size, model)}", comparison, baseline=SYNC)


def one_training_step(
    report: Report, training: Training, libraries: dict[str, contestants.Make], rounds: int, device: torch.device
) -> None:
    """What averaging adds to a step, with all of its work included. All contestants train the same model in turns."""
    torch.manual_seed(0)
    model = training.make().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(training.inputs, device=device)
    targets = torch.randn(training.inputs[0], training.outputs, device=device)

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    def steps(averaging: Averaging | None) -> Callable[[], None]:
        def run() -> None:
            for _ in range(training.steps):
                train()
                if averaging is not None:
                    averaging.update()
            if averaging is not None and averaging.fence is not None:
                averaging.fence()

        return run

    with ExitStack() as stack:
        rivals: dict[str, Averaging | None] = {NO_EMA: None}
        rivals.update({name: make(model, stack) for name, make in libraries.items()})
        synchronize = synchronizer(device)
        measures = {
            name: timed(steps(rival), synchronize=synchronize, divide_by=training.steps)
            for name, rival in rivals.items()
        }
        comparison = compare(measures, rounds=rounds)
    note = (
        f"Forward, backward and AdamW on inputs of {training.inputs}, then update(). A sample is {training.steps} "
        f"steps in a row until all averaging is done, per step.\n{_async_to_sync(comparison)}"
    )
    report.add(f"one training step: {training.name}", comparison, baseline=NO_EMA, note=note)


def _async_to_sync(comparison: Comparison) -> str:
    """What the asynchronous class adds to a step, against what the synchronous one does."""
    more = comparison.difference(ASYNC, SYNC)  # of the steps, and so of what is added to them, round by round
    added = [comparison.difference(name, NO_EMA).median for name in (ASYNC, SYNC)]
    ratio = f"{added[0] / added[1]:.2f} times as much" if min(added) > 0 else "no ratio: one of them added nothing"
    spread = f"{duration(more.median)} [{duration(more.q1)} - {duration(more.q3)}]"
    return f"{ASYNC} adds {spread} more than {SYNC} does (below 0: less); at the medians {ratio}."


def _measures(rivals: dict[str, Averaging], repeats: int, device: torch.device) -> dict[str, Measure]:
    """Each until done; and until it returns, where that is earlier."""
    measures: dict[str, Measure] = {}
    wait = synchronizer(device)
    for name, rival in rivals.items():
        measures[name] = timed(rival.update_and_fence, synchronize=wait, repeats=repeats)
        if rival.fence is not None or wait is not None:
            measures[f"{name}, until it returns"] = timed(
                rival.update, settle=rival.fence, synchronize=wait, until="return", repeats=repeats
            )
    return measures


def _described(size: Size, model: nn.Module) -> str:
    elements, tensors = models.averaged_elements(model), models.averaged_tensors(model)
    shown = f"{elements / 1e6:.1f} M" if elements >= 1e6 else f"{elements}"
    return f"{size.name}, {shown} elements in {tensors} tensors (median of {size.repeats} updates per sample)"


if __name__ == "__main__":
    main()
