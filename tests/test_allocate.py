"""Widths by an integer programme: against brute force, against the whole network, and down to the proven file."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import programme, units
from halfbyte.errors import FormatError, UsageError
from halfbyte.graph import by_value
from halfbyte.reconstruct import split, unseen_first
from halfbyte.run import run, simulate
from halfbyte.sensitivity import _points as sensitivity_points
from halfbyte.targets import find
from halfbyte.units import Candidates, merged

TARGET = find("onnxruntime", saturates=True)
WIDTHS = [hb.bits(w, a) for w in (2, 4, 8) for a in (4, 8)]


class Net(nn.Module):
    """A residual block between a stem and a head; the pooled maps are moved, so that grids are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head, self.last = nn.Linear(8, 12), nn.Linear(12, 5)
        nn.init.normal_(self.last.weight, std=1.5)  # decisions, so that there is something to lose

    def forward(self, x: Tensor) -> Tensor:
        y = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        y = torch.relu(y + self.b(torch.relu(self.a(y))))
        return self.last(torch.relu(self.head(y.mean((2, 3)))))


def batches(count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    ends = [torch.randn(16, 3, 1, 1, generator=generator) * 2 for _ in range(count)]  # samples differ on the whole, too
    return [(torch.randn(16, 3, 8, 8, generator=generator) + e,) for e in ends]


@functools.cache
def network(kind: type[nn.Module] = Net) -> hb.QModel:
    torch.manual_seed(3)
    return hb.capture(kind().eval(), (torch.randn(2, 3, 8, 8),))


@functools.cache
def solved(*, uniform: bool = True) -> Candidates:
    """Six candidates with weights and biases of their own."""
    found = {}
    for b in WIDTHS:
        placed = hb.place(
            network(), TARGET, weight_bits=b.weights, activation_bits=b.activations, uniform=uniform, narrow=not uniform
        )
        found[b] = hb.reconstruct(hb.calibrate(placed, batches()), batches(), hb.Descent(), inputs="float")
    return found


@functools.cache
def table(*, uniform: bool = True) -> hb.SensitivityTable:
    return hb.sensitivity(solved(uniform=uniform), batches(), samples=40)


def every_choice(candidates: Candidates, limit: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    widths = {**units.units(candidates).widths, **limit}
    return [dict(zip(widths, ws, strict=True)) for ws in itertools.product(*widths.values())]


FEW = dict.fromkeys(("relu", "add", "x", "mean", "relu_3", "relu_2"), (8,))  # so that all choices can be listed


def test_pairs_of_widths_order_and_print() -> None:
    assert str(hb.bits(4, 8)) == "W4A8"
    assert hb.bits(" w8a16 ") == hb.bits(8, 16)
    assert sorted([hb.bits(8, 4), hb.bits(4, 8), hb.bits(4, 4)]) == [hb.bits(4, 4), hb.bits(4, 8), hb.bits(8, 4)]
    assert len({hb.bits(4, 8), hb.bits("W4A8")}) == 1


@pytest.mark.parametrize("wrong", [("W4",), ("W4A8", 8), (4,), (1, 8), (4, 17)])
def test_other_pairs_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        hb.bits(*wrong)


def test_units_are_weights_and_shared_grids() -> None:
    u = units.units(solved())
    (pool,) = [group for group in u.groups.values() if "max_pool2d" in group]
    assert pool[0] != "max_pool2d"
    assert len(pool) > 1
    assert u.widths["a.weight"] == (2, 4, 8)
    assert u.widths[pool[0]] == (4, 8)
    assert [(r.name, r.weight) for r in u.readers][:2] == [("stem", "stem.weight"), ("a", "a.weight")]
    assert {r.name: r.group for r in u.readers}["a"] == pool[0]


def test_a_uniform_choice_is_the_candidate() -> None:
    (x,) = batches(1)
    for label, m in solved().items():
        u = units.units(solved())
        choice = {k: label.weights if k.endswith("weight") else label.activations for k in u.open}
        made = merged(solved(), u, choice)
        assert torch.equal(run(made, x, simulate(made))[0], run(m, x, simulate(m))[0]), label


def test_a_mixed_choice_takes_each_part_from_its_candidate() -> None:
    u = units.units(solved())
    made = merged(solved(), u, {"a.weight": 2, "b.weight": 4})
    for name, label in (("a", "W2A8"), ("b", "W4A8"), ("stem", "W8A8")):
        from_ = solved()[hb.bits(label)]
        for p in (f"{name}.weight", f"{name}.bias"):
            assert torch.equal(made.parameters[p], from_.parameters[p])
        assert made.grids[f"{name}.weight"] is from_.grids[f"{name}.weight"]
        assert made.plan[f"{name}.weight"] == from_.plan[f"{name}.weight"]


def rounded(u: units.Units, unit: str) -> Callable[[str], bool]:
    """What is rounded while a unit is judged: all parameters, and its own running values."""
    return lambda name: name.endswith(("weight", "bias")) or name in u.groups.get(unit, ())


def test_samples_that_were_held_out_come_first() -> None:
    found, (_, held) = unseen_first(batches()), split(batches())
    assert torch.equal(found[0][0], held[0][0]) and len(held[0][0]) == 3 * 2
    before, after = (sorted(t.sum().item() for b in data for t in b[0]) for data in (batches(), found))
    assert before == after
    endless = ((x,) for x in itertools.repeat(torch.randn(16, 3, 8, 8)))
    assert hb.output_loss(solved()[hb.bits(8, 8)], endless, samples=8) > 0
    one = [(torch.randn(1, 3, 8, 8),)]
    assert unseen_first(one)[0][0] is one[0][0]


@pytest.mark.parametrize("uniform", [True, False])
def test_sensitivity_is_that_of_the_whole_network(uniform: bool) -> None:
    candidates, found = solved(uniform=uniform), table(uniform=uniform)
    u = units.units(candidates)
    x = torch.cat([b[0] for b in unseen_first(batches())])[:40]

    def divergence(choice: Mapping[str, int], only: Callable[[str], bool] = lambda _: True) -> float:
        m = merged(candidates, u, choice)
        p, q = (y[0].double().log_softmax(1) for y in (run(m.as_float(), (x,)), run(m, (x,), simulate(m, only=only))))
        return float((p.exp() * (p - q)).sum(1).mean())

    assert found.base == pytest.approx(divergence({}), rel=1e-5)
    assert found.losses.keys() == set(u.open)
    for unit, losses in found.losses.items():
        only = rounded(u, unit)
        for width, loss in losses.items():
            more = divergence({unit: width}, only) - divergence({}, only)
            naive = 0.0 if width == max(losses) else max(1e-6, more)
            assert loss == pytest.approx(naive, rel=1e-4, abs=1e-8), (unit, width)
    m = merged(candidates, u, {"a.weight": 2})
    assert hb.output_loss(m, batches(), samples=40) == pytest.approx(divergence({"a.weight": 2}), rel=1e-5)


def test_sensitivity_of_outputs_is_noise_to_signal() -> None:
    (x,) = batches(1)[0]
    found = hb.sensitivity(solved(), [(x,)], metric="outputs", samples=16)
    u = units.units(solved())

    def noise(choice: Mapping[str, int], unit: str) -> float:
        m = merged(solved(), u, choice)
        (y,), (z,) = run(m.as_float(), (x,)), run(m, (x,), simulate(m, only=rounded(u, unit)))
        return float((y - z).square().sum() / (y - y.mean()).square().sum())

    for unit, width in (("a.weight", 2), ("relu.3", 4), ("x", 4)):
        more = noise({unit: width}, unit) - noise({}, unit)
        assert found.losses[unit][width] == pytest.approx(max(1e-6, more), rel=1e-3)
    assert found.points is None


def test_sensitivity_with_labels() -> None:
    labelled = [(b, torch.arange(16) % 5) for b in batches()]
    found = hb.sensitivity(solved(), labelled, metric="loss", samples=32)
    u = units.units(solved())
    x, y = (torch.cat(t)[:32] for t in zip(*unseen_first([(*b, y) for b, y in labelled]), strict=True))
    m = merged(solved(), u, {"a.weight": 2})
    only = rounded(u, "a.weight")
    loss, base = (
        float(nn.functional.cross_entropy(run(n, (x,), simulate(n, only=only))[0].double(), y))
        for n in (m, merged(solved(), u, {}))
    )
    assert found.losses["a.weight"][2] == pytest.approx(max(1e-6, loss - base), abs=1e-6)
    with pytest.raises(UsageError, match="labelled data"):
        hb.sensitivity(solved(), batches(), metric="loss")


@pytest.mark.parametrize("metric", ["noise", "second-order"])
def test_proxies_fall_with_width(metric: str) -> None:
    found = hb.sensitivity(solved(), batches(), metric=metric, samples=24)  # type: ignore[arg-type]
    assert found.losses.keys() == set(units.units(solved()).open)
    for unit, losses in found.losses.items():
        scores = [losses[w] for w in sorted(losses)]
        assert scores == sorted(scores, reverse=True), unit
        assert scores[-1] == 0
        assert scores[0] >= 1e-6


def test_the_second_order_predicts_what_is_measured() -> None:
    found = hb.sensitivity(solved(), batches(), metric="second-order", samples=40).losses
    large = {(u, w): x for u, t in table().losses.items() for w, x in t.items() if x > 1e-4}
    assert len(large) >= 6
    for (unit, width), measured in large.items():
        assert measured / 3 < found[unit][width] < measured * 3, (unit, width)


def test_points_come_with_the_root_of_the_divergence() -> None:
    assert table().points == pytest.approx(100 / 2**0.5), "hardly any decision flips, so Pinsker's bound"
    sums = [torch.tensor([d * 100, 100, 40 * d**0.5], dtype=torch.float64) for d in (0.04, 0.09, 0.64)]
    assert sensitivity_points(sums) == pytest.approx(40)


def test_the_noise_proxy_is_the_noise_of_the_layer() -> None:
    m, x = solved()[hb.bits(2, 8)], batches(1)[0][0][:16]
    found = hb.sensitivity(solved(), [(x,)], metric="noise", samples=16).losses["stem.weight"][2]

    reference = run(m.as_float(), (x,), stop="stem")[0]

    def noise(m: hb.QModel) -> float:
        (y,) = run(m, (x,), simulate(m, only=lambda n: n == "stem.weight"), stop="stem")
        return float((y - reference).double().square().sum() / reference.double().square().sum())

    assert found == pytest.approx(noise(m) - noise(solved()[hb.bits(8, 8)]), rel=1e-4)


@pytest.mark.parametrize("kind", ["size", "logical_size", "bops"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_programme_finds_what_brute_force_finds(kind: str, share: float) -> None:
    costs, losses = hb.costs(solved()), table()
    choices = every_choice(solved(), FEW)
    totals = [costs.total(c)[kind] for c in choices]
    bound = min(totals) + share * (max(totals) - min(totals))
    fixed = {k: w[0] for k, w in FEW.items() if k in losses.losses}
    found = hb.allocate(solved(), losses, hb.Budget(**{kind: bound}), fixed=fixed)
    best = min(losses.predicted(c) for c, t in zip(choices, totals, strict=True) if t <= bound)
    assert found.loss == pytest.approx(best, rel=1e-9)
    assert found.costs[kind] <= bound
    assert found.status == "optimal"
    step = hb.greedy(solved(), losses, hb.Budget(**{kind: bound}), fixed=fixed)
    assert step.costs[kind] <= bound
    assert step.loss >= found.loss - 1e-12
    assert all(found.choice[k] == w for k, w in fixed.items())


def test_what_the_solver_prints_by_itself_is_not_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    solve = programme.milp

    def talking(*args: Any, **options: Any) -> Any:
        os.write(1, b"tmpSolver.run();\n")
        return solve(*args, **options)

    monkeypatch.setattr(programme, "milp", talking)
    hb.allocate(solved(), table(), hb.Budget(size=0.5))
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def test_a_bound_on_the_loss_gives_the_least_size() -> None:
    costs = hb.costs(solved())
    losses = replace(table(), points=30.0)
    choices = every_choice(solved(), FEW)
    budget = hb.Budget(
        drop=30 * (losses.base + 0.3 * losses.predicted(min(choices, key=lambda c: sum(c.values())))) ** 0.5
    )
    bound = budget.loss(losses)
    assert bound is not None
    fixed = {k: w[0] for k, w in FEW.items() if k in losses.losses}
    found = hb.allocate(solved(), losses, budget, fixed=fixed)
    assert found.costs["size"] == min(costs.total(c)["size"] for c in choices if losses.predicted(c) <= bound)
    assert found.loss <= bound
    assert hb.greedy(solved(), losses, budget, fixed=fixed).costs["size"] >= found.costs["size"]


def test_several_budgets_hold_together() -> None:
    budget = hb.Budget(size=0.31, bops=0.03)
    found = hb.allocate(solved(), table(), budget)
    assert found.shares["size"] <= 0.31
    assert found.shares["bops"] <= 0.03
    for more in hb.several(solved(), table(), budget, count=4, spread=1.0):
        assert more.shares["size"] <= 0.31
        assert more.shares["bops"] <= 0.03
        assert more.loss >= found.loss - 1e-12
        assert more.loss == pytest.approx(table().predicted(more.choice))


def test_perturbed_choices_differ_and_the_best_is_measured() -> None:
    found = hb.several(solved(), table(), hb.Budget(logical_size=0.18), count=4, spread=1.0)
    assert len({tuple(sorted(a.choice.items())) for a in found}) == len(found) > 1
    chosen = hb.best(solved(), found, batches(), table(), samples=40)
    u = units.units(solved())
    measured = [hb.output_loss(merged(solved(), u, a.choice), batches(), samples=40) - table().base for a in found]
    assert chosen.measured == pytest.approx(min(measured), rel=1e-5, abs=1e-9)


def test_the_front_falls() -> None:
    found = hb.front(solved(), table(), by="bops", points=5)
    assert len(found) >= 3
    assert [a.costs["bops"] for a in found] == sorted(a.costs["bops"] for a in found)
    assert [a.loss for a in found] == sorted((a.loss for a in found), reverse=True)
    assert found[-1].loss == 0


def test_what_cannot_be_kept_names_what_can() -> None:
    costs = hb.costs(solved())
    least = min(costs.total(c)["logical_size"] for c in every_choice(solved(), FEW))
    with pytest.raises(UsageError, match=rf"least reachable is {least:.0f} bits.*logical-size=([\d.]+)%") as caught:
        hb.allocate(solved(), table(), hb.Budget(logical_size=0.01))
    share = str(caught.value).split("logical-size=")[2].split("%")[0]
    assert hb.allocate(solved(), table(), hb.Budget.parse(f"logical-size={share}%")).loss > 0
    with pytest.raises(UsageError, match=r"drop=0\.001"):
        hb.allocate(solved(), replace(table(), points=30.0), hb.Budget(drop=0.001))


@pytest.mark.parametrize("uniform", [True, False])
def test_the_selected_model_is_the_merged_one_and_is_proven(uniform: bool, tmp_path: Path) -> None:
    candidates = solved(uniform=uniform)
    found = hb.allocate(candidates, table(uniform=uniform), hb.Budget(bops=0.025 if uniform else 0.045))
    assert len(set(found.choice.values())) > 1
    m = hb.select(candidates, found)
    same = merged(candidates, units.units(candidates), found.choice)
    (x,) = batches(1)
    assert torch.equal(run(m, x, simulate(m))[0], run(same, x, simulate(same))[0])
    assert hb.export_onnx(m, tmp_path / "net.onnx").proven
    stored = onnx.load(tmp_path / "net.onnx").graph.initializer
    codes = {i.name: len(i.raw_data) or numpy_helper.to_array(i).nbytes for i in stored}
    gone = set(by_value(same.graph)) - set(by_value(m.graph))
    spare = sum(hb.costs(candidates).grids[c][found.choice[c]] for c in gone)
    assert sum(codes.values()) + spare == found.costs["size"]
    entries = {e.value: e for e in m.log if e.stage == "allocate"}
    assert entries["a"].figures["weights"] == found.choice["a.weight"]
    hb.save(m, tmp_path / "kept")
    again = hb.load(tmp_path / "kept")
    assert again.log == m.log, "figures are JSON values"
    assert torch.equal(run(again, x, simulate(again))[0], run(m, x, simulate(m))[0])
    assert entries[None].figures["loss"] == found.loss


@pytest.mark.parametrize(("narrow", "gone"), [(4, False), (8, True)])
def test_a_copy_of_the_same_width_goes(narrow: int, gone: bool) -> None:
    candidates = solved(uniform=False)
    u = units.units(candidates)
    assert u.copies
    (copy, source), *_ = u.copies.items()
    zero = hb.allocate(candidates, table(uniform=False), hb.Budget(bops=1.0))
    m = hb.select(candidates, replace(zero, choice={copy: narrow}))
    assert (copy not in by_value(m.graph)) == gone
    assert (copy not in m.plan) == gone
    readers = {n.meta["value"] for n in by_value(m.graph)[source].users}
    assert ("a" in readers) == gone
    assert copy in by_value(candidates[hb.bits(8, 8)].graph), "the candidates stay as they were"


def test_candidates_of_different_graphs_are_refused() -> None:
    mixed = {hb.bits(4, 4): solved(uniform=False)[hb.bits(4, 4)], hb.bits(8, 8): solved()[hb.bits(8, 8)]}
    with pytest.raises(UsageError, match="narrow=True"):
        hb.sensitivity(mixed, batches())
    other = solved()[hb.bits(4, 8)]
    moved = {**other.params, "a.weight": other.params["a.weight"] * 2}
    with pytest.raises(UsageError, match="float parameters"):
        hb.costs({**solved(), hb.bits(4, 8): replace(other, params=moved)})
    with pytest.raises(UsageError, match="no grids"):
        hb.costs({hb.bits(8, 8): network()})
    with pytest.raises(UsageError, match=r"hb\.bits"):
        hb.costs({(8, 8): solved()[hb.bits(8, 8)]})  # type: ignore[dict-item]


def test_units_that_are_fixed() -> None:
    found = hb.allocate(solved(), table(), hb.Budget(bops=0.03), fixed={"stem.*": 8, "last.*": 8})
    assert found.choice["stem.weight"] == found.choice["last.weight"] == 8
    with pytest.raises(UsageError, match="did you mean"):
        hb.allocate(solved(), table(), hb.Budget(bops=0.03), fixed={"stem.weigt": 8})
    with pytest.raises(UsageError, match="cannot be fixed at 5 bits"):
        hb.allocate(solved(), table(), hb.Budget(bops=0.03), fixed={"stem.weight": 5})


@pytest.mark.parametrize(
    ("text", "kind", "bound"),
    [
        ("size=14%", "size", lambda c: 0.14 * c.reference["size"]),
        ("size=0.14", "size", lambda c: 0.14 * c.reference["size"]),
        ("size=1.2kB", "size", lambda _: 1200),
        ("size=1KiB", "size", lambda _: 1024),
        ("logical-size=1kB", "logical_size", lambda _: 8000),
        ("bops=1.5G", "bops", lambda _: 1.5e9),
        ("bops=1e9", "bops", lambda _: 1e9),
    ],
)
def test_budgets_are_read(text: str, kind: str, bound: object) -> None:
    costs = hb.costs(solved())
    assert hb.Budget.parse(text).limits(costs)[kind] == pytest.approx(bound(costs))  # type: ignore[operator]


@pytest.mark.parametrize(
    "text", ["", "size", "size=", "weight=3", "size=-1", "size=1parsec", "size=0", "drop=1%", "size=1,size=2"]
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        hb.Budget.parse(text)


def test_budgets_that_nothing_was_measured_for() -> None:
    assert hb.Budget.parse("latency=4ms,drop=0.5").given == {"latency": "4ms", "drop": 0.5}
    with pytest.raises(UsageError, match="EngineLatency"):
        hb.allocate(solved(), table(), hb.Budget(latency="4ms"))
    with pytest.raises(UsageError, match="metric 'divergence'"):
        hb.allocate(solved(), replace(table(), metric="noise"), hb.Budget(drop=1))
    with pytest.raises(UsageError, match="at least one bound"):
        hb.Budget()


def test_latency_counts_and_what_is_not_faster_is_named() -> None:
    def latency(_: hb.QModel, layer: object, widths: hb.Bits | None) -> float:
        narrow = widths is not None and str(layer) == "conv2d_default_1" and widths.weights <= 4
        return 4e-3 if widths is None else 1e-3 if narrow else 2e-3

    costs = hb.costs(solved(), latency=latency)
    assert costs.reference["latency"] == pytest.approx(20e-3)
    slow = {layer for layer, _ in costs.not_faster()}
    fast = {r.layer for r in costs.rows} - slow
    least = (5 - len(fast) * 0.5) * 2e-3
    found = hb.allocate(solved(), table(), hb.Budget(latency=least / 20e-3 + 1e-9), costs=costs)
    assert found.costs["latency"] == pytest.approx(least)
    assert costs.to_dict()["not_faster"]


def test_the_engine_is_asked_once_for_each_container(tmp_path: Path) -> None:
    m = solved()[hb.bits(8, 8)]
    layer, timer = by_value(m.graph)["a"], hb.EngineLatency(rounds=3, cache=tmp_path)
    seconds = timer(m, layer, hb.bits(4, 8))
    assert 0 < seconds < 1
    assert timer(m, layer, hb.bits(8, 8)) == seconds
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"seconds": 7.0}')
    assert hb.EngineLatency(rounds=3, cache=tmp_path)(m, layer, hb.bits(2, 4)) == 7.0
    kept.write_text("damaged")
    assert hb.EngineLatency(rounds=3, cache=tmp_path)(m, layer, hb.bits(2, 4)) < 1


class Twice(nn.Module):
    """A layer that is called twice has one weight and reads two values."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.both(torch.relu(self.both(x)))))


def test_a_weight_of_two_layers_is_one_unit(tmp_path: Path) -> None:
    m = network(Twice)
    candidates = {}
    for b in WIDTHS:
        placed = hb.place(m, TARGET, weight_bits=b.weights, activation_bits=b.activations)
        candidates[b] = hb.calibrate(placed, batches())
    u = units.units(candidates)
    assert [r.weight for r in u.readers] == ["both.weight", "both.weight", "last.weight"]
    assert len({r.group for r in u.readers}) == 3
    losses, costs = hb.sensitivity(candidates, batches(), samples=16), hb.costs(candidates)
    choices = every_choice(candidates, {})
    for bound in (0.01, 0.03):
        found = hb.allocate(candidates, losses, hb.Budget(bops=bound))
        limit = bound * costs.reference["bops"]
        kept = [losses.predicted(c) for c in choices if costs.total(c)["bops"] <= limit]
        assert found.loss == pytest.approx(min(kept), rel=1e-9)
    assert hb.export_onnx(hb.select(candidates, found), tmp_path / "net.onnx").proven
