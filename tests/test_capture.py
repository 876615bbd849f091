"""Networks become graphs: stable names, the same outputs, nothing changed behind the user's back, refusals."""

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte.chains import pairs
from halfbyte.errors import CaptureError
from halfbyte.graph import effort, extent, layers, macs
from halfbyte.model import value_name
from halfbyte.ops import Kind, base_name, kind


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


class Optional(nn.Module):
    """Like those of the transformers library: every input by name, none of them required, a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.layer = nn.Embedding(9, 4), nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(
        self,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        kinds: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        assert ids is not None
        x = self.words(ids) if kinds is None else self.words(ids) + self.kinds(kinds)
        x = x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        found = self.layer(x)
        return {"logits": found} if labels is None else {"loss": F.cross_entropy(found, labels), "logits": found}


def tokens(samples: int) -> dict[str, Tensor]:
    """Every input that Optional knows, in another order."""
    g = torch.Generator().manual_seed(samples)
    ids, kinds = torch.randint(9, (samples, 5), generator=g), torch.randint(2, (samples, 5), generator=g)
    return {"kinds": kinds, "mask": torch.ones(samples, 5), "ids": ids}


@pytest.mark.parametrize("given", [("ids",), ("kinds", "ids"), ("ids", "mask"), ("kinds", "mask", "ids")])
def test_inputs_by_name(given: tuple[str, ...]) -> None:
    net, example, fresh = Optional().eval(), *({k: tokens(n)[k] for k in given} for n in (2, 3))
    m = hb.capture(net, example)
    found = [str(n.target) for n in m.inputs]
    assert found == [k for k in ("ids", "mask", "kinds") if k in given]  # as forward has them
    assert m.dynamic
    (got,) = hb.run(m, tuple(fresh[k] for k in found))
    assert torch.allclose(got, net(**fresh)["logits"], atol=1e-6)


def test_a_name_that_forward_does_not_know() -> None:
    with pytest.raises(
        CaptureError, match=r"does not run on an example of shape .* unexpected keyword argument 'pictures'"
    ):
        hb.capture(nn.Linear(3, 3), {"pictures": torch.zeros(2, 3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_taken_as_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).to(dtype).eval()
    m = hb.capture(net, torch.randn(2, 2, 5, 5).to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert any(f"parameters of {name} were taken as float32" in str(entry) for entry in m.log)
    assert net[0].weight.dtype == dtype and all(t.dtype == torch.float32 for t in m.params.values() if t.numel() > 1)
    same_outputs(copy.deepcopy(net).float(), m, torch.randn(3, 2, 5, 5))
    q = hb.quantize(net, [torch.randn(8, 2, 5, 5).to(dtype)])
    assert q.samples[0].dtype == torch.float32
    program = torch.export.export(net, (torch.randn(2, 2, 5, 5).to(dtype),))
    with pytest.raises(CaptureError, match=rf"computes in {name}: export the network after net.float\(\)"):
        hb.capture(program, torch.randn(2, 2, 5, 5))


def test_an_example_of_a_type_that_the_network_does_not_take() -> None:
    with pytest.raises(CaptureError, match=r"does not run on an example of shape \[2, 3\] of uint8"):
        hb.capture(nn.Linear(3, 3), torch.zeros(2, 3, dtype=torch.uint8))


class Caching(nn.Module):
    """Keeps what it computes for a size, as detectors their anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.size, self.grid = nn.Linear(4, 4), None, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[1:]:
            self.size, self.grid = x.shape[1:], torch.arange(4.0)
        return self.layer(x) + self.grid


def test_what_forward_keeps_in_attributes_is_as_it_was() -> None:
    net = Caching()
    m = hb.capture(net, torch.randn(2, 4))
    assert net.size is None and net.grid.numel() == 0 and net.training
    assert m.dynamic
    same_outputs(net, m, torch.randn(3, 4))
    (net(torch.randn(2, 4).requires_grad_()).sum()).backward()  # nothing of inference mode has stayed


class Composed(nn.Module):
    """A weight made of others, a table that a layer turns into another, and a mask that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.gain = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)
        self.table, self.layer = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 6)
        self.projection = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        w = self.gain * (self.raw - self.raw.mean((1, 2, 3), keepdim=True)) / self.raw.std((1, 2, 3), keepdim=True)
        x = F.conv2d(x, w).flatten(2).transpose(1, 2)
        seen = torch.ones(x.shape[1], 5).tril()
        return (x @ self.layer(self.table).t() + seen) @ self.layer(self.table) @ self.projection.t()


def test_what_no_input_reaches_is_a_parameter() -> None:
    net = Composed()
    x = torch.randn(2, 3, 5, 5)
    m = hb.capture(net, x)
    (conv,) = (n for n in m.graph.nodes if kind(n) is Kind.CONV)
    assert conv.args[1].op == "get_attr" and not {"raw", "gain", "table", "layer.weight"} & set(m.params)
    assert sorted(base_name(n) for n in m.graph.nodes if n.op == "call_function" and "value" in n.meta) == sorted(
        ["conv", "flatten", "transpose", "linear", "add", "linear", "linear"]
    )
    assert "projection" in m.params  # as it is stored
    same_outputs(net, m, torch.randn(3, 3, 5, 5))
    q = hb.quantize(net, [x, x])
    assert q.grid(value_name(conv.args[1])) is not None


def test_large_constants_stay_what_makes_them() -> None:
    net = Function(lambda s, x: s.layer(x) + torch.ones(3000, 3000)[0, 0], layer=nn.Linear(3, 3))
    m = hb.capture(net, torch.randn(2, 3))
    assert all(t.numel() < 100 for t in m.params.values())
    same_outputs(net, m, torch.randn(3, 3))


def written_over(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    z = torch.zeros_like(y)
    z[:, :4] = y[:, 4:]
    z[:, 4:, :, 0] = y.mean((2, 3))[:, :4, None]
    return torch.relu(z)


def summits(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return torch.cat([F.adaptive_max_pool2d(y, (3, 2)).flatten(1), F.adaptive_max_pool2d(y, 1).flatten(1)], 1)


@pytest.mark.parametrize(("function", "gone"), [(written_over, "copy"), (summits, "adaptive_max_pool2d")])
def test_what_engines_do_not_know_is_written_otherwise(function: Any, gone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Function(function, a=nn.Conv2d(3, 8, 3, padding=1)), torch.randn(24, 3, 6, 6)
    m = hb.capture(net, x[:2])
    assert gone not in {base_name(n) for n in m.graph.nodes if n.op == "call_function"}
    torch.testing.assert_close(hb.run(m, (x,))[0], net(x))
    for target in ("onnxruntime", "openvino" if function is summits else "onnxruntime"):
        q = hb.quantize(m, x, target=target)
        assert "no difference" in str(hb.export_onnx(q, tmp_path / f"{target}.onnx"))


def test_the_effort_of_layers_of_few_products() -> None:
    """A depthwise layer has few products for the numbers that it moves, as the first layer of an image network has."""
    net = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    )
    depthwise, dense, pointwise = layers(hb.capture(net, torch.randn(2, 16, 8, 8)).graph)
    assert macs(dense) == 16 * macs(depthwise) == 9 * macs(pointwise)
    assert effort(dense) < 2 * effort(depthwise)
    assert effort(pointwise) - macs(pointwise) == effort(dense) - macs(dense) == 100 * 2 * 16 * 8 * 8


def test_sizes_that_depend_on_the_batch() -> None:
    """Windows of pictures lie beside the samples: as many as the batch times their number."""

    def windows(s: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = x.reshape(n, 4, 2, 4, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
        x = F.relu(s.first(x)).reshape(n, 4, 4, 2, 2, 6)
        return s.second(x.permute(0, 1, 3, 2, 4, 5).reshape(n, 64, 6))

    net = Function(windows, first=nn.Linear(6, 6), second=nn.Linear(6, 3))
    m = hb.capture(net, torch.randn(2, 8, 8, 6))
    first, second = (n for n in m.graph.nodes if kind(n) is Kind.LINEAR)
    assert first.meta["shape"] == ("16*batch", 4, 6)
    assert [extent(d) for d in first.meta["shape"]] == [16, 4, 6] and extent("16*batch", 3) == 48
    assert macs(first) == 2 * macs(second) == 64 * 36
    assert [p.first for p in pairs(m.graph, "test")[0]] == [first]
    q = hb.quantize(net, [torch.randn(4, 8, 8, 6)])
    same = hb.run(q, (torch.randn(3, 8, 8, 6),))[0]
    assert same.shape == (3, 64, 3)


@pytest.mark.parametrize(
    ("text", "size"), [("batch", 3), ("2*batch", 6), ("batch*4 + 1", 13), ("-1 + batch", 2), ("(batch//2)*5", 5)]
)
def test_extents(text: str, size: int) -> None:
    assert extent(text, 3) == size


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
        (Function(lambda s, x: (x + 1, random.Random())), r"returns a Random, which is no tensor: .*use_cache"),
        (Function(lambda s, x: x + torch.rand_like(x)), "random numbers"),
        (torch.jit.trace(nn.Linear(3, 3), torch.zeros(2, 3)), "scripted or traced module"),
        (Function(lambda s, x: x[x > 0]), "how much output 'output' puts out depends on what the data"),
        (Function(lambda s, x: x + s.a(x[x[:, 0] > 0]).sum(0), a=nn.Linear(3, 3)), "how much layer 'a' puts out"),
        (nn.LazyLinear(3), "parameter 'weight' has no shape yet"),
        (nn.Linear(3, 3, device="meta"), "parameter 'weight' is on the device 'meta'"),
    ],
)
def test_refusals_name_the_reason(net: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as refused:
        hb.capture(net, torch.randn(2, 3))
    assert len(str(refused.value)) < 500


def test_a_refusal_is_all_that_is_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """torch logs a traceback for the first input that does not fit."""
    with pytest.raises(CaptureError, match=r"does not run on an example of shape \[2, 4\]"):
        hb.capture(nn.Linear(3, 3), torch.randn(2, 4))
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR", "CRITICAL")] == []
    assert capfd.readouterr() == ("", "")


def modes(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        x = s.layer(x.float())
    with torch.enable_grad():
        return torch.relu(x)


def test_parts_with_other_gradients_or_without_autocast_are_operations_like_others() -> None:
    net, x = Function(modes, layer=nn.Linear(4, 4)), torch.randn(3, 4)
    m = hb.capture(net, x)
    assert [base_name(n) for n in m.graph.nodes if n.op == "call_function"] == ["linear", "relu"]
    torch.testing.assert_close(hb.run(m, (x,))[0], net(x))


class Masked(nn.Module):
    """An attention mask, as many networks register it."""

    def __init__(self, value: float, name: str = "mask") -> None:
        super().__init__()
        self.layer, self.name = nn.Linear(4, 4), name
        self.register_buffer(name, torch.full((4, 4), value).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return (y[:, None] + getattr(self, self.name)).softmax(-1)


def test_masks_may_hold_infinity_and_nothing_else_may() -> None:
    x = torch.randn(3, 4)
    m = hb.capture(Masked(float("-inf")), x)
    (y,) = hb.run(m, (x,))
    assert bool((y[:, 0, 1:] == 0).all())
    for net in (Masked(float("nan")), Masked(float("-inf"), "running_mean")):
        with pytest.raises(CaptureError, match=f"parameter '{net.name}' holds NaN or infinite values"):
            hb.capture(net, x)


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_roundings_that_a_deep_network_makes_large_are_no_difference(
    gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Function(lambda _, x: torch.sin(x))) for _ in range(20)))
    with torch.no_grad():
        for block in net:
            block[0].weight.mul_(gain * 2)
    run = hb.run
    monkeypatch.setattr(
        sys.modules["halfbyte.capture"], "run", lambda m, x: tuple(t + 3e-4 * t.abs().max() for t in run(m, x))
    )
    if gain > 1:
        hb.capture(net, torch.randn(2, 8))
        return
    with pytest.raises(CaptureError, match=r"at output 'output' by 0.0003"):
        hb.capture(net, torch.randn(2, 8))


@pytest.mark.parametrize("example", [(), "x", [torch.zeros(2), 3]])
def test_examples_are_tensors(example: Any) -> None:
    with pytest.raises(CaptureError, match="example must be a tensor"):
        hb.capture(nn.Linear(2, 2), example)
