"""Ranges by their effect on the outputs: against brute force, what must stay, and who has the last word."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.affine import Grid, fake_quantize
from halfbyte.errors import DataError, UsageError
from halfbyte.formats import Format
from halfbyte.losses import noise_to_signal
from halfbyte.recipe import load_recipe
from halfbyte.run import run, simulate
from halfbyte.targets import GENERIC

MODULE = importlib.import_module("halfbyte.refine_ranges")  # in the package the function has the name


class Lopsided(nn.Module):
    """The hidden channel that fills the range hardly matters to the outputs; the small ones do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight[0] *= 12
            self.last.weight[:, 0] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


def data(count: int = 96, seed: int = 1) -> list[tuple[Tensor]]:
    return [(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)),)]


def calibrated(bits: int = 4) -> hb.QModel:
    m = hb.capture(Lopsided().eval(), (torch.randn(4, 6),))
    return hb.calibrate(hb.place(m, GENERIC, activation_bits=bits), data())


def hidden(m: hb.QModel) -> str:
    return next(n for n in MODULE._candidates(m) if "relu" in n)


def effect(m: hb.QModel, value: str, samples: list[tuple[Tensor]]) -> float:
    """What rounding one value alone does to the outputs."""
    tap = simulate(m, only=lambda n: n == value)
    pairs = [(run(m.as_float(), x)[0], run(replace(m, tuned={}), x, tap)[0]) for x in samples]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_range_follows_what_matters() -> None:
    m = calibrated()
    found = hb.refine_ranges(m, data())
    name, fresh = hidden(m), data(seed=2)
    assert found.grids[name].scale < 0.9 * m.grids[name].scale
    assert effect(found, name, fresh) < 0.8 * effect(m, name, fresh)
    assert any(e.value == name and "scale times" in e.message for e in found.log)


def test_chosen_factor_is_that_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network behind the value is linear, so that first order is all: trials on the outputs must agree."""
    monkeypatch.setattr(MODULE, "_ROUNDS", 1)
    m = calibrated()
    name = hidden(m)
    trials = [
        effect(replace(m, grids={**m.grids, name: replace(m.grids[name], scale=m.grids[name].scale * f)}), name, data())
        for f in MODULE.FACTORS
    ]
    many = [(torch.cat([data()[0][0]] * 8),)]  # directions are random, and twice as many for each copy
    found = hb.refine_ranges(m, many)
    ratio = float(found.grids[name].scale / m.grids[name].scale)
    assert ratio == pytest.approx(MODULE.FACTORS[trials.index(min(trials))])


def test_squares_are_sums_over_positions_of_error_times_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x, slopes = torch.randn(5, 3, 4, generator=generator), [torch.randn(5, 3, 4, generator=generator) for _ in range(2)]
    form = Format(4)
    grid = Grid(torch.tensor(0.3), torch.tensor(7), torch.tensor(form.lo), torch.tensor(form.hi))
    found = MODULE._squares(x, grid, form, slopes)
    for k, factor in enumerate(MODULE.FACTORS):
        error = fake_quantize(x, replace(grid, scale=grid.scale * factor)) - x
        each = torch.stack([sum((error[i] * s[i]).sum() ** 2 for s in slopes) for i in range(5)]).double()
        torch.testing.assert_close(found[:, k], torch.stack([each[0::2].sum(), each[1::2].sum()]), rtol=1e-5, atol=0)


def test_repeats() -> None:
    m = calibrated()
    a, b = (hb.refine_ranges(m, data(), seed=3) for _ in range(2))
    assert all(torch.equal(a.grids[n].scale, b.grids[n].scale) for n in a.grids)


def test_ends_and_fixed_values_keep_their_range() -> None:
    m = calibrated()
    ends = {str(n.target) for n in m.inputs} | {n for n in m.grids if n.startswith("last")}
    assert not ends & set(MODULE._candidates(m))
    found = hb.refine_ranges(m, data(), fixed={hidden(m)})
    assert found.grids == m.grids
    assert "left as they are" in found.log[-1].message


def test_held_out_samples_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    m, answers = calibrated(), iter([1.0, 2.0])
    monkeypatch.setattr(MODULE, "noise_to_signal", lambda *_: next(answers))
    found = hb.refine_ranges(m, data())
    assert found.grids == m.grids
    assert found.log[-1].message.startswith("undone")


@pytest.mark.parametrize(
    ("noise", "kept"), [([9, 3, 2, 4], 2), ([9, 1, 2, 4], 4), ([9, 10, 9, 8], 1), ([5, 6, 7, 8], 0)]
)
def test_those_that_promise_most_are_kept_if_all_do_worse(
    noise: list[float], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 4))
    m = hb.calibrate(hb.place(hb.capture(net.eval(), torch.randn(4, 6)), GENERIC, activation_bits=4), data())
    effects = {name: MODULE._Effect() for name in MODULE._candidates(m)}
    for gain, effect in enumerate(effects.values(), 1):
        effect.sums[:] = 9.0
        effect.sums[:, 2] -= gain
    answers = iter(noise)
    monkeypatch.setattr(MODULE, "_ROUNDS", 1)
    monkeypatch.setattr(MODULE, "_effects", lambda *_: effects)
    monkeypatch.setattr(MODULE, "noise_to_signal", lambda *_: next(answers))
    found = hb.refine_ranges(m, data())
    changed = [n for n in effects if not torch.equal(found.grids[n].scale, m.grids[n].scale)]
    assert changed == list(effects)[4 - kept :]
    told = found.log[-1]
    assert told.message.startswith(f"kept {kept} of 4 changes" if kept else "undone")
    assert told.figures == {"before": noise[0], "after": min(noise), "kept": kept > 0}
    assert {e.value for e in found.log if e.stage == "refine_ranges" and e.value} == set(changed)


@pytest.mark.parametrize(
    ("noise", "rounds"),
    [([9, 8.5], 1), ([0.1, 0.009], 1), ([9, 4, 4, 3.9], 2), ([9, 4, 4, 5], 2), ([9, 4, 4, 2, 2, 1], 3)],
)
def test_ranges_are_refined_again_where_that_brought_much(
    noise: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([*noise, None])
    monkeypatch.setattr(MODULE, "noise_to_signal", lambda *_: next(answers))
    effect = MODULE._Effect()
    effect.sums[:], effect.sums[:, 2] = 9.0, 1.0
    monkeypatch.setattr(MODULE, "_effects", lambda *_: {hidden(m): effect})
    m = calibrated()
    found = hb.refine_ranges(m, data())
    assert next(answers) is None
    scale = found.grids[hidden(m)].scale / m.grids[hidden(m)].scale
    kept = sum(after < before for before, after in zip(noise[::2], noise[1::2], strict=True))
    assert float(scale) == pytest.approx(MODULE.FACTORS[2] ** kept)
    assert len([e for e in found.log if e.message.startswith("kept")]) == kept
    assert rounds - kept in (0, 1)
    assert not any(e.message.startswith("undone") for e in found.log)


def test_only_running_values_are_judged() -> None:
    """The guard looks at these values alone, with the weights of the float network."""
    m = calibrated()
    alone = MODULE._alone(m, [hidden(m)])
    assert noise_to_signal(alone, data(), m.as_float()) > 0
    assert set(alone.grids) == {hidden(m)}
    assert not alone.tuned


def test_wider_values_can_be_left_alone() -> None:
    wide = calibrated(8)
    found = hb.refine_ranges(wide, data(), widest=7)
    assert found.grids == wide.grids
    assert "at most 7 bits" in found.log[-1].message


def test_what_is_missing_is_said() -> None:
    m = calibrated()
    with pytest.raises(UsageError, match="calibrate before"):
        hb.refine_ranges(m.as_float(), data())
    with pytest.raises(DataError, match="no data"):
        hb.refine_ranges(m, [])


def test_few_bits_do_it_by_themselves() -> None:
    assert load_recipe("low-bit").has("refine_ranges")
    net = Lopsided().eval()
    q = hb.quantize(net, data(256)[0][0], weight_bits=8, activation_bits=4, recipe="low-bit", target=GENERIC)
    assert any(e.stage == "refine_ranges" for e in q.log)


def test_a_rule_that_was_asked_for_has_the_last_word() -> None:
    net, x = Lopsided().eval(), data(256)[0][0]
    for rule in ("min-max", hb.MinMax()):
        q = hb.quantize(net, x, activation_range=rule, target=GENERIC)
        assert not any(e.stage == "refine_ranges" and "kept" in e.message for e in q.log)
        assert float(q.grids[hidden(q)].maximum) >= float(run(q.as_float(), (x,), stop=hidden(q))[0].max()) * 0.99


class Indices(Lopsided):
    """Also puts out what nobody can differentiate: the class, and scores cut off from the graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.argmax(1), y.cumsum(1).detach()


def test_outputs_that_are_no_numbers_do_not_count() -> None:
    q = hb.quantize(Indices().eval(), data(256)[0][0], target=GENERIC)
    entry = next(e for e in q.log if e.stage == "refine_ranges" and e.value is None)
    assert entry.message.startswith(("kept", "undone"))
    assert entry.figures["before"] > 0
