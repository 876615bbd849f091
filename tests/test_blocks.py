"""Blocks of layers refined together: where the graph is cut, and what must hold whatever the gradients do."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import engine
from halfbyte.affine import fake_quantize
from halfbyte.blocks import blocks_of
from halfbyte.errors import UsageError
from halfbyte.graph import bias_of, layers, output_values, weight_of
from halfbyte.model import value_name
from halfbyte.refinement import LEARNED, Part, Rates
from halfbyte.targets import find

hb_blocks = sys.modules[blocks_of.__module__]
SHORT = hb.Blocks(iterations=6, batch=8, layers=2)


class Residual(nn.Module):
    """Two residual blocks, one of them depthwise, with limits for each channel and a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(nn.functional.relu6(self.a(x))))
        x = x + self.d(torch.relu(self.c(x)))
        y: Tensor = self.last(x.mean((2, 3)))
        return y


def samples(count: int = 48, seed: int = 1) -> list[tuple[Tensor]]:
    x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [(part,) for part in nn.functional.avg_pool2d(x, 3, 1, 1).split(16)]


@pytest.fixture(scope="module")
def start() -> hb.QModel:
    """Four-bit weights and running values, weights by descent."""
    torch.manual_seed(0)
    m = hb.equalize(hb.capture(Residual().eval(), (torch.zeros(2, 3, 16, 16),)), activation_bits=4, weight_bits=4)
    target = find("onnxruntime", saturates=engine.saturates())
    placed = hb.place(m, target, weight_bits=4, activation_bits=4, uniform=False)
    return hb.reconstruct(hb.calibrate(placed, samples()), samples(), hb.Descent())


def test_cuts_lie_where_one_value_carries_everything(start: hb.QModel) -> None:
    parts = blocks_of(start, 2)
    assert [n for part in parts for n in part] == [n for n in start.graph.nodes if n.op != "output"]
    assert len(parts) > 1
    every = set(layers(start.graph))
    for at, part in enumerate(parts[:-1]):
        assert sum(n in every for n in part) >= 2
        later = {n for rest in parts[at + 1 :] for n in rest}
        crossing = [n for n in part if n.op == "call_function" and any(u in later for u in n.users)]
        assert crossing == part[-1:]


def test_a_network_without_a_cut_is_one_block() -> None:
    class Ladder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            return y + self.c(torch.relu(self.b(torch.relu(y))))

    assert len(blocks_of(hb.capture(Ladder().eval(), (torch.zeros(2, 4),)), 2)) == 1


@pytest.mark.parametrize("options", [SHORT, replace(SHORT, drop=0.5), replace(SHORT, weighting="gradient")])
def test_refining_keeps_the_laws(start: hb.QModel, options: hb.Blocks) -> None:
    m = hb.refine(start, samples(), options)
    for layer in layers(m.graph):
        weight = weight_of(layer)
        assert weight is not None
        grid = m.grid(value_name(weight))
        assert grid is not None
        w = m.parameters[str(weight.target)]
        assert torch.equal(fake_quantize(w, grid), w)
    entries = [e for e in m.log if e.stage == "blocks"]
    assert len(entries) == len(blocks_of(start, options.layers))
    assert all(e.figures["after"] <= e.figures["before"] for e in entries)
    assert m.plan == start.plan and start.tuned != {}


def test_gradients_find_what_layers_alone_did_not(start: hb.QModel) -> None:
    refined = hb.refine(start, samples(192), hb.Blocks(iterations=120, rate=0.01, layers=2))
    figures = [e.figures for e in refined.log if e.stage == "blocks"]
    assert any(f["kept"] for f in figures)
    assert sum(f["after"] for f in figures) < sum(f["before"] for f in figures)


def test_scales_of_running_values_move_and_limits_follow(start: hb.QModel) -> None:
    m = hb.refine(start, samples(), replace(SHORT, iterations=60, scale_rate=0.02))
    narrow = [n for n in start.grids if (f := start.plan.get(n)) is not None and f.bits == 4 and not f.signed]
    moved = [n for n in narrow if not torch.equal(m.grids[n].scale, start.grids[n].scale)]
    assert moved
    relu6 = next(n for n in start.plan if n.startswith("relu6") and start.plan[n] is not None)
    grid = m.grid(relu6)
    assert grid is not None
    limit = m.parameters.get(f"{relu6}:upper", torch.tensor(6.0))
    assert bool((grid.maximum <= limit + grid.scale).all())


def test_the_same_seed_gives_the_same_bits_and_a_kept_run_goes_on(start: hb.QModel, tmp_path: Path) -> None:
    whole = hb.refine(start, samples(), SHORT)
    seen = 0

    def stop(stage: str, done: int, _total: int | None) -> None:
        nonlocal seen
        if stage == "blocks" and done == 1:
            seen += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hb.refine(start, samples(), SHORT, kept=tmp_path, progress=stop)
    resumed = hb.refine(start, samples(), SHORT, kept=tmp_path)
    assert seen == 1
    assert whole.tuned.keys() == resumed.tuned.keys()
    assert all(torch.equal(whole.tuned[k], resumed.tuned[k]) for k in whole.tuned)
    assert all(torch.equal(whole.grids[k].scale, resumed.grids[k].scale) for k in whole.grids)


def test_a_time_limit_takes_fewer_steps(start: hb.QModel) -> None:
    m = hb.refine(start, samples(), replace(SHORT, iterations=100_000), time_limit=2.0)
    assert all(e.figures["steps"] < 100_000 for e in m.log if e.stage == "blocks")


def test_wrong_use_is_one_sentence(start: hb.QModel) -> None:
    with pytest.raises(hb.UsageError, match="nothing to refine yet"):
        hb.refine(start.as_float(), samples(), SHORT)
    with pytest.raises(hb.UsageError, match="drop"):
        hb.Blocks(drop=1.0)


def test_a_refined_file_is_proven(start: hb.QModel, tmp_path: Path) -> None:
    parity = hb.export_onnx(hb.refine(start, samples(), SHORT), tmp_path / "model.onnx")
    assert parity.proven and parity.integer_mismatches == 0


def test_gradients_of_portions_are_those_of_the_batch(start: hb.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums of integers can be exactly zero, where rounding errors decide what the activation function passes: biases off their steps.
    monkeypatch.setattr(Part, "_bias_step", lambda *_: None)
    biases = {
        str(b.target): start.parameters[str(b.target)] for n in layers(start.graph) if (b := bias_of(n)) is not None
    }
    start = replace(start, tuned={**start.tuned, **{k: b + 1e-4 * (1 + torch.rand_like(b)) for k, b in biases.items()}})
    nodes = [n for n in start.graph.nodes if n.op != "output"]
    (x,) = samples(16)[0]
    (output,) = output_values(start.graph)

    def gradients(portion: int | None) -> list[Tensor]:
        part = Part(start, nodes, LEARNED, seed=0)

        def loss(at: Tensor) -> Tensor:
            return part.run({start.inputs[0]: x[at]})[output].square().mean()

        part.free_biases({start.inputs[0]: x})
        variables = [t for group in part.variables(Rates(1, 1, 1)) for t in group["params"]]
        if portion is None:
            loss(torch.arange(len(x))).backward()
        else:
            part.portion = portion
            part.backward(loss, torch.arange(len(x)))
        assert not part.leaves and not part.training
        return [t.grad for t in variables if t.grad is not None]

    wanted = gradients(None)
    assert len(wanted) > 10 and any(bool(t.any()) for t in wanted)
    for portion in (3, 16):
        for found, t in zip(gradients(portion), wanted, strict=True):
            torch.testing.assert_close(found, t, rtol=1e-3, atol=1e-5 * float(t.abs().max()) + 1e-7)


class Tokens(nn.Module):
    """Two transformer blocks, whose samples lie along the second dimension inside, and whose heads are joined with them."""

    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.blocks, self.last = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.blocks(x).mean(1))
        return y @ y.t() if self.pairs else y


def test_samples_are_told_apart_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    m, x = hb.capture(Tokens().eval(), torch.randn(2, 5, 16)), torch.randn(11, 5, 16)
    parts = blocks_of(m, 2)
    assert len(parts) > 2
    monkeypatch.setattr(hb_blocks, "fitting", lambda *_: 4)
    stream = hb_blocks._Stream(m, (x,))
    for part in parts:
        env = stream.advanced(m, part, rounded=False)
    (wanted,) = hb.run(m, (x,))
    torch.testing.assert_close(env[output_values(m.graph)[0]], wanted)
    quantized = hb.quantize(m, [(x,)] * 3, bits="W4A4", rounding="blocks", iterations=3)
    assert any(e.stage == "blocks" and "steps" in e.figures for e in quantized.log)


def test_outputs_of_several_samples_together_are_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16)
    with pytest.raises(UsageError, match=r"output 'matmul' .* not one of separate samples"):
        hb.quantize(hb.capture(Tokens(pairs=True).eval(), x), [(x,)], bits="W4A4", rounding="blocks", iterations=3)
