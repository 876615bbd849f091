"""Networks become graphs: stable names, the same outputs, nothing changed behind the user's back, refusals."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte.errors import CaptureError
from halfbyte.model import value_name
from halfbyte.ops import base_name


class Function(nn.Module):
    """A function of the inputs, with parts."""

    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


def names(m: hb.QModel) -> list[str]:
    return [value_name(n) for n in m.graph.nodes if n.op == "call_function" and "value" in n.meta]


def same_outputs(net: nn.Module, m: hb.QModel, *x: Tensor) -> None:
    with torch.no_grad():
        expected = net.eval()(*x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(expected, hb.run(m, x), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_names_come_from_modules_calls_and_operations() -> None:
    net = Function(
        lambda s, x: F.relu(s.block(s.block(x)) + F.relu(x)),
        block=nn.Sequential(nn.Linear(4, 4), nn.GELU()),
    )
    m = hb.capture(net, torch.randn(2, 4))
    found = names(m)
    assert len(found) == len(set(found)) == 7
    assert found[:4] == ["block.0", "block.1", "block.0@1", "block.1@1"]
    assert found[4:] == ["relu", "add", "relu.1"]
    assert set(m.params) == {"block.0.weight", "block.0.bias"}
    same_outputs(net, m, torch.randn(3, 4))


def test_several_operations_of_one_module_are_numbered() -> None:
    inner = Function(lambda s, x: torch.tanh(x + 1) * torch.tanh(x))
    m = hb.capture(nn.Sequential(nn.Linear(3, 3), inner), torch.randn(2, 3))
    assert names(m) == ["0", "1:add", "1:tanh", "1:tanh.1", "1:mul"]


def test_in_place_operations() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.layer(x)
        y += 1
        y.relu_()
        y[:, 0].mul_(2)
        return y

    net = Function(forward, layer=nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
    m = hb.capture(net, torch.randn(2, 4))
    assert not [n for n in m.graph.nodes if n.op == "call_function" and base_name(n).endswith("_")]
    x = torch.randn(5, 4)
    same_outputs(net, m, x)


def test_several_inputs_and_named_outputs() -> None:
    net = Function(lambda s, a, b: {"sum": s.layer(a) + b, "both": (a, b)[1] * 2}, layer=nn.Linear(4, 4))
    m = hb.capture(net, (torch.randn(2, 4), torch.randn(2, 4)))
    assert m.outputs == ("sum", "both")
    assert len(m.inputs) == 2
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    total, double = hb.run(m, (a, b))
    assert torch.allclose(total, net.layer(a) + b, atol=1e-6)
    assert torch.equal(double, 2 * b)
    pair = hb.capture(Function(lambda s, a, b: (a + b, a - b)), (a, b))
    assert pair.outputs == ("output_0", "output_1")
    with pytest.raises(hb.UsageError, match="takes 2 inputs, 1 were given"):
        hb.run(m, (a,))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_batch_is_free_whatever_the_example(batch: int, packed: bool) -> None:
    layer = nn.Conv2d(2, 3, 3)
    net = Function(lambda s, x: s.layer(x).flatten(1), layer=layer) if packed else nn.Sequential(layer, nn.Flatten())
    m = hb.capture(net, torch.randn(batch, 2, 5, 5))
    assert m.dynamic
    for size in (1, 2, 7):
        same_outputs(net, m, torch.randn(size, 2, 5, 5))


def test_a_fixed_batch_is_captured_static_and_said() -> None:
    net = Function(lambda s, x: s.layer(x).reshape(2, 6), layer=nn.Linear(3, 3))
    m = hb.capture(net, torch.randn(4, 3))
    assert not m.dynamic
    assert any("fixes its batch size" in str(entry) for entry in m.log)
    same_outputs(net, m, torch.randn(4, 3))


def test_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net.train()
    net[3].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    torch.manual_seed(7)
    random.seed(7)
    before = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    m = hb.capture(net, torch.full((1, 4), 0.5))
    after = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert [x.training for x in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert any("train/eval" in str(entry) for entry in m.log)
    assert "dropout" not in [base_name(n) for n in m.graph.nodes]
    same_outputs(net, m, torch.randn(3, 4))


def test_an_exported_program_is_taken_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    x = torch.randn(2, 2, 5, 5)
    m = hb.capture(torch.export.export(net, (x,)), x)
    same_outputs(net, m, x)
    assert names(m) == ["0", "1"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


def damaged() -> nn.Module:
    net = nn.Linear(3, 3)
    with torch.no_grad():
        net.weight[1, 1] = float("nan")
    return net


def branching(s: Any, x: Tensor) -> Tensor:
    return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (damaged(), "parameter 'weight' holds NaN"),
        (Counting(), "changes its buffer 'seen'"),
        (Function(branching), "torch.export cannot capture Function: "),
        (Function(lambda s, x: (x, 3)), "not a tensor"),
        (Function(lambda s, x: x + torch.rand_like(x)), "random numbers"),
    ],
)
def test_refusals_name_the_reason(net: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as refused:
        hb.capture(net, torch.randn(2, 3))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("example", [(), "x", [torch.zeros(2), 3]])
def test_examples_are_tensors(example: Any) -> None:
    with pytest.raises(CaptureError, match="example must be a tensor"):
        hb.capture(nn.Linear(2, 2), example)
