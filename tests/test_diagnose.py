"""Faults planted into trained networks, each named first; healthy networks; what cannot be diagnosed; the figures behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import wilcoxon
from torch import nn
from torch.utils.data import TensorDataset

import halfbyte as hb
from halfbyte.diagnose import diagnose
from halfbyte.errors import DataError, UsageError
from halfbyte.matching import match, signed_rank
from halfbyte.probes import Bench, bench, each_alone, each_left_out, quantizers
from halfbyte.run import simulate
from halfbyte.targets import ONNXRUNTIME_AVX2
from planted import FAULTS, Subject, float_layer, ranged, wide
from tiny import array, halfbyte, quantized
from trained import NETWORKS, pixels, prepared, trained

SUBJECTS = list(NETWORKS)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    nets = trained(request.param), trained(request.param, tracked=False)
    return Subject(*nets, prepared, pixels(128, 3)[0], pixels(64, 4), tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    nets = trained("plain"), trained("plain", tracked=False)
    return Subject(*nets, prepared, pixels(128, 3)[0], pixels(64, 4), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named_first(subject: Subject, fault: str) -> None:
    plant, expected = FAULTS[fault]
    m, data, file = plant(subject)
    d = diagnose(m, data, file=file, repairs=False)
    assert d.cause.name == expected, d
    assert d.cause.command
    assert d.cause.evidence
    assert not [s for s in d.steps if s.name.startswith("rule ")], "a step of this name says that a rule broke"
    assert json.loads(json.dumps(d.to_dict()))["cause"]["name"] == expected


def test_healthy_network(subject: Subject) -> None:
    m = subject.quantized()
    d = diagnose(m, subject.data, network=subject.net)
    assert d.cause.name == "nothing found", d
    assert {s.verdict for s in d.steps} == {"passed", "not run"}
    assert d.labelled
    assert diagnose(m).cause.name == "nothing found"


def test_too_few_bits_and_the_repairs(subject: Subject) -> None:
    m = subject.quantized(weight_bits=2, recipe="default", uniform=True)
    d = diagnose(m, subject.data)
    assert d.cause.name == "too few bits", d
    assert d.repairs
    best = d.repairs[0]
    assert best.after is not None and best.after < best.before
    assert "cause" in str(d) and "next" in repr(d)
    assert "<td>too few bits</td>" in d._repr_html_()
    assert d.channels and len(d.channels[0].low) == len(d.channels[0].high)


def test_module_in_train_mode(plain: Subject) -> None:
    net = NETWORKS["plain"]()
    net.load_state_dict(plain.net.state_dict())
    net.train()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    d = diagnose(plain.quantized(), plain.data, network=net)
    assert d.cause.name == "train-mode batch norm"
    assert net.training
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_another_module_is_told(plain: Subject) -> None:
    torch.manual_seed(5)
    d = diagnose(plain.quantized(), plain.data, network=NETWORKS["plain"]().eval())
    assert d.cause.name == "a transform changed the network"


def test_alone_and_left_out_are_what_whole_runs_give(plain: Subject) -> None:
    """The shortcut over frontiers against full runs."""
    m = plain.quantized(weight_bits=4, recipe="default")
    m = replace(m, tuned={})
    x = plain.samples[:16]
    b = bench(m, [((x[:8],), None), ((x[8:],), None)])
    alone, left = each_alone(m, b), each_left_out(m, b, quantizers(m))
    wanted = hb.run(m.as_float(), (x,))[0]
    signal = float((wanted - wanted.mean()).square().sum())
    for root, group in quantizers(m).items():
        for found, on in ((alone, set(group)), (left, {*m.grids, *m.ties} - set(group))):
            (got,) = hb.run(m, (x,), simulate(m, only=on.__contains__))
            assert found[root] == pytest.approx(float((got - wanted).square().sum()) / signal, rel=0.05, abs=1e-7)
    assert list(alone.values()) == sorted(alone.values(), reverse=True)


def test_what_cannot_be_diagnosed(plain: Subject) -> None:
    m = plain.quantized()
    with pytest.raises(UsageError, match="no grids"):
        diagnose(m.as_float())
    with pytest.raises(UsageError, match="no samples"):
        diagnose(replace(m, samples=()))
    with pytest.raises(DataError, match="gives no batches"):
        diagnose(m, [])
    with pytest.raises(DataError, match=r"batch 0 of the data has shape \[2, 5, 16, 16\]"):
        diagnose(m, [torch.zeros(2, 5, 16, 16)])
    with pytest.raises(DataError, match="3 tensors but the network takes 1"):
        diagnose(m, [(plain.samples, plain.samples, plain.samples)])


def test_data_of_every_form_are_the_same_samples(plain: Subject) -> None:
    m, x = plain.quantized(), plain.samples[:8]
    y = hb.predict(m.as_float(), (x,))[0].argmax(1)
    sources = [x, [x], iter(x.split(4)), [(x, y)], [((x,), y)], TensorDataset(x, y), {"x": x, "label": y}]
    found = [diagnose(m, source, samples=8, repairs=False) for source in sources]
    assert [d.samples for d in found] == [8] * len(sources)
    assert [d.labelled for d in found] == [False] * 3 + [True] * 4
    assert all(set(d.quantizers) == set(found[0].quantizers) for d in found[1:])


def test_a_check_that_fails_says_why(plain: Subject, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"nothing")

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("lost")

    d = diagnose(plain.quantized(), plain.data, file=tmp_path / "net.onnx", network=Broken())
    assert d.cause.name == "a file that differs from the simulation"
    assert any(s.verdict == "not run" and "KeyError" in s.detail for s in d.steps)


def test_network_without_batch_norms_or_classes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(8, 3, 10, 10)
    m = hb.quantize(hb.capture(net, x), [x], target=ONNXRUNTIME_AVX2)
    d = diagnose(m, [x])
    assert d.cause.name == "nothing found"
    assert any("no batch norm" in s.detail for s in d.steps)


def test_signed_rank_is_wilcoxons() -> None:
    g = torch.Generator().manual_seed(0)
    for count in (5, 16, 40):
        change = torch.randn(count, generator=g, dtype=torch.float64) + 0.3
        wanted = wilcoxon(change.numpy(), method="approx", alternative="greater").zstatistic
        assert signed_rank(change) == pytest.approx(float(wanted))
    assert signed_rank(torch.zeros(4)) == 0


def test_order_of_colours_shows_without_moments_or_labels(subject: Subject) -> None:
    """Colours that are swapped after mean and deviation were made equal leave every channel's statistics as they are."""
    m = replace(hb.fold_batchnorm(subject.capture()), moments={})
    x = subject.samples
    alike = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    told = match(m, (alike.flip(1),))
    assert told is not None and told.off and told.options == "--color bgr"
    assert match(m, (alike,)) is None


def test_usual_scalings_are_told_apart() -> None:
    """Of the four ways to give pixels, the one that was taken and the one that the first batch norm remembers."""
    statistics = {"0..255": (0.0, 1.0), "0..1": (0.0, 255.0), "-1..1": (127.5, 127.5), "ImageNet": (
        torch.tensor((123.675, 116.28, 103.53)).view(1, 3, 1, 1), torch.tensor((58.395, 57.12, 57.375)).view(1, 3, 1, 1))}  # fmt: skip
    raw = pixels(128, 3)[0]
    raw = (raw - raw.amin()) / (raw.amax() - raw.amin()) * 255
    torch.manual_seed(0)
    for expected, (mean, std) in statistics.items():
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 4, 3))
        net((raw - mean) / std)  # in train mode: the batch norm remembers
        m = hb.fold_batchnorm(hb.capture(net.eval(), raw[:2]))
        for given, (other_mean, other_std) in statistics.items():
            told = match(m, (((raw - other_mean) / other_std),))
            assert told is not None
            assert told.repairable == (given != expected), (given, expected, told)
            if given != expected:
                assert told.exact and f"as {given}" in told.repair.replace("those of ImageNet", "ImageNet"), told
                assert f"where {expected}" in told.repair.replace("those of ImageNet", "ImageNet"), told


def test_where_nothing_is_left_of_the_signal_a_cause_is_judged_alone(subject: Subject) -> None:
    """Ranges a tenth as wide somewhere, and two bits for the weights besides: taking one away alone helps little."""
    m, data, _ = FAULTS["narrow ranges"][0](subject)
    ruined = replace(m, grids=dict(m.grids))
    for v, grid in m.grids.items():
        if v in m.params:
            ruined.grids[v] = replace(grid, scale=grid.scale * 60)  # type: ignore[index]
    d = diagnose(ruined, data, repairs=False)
    assert {"too wide ranges", "too narrow ranges"} <= {c.name for c in d.causes}, d


def test_sums_that_a_wrong_range_makes_large_are_not_the_cause(plain: Subject) -> None:
    m = ranged(plain.quantized(), 1e-6)
    d = diagnose(m, plain.data, repairs=False)
    assert d.cause.name == "too narrow ranges", d


def test_what_chance_explains_is_not_lost() -> None:
    """Sixteen samples of which two turn wrong say little; ninety of which a quarter do say enough; even odds cost nothing."""

    def sure(samples: int, wrong: int, labelled: bool, margin: float = 9.0) -> tuple[float, float]:
        wanted = torch.zeros(samples, 4)
        wanted[:, 1] = margin
        got = wanted.clone()
        got[:wrong, 2] = 2 * margin
        y = torch.ones(samples, dtype=torch.int64) if labelled else None
        tally = Bench([((torch.zeros(samples, 1),), y)], [(wanted,)]).tally()
        tally.add((got,))
        score = tally.score
        assert score.lost is not None and score.sure is not None and score.sure < score.lost
        return score.lost, score.sure

    for labelled in (True, False):
        assert sure(16, 2, labelled)[0] == pytest.approx(2 / 16, rel=1e-2)
        assert sure(16, 2, labelled)[1] < 0.01
        assert sure(90, 23, labelled)[1] > 0.1
        assert sure(1, 1, labelled)[1] < 0.01
    assert sure(90, 23, labelled=False, margin=0.01)[0] < 0.01


def test_structural_float_operations_are_told_behind_nothing_found() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 10, 10)
    d = diagnose(hb.quantize(hb.capture(net, x), [x], target=ONNXRUNTIME_AVX2), [x])
    assert [c.name for c in d.causes] == ["nothing found", "an operation left in float"]


def test_biased_error_without_biases() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
    ).eval()
    x = torch.randn(16, 3, 12, 12)
    m = hb.quantize(hb.capture(net, x), [x], target=ONNXRUNTIME_AVX2, weight_bits=5, uniform=True, recipe="default")
    grid = m.grids["2.weight"]
    cut = m.params["2.weight"] - 0.499 * grid.scale.reshape(-1, 1, 1, 1)
    m = replace(m, tuned={k: t for k, t in m.tuned.items() if not k.startswith("2.")} | {"2.weight": cut})
    d = diagnose(m, [x], repairs=False)
    assert d.cause.name == "biased error of layers", d
    assert d.cause.values[0] == "2"


def test_command(tmp_path: Path) -> None:
    out = quantized(tmp_path)
    result = halfbyte("diagnose", out, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    described = json.loads((out / "summary.json").read_text())
    assert described["diagnosis"]["cause"] == found["cause"]
    assert (out / "report.html").read_text().count("Diagnosis") >= 1
    data = array(tmp_path / "other.npy")
    text = halfbyte("diagnose", out, "--data", data, "--threads", 1).output
    assert "cause " in text
    assert text.rstrip().splitlines()[-1].startswith("next ")
    assert halfbyte("diagnose", tmp_path).exit_code == 2
    (out / "checkpoint" / "graph.json").unlink()
    result = halfbyte("diagnose", out)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_suggested_command_builds_on_the_one_that_made_it(plain: Subject) -> None:
    command = (
        "halfbyte quantize net.py:build --calibration photos/ --activation-range min-max --bits W8A8 -o out --overwrite"
    )
    d = diagnose(wide(plain)[0], repairs=False, command=command)
    assert d.cause.command == (
        "halfbyte quantize net.py:build --calibration photos/ --bits W8A8 --activation-range mse --weight-range mse -o out-2"
    )
    assert "benchmark out " in diagnose(float_layer(plain)[0], repairs=False, command=command).cause.command
