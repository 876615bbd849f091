"""What channels look like: ends by what cutting there does to the outputs, against trials."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import channels, effects
from halfbyte.channels import Seen, clipped, measured
from halfbyte.run import run, simulate
from halfbyte.targets import GENERIC

BITS = 2


class Open(nn.Module):
    """The hidden channels are the inputs; a linear layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(8))
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


def data(count: int = 2048, seed: int = 1) -> list[tuple[Tensor]]:
    """Eight channels from 0 to 1, the first with a long tail, the others even."""
    x = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = -0.1 * x[:, 0].clamp(min=1e-4).log()
    return [(x,)]


def captured() -> tuple[hb.QModel, str]:
    m = hb.capture(Open().eval(), data()[0][0][:2])
    return m, "relu"


def ends(m: hb.QModel, name: str, samples: list[tuple[Tensor]]) -> Seen:
    return clipped(m, samples, measured(m, samples, {name: 1}), {name: 1}, BITS)[name]


def test_moments_are_those_of_the_samples() -> None:
    m, name = captured()
    (x,) = data()[0]
    seen = measured(m, [(x[:100],), (x[100:],)], {name: 1})[name]
    torch.testing.assert_close(seen.mean, x.mean(0))
    torch.testing.assert_close(seen.power, x.square().mean(0))
    torch.testing.assert_close(seen.high, x.amax(0))
    assert seen.active.tolist() == [1.0] * 8
    assert not seen.low.any()


def test_a_long_tail_is_cut_off_where_that_disturbs_the_outputs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "_JUDGES", 2048)
    m, name = captured()
    seen = ends(m, name, data())
    assert float(seen.high[0]) < 0.7 * float(data()[0][0][:, 0].max())
    assert float(seen.high[1:].min()) > 0.75


def test_chosen_ends_are_those_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network behind the value is linear: what first order says is all there is."""
    monkeypatch.setattr(effects, "_JUDGES", 2048)
    m, name = captured()
    (x,) = data()[0]
    wanted = run(m, (x,))[0]
    trials = []
    for clip in channels._CLIPS:
        step = x[:, 0].max() * clip / (2**BITS - 1)
        cut = x.clone()
        cut[:, 0] = (x[:, 0] / step).round().clamp(0, 2**BITS - 1) * step
        trials.append(float((run(m, (cut,))[0] - wanted).square().sum()))
    best = channels._CLIPS[trials.index(min(trials))] * float(x[:, 0].max())
    assert float(ends(m, name, data()).high[0]) == pytest.approx(best, rel=1e-5)


def test_no_channel_is_taken_for_much_smaller_than_all_others() -> None:
    m, name = captured()
    (x,) = data()[0]
    x[:, 3] *= 1e-4
    seen = ends(m, name, [(x,)])
    assert float(seen.high[3]) == pytest.approx(1 / 16, rel=0.3)


def test_few_bits_use_the_grid_for_what_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equalized by these ends, the channel with the tail disturbs the outputs less than equalized by its largest value."""
    monkeypatch.setattr(effects, "_JUDGES", 2048)
    net, (x,) = Open().eval(), data()[0]
    with torch.no_grad():
        net.last.weight[:, 0] *= 20
    m = hb.capture(net, x[:2])

    def error() -> float:
        q = hb.equalize(m, [(x,)], per_channel=True, weight_bits=8, activation_bits=BITS)
        torch.testing.assert_close(run(q, (x,))[0], run(m, (x,))[0], rtol=1e-4, atol=1e-5)
        placed = hb.calibrate(hb.place(q, GENERIC, activation_bits=BITS), [(x,)])
        tap = simulate(placed, only=lambda n: n == "relu")
        return float((run(replace(placed, tuned={}), (x,), tap)[0] - run(m, (x,))[0]).square().mean())

    found = error()
    monkeypatch.setattr(channels, "_CLIPS", (1.0,))
    assert found < 0.9 * error()
