"""The package as others get it: the public names, the wheel, and what the wheel does in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nitrous_ema
import nitrous_ema.async_

REPOSITORY = Path(__file__).resolve().parents[2]

# A training run of one parameter that goes 1, 2, 3, ...: the synthesized average must lie between first and last.
USE = """
import sys, torch, nitrous_ema
from nitrous_ema import AsyncPostHocEMA, PostHocEMA
print(nitrous_ema.__file__)
for kind in (PostHocEMA, AsyncPostHocEMA):
    net = torch.nn.Linear(1, 1, bias=False)
    with kind(net, checkpoint_every_num_steps=5, checkpoint_folder=kind.__name__, update_every=1) as ema:
        for step in range(1, 11):
            ema.fence()
            with torch.no_grad():
                net.weight.fill_(step)
            ema.update()
        average = ema.synthesize_ema_model(sigma_rel=0.08, device="cpu").ema_model.weight.item()
    print(average)
    if not 8 < average < 10:
        sys.exit("not an average of the last weights")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without the variables that would lead it to this source tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if not _installed("hatchling"):
        pytest.skip("hatchling, which builds the wheel, is not installed here: `make test` installs it")
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation: the backend is the one that constraints.txt pins, and nothing is fetched.
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, REPOSITORY, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel and, from this environment's folder, what it depends on; nothing editable."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--no-cache-dir"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Torch is large: borrowed, not installed again. The .pth files in a folder added like this are not read, so the
    # editable install of this source tree stays behind. Written after pip ran, which would take it for installed.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed))
    return folder


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        assert "CI" not in os.environ, f"{distribution} must be installed in continuous integration"
        return False
    return True


@pytest.mark.parametrize("package", [nitrous_ema, nitrous_ema.async_], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_listed(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("package", [nitrous_ema, nitrous_ema.async_], ids=lambda package: package.__name__)
def test_a_misspelled_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="PostHocEma"):
        _ = package.PostHocEma


def test_a_class_is_the_same_by_every_way_to_it():
    from nitrous_ema.async_.ema import AsyncPostHocEMA

    assert nitrous_ema.AsyncPostHocEMA is nitrous_ema.async_.AsyncPostHocEMA is AsyncPostHocEMA


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = REPOSITORY / "nitrous_ema"
    expected = {file.relative_to(REPOSITORY).as_posix() for file in source.rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    described = {name for name in names if name.startswith(f"nitrous_ema-{nitrous_ema.__version__}.dist-info/")}
    assert names - described == expected | {"nitrous_ema/py.typed"}
    assert any(name.endswith("/LICENSE") for name in described)


def test_only_torch_numpy_and_psutil_are_required(elsewhere):
    (site_packages,) = elsewhere.glob("lib/python*/site-packages")
    (ours,) = importlib.metadata.distributions(name="nitrous-ema", path=[str(site_packages)])
    required = {Requirement(line) for line in ours.requires or [] if "extra ==" not in line}
    assert required == {Requirement("torch>=2.6"), Requirement("numpy"), Requirement("psutil")}


def test_the_wheel_works_in_an_environment_of_its_own(elsewhere, tmp_path):
    file, *averages = run(elsewhere / "bin" / "python", "-c", USE, cwd=tmp_path).split()
    assert Path(file).is_relative_to(elsewhere)
    assert len(averages) == 2


@pytest.mark.parametrize("command", ["nitrous-ema", "python -m nitrous_ema"])
def test_the_command_answers_from_any_folder(elsewhere, tmp_path, command):
    program, *arguments = command.split()
    printed = run(elsewhere / "bin" / program, *arguments, "--help", cwd=tmp_path)
    assert "demo" in printed


def test_everything_installed_is_pinned():
    if Path(sys.prefix) != REPOSITORY / ".venv":
        pytest.skip("this is not the environment that `make` builds from constraints.txt")
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {_canonical(pin.name) for pin in pins if not pin.marker or pin.marker.evaluate()}
    here = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    found = {_canonical(distribution.name) for distribution in here}
    # Torch pins what its builds for accelerators bring along.
    brought = {name for name in found if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert found - brought - {"pip", "nitrous-ema"} <= pinned


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
