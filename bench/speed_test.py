"""The speed test that users know: seconds for 100 training steps of a large vision transformer, with and without EMA.

    model = torch.compile(torchvision.models.vit_h_14().cuda())       # inputs of 8 x 3 x 224 x 224
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    ema = PostHocEMA(model, sigma_rels=[0.05, 0.1], checkpoint_every_num_steps=1e10).cuda()
    ...                                                               # ten steps to warm up, then 100 of these:
    optimizer.zero_grad(); model(inputs).mean().backward(); optimizer.step(); ema.update()

Everything is float32, as there. With update_every at its default, 100, one of the 100 steps has an update; so ours is
also measured with one after every step, and with --large the others are. AsyncPostHocEMA does so by default.

Each sample sets its EMA up, warms up, runs the steps and removes the EMA; contestants take turns. One that fails is
reported below the table, and the command then ends with 1. Without a torchvision that fits this torch the same network
is taken from here, and the title names it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.contestants import nitrous_001
from bench.harness import Measure, compare, described, parser, start, synchronizer, timed
from bench.training import release, torchvision_vit_h_14, vit_quick
from nitrous_ema import AsyncPostHocEMA, PostHocEMA

NO_EMA = "without EMA"
WARM_UP_STEPS = 10
ROUNDS = 5

MakeEMA = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What users run: the same network, inputs and optimizer for every contestant."""

    network: nn.Module
    inputs: Tensor
    steps: int
    folder: Path

    def seconds(self, make: MakeEMA | None, **options: Any) -> float:
        """Of the steps with one EMA."""
        ema = None
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, fused=True)
        if make is not None:
            ema = make(
                self.network,
                sigma_rels=[0.05, 0.1],
                checkpoint_every_num_steps=1e10,
                checkpoint_folder=str(self.folder / f"{next(_NUMBERS)}"),
                **options,
            ).to(self.inputs.device)

        def train(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                self.network(self.inputs).mean().backward()
                optimizer.step()
                if ema is not None:
                    ema.update()

        try:
            train(min(WARM_UP_STEPS, self.steps))
            return timed(lambda: train(self.steps), synchronize=synchronizer(self.inputs.device))()
        finally:
            if isinstance(ema, PostHocEMA):
                ema.close()


_NUMBERS = itertools.count()


def contestants(script: Script, *, everyone: bool) -> tuple[dict[str, Measure], dict[str, str]]:
    """By name; and why some are absent."""
    libraries: dict[str, tuple[MakeEMA, Mapping[str, Any]]] = {}
    absent: dict[str, str] = {}
    try:
        import ema_pytorch

        libraries["ema-pytorch"] = ema_pytorch.PostHocEMA, {}
    except ImportError as error:
        absent["ema-pytorch"] = str(error)
    library, reason = nitrous_001()
    if library is not None:
        libraries["nitrous-ema 0.0.1"] = library.PostHocEMA, {}
    else:
        absent["nitrous-ema 0.0.1"] = reason
    found: dict[str, tuple[MakeEMA | None, Mapping[str, Any]]] = {NO_EMA: (None, {})}
    found |= libraries
    found["PostHocEMA"] = PostHocEMA, {}
    found["PostHocEMA, update_every=1"] = PostHocEMA, {"update_every": 1}
    found["AsyncPostHocEMA, for which update_every=1 is the default"] = AsyncPostHocEMA, {}
    if everyone:
        found["AsyncPostHocEMA, update_every=100"] = AsyncPostHocEMA, {"update_every": 100}
        found |= {f"{name}, update_every=1": (make, {"update_every": 1}) for name, (make, _) in libraries.items()}

    def measure(make: MakeEMA | None, options: Mapping[str, Any]) -> Measure:
        def once() -> float:
            release(script.inputs.device)  # also what an EMA that has failed has left
            return script.seconds(make, **options)

        return once

    return {name: measure(*each) for name, each in found.items()}, absent


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    report = start("speed_test", options)
    make, described_as = (vit_quick, "tiny ViT") if options.quick else torchvision_vit_h_14()
    torch.manual_seed(0)
    shape = (2, 3, 16, 16) if options.quick else (8, 3, 224, 224)
    inputs = torch.randn(shape, device=device)
    network, how = _network(make().to(device), inputs, options.eager)
    with tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-") as folder:
        script = Script(network=network, inputs=inputs, steps=options.steps, folder=Path(folder))
        measures, absent = contestants(script, everyone=options.large)
        for name, reason in absent.items():
            print(f"left out: {name}: {reason}")
        failed: dict[str, str] = {}
        comparison = compare(
            measures,
            rounds=options.rounds or ROUNDS,
            warm_up_rounds=0,
            seconds_at_most=60 * options.minutes,
            failed=failed,
        )
    title = f"{options.steps} training steps of {described_as}, {how}, inputs of {' x '.join(map(str, shape))}"
    report.add(title, comparison, baseline=NO_EMA, failed=failed)
    report.write(options.json)
    sys.exit(bool(report.failures))


def _network(network: nn.Module, inputs: Tensor, eager: bool) -> tuple[nn.Module, str]:
    """The network, compiled, and how it runs: a machine that cannot compile still gives numbers."""
    if eager:
        return network, "eager"
    try:
        compiled: nn.Module = torch.compile(network)
        compiled(inputs).mean().backward()
    except Exception as error:
        torch._dynamo.reset()
        return network, f"eager as torch.compile has failed ({described(error)})"
    return compiled, "torch.compile"


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=4.0, help="begin no round after these (default 4)")
    options.add_argument("--steps", type=int, default=100, help="training steps per sample (default 100)")
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    options.set_defaults(device="cuda")
    chosen = options.parse_args()
    if chosen.device == "cpu" and not chosen.quick:
        options.error("this is a test for accelerators; --device cpu needs --quick, to see that it runs")
    return chosen


if __name__ == "__main__":
    main()
