"""A compiled ``ema_model``: one graph, whose forward is ordered behind the averaging at each call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import nitrous_ema.async_.ema
from nitrous_ema import AsyncPostHocEMA, KarrasEMA, PostHocEMA
from nitrous_ema.averaging import compiled_forward
from tests.support.fakes import LateLane
from tests.support.models import set_weights


class Conditioned(nn.Module):
    """Its weights are normalized in the forward, and it has tensors in each kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.embed = nn.Linear(4, 4), nn.Linear(2, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, conditions: dict[str, list[torch.Tensor]], *, scale: float = 1.0):
        weight = self.layer.weight / self.layer.weight.norm(dim=1, keepdim=True)
        embedded = self.embed(conditions["time"][0])
        return (nn.functional.linear(x, weight) + embedded) * self.gain.exp() * scale


def inputs() -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    return torch.randn(3, 4), {"time": [torch.randn(3, 2)]}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's own compiler
        yield
    torch.compiler.reset()


def averaged(model: nn.Module, cls: type[PostHocEMA], folder) -> PostHocEMA:
    ema = cls(model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", update_every=1)
    train(ema, model, range(3))
    return ema


def train(ema: PostHocEMA, model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        ema.fence()
        set_weights(model, seed)
        ema.update()


def expected_output(ema: PostHocEMA, arguments) -> torch.Tensor:
    """Oracle: a module that holds the average of the state_dict."""
    prefix = "ema_models.0.ema_model."
    module = Conditioned()
    state = ema.state_dict()
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    with torch.no_grad():
        return module(*arguments, scale=2.0)


def compile_alone(module: nn.Module, **options):
    """Compile the module. Torch then compiles the hook and the forward as two graphs."""
    return torch.compile(module, **options)


def compile_inlined(module: nn.Module, **options):
    """Compile a function that calls the module: the hook and the forward are one graph."""
    return torch.compile(lambda *args, **kwargs: module(*args, **kwargs) * 1.0, **options)


WAYS = pytest.mark.parametrize("compile_it", [compile_alone, compile_inlined])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@WAYS
@BACKENDS
@pytest.mark.parametrize("kind", ["plain", "cast"])
def test_held_compiled_module_reads_behind_a_lane_that_is_late(backend, kind, compile_it, tmp_path, monkeypatch):
    lane = LateLane()
    monkeypatch.setattr(nitrous_ema.async_.ema, "_FEW_ELEMENTS", 0)
    monkeypatch.setattr(nitrous_ema.async_.ema, "make_lane", lambda device: lane)
    model = Conditioned()
    with averaged(model, AsyncPostHocEMA, tmp_path) as ema:
        shown = ema.ema_models[0].ema_model
        if kind == "cast":
            shown.double()
        compiled = compile_it(shown, backend=backend, fullgraph=True)
        for seeds in (range(3, 5), range(5, 8), range(8, 9)):
            x, conditions = inputs()
            with torch.no_grad():
                train(ema, model, seeds)
                dtype = shown.gain.dtype
                arguments = x.to(dtype), {"time": [conditions["time"][0].to(dtype)]}
                output = compiled(*arguments, scale=2.0)
            torch.testing.assert_close(output.float(), expected_output(ema, (x, conditions)), rtol=1e-4, atol=1e-4)


@WAYS
@BACKENDS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides it but from -W error
def test_compiled_module_has_the_gradients_of_its_inputs(backend, compile_it, tmp_path):
    ema = averaged(Conditioned(), PostHocEMA, tmp_path)
    shown = ema.ema_models[0].ema_model
    compiled = compile_it(shown, backend=backend, fullgraph=True)
    gradients = []
    x, conditions = inputs()
    for module in (shown, compiled):
        leaves = [x.clone().requires_grad_(), conditions["time"][0].clone().requires_grad_()]
        module(leaves[0], {"time": [leaves[1]]}).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


@WAYS
def test_updates_and_requests_compile_nothing_anew(compile_it, tmp_path):
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph

    model = Conditioned()
    ema = averaged(model, PostHocEMA, tmp_path)
    compiled = compile_it(ema.ema_models[0].ema_model, backend=note, fullgraph=True)
    compiled(*inputs())
    before = len(graphs)
    for seeds in (range(3, 5), range(5, 8)):
        train(ema, model, seeds)
        compiled(*inputs())
        _ = ema.ema_models[0].ema_model
    assert len(graphs) == before > 0


def test_compiled_module_in_train_mode_is_refused(tmp_path):
    ema = averaged(Conditioned(), PostHocEMA, tmp_path)
    shown = ema.ema_models[0].ema_model
    compiled = torch.compile(shown, backend="eager", fullgraph=True)
    shown.layer.train()
    with pytest.raises(RuntimeError, match="'layer' was put in train mode"):
        compiled(*inputs())


def test_compiled_module_outlives_its_ema():
    ema = KarrasEMA(nn.Linear(2, 2), sigma_rel=0.1, update_every=1)
    ema.update()
    compiled = torch.compile(ema.ema_model, backend="eager", fullgraph=True)
    expected = compiled(torch.ones(1, 2))
    del ema
    assert torch.equal(compiled(torch.ones(1, 2)), expected)


def test_forward_without_a_tensor_among_its_arguments_is_refused():
    class Constant(nn.Linear):
        def forward(self, factor: float) -> torch.Tensor:
            return self.weight * factor

    ema = KarrasEMA(Constant(2, 2), sigma_rel=0.1, update_every=1)
    with pytest.raises(Exception, match="no tensor among its arguments"):
        torch.compile(ema.ema_model, backend="eager", fullgraph=True)(2.0)


def test_export_is_refused_and_a_copy_can_be_exported(tmp_path):
    ema = averaged(Conditioned(), PostHocEMA, tmp_path)
    shown = ema.ema_models[0].ema_model
    with pytest.raises(Exception, match=r"Export copy\.deepcopy\(ema_model\)"):
        torch.export.export(shown, inputs())
    torch.export.export(copy.deepcopy(shown), inputs())


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_operator_is_kept_out_of_cuda_graphs():
    compiled_forward._define()
    operator = torch.ops.nitrous_ema.order_behind_averaging.default
    assert torch.Tag.cudagraph_unsafe in operator.tags
    tensors = [torch.randn(3, requires_grad=True), torch.randn(4, 2).t(), torch.arange(3)]
    torch.library.opcheck(operator, (tensors, -1))
