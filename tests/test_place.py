"""Which values get a grid, which share one, which stay in float, and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte import engine
from halfbyte.errors import PlacementError
from halfbyte.lower import lower
from halfbyte.targets import GENERIC, ONNXRUNTIME, ONNXRUNTIME_PER_TENSOR, find


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def placed(function: Callable[..., Any], shape: tuple[int, ...] = (2, 4, 6, 6), **parts: Any) -> hb.QModel:
    options = {k: parts.pop(k) for k in ("overrides", "weight_bits", "activation_bits", "target") if k in parts}
    net = Net(function, **parts).eval()
    return hb.place(hb.capture(net, torch.randn(shape)), options.pop("target", ONNXRUNTIME), **options)


def integers(m: hb.QModel) -> set[str]:
    """Running values with a format, those that share a grid included."""
    return {name for name, form in m.plan.items() if form is not None and "weight" not in name}


def conv(i: int = 4, o: int = 4, k: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k)


def test_a_fused_relu_has_the_grid_and_its_input_none() -> None:
    m = placed(lambda s, x: s.b(F.relu(s.a(x))), a=conv(), b=conv())
    assert integers(m) == {"x", "relu", "b"}
    assert m.plan["a"] is None
    assert not m.ties
    weight = m.plan["a.weight"]
    assert weight is not None
    assert (weight.signed, weight.symmetric, weight.narrow, weight.axis) == (True, True, True, 0)


def test_a_relu_beside_other_readers_limits_the_codes() -> None:
    m = placed(lambda s, x: (lambda y: s.b(F.relu(y)) + s.c(y))(s.a(x)), a=conv(), b=conv(), c=conv())  # noqa: PLC3002
    assert {"a", "relu"} <= integers(m)
    assert m.ties["relu"] == "a"


def test_a_residual_addition_between_layers_runs_on_codes() -> None:
    m = placed(lambda s, x: (lambda y: s.c(y + s.b(y)))(s.a(x)), a=conv(), b=conv(), c=conv())  # noqa: PLC3002
    assert integers(m) == {"x", "a", "b", "add", "c"}
    assert not m.ties


def test_an_addition_that_floats_read_stays_float() -> None:
    m = placed(lambda s, x: torch.tanh(s.a(x) + s.b(x)), a=conv(), b=conv())
    assert m.plan["add"] is None
    assert any(e.value == "add" and "a float operation reads" in e.message for e in m.log)


def test_concatenation_has_a_grid_of_its_own() -> None:
    m = placed(lambda s, x: s.c(torch.cat([s.a(x), F.relu(s.b(x))], 1)), a=conv(), b=conv(), c=conv(8))
    assert {"a", "relu", "cat"} <= integers(m)
    assert not {"a", "relu", "cat"} & set(m.ties)


def test_moves_and_pooling_share_the_grid_of_what_they_move() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(s.a(x), 2)
        first, second = y.split([1, 3], 1)
        return s.b(first.permute(0, 1, 3, 2)) + s.c(F.pad(second, (1, 0)))[..., :3]

    m = placed(forward, a=conv(), b=conv(1), c=conv(3))
    tied = {name for name, root in m.ties.items() if root == "a"}
    assert tied == {"max_pool2d", "item", "permute", "item.1"}  # the padding became the convolution's own
    assert all(m.plan[name] == m.plan["a"] for name in tied)
    assert "a" not in m.ties


def test_average_pooling_gets_its_own_grid() -> None:
    m = placed(lambda s, x: s.b(F.avg_pool2d(s.a(x), 2)), a=conv(), b=conv())
    assert "avg_pool2d" in integers(m)
    assert "avg_pool2d" not in m.ties


def test_floats_read_the_value_before_rounding() -> None:
    m = placed(
        lambda s, x: (lambda y: s.b(y) + s.c(torch.sigmoid(y)))(torch.tanh(s.a(x))),  # noqa: PLC3002
        a=conv(),
        b=conv(),
        c=conv(),
    )
    assert m.plan["tanh"] is None
    assert m.plan["tanh:quantized"] is not None
    (rounded,) = [n for n in m.graph.nodes if n.meta.get("value") == "tanh:quantized"]
    assert [u.meta["value"] for u in rounded.users] == ["b"]
    (sigmoid,) = [n for n in m.graph.nodes if n.meta.get("value") == "sigmoid"]
    assert sigmoid.args[0].meta["value"] == "tanh"


def test_a_transformer_block() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(s.norm(x)).chunk(3, -1)
        y = x + s.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return y + s.down(F.gelu(s.up(y)))

    parts = {
        "norm": nn.LayerNorm(4),
        "qkv": nn.Linear(4, 12),
        "out": nn.Linear(4, 4),
        "up": nn.Linear(4, 8),
        "down": nn.Linear(8, 4),
    }
    m = placed(forward, (2, 5, 4), **parts)
    on = integers(m)
    assert {"norm", "softmax", "gelu"} <= on, "what layers and products read has a grid"
    for name in ("qkv", "out", "up", "down"):
        assert m.plan[f"{name}.weight"] is not None
    reasons = {e.value: e.message for e in m.log}
    assert all("no integer kernel" in reasons[name] for name in ("norm", "softmax", "gelu"))
    assert m.plan["norm.weight"] is None
    assert m.plan["x"] is None


def test_overrides_by_name_and_pattern() -> None:
    layers = {"a": conv(), "b": conv(), "c": conv()}
    forward = lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))  # noqa: E731
    m = placed(forward, **layers, overrides={"b": None, "[ac].weight": hb.Format(4), "relu": hb.Format(6)})
    assert m.plan["b.weight"] is None
    assert any(e.value == "b" and "on request" in e.message for e in m.log)
    assert [m.plan[f"{n}.weight"].bits for n in "ac"] == [4, 4]
    assert m.plan["a.weight"].signed
    assert m.plan["relu"].bits == 6
    assert m.plan["x"].bits == 8
    by_weight = placed(forward, **layers, overrides={"b.weight": None})
    assert by_weight.plan["b.weight"] is None
    assert by_weight.plan["c.weight"] is not None


def test_an_override_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PlacementError, match=r"'a.weigth' matches no value.*did you mean a.weight"):
        placed(lambda s, x: s.a(x), a=conv(), overrides={"a.weigth": None})


@pytest.mark.parametrize(("weights", "activations"), [(9, 8), (8, 16), (1, 8)])
def test_widths_of_the_target(weights: int, activations: int) -> None:
    with pytest.raises(PlacementError, match="2 to 8 bits"):
        placed(lambda s, x: s.a(x), a=conv(), weight_bits=weights, activation_bits=activations)


def test_a_target_by_name() -> None:
    m = hb.capture(nn.Sequential(conv(), nn.ReLU(), conv()), torch.zeros(2, 4, 6, 6))
    assert hb.place(m, "generic").plan == hb.place(m, GENERIC).plan
    assert hb.place(m, "onnxruntime").target == find("onnxruntime", saturates=engine.saturates())
    with pytest.raises(hb.UsageError, match="there is no target 'genric': did you mean 'generic'"):
        hb.place(m, "genric")


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(PlacementError, match="nothing in this network can be quantized"):
        placed(lambda s, x: torch.tanh(x))
    with pytest.raises(PlacementError, match="nothing in this network can be quantized"):
        placed(lambda s, x: s.a(x), a=conv(), overrides={"*": None})


def test_one_scale_for_a_tensor_where_the_target_wants_it() -> None:
    m = placed(lambda s, x: s.a(x), a=conv(), target=ONNXRUNTIME_PER_TENSOR, weight_bits=4, activation_bits=5)
    assert (m.plan["a.weight"].axis, m.plan["a.weight"].bits, m.plan["x"].bits) == (None, 4, 5)


def test_every_real_value_is_in_the_plan_and_the_original_is_untouched() -> None:
    net = Net(lambda s, x: (torch.tanh(s.a(x)), s.a(x).argmax(1)), a=conv())
    m = hb.capture(net, torch.randn(2, 4, 6, 6))
    before = [n.name for n in m.graph.nodes]
    p = hb.place(m, ONNXRUNTIME)
    assert [n.name for n in m.graph.nodes] == before
    assert not m.plan
    real = {n.meta["value"] for n in p.graph.nodes if n.meta.get("dtype") == "float32"}
    assert real == set(p.plan)


def narrow(uniform: bool, function: Callable[..., Any], **parts: nn.Module) -> hb.QModel:
    m = hb.capture(Net(function, **parts).eval(), torch.randn(2, 4, 6, 6))
    return hb.place(m, ONNXRUNTIME, weight_bits=4, activation_bits=4, uniform=uniform)


def widths(m: hb.QModel) -> dict[str, int]:
    return {name: form.bits for name, form in m.plan.items() if form is not None}


def separable(s: Any, x: Tensor) -> Tensor:
    y = F.relu(s.a(x))
    z = s.c(F.relu(s.b(y)))
    return s.d(F.relu(z + s.e(y)))  # the sum's operands, c and e, are multiplied by no layer


def test_the_ends_and_the_operands_of_sums_may_keep_eight_bits() -> None:
    parts = {name: conv() for name in "abcde"}
    every = widths(narrow(True, separable, **parts))
    assert set(every.values()) == {4}
    m = narrow(False, separable, **parts)
    spared = widths(m)
    assert spared.keys() == every.keys()
    assert {n: spared[f"{n}.weight"] for n in "abcde"} == {"a": 8, "b": 4, "c": 4, "d": 8, "e": 4}
    multiplied = {"relu", "relu.1"}  # what b, e and c read
    assert multiplied <= spared.keys()
    values = {n: bits for n, bits in spared.items() if not n.endswith("weight")}
    assert values == {n: 4 if n in multiplied else 8 for n in values}
    assert {"x", "c", "e", "d"} <= values.keys()
    said = [str(e) for e in m.log]
    assert "place: a.weight: keeps 8 bits: the first or the last layer" in said
    assert "place: d.weight: keeps 8 bits: the first or the last layer" in said
    assert any(f"{len(values) - 2} running values keep 8 bits" in text for text in said)


def test_values_that_share_a_grid_have_one_width() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(s.a(x), 2)
        return s.c(s.b(y) + y)

    m = narrow(False, forward, a=conv(), b=conv(), c=conv())
    assert m.ties["max_pool2d"] == "a"
    assert m.plan["a"] == m.plan["max_pool2d"]
    assert m.plan["a"].bits == 8, "the addition reads it"  # type: ignore[union-attr]
    assert m.plan["max_pool2d:quantized"].bits == 4, "b multiplies a copy"  # type: ignore[union-attr]
    assert "max_pool2d:quantized" not in m.ties
    assert m.plan["b"].bits == 8  # type: ignore[union-attr]


def test_sparing_never_narrows_and_yields_to_overrides() -> None:
    layers = {name: conv() for name in "abc"}
    forward = lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))  # noqa: E731
    m = hb.capture(Net(forward, **layers).eval(), torch.randn(2, 4, 6, 6))
    wide = hb.place(m, ONNXRUNTIME, uniform=False)
    assert wide.plan == hb.place(m, ONNXRUNTIME).plan
    assert not any("keep" in e.message for e in wide.log)
    own = {"a.weight": hb.Format(3), "relu": hb.Format(6), "c.weight": None}
    given = hb.place(m, ONNXRUNTIME, weight_bits=4, activation_bits=4, uniform=False, overrides=own)
    found = widths(given)
    assert (found["a.weight"], found["relu"]) == (3, 6)
    assert found["b.weight"] == 8, "the last layer that runs in integers"


@pytest.mark.parametrize("target", [ONNXRUNTIME, ONNXRUNTIME_PER_TENSOR, GENERIC])
def test_weights_of_few_bits_have_zero_points_where_the_target_takes_them(target: hb.Target) -> None:
    net = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5))).eval()
    m = hb.capture(net, torch.randn(2, 4, 3, 3))
    widths = {"0": 2, "1": 4, "2": 6, "3": 7, "4": 8}

    def formats(**options: bool) -> dict[str, hb.Format | None]:
        overrides = {name: hb.bits(w, 8) for name, w in widths.items()}
        plan = hb.place(m, target, overrides=overrides, **options).plan
        return {name: plan[f"{name}.weight"] for name in widths}

    for name, form in formats().items():
        assert form is not None and form.bits == widths[name] and form.signed
        assert form.symmetric == form.narrow == (widths[name] > 6 or target is GENERIC)
    assert all(f is not None and f.symmetric and f.narrow for f in formats(symmetric_weights=True).values())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_zero_point_lowers_the_error_of_lopsided_weights(bits: int, per_channel: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        each = torch.tensor([-0.3, -0.15, 0.0, 0.15, 0.3]).reshape(5, 1, 1, 1)
        net[2].weight.add_(each if per_channel else 0.15)
    x = torch.randn(16, 4, 9, 9)
    m = hb.capture(net, x)
    target = find("onnxruntime" if per_channel else "onnxruntime-per-tensor", saturates=engine.saturates())

    def made(symmetric: bool) -> tuple[hb.QModel, float]:
        placed = hb.place(m, target, weight_bits=bits, uniform=True, symmetric_weights=symmetric)
        q = hb.calibrate(placed, [(x,)])
        w, grid = q.parameters["2.weight"], q.grids["2.weight"]
        return q, float((hb.fake_quantize(w, grid) - w).square().sum())

    q, error = made(False)
    assert error < 0.9 * made(True)[1]
    assert q.grids["2.weight"].zero.any()
    codes = lower(q).params["2.weight:codes"].int().reshape(5 if per_channel else 1, -1)
    assert int((codes.amax(1) - codes.amin(1)).max()) <= 2**bits - 1, "as many levels as bits"
    assert not lower(q).params["2.weight:zero"].any(), "kernels see codes less zero-point"
    assert hb.export_onnx(q, tmp_path / "net.onnx").proven
