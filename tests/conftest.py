"""What holds for every test: most of it is in pyproject.toml."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a device, which has torch and pytest; no CUDA test needs it
    hypothesis = None

if hypothesis is not None:
    hypothesis.settings.register_profile(
        "house",
        deadline=None,  # a busy machine is no bug
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # for the same reason
        derandomize="CI" in os.environ,  # the same commit gives the same verdict; at home every run tries new examples
        print_blob=True,
    )
    hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda", action="store_true", help="fail, rather than skip, where there is no CUDA device"
    )
    parser.addoption(
        "--small-models",
        choices=("thread", "inline"),
        default="thread",
        help="where AsyncPostHocEMA averages the small models of the tests: in its thread, as it does large ones, or "
        "inside update(), as users of small models get it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--small-models") == "inline":
        _skip_tests_of_the_thread(items)
    needy = [item for item in items if item.get_closest_marker("cuda")]
    if not needy:
        return
    import torch  # over a second: only for those who ask for a device

    if torch.cuda.is_available():
        return
    if config.getoption("--require-cuda"):
        raise pytest.UsageError(f"no CUDA device, or torch {torch.__version__} was built without CUDA")
    for item in needy:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make test-cuda PYTHON=...)"))


def _skip_tests_of_the_thread(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("thread_lane"):
            item.add_marker(pytest.mark.skip(reason="holds up the averaging thread, which small models do not have"))


@pytest.fixture(scope="session", autouse=True)
def lane_of_small_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Average small models in the thread, unless ``--small-models inline`` asks for what their users get.

    Models of tests have a few dozen parameters. Without this fixture no test would reach the thread, in which the
    models of most users are averaged.
    """
    import nitrous_ema.async_.ema

    if request.config.getoption("--small-models") == "inline":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nitrous_ema.async_.ema, "_FEW_ELEMENTS", -1)
        yield
