"""Second tensors in the graph: the float network stays, the sums are exact, the budget holds, the engine agrees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import engine, recipe
from halfbyte.affine import fake_quantize, quantize
from halfbyte.calibrate import bias_step, whole_biases
from halfbyte.graph import RESIDUAL, bias_of, by_value, layers, macs, twin_of, weight_of
from halfbyte.integer import run_integer
from halfbyte.local import Problem, Solution
from halfbyte.losses import noise_to_signal as error
from halfbyte.lower import lower
from halfbyte.model import value_name
from halfbyte.place import unplaced
from halfbyte.targets import find


class Net(nn.Module):
    """Convolutions plain, depthwise and grouped, a residual, tokens-free linear layers; unequal kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3, bias=False)
        self.hidden = nn.Linear(12, 16)
        self.last = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.plain, self.depthwise, self.grouped, self.hidden):
                layer.weight[::3] = layer.weight[::3].sign() * layer.weight[::3].abs() ** 3 * 50  # a heavy tail

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(torch.relu(self.first(x))))
        x = x + nn.functional.relu6(self.depthwise(x))
        x = torch.relu(self.grouped(x)).mean((2, 3))
        return self.last(torch.relu(self.hidden(x)))


def data(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def calibrated(
    target: str = "onnxruntime", net: nn.Module | None = None, bits: int = 4, *, symmetric: bool = False
) -> hb.QModel:
    torch.manual_seed(4)
    x = data()
    m = hb.capture((net or Net()).eval(), x[:2])
    where = find(target, saturates=engine.saturates())
    placed = hb.place(m, where, weight_bits=bits, activation_bits=bits, uniform=False, symmetric_weights=symmetric)
    return hb.calibrate(placed, [(x,)])


@pytest.fixture(scope="module")
def base() -> hb.QModel:
    torch.set_num_threads(1)
    return calibrated()


def noise(m: hb.QModel) -> float:
    return error(m, [(data(),)], m.as_float())


def simulated(m: hb.QModel, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    tap = hb.simulate(m)

    def keep(name: str, t: Tensor) -> Tensor:
        found[name] = tap(name, t)
        return found[name]

    hb.run(m, (x,), keep)
    return found


@pytest.mark.parametrize(("share", "activations"), [(0.2, 0.0), (0.0, 1.0), (0.5, 1.0), (1.0, 0.0)])
def test_the_float_network_stays(base: hb.QModel, share: float, activations: float) -> None:
    split = hb.split_tensor(base, [(data(),)], share=share, activations=activations)
    assert len(split.graph.nodes) > len(base.graph.nodes)
    x = data(8) * 2
    (before,), (after,) = hb.run(base.as_float(), (x,)), hb.run(split.as_float(), (x,))
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))
    assert base.graph is not split.graph


def test_every_sum_is_proven_in_the_engine(base: hb.QModel, tmp_path: Path) -> None:
    split = hb.split_tensor(base, [(data(),)], share=0.8, activations=1.0)
    split_layers = {e.value for e in split.log if e.stage == "split_tensor" and "kernels" in e.figures and e.value}
    assert split_layers == {"plain", "depthwise", "grouped", "hidden"}
    parity = hb.export_onnx(split, tmp_path / "net.onnx")
    assert parity.proven
    assert parity.float_max_steps == 0
    assert {op for op, _ in parity.float_nodes} == {"Add", "Sub"}  # of the linear layer's float outputs; of x - Q(x)
    assert parity.kernels["QLinearAdd"] >= 6
    hb.save(split, tmp_path / "kept")
    again = hb.load(tmp_path / "kept")
    x = data(4)
    assert torch.equal(hb.predict(split, (x,))[0], hb.predict(again, (x,))[0])
    assert dict(again.ties) == dict(split.ties)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-per-tensor"])
def test_integers_are_the_sum_of_both_products(target: str) -> None:
    """A linear layer's parts are written as floats: ``alpha_1 (q_1 x) + alpha_2 (q_2 x)`` to the last bit."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 10, bias=False), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    m = hb.capture(net.eval(), x[:2])
    m = hb.place(m, find(target, saturates=engine.saturates()), weight_bits=4, activation_bits=4, uniform=False)
    m = hb.calibrate(m, [(x,)])
    split = hb.split_tensor(m, [(x,)], share=1.0)
    low = lower(split)
    seen: dict[str, Tensor] = {}

    def tap(name: str, codes: Tensor) -> Tensor:
        return seen.setdefault(name, codes)

    run_integer(low, (x,), tap)
    read, written = split.grid("1"), split.grid("3")
    assert read is not None and written is not None
    centred = seen["1"].long() - int(read.zero)
    kernels = split.params["2.weight:second.places"].long() if "2.weight:second.places" in split.params else None
    parts = []
    for name in ("2.weight", "2.weight:second"):
        grid = split.grids[name]
        codes = hb.quantize_tensor(split.params[name], grid).long()
        scale = grid.scale * read.scale
        parts.append((centred @ codes.T).float() * scale)
    first, second = parts
    assert float(second.abs().max()) > 0
    if kernels is not None:
        second = torch.cat([second, torch.zeros(len(x), 1)], 1)[:, kernels]
    expected = (torch.round((first + second) / written.scale) + written.zero).clamp(written.lo, written.hi)
    assert torch.equal(seen["3"], expected)


def test_accumulators_of_convolutions_are_exact(base: hb.QModel) -> None:
    """Both parts of a convolution are their integer sums, requantized; the sum is that of the engine's addition."""
    split = hb.split_tensor(base, [(data(),)], share=1.0)
    x = data(4)
    seen: dict[str, Tensor] = {}
    run_integer(lower(split), (x,), lambda n, c: seen.setdefault(n, c))
    source = next(n for n in by_value(split.graph).values() if value_name(n) == "plain:first").args[0]
    read = split.grid(value_name(source))  # type: ignore[arg-type]
    assert read is not None
    codes = next(c for n, c in seen.items() if n == value_name(source))  # type: ignore[arg-type]
    for name, weight in (("plain:first", "plain.weight"), ("plain:second", "plain.weight:second")):
        w, out = split.grids[weight], split.grids[name]
        q = hb.quantize_tensor(split.params[weight], w).double()
        acc = nn.functional.conv2d((codes - read.zero).double(), q, padding=1)
        bias = split.parameters["plain.bias" if name.endswith("first") else "plain.weight:second.bias"]
        scale = (w.scale * read.scale)[:, None, None]
        acc = acc + (bias.double()[:, None, None] / scale.double()).round()
        expected = torch.round(acc.float() * (scale / out.scale)) + out.zero
        assert torch.equal(seen[name], expected.clamp(out.lo, out.hi))


def test_more_tensors_less_noise() -> None:
    base = calibrated(symmetric=True)

    def made(share: float, activations: float) -> float:
        return noise(hb.split_tensor(base, [(data(),)], share=share, activations=activations))

    none, kernels, values, both = noise(base), made(1.0, 0.0), made(0.0, 1.0), made(1.0, 1.0)
    assert kernels < none
    assert values < none
    assert both < min(kernels, values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_whole_weight_gets_a_second_one_too(symmetric: bool) -> None:
    m = calibrated("onnxruntime-per-tensor", symmetric=symmetric)
    split = hb.split_tensor(m, [(data(),)], share=1.0)
    entries = [e for e in split.log if e.stage == "split_tensor" and e.value]
    assert {e.value for e in entries} >= {"plain", "hidden"}
    assert all(e.figures["after"] < e.figures["before"] for e in entries)
    assert split.grids["plain.weight:second"].scale.ndim == 0
    assert torch.equal(split.grids["plain.weight"].scale, m.grids["plain.weight"].scale) == symmetric
    assert not split.grids["plain.weight"].zero.any()
    assert noise(split) < noise(m)


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("activations", [0.0, 0.4])
def test_the_budget_holds_and_a_second_call_changes_nothing(base: hb.QModel, share: float, activations: float) -> None:
    split = hb.split_tensor(base, [(data(),)], share=share, activations=activations)

    def weight_bytes(m: hb.QModel) -> float:
        names = {str(w.target) for n in layers(m.graph) if (w := weight_of(n)) is not None}
        return sum(m.params[n].numel() * m.plan[n].bits / 8 for n in names)  # type: ignore[union-attr]

    work = [sum(macs(n) for n in layers(m.graph)) for m in (base, split)]
    side = sum(4 * t.numel() for n, t in split.params.items() if ":second." in n)
    assert weight_bytes(split) + side <= (1 + share) * weight_bytes(base)
    assert work[1] <= (1 + share + activations) * work[0]
    again = hb.split_tensor(split, [(data(),)], share=share, activations=activations)
    assert [value_name(n) for n in again.graph.nodes if "value" in n.meta] == [
        value_name(n) for n in split.graph.nodes if "value" in n.meta
    ]
    x = data(8)
    assert torch.equal(hb.predict(split, (x,))[0], hb.predict(again, (x,))[0])


def test_the_worst_kernels_come_first(base: hb.QModel) -> None:
    split = hb.split_tensor(base, [(data(),)], share=0.3)
    entry = next(e for e in split.log if e.stage == "split_tensor" and e.value is None)
    assert entry.figures["kernels"] == sum(
        e.figures["kernels"] for e in split.log if e.value and e.stage == "split_tensor"
    )
    places = split.params["grouped.weight:second.places"]
    w, grid = base.params["grouped.weight"], base.grids["grouped.weight"]
    relative = (fake_quantize(w, grid) - w).flatten(1).square().sum(1) / w.flatten(1).square().sum(1)
    chosen = places < int(places.max())
    assert 0 < int(chosen.sum()) < len(chosen)
    assert float(relative[chosen].min()) >= float(relative[~chosen].median())


class Shared(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))
        return y


def test_layers_of_one_weight_have_a_twin_each() -> None:
    m = hb.split_tensor(calibrated(net=Shared()), [(data(),)], share=0.0, activations=1.0)
    twins = {n: t for n in layers(m.graph) if (t := twin_of(n)) is not None}
    assert [(value_name(n), value_name(t)) for n, t in twins.items()] == [
        (f"{name}:main", f"{name}{RESIDUAL}") for name in ("b", "b@1")
    ]
    hb.reconstruct(m, [(data(),)], hb.Descent())


def test_shared_and_transposed_weights_say_why() -> None:
    m = calibrated(net=Shared())
    split = hb.split_tensor(m, [(data(),)], share=1.0)
    assert any("its parameters are shared" in str(e) for e in split.log)
    assert len(split.graph.nodes) == len(m.graph.nodes)


def test_eight_bits_have_nothing_to_split() -> None:
    m = calibrated(bits=8)
    split = hb.split_tensor(m, [(data(),)], share=1.0, activations=1.0)
    assert len(split.graph.nodes) == len(m.graph.nodes)


def test_what_cannot_work_is_refused(base: hb.QModel) -> None:
    with pytest.raises(hb.UsageError, match=r"share = 1\.5 is not a fraction"):
        hb.split_tensor(base, [(data(),)], share=1.5)
    with pytest.raises(hb.UsageError, match=r"activations = -0\.1 is not a fraction"):
        hb.split_tensor(base, [(data(),)], activations=-0.1)
    with pytest.raises(hb.UsageError, match="call place and calibrate"):
        hb.split_tensor(base.as_float(), [(data(),)])
    chosen = replace(base, tuned={**base.tuned, "plain.weight": base.params["plain.weight"]})
    with pytest.raises(hb.UsageError, match="before reconstruct"):
        hb.split_tensor(chosen, [(data(),)])


def test_reconstruction_goes_on_from_a_split_model(base: hb.QModel) -> None:
    split = hb.split_tensor(base, [(data(),)], share=0.5)
    solved = hb.reconstruct(split, [(data(),)], hb.Descent())
    assert "plain.weight" in solved.tuned
    assert noise(solved) < noise(base)


@pytest.mark.parametrize("method", [hb.AdaRound(iterations=4), hb.AdaQuant(iterations=4)])
def test_what_is_learned_by_gradients_goes_on_from_a_split_model(base: hb.QModel, method: Any) -> None:
    split = hb.split_tensor(base, [(data(),)], share=0.2, activations=0.5)
    assert not any(g.scale.is_inference() or g.lo.is_inference() for g in split.grids.values())
    solved = hb.reconstruct(split, [(data(),)], method)
    assert solved.tuned
    assert noise(solved) <= noise(split) * 1.2


class Pooled(nn.Module):
    """A value whose codes only move before a layer reads them, and a sum behind a layer that is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        y = torch.relu(self.a(x))
        y = y + self.c(torch.relu(self.b(y)))
        return self.last(torch.relu(y))


def pooled() -> tuple[hb.QModel, hb.QModel]:
    torch.manual_seed(0)
    m = calibrated(net=Pooled())
    return m, hb.split_tensor(m, [(data(),)], share=0.0, activations=1.0)


def test_codes_that_only_move_are_wide_up_to_the_layer(tmp_path: Path) -> None:
    _, split = pooled()
    assert split.plan["relu"].bits == 8  # type: ignore[union-attr]
    (moved,) = (n for n, root in split.ties.items() if root == "relu")
    parts = [split.plan[f"{moved}:quantized{suffix}"] for suffix in ("", RESIDUAL)]
    assert [p.bits for p in parts if p] == [4, 4]
    parity = hb.export_onnx(split, tmp_path / "net.onnx")
    assert parity.proven
    seen = simulated(split, data(4))
    both = seen[f"{moved}:quantized"] + seen[f"{moved}:quantized{RESIDUAL}"]
    step = split.grids[f"{moved}:quantized"].scale
    assert float((both - seen[moved]).abs().max()) < float(step) / 8


def test_a_layer_between_two_split_values_may_have_no_activation_function(tmp_path: Path) -> None:
    """The sum of a layer and its twin is then itself a value that is read in two parts, as in linear bottlenecks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 32, 1))
    with torch.no_grad():
        net[0].weight[0] *= 30  # coarse steps for the other channels
        net[2].weight[:, 0] /= 30
    m = calibrated(net=nn.Sequential(*net, nn.ReLU(), nn.Conv2d(32, 4, 1)))
    split = hb.split_tensor(m, [(data(),)], share=0.0, activations=1.0)
    order = [e.value for e in split.log if e.stage == "split_tensor" and e.value]
    assert order == ["1", "2"]  # the other way round there is no sum yet
    assert noise(split) < noise(m)
    assert hb.export_onnx(hb.reconstruct(split, [(data(),)], hb.Descent()), tmp_path / "net.onnx").proven


def test_channels_with_limits_of_their_own_are_read_by_second_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU6(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(),
        nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight *= torch.linspace(0.5, 4.0, 12)[:, None, None, None]
        net[2].weight[::4] = net[2].weight[::4].sign() * net[2].weight[::4].abs() ** 3 * 200
    x = 3 * data()
    m = hb.equalize(hb.capture(net.eval(), x[:2]), [(x,)], method="noise", weight_bits=4)
    m = hb.calibrate(
        hb.place(m, find("onnxruntime", saturates=engine.saturates()), weight_bits=4, uniform=False), [(x,)]
    )
    split = hb.split_tensor(m, [(x,)], share=0.3)
    gathered = [n for n in split.ties if n.endswith(":second:inputs")]
    assert gathered and m.grid("1").lo.ndim + m.grid("1").hi.ndim > 0, "each channel has its limits"  # type: ignore[union-attr]
    assert noise(split) < noise(m)
    assert hb.export_onnx(split, tmp_path / "net.onnx").proven


def test_without_the_second_parts_all_is_as_before() -> None:
    m, split = pooled()
    whole, back = unplaced(m), unplaced(split)
    assert [(n.target, n.meta.get("value")) for n in back.graph.nodes] == [
        (n.target, n.meta.get("value")) for n in whole.graph.nodes
    ]
    assert back.params.keys() == whole.params.keys()


def watched(m: hb.QModel) -> tuple[hb.QModel, dict[str, Problem]]:
    """The reconstructed model, and the problem of each layer that was solved."""
    seen: dict[str, Problem] = {}

    class Watching(hb.Descent):
        def solve(self, p: Problem) -> Solution:
            seen[value_name(p.layer)] = p
            return super().solve(p)

    return hb.reconstruct(m, [(data(),)], Watching()), seen


def test_layers_are_solved_on_the_sum_of_both_parts() -> None:
    _, split = pooled()
    twins = {value_name(n): t for n in layers(split.graph) if (t := twin_of(n)) is not None}
    assert "a:main" in twins
    solved, problems = watched(split)
    seen = {name: torch.cat([*p.inputs]) for name, p in problems.items()}
    before = simulated(solved, data()[: len(seen["a:main"])])
    for name, twin in twins.items():
        node = by_value(split.graph)[name]
        parts = [before[value_name(n.args[0])] for n in (node, twin)]  # type: ignore[arg-type]
        assert torch.allclose(seen[name], parts[0] + parts[1], atol=1e-6)
        assert any(e.value == name and e.figures.get("kept") is not None for e in solved.log)
    left = {e.value for e in solved.log if e.stage == "reconstruct" and "left as it is" in e.message and not e.figures}
    assert left == {value_name(t) for t in twins.values()}
    assert noise(solved) < noise(split)


def test_a_sum_behind_a_split_layer_is_made_up_for() -> None:
    """A layer that adds to a running sum also corrects what the other operand is off, in two parts as in one."""
    _, split = pooled()
    solved, problems = watched(split)
    wanted = torch.cat([*problems["c:main"].targets])
    x = data()[: len(wanted)]
    exact = {}
    hb.run(split.as_float(), (x,), lambda n, t: exact.setdefault(n, t))
    rounded = simulated(solved, x)
    other = next(n for n in by_value(split.graph)["add"].all_input_nodes if value_name(n) != "c")
    expected = exact["c"] + exact[value_name(other)] - rounded[value_name(other)]
    assert torch.allclose(wanted, expected, atol=1e-5)


def test_a_second_part_takes_up_what_the_bias_of_the_first_has_lost() -> None:
    _, split = pooled()
    whole = whole_biases(split, layers(split.graph))
    for layer in layers(split.graph):
        twin = twin_of(layer)
        if twin is None:
            continue
        weight, biases = split.grids[value_name(weight_of(layer))], [str(bias_of(n).target) for n in (layer, twin)]  # type: ignore[arg-type, union-attr]
        coarse, fine = (bias_step(split, n, weight) for n in (layer, twin))
        assert coarse is not None and fine is not None
        exact, main, rest = (split.parameters[biases[0]], *(whole.parameters[b].double() for b in biases))
        assert not split.parameters[biases[1]].any()
        assert bool(((main - exact).abs() <= 0.501 * coarse).all())
        assert bool(((main + rest - exact).abs() <= 0.501 * fine).all())
        for bias, step in ((main, coarse), (rest, fine)):
            assert torch.allclose(bias / step, (bias / step).round(), atol=1e-3)
        assert float((main + rest - exact).norm()) < 0.2 * float((main - exact).norm())


def test_reconstructed_layers_put_out_what_the_integers_will() -> None:
    """Simulation and integers differ where a float sum falls on the other side of a tie, and nowhere else."""
    _, split = pooled()
    solved = hb.reconstruct(split, [(data(),)], hb.Descent())
    seen: dict[str, Tensor] = {}
    x = data(16)
    run_integer(lower(solved), (x,), lambda n, t: seen.setdefault(n, t))
    shares = []
    for name, value in simulated(solved, x).items():
        grid = solved.grid(name)
        if grid is not None and name in seen and by_value(solved.graph)[name].op != "get_attr":
            shares.append(float((quantize(value, grid) != seen[name]).float().mean()))
    assert len(shares) > 10
    assert max(shares) < 2e-3, shares


def test_the_noisiest_value_for_its_operations_comes_first() -> None:
    m = calibrated(net=Pooled())
    every = hb.split_tensor(m, [(data(),)], share=0.0, activations=1.0)
    entries = [e for e in every.log if e.stage == "split_tensor" and e.value and "noise" in e.figures]
    rates = [e.figures["noise"] / e.figures["macs"] for e in entries]
    assert len(rates) >= 3
    assert rates == sorted(rates, reverse=True)
    worth = rates[0] * sum(macs(n) for n in layers(m.graph)) * 0.99
    one = hb.split_tensor(m, [(data(),)], share=0.0, activations=1.0, worth=worth)
    assert [e.value for e in one.log if e.stage == "split_tensor" and e.value] == [entries[0].value]
    for e in entries:  # the first-order figure against rounding that value alone
        grids = {n: g for n, g in m.grids.items() if m.ties.get(n, n) == e.value}
        alone = noise(replace(m, grids=grids, tuned={}))
        assert 0.4 < e.figures["noise"] / alone < 2.5, (e.value, e.figures["noise"], alone)


def test_the_low_bit_recipe_splits_values_of_few_bits_only() -> None:
    torch.manual_seed(4)
    m = hb.capture(Pooled().eval(), data(2))

    def split(**options: Any) -> list[str]:
        steps = recipe.load_recipe("low-bit").changed("split_tensor", activations=0.8)
        q = hb.quantize(m, [data()], recipe=steps, weight_bits=4, **options)
        return [n for n in q.grids if n.endswith(RESIDUAL)]

    assert split(activation_bits=4)
    assert not split(activation_bits=8)
    assert not split(activation_bits=4, uniform=True)


def test_the_recipe_splits_and_keeps_what_helps(tmp_path: Path) -> None:
    torch.manual_seed(4)
    m = hb.capture(Net().eval(), data(2))
    log = hb.quantize(m, [data()], recipe="omse", weight_bits=4, activation_bits=4).log
    assert any(e.stage == "split_tensor" and "held-out" in e.message for e in log)
    more = recipe.load_recipe("omse").changed("split_tensor", share=1.0, activations=1.0)
    q = hb.quantize(m, [data()], recipe=more, weight_bits=4, activation_bits=4)
    assert any(e.stage == "split_tensor" and e.message.startswith("kept") for e in q.log)
    assert "plain.weight:second" in q.params
    assert hb.export_onnx(q, tmp_path / "net.onnx").proven
    nothing = recipe.Context(None, base_target(), 4, 4, {}, {}, lambda *_: None)
    (entry,) = recipe.STEPS["split_tensor"](m, nothing).log[-1:]
    assert "there are no data" in entry.message


def test_the_tuning_of_a_recipe_takes_the_time_and_the_steps_that_it_is_given() -> None:
    m = hb.capture(Net().eval(), data(2))
    options: dict[str, Any] = {"recipe": "omse", "bits": "W4A4"}

    def steps(**more: Any) -> int:
        return int(
            next(e.figures["steps"] for e in hb.quantize(m, [data()], **options, **more).log if e.stage == "tune")
        )

    assert steps(iterations=7) == 7
    assert steps(time_limit=1e-3) < 50
    with pytest.raises(hb.UsageError, match="has no step reconstruct, which --rounding is for"):
        hb.quantize(m, [data()], rounding="adaround", **options)


def base_target() -> hb.Target:
    return find("onnxruntime", saturates=engine.saturates())
