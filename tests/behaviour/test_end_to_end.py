"""All steps in four processes: one trains, one synthesizes meanwhile, one loads without any code of this package."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nitrous_ema.profile import sigma_rel_to_gamma

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
LENGTHS = (0.05, 0.075, 0.12)

# Tied weights, a buffer that is averaged, one that counts, one that is in no state_dict.
NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(8, 16)
            self.norm = nn.BatchNorm1d(16)
            self.leave = nn.Linear(16, 8)
            self.again = nn.Linear(16, 8)
            self.again.weight = self.leave.weight
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x):
            x = torch.tanh(self.norm(self.enter(x)))
            return self.scale * (self.leave(x) + self.again(x))
"""

# Trains to step 200, prints a line, and goes on training until a line comes in. It also sums up, in float64 and without
# the library, the averages of step 200: every step's weights times the profile's weight of that step.
TRAIN = """
    import json, sys, threading
    import numpy as np, torch
    from net import Net
    from nitrous_ema import AsyncPostHocEMA

    folder, gammas = sys.argv[1], json.loads(sys.argv[2])
    told_to_stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), told_to_stop.set()), daemon=True).start()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-2)
    expected = [{} for _ in gammas]

    def step(ema):
        x = torch.randn(32, 8)
        loss = (net(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()

    with AsyncPostHocEMA(net, checkpoint_every_num_steps="manual", checkpoint_folder=folder) as ema:
        for t in range(1, 201):
            step(ema)
            if t % 10 == 0:
                ema.checkpoint()
            for sums, gamma in zip(expected, gammas):
                share = (t / 200) ** (gamma + 1) - ((t - 1) / 200) ** (gamma + 1)
                for name, tensor in net.state_dict().items():
                    sums[name] = sums.get(name, 0) + share * tensor.double().numpy()
        ema.flush(60)
        for index, sums in enumerate(expected):
            np.savez(f"expected-{index}.npz", **sums)
        print(json.dumps({"run": ema.run, "step": ema.step}), flush=True)
        for _ in range(1_000_000):
            step(ema)
            if ema.step % 200 == 0:
                ema.checkpoint()
                if told_to_stop.is_set():
                    break
        ema.flush(60)
        net.eval()
        x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
        loss = (net(x) - x.roll(1, 1)).square().mean().item()
    print(json.dumps({"step": ema.step, "loss": loss}), flush=True)
"""

EVALUATE = """
    import json, sys
    import torch
    from safetensors.torch import load_file
    from net import Net

    net = Net()
    net.load_state_dict(load_file(sys.argv[1]), strict=True)
    net.eval()
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = (net(x) - x.roll(1, 1)).square().mean().item()
    print(json.dumps({
        "loss": loss,
        "tied": net.leave.weight is net.again.weight,
        "batches": net.norm.num_batches_tracked.item(),
        "ours": [name for name in sys.modules if name.startswith("nitrous")],
    }))
"""


class Trainer:
    """A process that trains and prints lines of JSON."""

    def __init__(self, folder: Path, snapshots: Path) -> None:
        gammas = [float(sigma_rel_to_gamma(length)) for length in LENGTHS]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "train.py", str(snapshots), json.dumps(gammas)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def says(self) -> dict:
        line = self._lines.get(timeout=TIMEOUT)
        assert line, f"the trainer ended with status {self.process.wait(TIMEOUT)}"
        return json.loads(line)

    def stop(self) -> dict:
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        said = self.says()
        assert self.process.wait(TIMEOUT) == 0
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        self.process.stdin.close()
        self.process.stdout.close()


def put(folder: Path, **sources: str) -> Path:
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return folder


@pytest.fixture
def training(tmp_path):
    folder = put(tmp_path / "training", net=NET, train=TRAIN)
    trainer = Trainer(folder, tmp_path / "snapshots")
    yield trainer
    trainer.end()


def synthesize(snapshots: Path, out: Path, *options: str) -> list[dict]:
    """Run the worker as an evaluation job does: elsewhere, with nothing but the folder."""
    command = [sys.executable, "-W", "error", "-m", "nitrous_ema.async_.synthesize_worker", str(snapshots)]
    command += ["--sigma-rel", ",".join(map(str, LENGTHS)), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=snapshots.parent, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def evaluate(folder: Path, path: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "evaluate.py", path]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_averages_are_synthesized_while_training_goes_on_and_load_where_nothing_of_ours_is(training, tmp_path):
    snapshots = tmp_path / "snapshots"
    begun = training.says()
    assert begun["step"] == 200

    during = synthesize(snapshots, tmp_path / "during", "--step", "200")
    assert training.process.poll() is None
    stopped = training.stop()
    assert stopped["step"] > 200

    assert [(each["sigma_rel"], each["step"], each["run"]) for each in during] == [
        (length, 200, begun["run"]) for length in LENGTHS
    ]
    for index, each in enumerate(during):
        assert_is_the_average(each, np.load(tmp_path / "training" / f"expected-{index}.npz"))

    after = synthesize(snapshots, tmp_path / "after")
    assert {each["step"] for each in after} == {stopped["step"]}
    folder = put(tmp_path / "evaluation", net=NET, evaluate=EVALUATE)
    found = evaluate(folder, after[1]["path"])
    assert found["ours"] == []
    assert found["tied"]
    assert found["batches"] == stopped["step"]  # the buffer that counts is that of the target step
    assert found["loss"] < stopped["loss"]  # Adam at this rate leaves noise in the weights; the average has less


def assert_is_the_average(output: dict, expected) -> None:
    """It equals the definition's average within the profile error that the worker predicts."""
    found = safetensors.numpy.load_file(output["path"])
    assert sorted(found) == sorted(expected.files)  # the state_dict's keys, and no others
    assert found["norm.num_batches_tracked"] == 200
    for name in set(found) - {"norm.num_batches_tracked"}:
        scale = np.abs(expected[name]).max()
        assert np.abs(found[name] - expected[name]).max() < scale * (2 * output["profile_error"] + 1e-5), name
