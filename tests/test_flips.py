"""Decisions that noise turns over, estimated from pairs of margins and errors: right on average, surer than a count, and bounded."""

import pytest
import torch
from torch import Tensor

from halfbyte.flips import Decided, least_samples, points

CLASSES, NOISE = 20, 0.15


def scores(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores before and after, and labels: samples of which some are unclear, and noise."""
    g = torch.Generator().manual_seed(seed)
    wanted = torch.randn(count, CLASSES, generator=g)
    labels = torch.randint(CLASSES, (count,), generator=g)
    wanted[torch.arange(count), labels] += 6 * torch.rand(count, generator=g) + 1
    return wanted, wanted + NOISE * torch.randn(count, CLASSES, generator=g), labels


@pytest.fixture(scope="module")
def truth() -> tuple[float, float]:
    """Points of decisions that change, and of accuracy, on very many samples."""
    wanted, got, labels = scores(400_000, 0)
    before, after = wanted.argmax(1), got.argmax(1)
    right = (before == labels).double() - (after == labels).double()
    return 100 * float((before != after).double().mean()), 100 * float(right.mean())


@pytest.mark.parametrize("labelled", [False, True])
def test_right_on_average_and_surer_than_a_count(truth: tuple[float, float], labelled: bool) -> None:
    estimates, counts = [], []
    for seed in range(1, 121):
        wanted, got, labels = scores(200, seed)
        estimates.append(points(Decided.of(wanted, got, labels if labelled else None)).mean)
        before, after = wanted.argmax(1), got.argmax(1)
        changed = (before == labels).double() - (after == labels).double() if labelled else (before != after).double()
        counts.append(100 * float(changed.mean()))
    found, counted = torch.tensor(estimates), torch.tensor(counts)
    assert float(found.mean()) == pytest.approx(truth[labelled], abs=4 * float(found.std()) / 120**0.5 + 0.02)
    assert float(found.std()) < 0.8 * float(counted.std())


@pytest.mark.parametrize("labelled", [False, True])
def test_bounds_cover_as_often_as_they_say(truth: tuple[float, float], labelled: bool) -> None:
    below = 0
    for seed in range(1000, 1300):
        wanted, got, labels = scores(150, seed)
        found = points(Decided.of(wanted, got, labels if labelled else None))
        below += found.most(0.16) < truth[labelled]
        assert found.mean < found.most(0.16) < found.most(0.01)
    assert below / 300 < 0.16 + 0.05


def test_probabilities_are_judged_as_their_logits() -> None:
    wanted, got, _ = scores(400, 11)
    by_logits = points(Decided.of(wanted, got)).mean
    assert points(Decided.of(wanted.softmax(1), got.softmax(1))).mean == pytest.approx(by_logits, rel=1e-3)


def test_nothing_changes_where_there_is_no_noise() -> None:
    wanted, _, labels = scores(300, 5)
    for y in (None, labels):
        found = points(Decided.of(wanted, wanted, y))
        assert found.mean == 0.0
        assert 0 < found.most(0.16) < 0.5


def test_large_noise_is_chance() -> None:
    wanted, _, _ = scores(300, 6)
    got = 1e3 * torch.randn(300, CLASSES, generator=torch.Generator().manual_seed(1))
    assert points(Decided.of(wanted, got)).mean > 70


def test_portions_are_joined_and_many_samples_are_no_matter() -> None:
    wanted, got, labels = scores(1500, 7)
    whole = points(Decided.of(wanted, got, labels))
    parts = [Decided.of(a, b, y) for a, b, y in zip(*(t.split(400) for t in (wanted, got, labels)), strict=True)]
    joined = points(Decided.joined(parts))
    assert joined.mean == pytest.approx(whole.mean)
    assert len(joined.by_sample) == 1500 and len(joined.by_error) == 256


def test_as_many_samples_as_needed() -> None:
    for limit in (0.2, 0.5, 3.0):
        n = least_samples(limit, 0.16)
        few, enough = (points(Decided.of(*[torch.eye(2).repeat(count, 1)[:count]] * 2)) for count in (n - 2, n))
        assert enough.most(0.16) <= limit < few.most(0.16)
