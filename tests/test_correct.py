"""Bias correction: it lowers the mean error it is about, says when it cannot, and the walk below it keeps its promises."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

import halfbyte as hb
from halfbyte.graph import layers
from halfbyte.model import value_name
from halfbyte.targets import GENERIC, ONNXRUNTIME_PER_TENSOR
from halfbyte.walk import Frontier


def network() -> nn.Sequential:
    """Three layers with batch norms whose means are far from zero, so that rounding moves the means of what follows."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for cin, cout in ((3, 8), (8, 8), (8, 8)):
        norm = nn.BatchNorm2d(cout)
        nn.init.uniform_(norm.weight, 0.3, 1)
        nn.init.uniform_(norm.bias, 0, 2)
        made += [nn.Conv2d(cin, cout, 3, bias=False), norm, nn.ReLU6()]
    net = nn.Sequential(*made, nn.Conv2d(8, 4, 1))
    with torch.no_grad():  # batch norms that have seen the data they claim to have seen
        for norm in (n for n in net if isinstance(n, nn.BatchNorm2d)):
            norm.momentum = None
        net.train()(pictures(256, 1))
    return net.eval()


def pictures(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def placed(target: hb.Target = ONNXRUNTIME_PER_TENSOR, bits: int = 4) -> hb.QModel:
    m = hb.fold_batchnorm(hb.capture(network(), pictures(2, 0)))
    return hb.place(m, target, weight_bits=bits)


def ranges(m: hb.QModel) -> dict[str, tuple[float, float]]:
    return {value_name(m.inputs[0]): (-4.0, 4.0)}


def batches(count: int) -> list[tuple[Tensor, ...]]:
    return [(pictures(64, 10 + i),) for i in range(count)]


def layer(m: hb.QModel, number: int) -> fx.Node:
    return layers(m.graph)[number]


def mean_error(m: hb.QModel, number: int, x: Tensor) -> Tensor:
    """Of one layer with rounded weights, fed these values: mean error of the outputs, [channels]."""
    node = layer(m, number)
    weight, bias = (str(n.target) for n in (node.args[1], node.args[2]))  # type: ignore[union-attr]
    grid = m.grid(weight)
    assert grid is not None
    rounded = hb.dequantize(hb.quantize_tensor(m.parameters[weight], grid), grid)
    rest = node.args[3:]
    error = node.target(x, rounded, m.parameters[bias], *rest) - node.target(x, m.params[weight], m.params[bias], *rest)  # type: ignore[operator]
    assert isinstance(error, Tensor)
    return error.movedim(1, 0).flatten(1).mean(1)


@pytest.mark.parametrize("target", [GENERIC, ONNXRUNTIME_PER_TENSOR])
def test_analytic_correction_lowers_the_mean_error(target: hb.Target) -> None:
    m = placed(target)
    q = hb.calibrate(m, overrides=ranges(m), correct=False)
    c = hb.correct_bias(q, ranges=ranges(m))
    assert not q.tuned
    assert any(entry.stage == "correct_bias" for entry in c.log)
    torch.manual_seed(1)
    for number in (1, 2, 3):
        seen = m.moments[value_name(layer(m, number - 1))]  # what the layer before puts out, before its clamp
        shape = (1, -1, 1, 1)
        x = (seen.mean.reshape(shape) + seen.std.reshape(shape) * torch.randn(2000, 8, 6, 6)).clamp(0, 6)
        before, after = mean_error(q, number, x).abs(), mean_error(c, number, x).abs()
        assert float(after.mean()) < 0.1 * float(before.mean())
        assert float(before.max()) > 1e-2


def test_calibration_corrects_as_the_function_does() -> None:
    m = placed()
    corrected = hb.calibrate(m, overrides=ranges(m))
    plain = hb.calibrate(m, overrides=ranges(m), correct=False)
    assert_same_tuned(corrected, hb.correct_bias(plain, ranges=ranges(m)))


def assert_same_tuned(a: hb.QModel, b: hb.QModel) -> None:
    assert a.tuned.keys() == b.tuned.keys() != set()
    assert all(torch.equal(t, b.tuned[n]) for n, t in a.tuned.items())


def test_analytic_correction_twice_is_once() -> None:
    m = placed()
    once = hb.correct_bias(hb.calibrate(m, overrides=ranges(m), correct=False), ranges=ranges(m))
    assert_same_tuned(once, hb.correct_bias(once, ranges=ranges(m)))


def output_error(m: hb.QModel, value: str, data: list[tuple[Tensor, ...]]) -> Tensor:
    """Mean error of one value of the simulated network, [channels]; grids in front of it count, its own does not."""
    simulated = hb.simulate(m, only=lambda name: name != value)
    total = []
    for batch in data:
        found = hb.run(m, batch, simulated, stop=value)[0] - hb.run(m.as_float(), batch, stop=value)[0]
        total.append(found.movedim(1, 0).flatten(1).mean(1))
    return torch.stack(total).mean(0)


def test_empirical_correction_removes_the_mean_error() -> None:
    data = batches(6)
    m = placed(bits=3)
    q = hb.calibrate(m, data, correct=False)
    c = hb.correct_bias(q, data)
    for node in layers(m.graph):
        before, after = (output_error(v, value_name(node), data).abs() for v in (q, c))
        assert float(after.max()) < 0.05 * float(before.max()) + 1e-3  # what lies within the samples' noise stays
    assert float(output_error(q, value_name(layer(m, 3)), data).abs().max()) > 0.05
    fresh = [(pictures(64, 90 + i),) for i in range(4)]
    end = value_name(layer(m, 3))
    assert float(output_error(c, end, fresh).abs().max()) < 0.25 * float(output_error(q, end, fresh).abs().max())
    assert any("4 layers" in entry.message for entry in c.log if entry.stage == "correct_bias")


def test_correction_comes_after_calibration() -> None:
    for data in (None, batches(1)):
        with pytest.raises(hb.UsageError, match="calibrate before correct_bias"):
            hb.correct_bias(placed(), data)
        with pytest.raises(hb.UsageError, match="calibrate before correct_bias"):
            hb.correct_bias(hb.capture(network(), pictures(2, 0)), data)


def test_narrow_biases_cannot_hold_a_correction() -> None:
    m = placed()
    q = hb.calibrate(m, overrides=ranges(m), correct=False)
    narrow = replace(q, target=replace(ONNXRUNTIME_PER_TENSOR, bias_bits=8))
    for data in (None, batches(1)):
        with pytest.raises(hb.UsageError, match="8 bits"):
            hb.correct_bias(narrow, data)
    wide = replace(q, target=replace(ONNXRUNTIME_PER_TENSOR, bias_bits=16))
    assert hb.correct_bias(wide, ranges=ranges(m)).tuned


def calibrated(data: list[tuple[Tensor, ...]]) -> hb.QModel:
    return hb.calibrate(placed(bits=3), data, correct=False)


def corrects(visited: list[str]) -> Callable[[hb.QModel, fx.Node, Frontier, Frontier], hb.QModel]:
    """A visit that remembers its layers and moves a part of the mean error into their biases."""

    def visit(m: hb.QModel, node: fx.Node, quantized: Frontier, reference: Frontier) -> hb.QModel:
        visited.append(value_name(node))
        weight, bias = (str(n.target) for n in (node.args[1], node.args[2]))  # type: ignore[union-attr]
        assert len(quantized) == len(reference)
        found = [node.target(x, m.params[weight], m.params[bias], *node.args[3:]) for x in quantized]  # type: ignore[operator]
        errors = [(a - b).movedim(1, 0).flatten(1).mean(1) for a, b in zip(found, reference, strict=True)]
        corrected = m.parameters[bias] - 0.5 * torch.stack(errors).mean(0)
        return replace(m, tuned={**m.tuned, bias: corrected})

    return visit


def test_the_walk_visits_each_layer_once_in_order() -> None:
    data = batches(2)
    q = calibrated(data)
    visited: list[str] = []
    said: list[tuple[int, int, str]] = []
    hb.walk(q, data, corrects(visited), progress=lambda *a: said.append(a))
    names = [value_name(n) for n in layers(q.graph)]
    assert visited == names
    assert said == [(i + 1, len(names), n) for i, n in enumerate(names)]


def test_a_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(2)
    q = calibrated(data)
    files = []
    original = torch.from_file

    def counted(*args: object, **kwargs: object) -> Tensor:
        files.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "from_file", counted)
    without = hb.walk(q, data, corrects([]))
    assert not files
    within = hb.walk(q, data, corrects([]), budget=0)
    assert files
    assert_same_tuned(without, within)


@torch.no_grad()
def test_the_walk_shows_both_networks() -> None:
    data = batches(2)
    q = calibrated(data)
    simulated = hb.simulate(q)

    def visit(m: hb.QModel, node: fx.Node, quantized: Frontier, reference: Frontier) -> hb.QModel:
        source = value_name(node.args[0])  # type: ignore[arg-type]
        for batch, x, y in zip(data, quantized, reference, strict=True):
            assert torch.equal(x, hb.run(q, batch, simulated, stop=source)[0])
            assert torch.equal(y, hb.run(q.as_float(), batch, stop=value_name(node))[0])
        return m

    assert hb.walk(q, data, visit) is q

    def in_float(m: hb.QModel, node: fx.Node, inputs: Frontier, _: Frontier) -> hb.QModel:
        source = value_name(node.args[0])  # type: ignore[arg-type]
        assert torch.equal(inputs[1], hb.run(q.as_float(), data[1], stop=source)[0])
        return m

    hb.walk(q, data, in_float, quantized_inputs=False)


def test_the_walk_needs_data() -> None:
    q = calibrated(batches(1))
    with pytest.raises(hb.HalfbyteError, match="no data"):
        hb.walk(q, [], corrects([]))
    with pytest.raises(hb.HalfbyteError, match="no data"):
        hb.correct_bias(q, [])
