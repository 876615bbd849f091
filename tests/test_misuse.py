"""What people do with a library that its authors do not: gradients off, networks that train on, bad ranges, words, numbers, methods."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import recipe
from halfbyte.errors import FormatError, PlacementError, UsageError, VerifyError
from halfbyte.targets import GENERIC


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return nn.Sequential(*layers).eval()


def pictures() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def captured() -> hb.QModel:
    return hb.capture(network(), pictures()[:2])


def calibrated(bits: int = 4) -> hb.QModel:
    return hb.calibrate(hb.place(captured(), GENERIC, weight_bits=bits, activation_bits=bits), [(pictures(),)])


WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "blocks": {"bits": "W4A4", "rounding": "blocks", "iterations": 5},
    "adaround": {"bits": "W4A8", "rounding": "adaround", "iterations": 5},
    "calibtip": {"bits": "W4A4", "recipe": "calibtip-advanced"},
    "max drop": {"max_drop": 50},
}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_the_caller_has_turned_off(off: Callable[[], Any], way: str) -> None:
    net = network()
    expected = hb.quantize(net, pictures(), **WAYS[way])
    with off():
        found = hb.quantize(net, pictures() + 0.0, **WAYS[way])
        assert not torch.is_grad_enabled()
    assert all(torch.equal(t, found.parameters[name]) for name, t in expected.parameters.items())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_steps_without_gradients(off: Callable[[], Any]) -> None:
    m, data = calibrated(), [(pictures(),)]
    with off():
        for step in (hb.refine_ranges, hb.tune, lambda m, d: hb.refine(m, d, hb.Blocks(iterations=3))):
            assert step(m, data).log[-1].message  # type: ignore[operator]
        assert hb.diagnose(m, data).to_dict()


def test_the_network_may_train_on() -> None:
    net = network()
    m = hb.quantize(net, pictures())
    before = [hb.predict(v, pictures())[0] for v in (m, m.as_float())]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.3)
    assert all(torch.equal(hb.predict(v, pictures())[0], y) for v, y in zip((m, m.as_float()), before, strict=True))


def test_a_metric_of_lists(tmp_path: Path) -> None:
    hb.export(hb.quantize(network(), pictures()), tmp_path / "out")
    found = hb.evaluate(tmp_path / "out", [(pictures(), torch.zeros(64))], metric=lambda forward, data: len(data))
    assert found.samples == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((1, -1), "is 1 to -1: give two finite ends, the lowest first"),
        ((0, 0), "finite ends"),
        ((float("nan"), 1), "finite ends"),
        ((0, float("inf")), "finite ends"),
        (3, r"is 3: give its ends, \(lowest, highest\)"),
        ("0..1", "give its ends"),
        ((0, 1, 2), "give its ends"),
    ],
)
def test_ranges_by_hand(given: Any, words: str) -> None:
    for ways in (
        lambda: hb.calibrate(hb.place(captured(), GENERIC), [(pictures(),)], overrides={"input": given}),
        lambda: hb.quantize(captured(), pictures(), ranges={"input": given}),
    ):
        with pytest.raises(UsageError, match=words):
            ways()


def test_a_range_of_tensors_and_of_a_weight() -> None:
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    grid = hb.quantize(captured(), pictures(), ranges={"input": ends}).grid("input")  # type: ignore[dict-item]
    assert grid is not None
    assert float(grid.maximum - grid.minimum) == pytest.approx(2.0, rel=0.01)
    with pytest.raises(PlacementError, match=r"'0\.weight' is a weight"):
        hb.calibrate(hb.place(captured(), GENERIC), [(pictures(),)], overrides={"0.weight": (-1, 1)})


STEPS: dict[str, Callable[[list[Any]], Any]] = {
    "absorb_bias": lambda d: hb.absorb_bias(captured(), d),
    "equalize": lambda d: hb.equalize(captured(), d),
    "calibrate": lambda d: hb.calibrate(hb.place(captured(), GENERIC), d),
    "correct_bias": lambda d: hb.correct_bias(calibrated(), d),
    "descent": lambda d: hb.reconstruct(calibrated(), d, hb.Descent()),
    "adaround": lambda d: hb.reconstruct(calibrated(), d, hb.AdaRound(iterations=3)),
    "refine": lambda d: hb.refine(calibrated(), d, hb.Blocks(iterations=3)),
    "refine_ranges": lambda d: hb.refine_ranges(calibrated(), d),
    "tune": lambda d: hb.tune(calibrated(), d, iterations=3),
    "tune_statistics": lambda d: hb.tune_statistics(calibrated(), d),
    "output_loss": lambda d: hb.output_loss(calibrated(), d),
}


@pytest.mark.parametrize("step", STEPS)
def test_data_that_no_step_can_use(step: str) -> None:
    bad = pictures()
    bad[10] = float("nan")
    for data, words in (
        ([(bad,)], "NaN"),
        ([(pictures()[:, :2],)], r"has shape \[\d+, 2, 8, 8\], and the network takes \[batch, 3, 8, 8\]"),
    ):
        with pytest.raises(UsageError, match=words):
            STEPS[step](data)


@dataclass(frozen=True)
class Method:
    """A method that returns what it is told to."""

    given: Callable[[hb.Problem], hb.Solution]
    name: str = "own"
    residual: bool = False
    unrounded: bool = False
    iterations: int = 0

    def solve(self, p: hb.Problem) -> hb.Solution:
        return self.given(p)


class Plain:
    """No dataclass."""

    name, residual, unrounded, iterations = "plain", False, False, 100

    def solve(self, p: hb.Problem) -> hb.Solution:
        p.weight.mul_(0.5)
        return hb.Solution(hb.fake_quantize(p.weight, p.grid), p.grid, p.bias)


def finer(p: hb.Problem) -> hb.Solution:
    grid = replace(p.grid, scale=p.grid.scale / 16, lo=p.grid.lo * 16, hi=p.grid.hi * 16)
    return hb.Solution(hb.fake_quantize(p.weight, grid), grid, p.bias)


def learned(p: hb.Problem) -> hb.Solution:
    w = p.weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        pairs = zip(p.inputs, p.targets, strict=True)
        sum((p.apply(x, hb.fake_quantize(w, p.grid), p.bias) - y).square().mean() for x, y in pairs).backward()  # type: ignore[union-attr]
        optimizer.step()
    return hb.Solution(hb.fake_quantize(w, p.grid), p.grid, p.bias)


def test_solutions_of_other_methods() -> None:
    m, data = calibrated(), [(pictures(),)]
    with pytest.raises(VerifyError, match=r"layer '0' has codes -112 to 112, and int4 .* holds -7 to 7"):
        hb.reconstruct(m, data, Method(finer))
    with pytest.raises(VerifyError, match="does not lie on its grid"):
        hb.reconstruct(m, data, Method(lambda p: hb.Solution(p.weight, p.grid, p.bias)))
    with pytest.raises(VerifyError, match="has shape"):
        hb.reconstruct(m, data, Method(lambda p: hb.Solution(p.weight[:1], p.grid, p.bias)))
    found = hb.reconstruct(m, data, Method(learned))
    assert all(not t.requires_grad for t in found.parameters.values())
    hb.reconstruct(m, data, Method(learned, iterations=100), time_limit=60)  # timed first
    before = captured().parameters
    assert hb.reconstruct(m, data, Plain(), time_limit=60).grids.keys() == m.grids.keys()
    assert all(torch.equal(t, before[name]) for name, t in m.as_float().parameters.items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, d: hb.reconstruct(m, d, hb.Descent(), inputs="quantised"), "inputs is 'quantised': did you mean 'quantized'"),
        (lambda m, d: hb.tune(m, d, loss="kl"), "loss is 'kl': choose error or divergence"),
        (lambda m, d: hb.output_loss(m, d, metric="kl"), "metric is 'kl'"),
        (lambda m, d: hb.equalize(captured(), d, method="weight"), "did you mean 'weights'"),
        (lambda m, d: hb.equalize(captured(), d, ranges="x"), "ranges is 'x'"),
        (lambda m, d: hb.calibrate(m, d, logits="crossentropy"), "did you mean 'cross-entropy'"),
        (lambda m, d: hb.export_onnx(m, "x.onnx", container="pakced"), "did you mean 'packed'"),
        (lambda m, d: hb.Descent(rounding="adjecent"), "did you mean 'adjacent'"),
        (lambda m, d: hb.Descent(rows=-1), "must be positive"),
        (lambda m, d: hb.Descent(scales=()), "must be positive"),
        (lambda m, d: hb.Descent(sweeps=0), "must be positive"),
        (lambda m, d: hb.Blocks(weighting="grad"), "did you mean 'gradient'"),
        (lambda m, d: recipe.load_recipe("low-bit").changed("split_tensors", share=0.0), "there is no step 'split_tensors'"),
        (lambda m, d: hb.bits(4.0, 8), "a width is 4.0: give a whole number of bits"),  # type: ignore[arg-type]
        (lambda m, d: hb.predict(m, d[0][0][:0]), "holds no sample"),
        (lambda m, d: hb.predict(m, d[0][0].numpy()[None]), "is of type ndarray: give batches of tensors"),
    ],
)  # fmt: skip
def test_words_and_numbers(call: Callable[..., Any], words: str) -> None:
    with pytest.raises((UsageError, FormatError), match=words):
        call(calibrated(), [(pictures(),)])


def test_placed_anew() -> None:
    data = [(pictures(),)]
    narrow = hb.reconstruct(calibrated(4), data, hb.Descent())
    wide = hb.place(narrow, GENERIC)
    assert not wide.grids
    assert not wide.tuned
    again = hb.calibrate(wide, data)
    assert all(torch.equal(t, calibrated(8).parameters[name]) for name, t in again.parameters.items())


def test_a_depthwise_transposed_convolution_of_fewer_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, groups=3)).eval()
    m = hb.quantize(net, pictures(), target="generic")
    grid = m.grid("2.weight")
    assert grid is not None
    assert grid.scale.ndim == 0


def test_a_parameter_that_is_put_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x), self.layer.weight

    m = hb.quantize(Net().eval(), torch.randn(64, 6), bits="W4A8")
    assert len(hb.predict(m, torch.randn(2, 6))) == 2


def test_two_tensors_on_powers_of_two() -> None:
    placed = hb.place(captured(), GENERIC, weight_bits=4)
    form = hb.Format(4, True, True, axis=0, power_of_two=True, narrow=True)
    plan = {name: form if name.endswith("weight") else f for name, f in placed.plan.items()}
    m = hb.split_tensor(hb.calibrate(replace(placed, plan=plan), [(pictures(),)]), [(pictures(),)], share=0.5)
    assert not any(name.endswith(":second") for name in m.grids)
    assert any("powers of two" in entry.message for entry in m.log)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("rank", "function"),
    [
        (1, lambda x: x.max(-1).values),
        (2, lambda x: x.amax((2, 3))),
        (2, lambda x: x.amax((-1, -2), keepdim=True).flatten(1)),
        (3, lambda x: x.amax((2, 3, 4))),
    ],
)
def test_the_maximum_over_all_positions(
    target: str, rank: int, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](3, 8, 3)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(nn.functional.elu(self.first(x))))  # type: ignore[no-any-return]

    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(32, 3, *[7] * rank)
    m = hb.quantize(net, x, target=target)
    torch.testing.assert_close(hb.predict(m.as_float(), x)[0], net(x))
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


def test_validation_of_single_tensors() -> None:
    labels = network()(pictures()).argmax(1)
    found = hb.search(captured(), pictures(), max_drop=50, validation=[(pictures(), labels)])
    assert found.labelled
    assert found.samples == 64


def test_samples_of_a_proof_as_a_tensor(tmp_path: Path) -> None:
    m = hb.quantize(network(), pictures())
    assert "on 4 samples" in str(hb.export_onnx(m, tmp_path / "net.onnx", samples=pictures()[:4]))
    assert np.isfinite(hb.predict(m, pictures()[:4])[0].numpy()).all()
