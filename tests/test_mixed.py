"""Widths chosen on the way through a recipe, and the front of sizes and losses."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import FormatError, UsageError
from halfbyte.formats import parse_widths
from halfbyte.mixed import Point, Tradeoff, widths
from halfbyte.recipe import load_recipe
from halfbyte.sensitivity import output_loss
from halfbyte.tradeoff import page, write
from test_allocate import batches, network
from tiny import array, halfbyte
from tiny import network as written


@functools.cache
def mixed(**options: Any) -> hb.QModel:
    return hb.quantize(network(), batches(), weight_bits=(2, 4, 8), **options)


def stages(m: hb.QModel) -> list[str]:
    return [e.stage for e in m.log]


def summary(m: hb.QModel) -> dict[str, Any]:
    return dict(next(e.figures for e in m.log if e.stage == "allocate" and e.value is None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("W4A8", ((4,), (8,))), ("w8,2,4A8", ((2, 4, 8), (8,))), (" W4,4 A8, 4", ((4,), (4, 8)))],
)
def test_texts_of_widths(text: str, expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert parse_widths(text) == expected


@pytest.mark.parametrize("text", ["W4", "4,8", "W,4A8", "W1A8", "W4A17", "W4-8A8", ""])
def test_texts_of_no_widths(text: str) -> None:
    with pytest.raises(FormatError):
        parse_widths(text)


def test_pairs_of_widths() -> None:
    found = widths([8, 4, 4], 8)
    assert found.several
    assert found.pairs == [hb.bits(4, 8), hb.bits(8, 8)]
    assert not widths(4, [8]).several
    with pytest.raises(UsageError, match="at least one"):
        widths([], 8)


def test_budget_holds_and_the_file_is_proven(tmp_path: Path) -> None:
    m = mixed(budget="logical-size=17%", uniform=True)
    chosen = summary(m)
    assert chosen["shares"]["logical_size"] <= 0.17
    assert len({form.bits for n, form in m.plan.items() if form is not None and n.endswith("weight")}) > 1
    assert stages(m)[::-1].index("reconstruct") < stages(m)[::-1].index("allocate")
    parity = hb.export_onnx(m, tmp_path / "net.onnx")
    assert "proven equal" in str(parity)


def test_no_worse_than_the_uniform_network_that_keeps_the_budget() -> None:
    """Measured on the samples that decide: at the size of W4A8 the choice loses at most what W4A8 does."""
    options: Any = {"recipe": nearest(), "uniform": True}
    (four,) = [p for p in front().points if p.label == "W4A8"]
    m = hb.quantize(
        network(),
        batches(),
        weight_bits=(2, 4, 8),
        budget=hb.Budget(logical_size=four.shares["logical_size"]),
        **options,
    )
    four_alone = hb.quantize(network(), batches(), weight_bits=4, **options)
    assert summary(m)["shares"]["logical_size"] <= four.shares["logical_size"]
    decides = [tuple(t[:32] for t in batches()[0])]
    assert output_loss(m, decides, metric="outputs") <= 1.05 * output_loss(four_alone, decides, metric="outputs")


def nearest() -> Any:
    return load_recipe("low-bit").changed("reconstruct", method="nearest")


def test_activations_are_chosen_too() -> None:
    m = hb.quantize(
        network(), batches(), weight_bits=(4, 8), activation_bits=(4, 8), budget="bops=5%", recipe=nearest()
    )
    assert summary(m)["shares"]["bops"] <= 0.05
    hb.predict(m, batches()[0])


@pytest.mark.parametrize("recipe", ["calibtip-light", "calibtip-advanced", "omse"])
def test_recipes_with_one_width_and_with_several(recipe: str) -> None:
    one = hb.quantize(network(), batches(), recipe=recipe, weight_bits=4, activation_bits=4)
    assert "allocate" not in stages(one)
    several = hb.quantize(network(), batches(), recipe=recipe, weight_bits=(4, 8), activation_bits=8, budget="size=40%")
    assert summary(several)["shares"]["size"] <= 0.4


def test_same_seed_same_choice() -> None:
    a, b = (hb.quantize(network(), batches(), weight_bits=(2, 4), budget="logical-size=20%") for _ in range(2))
    assert summary(a)["choice"] == summary(b)["choice"]
    for name, t in a.tuned.items():
        assert torch.equal(t, b.tuned[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": (4, 8)}, "needs a bound"),
        ({"weight_bits": 4, "budget": "size=14%"}, "give several"),
        ({"weight_bits": (4, 8), "budget": "size=0.1%"}, "least reachable"),
        ({"weight_bits": (4, 8), "budget": "weight=3"}, "weight"),
    ],
)
def test_what_contradicts_itself(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hb.quantize(network(), batches(), **options)


def test_choice_needs_data() -> None:
    with pytest.raises(UsageError, match="--calibration"):
        hb.quantize(network(), None, weight_bits=(4, 8), budget="size=50%", recipe="dfq")


@functools.cache
def front() -> Tradeoff:
    return hb.tradeoff(network(), batches(), weight_bits=(2, 4, 8), points=5, uniform=True, name="<net>")


def test_front_goes_from_the_least_to_the_widest() -> None:
    found = front()
    uniform = {p.label: p for p in found.points if p.label}
    assert set(uniform) == {"W2A8", "W4A8", "W8A8"}
    own = [p for p in found.points if not p.label]
    sizes = [p.costs["logical_size"] for p in found.points]
    assert sizes == sorted(sizes)
    for i, p in enumerate(found.points):
        if not p.label:
            assert all(p.loss < cheaper.loss for cheaper in found.points[:i])
    predicted = [p.predicted for p in own]
    assert predicted == sorted(predicted, reverse=True)  # type: ignore[type-var]
    assert all(set(p.weights) == set(own[0].weights) and not p.activations for p in found.points)


def test_front_as_table_and_page(tmp_path: Path) -> None:
    found = front()
    text = repr(found)
    assert len(text.splitlines()) == 1 + len(found.points)
    write(found, tmp_path / "t")
    assert json.loads((tmp_path / "t" / "tradeoff.json").read_text())["points"][0]["costs"]["size"] > 0
    text = (tmp_path / "t" / "tradeoff.html").read_text()
    assert "&lt;net&gt;" in text and "<net>" not in text
    assert text.count("<circle") == sum(not p.label for p in found.points)
    assert text.count('class="uniform" x=') == 3
    assert "stem.weight: " in text


def test_page_of_one_point() -> None:
    point = Point(
        "W4A8", {"size": 10.0, "logical_size": 80.0}, {"size": 0.1, "logical_size": 0.1}, 0.0, None, {"a": 4}, {}
    )
    assert "W4A8" in page(Tradeoff("n", "outputs", (point,)))


def test_front_needs_several_widths() -> None:
    with pytest.raises(UsageError, match="several"):
        hb.tradeoff(network(), batches(), weight_bits=(4,))


def test_commands(tmp_path: Path) -> None:
    net, data = written(tmp_path, "pair"), array(tmp_path / "x.npy")
    common = (net, "--calibration", data, "--threads", 1)
    result = halfbyte(
        "quantize",
        *common,
        "-o",
        tmp_path / "out",
        "--weight-bits",
        "2,4,8",
        "--budget",
        "logical-size=30%",
        "--uniform",
    )
    assert result.exit_code == 0, result.output
    assert "so that it loses least under logical-size=30%" in result.output
    described = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert described["configuration"]["bits"] == "W2,4,8A8"
    result = halfbyte("tradeoff", *common, "-o", tmp_path / "t", "--weight-bits", "4,8", "--points", 2, "--uniform")
    assert result.exit_code == 0, result.output
    assert "W4A8" in result.output
    assert (tmp_path / "t" / "tradeoff.html").exists()
    for wrong, message in (
        (("--weight-bits", "4,8"), "--budget"),
        (("--budget", "size=10%"), "--weight-bits"),
        (("--weight-bits", "4;8", "--budget", "size=10%"), "W2,4,8A8"),
    ):
        result = halfbyte("quantize", *common, "-o", tmp_path / "no", *wrong)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "no").exists()


def test_latency_budgets_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    m = hb.quantize(network(), batches(), weight_bits=(4, 8), budget="latency=10s", recipe=nearest())
    assert summary(m)["costs"]["latency"] > 0
