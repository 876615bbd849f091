"""Tuning of statistics and of whole networks: what must stay, what may move, and that held-out samples have the last word."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import halfbyte as hb
from halfbyte import engine, recipe
from halfbyte.affine import fake_quantize, quantize
from halfbyte.blocks import portion
from halfbyte.calibrate import bias_floor, bias_step
from halfbyte.graph import bias_of, input_axis, layers, weight_of
from halfbyte.losses import divergence, noise_to_signal, relative_error
from halfbyte.model import value_name
from halfbyte.reconstruct import split
from halfbyte.run import run, simulate
from halfbyte.targets import GENERIC, ONNXRUNTIME_PER_TENSOR, find

STATISTICS = importlib.import_module("halfbyte.tune_statistics")  # in the package the function has the name
EVERYTHING: tuple[Any, ...] = ("biases", "scales", "codes")


class Net(nn.Module):
    """Batch norms, a depthwise layer, a residual, a layer without bias, and a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.b, self.bare = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b(nn.functional.relu6(self.norm_a(self.a(x)))))
        y: Tensor = self.last(torch.relu(self.bare(x)).mean((2, 3)))
        return y


def samples(count: int = 64, seed: int = 1) -> list[tuple[Tensor]]:
    """Smooth noise, each sample of another brightness and contrast, so that the outputs differ between samples."""
    generator = torch.Generator().manual_seed(seed)
    x, colour, contrast = (torch.randn(count, 3, n, n, generator=generator) for n in (16, 1, 1))
    return [(part,) for part in (2 * contrast * nn.functional.avg_pool2d(x, 3, 1, 1) + colour).split(32)]


def captured() -> hb.QModel:
    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm, net.norm_a):  # batch norms that have seen the data they claim to have seen
        norm.momentum = None
    with torch.no_grad():
        net.train()(torch.cat([b[0] for b in samples(64, 7)]))
        net.last.weight *= 10  # classes that differ
    return hb.fold_batchnorm(hb.capture(net.eval(), (torch.zeros(2, 3, 16, 16),)))


def nearest(target: hb.Target | None = None, **options: Any) -> hb.QModel:
    target = target or find("onnxruntime", saturates=engine.saturates())
    bits = {"weight_bits": 3, "activation_bits": 4, "uniform": False, **options}
    return hb.calibrate(hb.place(captured(), target, **bits), samples())


@pytest.fixture(scope="module")
def start() -> hb.QModel:
    """Three-bit weights and four-bit running values, nearest rounding."""
    return nearest()


@pytest.fixture(scope="module")
def tuned(start: hb.QModel) -> hb.QModel:
    return hb.tune_statistics(start, samples())


def falling() -> Any:
    """An error that says of any second model that it is better."""
    errors = iter([1.0, 0.0])
    return lambda *_: next(errors)


def noise(m: hb.QModel, data: list[Any]) -> float:
    return noise_to_signal(m, data, m.as_float())


def codes(m: hb.QModel) -> dict[str, Tensor]:
    found = {}
    for layer in layers(m.graph):
        weight = weight_of(layer)
        assert weight is not None
        grid = m.grid(value_name(weight))
        if grid is not None:
            found[str(weight.target)] = quantize(m.parameters[str(weight.target)], grid)
    return found


def biases(m: hb.QModel) -> set[str]:
    return {str(b.target) for layer in layers(m.graph) if (b := bias_of(layer)) is not None}


def same_grid(a: hb.Grid, b: hb.Grid) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("scale", "zero", "lo", "hi"))


def statistics(m: hb.QModel, layer: fx.Node, data: list[tuple[Tensor]], *, rounded: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a layer puts out, before its own grid rounds it, [channels]."""
    seen: list[Tensor] = []
    tap = simulate(m, only=lambda n: n != value_name(layer)) if rounded else (lambda _, x: x)

    def watch(name: str, x: Tensor) -> Tensor:
        y = tap(name, x)
        if name == value_name(layer):
            seen.append(y.movedim(input_axis(layer), 0).flatten(1))
        return y

    for batch in data:
        run(m if rounded else m.as_float(), batch, watch)
    whole = torch.cat(seen, 1).double()
    return whole.mean(1), whole.std(1, correction=0)


def test_integer_weights_stay_and_only_scales_and_biases_move(start: hb.QModel, tuned: hb.QModel) -> None:
    before, after = codes(start), codes(tuned)
    assert all(torch.equal(before[k], after[k]) for k in before)
    weights = {value_name(w) for layer in layers(start.graph) if (w := weight_of(layer)) is not None}
    moved = {k for k in start.grids if not same_grid(start.grids[k], tuned.grids[k])}
    assert moved and moved <= weights
    for name, w in codes(tuned).items():
        grid = tuned.grid(name)
        assert grid is not None
        assert torch.equal(hb.dequantize(w, grid), fake_quantize(tuned.parameters[name], grid))
    assert tuned.plan == start.plan and tuned.params is start.params


def test_tuned_statistics_gain_on_new_samples(start: hb.QModel, tuned: hb.QModel) -> None:
    figures = tuned.log[-1].figures
    assert figures["kept"] and figures["after"] < figures["before"]
    fresh = samples(64, 99)
    assert noise(tuned, fresh) < noise(start, fresh)


def test_each_layer_gets_its_statistics_back(start: hb.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force: with no held-out sample to object, the samples' own statistics are met in every channel of every layer."""
    monkeypatch.setattr(STATISTICS, "_better", lambda _pairs, factor, *_: torch.ones_like(factor, dtype=torch.bool))
    monkeypatch.setattr(STATISTICS, "noise_to_signal", falling())
    m = hb.tune_statistics(start, samples())
    fit, _ = split(samples(), 4)
    for layer in layers(m.graph):
        mean, std = statistics(m, layer, fit, rounded=True)
        wanted_mean, wanted_std = statistics(m, layer, fit, rounded=False)
        assert torch.allclose(std, wanted_std, rtol=1e-3)
        if bias_of(layer) is not None:
            assert torch.allclose(mean, wanted_mean, atol=1e-3 * float(wanted_std.max()))


def test_nothing_changes_where_nothing_was_rounded(start: hb.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights already on their grids and running values in float: both networks are one, so are their statistics."""
    rounded = {k: fake_quantize(start.params[k], start.grids[k]) for k in codes(start)}
    grids = {k: start.grids[k] for k in rounded}
    m = replace(start, params={**start.params, **rounded}, tuned={}, grids=grids)
    assert hb.tune_statistics(m, samples()).log[-1].figures["before"] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(STATISTICS, "noise_to_signal", falling())  # else the model comes back whatever the layers do
    out = hb.tune_statistics(m, samples())
    assert all(torch.equal(out.parameters[k], m.params[k]) for k in m.params)
    assert out.grids == grids


def test_no_gradient_is_used(start: hb.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    seen: list[bool] = []
    with torch.enable_grad():
        m = hb.tune_statistics(start, samples(), progress=lambda *_: seen.append(torch.is_grad_enabled()))
    assert seen and not any(seen)
    assert not any(t.requires_grad for t in m.tuned.values())


@pytest.mark.parametrize("options", [{"weight_bits": 8}, {"weight_bits": 4, "uniform": True}])
def test_the_outputs_never_lose_on_held_out_samples(options: dict[str, Any]) -> None:
    m = nearest(**options)
    out = hb.tune_statistics(m, samples())
    _, held = split(samples(), 4)
    assert noise(out, held) <= noise(m, held)
    figures = out.log[-1].figures
    assert noise(m, held) == pytest.approx(figures["before"])
    if not figures["kept"]:
        assert out.tuned is m.tuned and out.grids is m.grids


def test_a_loss_at_the_outputs_undoes_everything(start: hb.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.0, 1.0])
    monkeypatch.setattr(STATISTICS, "noise_to_signal", lambda *_: next(errors))
    out = hb.tune_statistics(start, samples())
    assert out.tuned is start.tuned and out.grids is start.grids
    assert "undone" in out.log[-1].message


def test_a_shared_scale_stays_and_the_bias_takes_the_mean() -> None:
    m = nearest(ONNXRUNTIME_PER_TENSOR)
    out = hb.tune_statistics(m, samples())
    assert all(same_grid(m.grids[k], out.grids[k]) for k in m.grids)
    assert set(out.tuned) <= set(m.tuned) | biases(m)


def test_a_bias_without_room_stays(start: hb.QModel) -> None:
    """A channel whose bias already fills int32 cannot have a smaller scale."""
    layer = layers(start.graph)[1]
    weight = value_name(layer.args[1])  # type: ignore[arg-type]
    grid = start.grids[weight]
    floor = bias_floor(start, layer, grid)
    assert floor is not None
    small = replace(grid, scale=torch.maximum(floor, torch.full_like(floor, 1e-30)))
    out = hb.tune_statistics(replace(start, grids={**start.grids, weight: small}), samples())
    for node in layers(out.graph):
        name = value_name(node.args[1])  # type: ignore[arg-type]
        least = bias_floor(out, node, out.grids[name])
        assert least is None or bool((out.grids[name].scale >= least).all())


def test_wrong_use_of_statistics_is_one_sentence(start: hb.QModel) -> None:
    with pytest.raises(hb.UsageError, match="no statistics to tune yet"):
        hb.tune_statistics(start.as_float(), samples())
    assert start.target is not None
    with pytest.raises(hb.UsageError, match="8 bits"):
        hb.tune_statistics(replace(start, target=replace(start.target, bias_bits=8)), samples())


def test_bias_tuning_touches_only_biases(start: hb.QModel) -> None:
    out = hb.tune(start, samples(), loss="divergence", iterations=30, scale_rate=0.02)
    figures = out.log[-1].figures
    assert figures["after"] < figures["before"]
    assert out.grids == start.grids
    assert {k for k in out.parameters if not torch.equal(out.parameters[k], start.parameters[k])} <= biases(start)
    _, held = split(samples())
    (batch,) = held
    wanted, found = run(start.as_float(), batch), run(out, batch, simulate(out))
    assert float(divergence(found, wanted)) == pytest.approx(figures["after"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", ["divergence", "error"])
@pytest.mark.parametrize("learn", [("scales",), EVERYTHING])
def test_tuning_keeps_the_laws(start: hb.QModel, learn: tuple[Any, ...], loss: Any) -> None:
    out = hb.tune(start, samples(), learn=learn, loss=loss, iterations=12, rate=0.05, scale_rate=0.02, batch=8)
    figures = out.log[-1].figures
    assert figures["after"] <= figures["before"]
    if not figures["kept"]:
        assert out.grids is start.grids and out.tuned is start.tuned
        return
    for name in codes(out):
        grid = out.grids[name]
        w = out.parameters[name]
        assert torch.equal(fake_quantize(w, grid), w)
        form = out.plan[name]
        assert form is not None
        if form.bits == 8 or "codes" not in learn:
            assert torch.equal(codes(out)[name], codes(start)[name])
    for layer in layers(out.graph) if "biases" not in learn else []:
        bias, grid = bias_of(layer), out.grids[value_name(layer.args[1])]  # type: ignore[arg-type]
        step = bias_step(out, layer, grid)
        if bias is not None and step is not None:  # all stay, but for the steps that integer kernels hold them in
            moved = (out.parameters[str(bias.target)] - start.parameters[str(bias.target)]).abs()
            assert bool((moved <= 0.51 * step).all())


def test_everything_together_finds_more_than_biases(start: hb.QModel) -> None:
    fresh = samples(64, 5)
    found = [
        noise(hb.tune(start, samples(256), learn=learn, iterations=80, rate=0.02, scale_rate=0.05), fresh)
        for learn in (("biases",), EVERYTHING)
    ]
    assert noise(start, fresh) > found[0] > found[1]


def test_the_same_seed_gives_the_same_bits_and_a_kept_result_is_read(start: hb.QModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learn": EVERYTHING, "iterations": 8, "kept": tmp_path}
    first = hb.tune(start, samples(), **options)
    steps: list[int] = []
    again = hb.tune(start, samples(), **options, progress=lambda *_: steps.append(1))
    other = hb.tune(start, samples(), **{**options, "kept": None})
    assert not steps
    for m in (again, other):
        assert all(torch.equal(first.parameters[k], m.parameters[k]) for k in first.parameters)
        assert all(same_grid(first.grids[k], m.grids[k]) for k in first.grids)
    hb.tune(start, samples(), **{**options, "seed": 1}, progress=lambda *_: steps.append(1))
    assert len(steps) == 8


def test_time_limit_and_interruption_keep_the_best_so_far(start: hb.QModel, tmp_path: Path) -> None:
    short = hb.tune(start, samples(), iterations=100_000, time_limit=1.5)
    assert 4 <= short.log[-1].figures["steps"] < 100_000

    def stop(_stage: str, done: int, _total: int | None) -> None:
        if done == 5:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        hb.tune(start, samples(), iterations=1000, kept=tmp_path, progress=stop)
    m = hb.tune(start, samples(), iterations=1000, kept=tmp_path)
    assert "5 of 1000 steps" in m.log[-1].message


def test_wrong_use_of_tune_is_one_sentence(start: hb.QModel) -> None:
    for wrong, message in (
        ({"learn": ("bias",)}, "'biases', 'scales', 'codes'"),
        ({"learn": "biases"}, "must be a tuple"),
        ({"learn": ()}, "must be a tuple"),
        ({"iterations": 0}, "must be positive"),
    ):
        with pytest.raises(hb.UsageError, match=message):
            hb.tune(start, samples(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(hb.UsageError, match="nothing to tune yet"):
        hb.tune(start.as_float(), samples())


def test_losses_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 4, generator=generator) for _ in range(2))
    p, q = a.softmax(1), b.softmax(1)
    brute = sum(float(p[i, j]) * math.log(float(p[i, j] / q[i, j])) for i in range(6) for j in range(4)) / 6
    assert float(divergence((b,), (a,))) == pytest.approx(brute, rel=1e-5)
    assert float(divergence((a + 3,), (a,))) == pytest.approx(0, abs=1e-6)
    assert float(relative_error((a + 3,), (a,), (torch.tensor(1.0),), centred=True)) == pytest.approx(0, abs=1e-6)
    assert float(relative_error((a + 3,), (a,), (torch.tensor(4.5),))) == pytest.approx(2)


def test_networks_of_several_outputs_are_judged_by_their_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = torch.relu(self.a(x))
            y = self.b(x)
            return x, y, y.argmax(1)

    torch.manual_seed(0)
    m = hb.capture(Two().eval(), (torch.zeros(2, 3, 8, 8),))
    m = hb.calibrate(hb.place(m, GENERIC, weight_bits=3, activation_bits=4), samples())
    out = hb.tune(m, samples(), learn=EVERYTHING, iterations=20, scale_rate=0.02)
    assert "relative error" in out.log[-1].message
    assert out.log[-1].figures["after"] < out.log[-1].figures["before"]
    with pytest.raises(hb.UsageError, match="take 'error'"):
        hb.tune(m, samples(), loss="divergence")


def test_recipe_steps(start: hb.QModel) -> None:
    low = recipe.load_recipe("low-bit").changed("reconstruct", method="nearest")
    steps = (*low.steps, {"step": "tune_statistics", "guard": True})
    steps = (*steps, *({"step": "tune", "learn": what, "iterations": 4} for what in EVERYTHING))
    m = hb.quantize(captured(), samples(), recipe=replace(low, steps=steps), weight_bits=4, activation_bits=4)
    assert [e.figures["learn"] for e in m.log if e.stage == "tune"] == [
        ["biases"],
        ["biases", "scales"],
        ["biases", "scales", "codes"],
    ]
    assert any(e.stage == "tune_statistics" and e.figures for e in m.log)
    with pytest.raises(hb.UsageError, match="'both' is not one of 'biases', 'scales', 'codes'"):
        recipe.check(replace(low, steps=({"step": "tune", "learn": "both"},)))


def test_a_tuned_file_is_proven(tuned: hb.QModel, tmp_path: Path) -> None:
    m = hb.tune(tuned, samples(), learn=EVERYTHING, iterations=5)
    parity = hb.export_onnx(m, tmp_path / "model.onnx")
    assert parity.proven and parity.integer_mismatches == 0


def test_a_block_takes_samples_by_its_positions() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, stride=4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.b(self.a(x)).mean((2, 3)))
            return y

    a, b, c = layers(hb.capture(Sizes().eval(), (torch.zeros(2, 3, 64, 64),)).graph)
    assert [portion([n]) for n in (a, b, c)] == [2, 16, 64]
    assert portion([a, b, c]) == 2


def test_features_and_mixed_samples_lower_the_noise(start: hb.QModel) -> None:
    """Judged on samples that nobody has seen."""
    few, fresh = [(samples()[0][0][:16],)], samples(64, 9)
    options: dict[str, Any] = {"learn": EVERYTHING, "iterations": 60, "rate": 0.02, "scale_rate": 0.05, "batch": 8}
    out = hb.tune(start, few, features=True, mix=True, **options)
    assert noise(out, fresh) < 0.7 * noise(start, fresh)
    assert out.log[-1].figures["kept"]
    for name, grid in out.grids.items():  # whatever moved lies on its grid
        if name in out.params and out.plan.get(name) is not None:
            assert torch.equal(fake_quantize(out.parameters[name], grid), out.parameters[name])


def test_mixed_samples_lie_between_samples(start: hb.QModel) -> None:
    tune = importlib.import_module("halfbyte.tune")
    part = importlib.import_module("halfbyte.refinement").Part(
        start, [n for n in start.graph.nodes if n.op != "output"], EVERYTHING, seed=0
    )
    (x,) = samples()[0]
    judge = tune._Judge(part, (x,), 20, divergent=False, features=True, mix=True)
    given = judge.env(torch.arange(12))
    (mixed,) = judge._mixed(given).values()
    same = [bool(torch.equal(a, b)) for a, b in zip(mixed, x[:12], strict=True)]
    assert 0 < sum(same) < 12
    assert float(mixed.min()) >= float(x[:20].min())
    assert float(mixed.max()) <= float(x[:20].max())
    assert len(judge.features) >= 1
