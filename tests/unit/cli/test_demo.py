from __future__ import annotations

import io
import math
import sys

import pytest
import torch

from nitrous_ema import SnapshotStore
from nitrous_ema.cli import demo
from nitrous_ema.errors import MissingExtraError
from nitrous_ema.search.table import SweepTable
from tests.support.search_rows import row

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)


class IdealForGaussians(torch.nn.Module):
    """The best denoiser of images whose pixels are independent and normal with standard deviation sigma_data."""

    def __init__(self, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def forward(self, noisy, sigma, labels):
        return noisy * self.sigma_data**2 / (self.sigma_data**2 + sigma**2)


class Knows(torch.nn.Module):
    """Knows the clean image."""

    def __init__(self, clean) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, noisy, sigma, labels):
        return self.clean.expand_as(noisy)


def gaussians(count: int, sigma_data: float) -> demo.Images:
    generator = torch.Generator().manual_seed(1)
    pixels = sigma_data * torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return demo.Images(pixels, torch.zeros(count, dtype=torch.long))


def quick(folder) -> list[str]:
    report = io.StringIO()
    assert demo.main(["--quick", "--out", str(folder)], stdout=report) == 0
    return report.getvalue().splitlines()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    report = quick(folder)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    return folder, report


def table(report: list[str]) -> list[str]:
    begin = next(number for number, line in enumerate(report) if "sigma_rel" in line and "held-out" in line)
    return report[begin:-1]


# The demo


def test_demo_compares_every_length_with_the_raw_weights(done):
    _, report = done
    rows = [line.split() for line in table(report)[1:17]]
    assert rows[0][:2] == ["raw", "weights"]
    lengths = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25]
    assert [float(row[0]) for row in rows[1:]] == lengths
    raw, losses = float(rows[0][2]), [float(row[1]) for row in rows[1:]]
    assert [float(row[2].rstrip("%")) / 100 for row in rows[1:]] == pytest.approx(
        [loss / raw - 1 for loss in losses], abs=1e-3
    )
    best = [row for row in rows if row[-1] == "best"]
    assert len(best) == 1
    assert float(best[0][1]) == min(losses)
    assert f"sigma_rel {best[0][0]} " in report[-3]


def test_tracked_lengths_come_out_exactly_and_others_nearly(done):
    _, report = done
    errors = {float(line.split()[0]): float(line.split()[3]) for line in table(report)[2:17]}
    assert errors[0.05] < 1e-12
    assert errors[0.1] < 1e-12
    assert 1e-6 < errors[0.07] < 0.02


def test_demo_leaves_pictures_averages_and_snapshots(done):
    folder, _ = done
    for name in ("loss.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "averages").glob("step-62-sigma-*.safetensors"))) == 15
    assert [snapshot.step for snapshot in SnapshotStore(folder / "snapshots").snapshots()] == [*range(5, 65, 5), 62]


def test_same_seed_gives_the_same_table_in_a_used_folder_too(done):
    folder, report = done
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)  # what the caller does with torch's generator has no influence
        again = quick(folder)
    assert table(again) == table(report)
    assert [len([line for line in each if "contains earlier runs" in line]) for each in (report, again)] == [0, 1]


def test_verdict_is_the_raw_weights_where_they_are_better():
    table = SweepTable((row(0.1, 1.2),))
    *_, worse = demo._table(table, torch.tensor([1.0, 1.0]), torch.tensor([1.1, 1.3]))
    *_, better = demo._table(table, torch.tensor([1.0, 1.0]), torch.tensor([0.8, 0.6]))
    assert worse == "The raw weights are best: the loss of sigma_rel 0.1 is 20.0% above theirs (0.2000 ± 0.1000)."
    assert better == "sigma_rel 0.1 is best: its loss is 30.0% below that of the raw weights (0.3000 ± 0.1000)."


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_missing_extra_is_reported_before_anything_is_done(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module}: pip install 'nitrous-ema\[demo\]'"):
        demo.main(["--quick", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--steps", "3"], ["--steps", "0.5"], ["--seed", "-1"], ["--seed", str(2**64)]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_split_has_every_digit_image_once():
    from sklearn.datasets import load_digits

    training, held_out = demo.load_images()
    assert (len(training.labels), len(held_out.labels)) == (1438, 359)
    pixels = torch.cat([training.pixels, held_out.pixels])
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    ours = sorted(((pixels.flatten(1) + 1) * 8).tolist())
    assert ours == sorted(load_digits().data.tolist())


# The model, against Karras et al. 2022


def test_preconditioning_is_that_of_the_paper():
    # Table 1 with sigma_data = 0.5 and sigma = 1.2, worked out by hand: sigma**2 + sigma_data**2 = 1.69 = 1.3**2.
    found = [float(each) for each in demo.preconditioning(torch.tensor(1.2, dtype=torch.float64), 0.5)]
    assert found == pytest.approx([0.25 / 1.69, 1.2 * 0.5 / 1.3, 1 / 1.3, math.log(1.2) / 4], rel=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
def test_network_sees_and_is_asked_for_unit_variance(sigma_data):
    """The requirements that the paper derives c_in, c_out and c_skip from (its appendix B.6)."""
    c_skip, c_out, c_in, _ = demo.preconditioning(SIGMAS, sigma_data)
    input_variance = c_in**2 * (sigma_data**2 + SIGMAS**2)
    asked_variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMAS**2) / c_out**2
    torch.testing.assert_close(input_variance, torch.ones_like(SIGMAS))
    torch.testing.assert_close(asked_variance, torch.ones_like(SIGMAS))
    for other in (c_skip * 0.99, c_skip * 1.01):  # c_skip is where the network's errors are amplified least
        assert ((1 - other) ** 2 * sigma_data**2 + other**2 * SIGMAS**2 > c_out**2).all()


@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_ideal_denoiser_of_gaussian_images_has_loss_one_at_every_noise_level(sigma):
    images = gaussians(2000, 0.7)
    noise = torch.randn(images.pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = demo.edm_loss(IdealForGaussians(0.7), images, torch.full((2000, 1, 1, 1), sigma), noise, 0.7)
    assert loss.shape == (2000,)
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.02)  # 128 000 pixels: four standard errors are 0.016


def test_denoiser_that_knows_the_image_has_no_loss():
    images = gaussians(3, 0.7)
    noise = torch.randn(images.pixels.shape, dtype=torch.float64)
    assert demo.edm_loss(Knows(images.pixels), images, demo.random_sigma(3), noise, 0.7).tolist() == [0, 0, 0]


def test_denoiser_leaves_an_image_without_noise_alone():
    model = demo.Denoiser(8, 1, 0.7)
    images = gaussians(2, 0.7)
    pixels = images.pixels.float()
    denoised = model(pixels, torch.full((2, 1, 1, 1), 1e-4), images.labels)
    torch.testing.assert_close(denoised, pixels, atol=1e-3, rtol=0)
    assert not torch.allclose(model(pixels, torch.ones(2, 1, 1, 1), images.labels), pixels, atol=1e-2)


def test_noise_levels_are_lognormal():
    logs = demo.random_sigma(40_000, torch.Generator().manual_seed(3)).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.03)


def test_sampler_follows_the_flow_of_gaussian_images_to_second_order():
    """Their flow is known: x shrinks as (sigma_data**2 + sigma**2) ** 0.5. Euler's method halves the error only."""
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = noise * 80 * 0.7 / math.hypot(0.7, 80)
    errors = []
    for steps in (18, 36, 72):
        drawn = demo.sample(IdealForGaussians(0.7), noise, torch.zeros(4, dtype=torch.long), steps)
        errors.append(float((drawn / exact - 1).abs().max()))
    assert errors[0] < 0.06
    assert errors[1] < errors[0] / 3.5
    assert errors[2] < errors[1] / 3.5


def test_sampler_ends_at_the_only_image_there_is():
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    drawn = demo.sample(Knows(image), torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(drawn, image.expand(2, 1, 8, 8), rtol=0, atol=1e-4)


def test_every_model_is_evaluated_with_the_same_noise():
    images = demo.Images(gaussians(5, 0.7).pixels.float(), torch.arange(5))
    model = demo.Denoiser(8, 1, 0.7)
    before = torch.get_rng_state()
    first = demo.evaluate(model, images, draws=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(demo.evaluate(model, images, draws=2), first)
