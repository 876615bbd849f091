"""Outputs of every kind: indices, truth values, nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.losses import comparable, noise_to_signal
from halfbyte.model import value_name
from halfbyte.parity import same_decisions


class Labels(nn.Module):
    """A segmenter as it is deployed: it puts out the class of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1)

    def scores(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    def forward(self, x: Tensor) -> Any:
        return self.scores(x).argmax(1)


class Both(Labels):
    def forward(self, x: Tensor) -> Any:
        y = self.scores(x)
        return y, y.argmax(1)


def pictures() -> Tensor:
    return torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(2))


def network(kind: type[Labels]) -> hb.QModel:
    torch.manual_seed(0)
    return hb.capture(kind(), pictures()[:2])


WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "blocks": {"bits": "W4A4", "rounding": "blocks", "iterations": 10},
    "calibtip-light": {"bits": "W4A4", "recipe": "calibtip-light"},
    "calibtip-advanced": {"bits": "W4A4", "recipe": "calibtip-advanced"},
    "omse": {"bits": "W4A4", "recipe": "omse"},
    "budget": {"weight_bits": (4, 8), "budget": "size=90%"},
}


@pytest.mark.parametrize("kind", [Labels, Both])
@pytest.mark.parametrize("way", WAYS)
def test_indices_are_judged_by_what_they_are_picked_from(kind: type[Labels], way: str, tmp_path: Path) -> None:
    m = hb.quantize(network(kind), pictures(), **WAYS[way])
    assert m.outputs == network(kind).outputs
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))
    tuned = [e for e in m.log if e.stage in ("blocks", "tune") and "before" in e.figures]
    assert all(0 < e.figures["before"] < 1 for e in tuned)
    assert tuned or way in ("8 bits", "calibtip-light", "budget")


def test_the_model_to_compare() -> None:
    m, both = network(Labels), network(Both)
    assert comparable(both) is both
    assert comparable(m).outputs == ("last",)
    assert torch.equal(hb.run(comparable(m), (pictures(),))[0], hb.run(both, (pictures(),))[0])
    assert "argmax" in {value_name(n).split(":")[-1] for n in m.graph.nodes if "value" in n.meta}  # as it was
    q = hb.quantize(m, pictures(), bits="W4A4")
    assert noise_to_signal(q, [(pictures(),)], m) == pytest.approx(
        noise_to_signal(comparable(q), [(pictures(),)], comparable(m))
    )


def test_outputs_of_nothing_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.layer, self.kind = nn.Linear(4, 2), kind

        def forward(self, x: Tensor) -> Any:
            return self.kind(self.layer(x))

    x = torch.randn(8, 4)
    m = hb.capture(Net(lambda y: {"logits": y, "loss": None, "top": y.argmax(1)}), x)
    assert m.outputs == ("logits", "top")
    assert hb.capture(Net(lambda y: (None, y)), x).outputs == ("output_1",)
    with pytest.raises(hb.UsageError, match="not a tensor"):
        hb.capture(Net(lambda y: None), x)
    with pytest.raises(hb.UsageError, match="not a tensor"):
        hb.capture(Net(lambda y: (y, 3)), x)


def test_truth_values(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    class Above(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) > 0

    m = hb.quantize(Above(), torch.randn(32, 4))
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))
    yes, no = torch.tensor([[True, False], [True, True]]), torch.tensor([[True, False], [True, False]])
    assert same_decisions(yes, no) == 1
    assert same_decisions(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[2, 1], [0, 2]])) == 1


class Steps(nn.Module):
    """Operations whose exported form, or whose gradients, are special."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.last, self.way = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), way

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.layer(x))
        if self.way == "buckets":  # counted by a maximum of one operand
            return self.last(y * torch.bucketize(x.mean(1, keepdim=True)[..., 1:-1, 1:-1], torch.tensor([0.0, 0.5])))
        return self.last(y) // 0.25 if self.way == "floors" else self.last(y).mean()


@pytest.mark.parametrize("way", ["buckets", "floors", "one number"])
@pytest.mark.parametrize("bits", ["W8A8", "W4A4"])
def test_networks_of_special_operations_are_proven(way: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = hb.quantize(Steps(way), pictures(), bits=bits)
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


def test_what_has_no_gradients_is_not_learned() -> None:
    with pytest.raises(hb.UsageError, match=r"no gradients here .*floor_divide.*choose what needs none"):
        hb.quantize(Steps("floors"), pictures(), bits="W4A4", rounding="blocks", iterations=5)


class Losses(Labels):
    """A loss of all samples beside, or in place of, what it is made of."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, x: Tensor) -> Any:
        y = self.scores(x)
        return y.square().mean() if self.alone else {"loss": y.square().mean(), "scores": y}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("way", ["blocks", "calibtip-advanced", "budget"])
def test_numbers_that_all_samples_share(alone: bool, way: str, tmp_path: Path) -> None:
    m = hb.quantize(hb.capture(Losses(alone), pictures()[:2]), pictures(), **WAYS[way])
    assert m.outputs == (("output",) if alone else ("loss", "scores"))
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))
    assert alone or comparable(m).outputs == ("last",)
    assert [len(y) for y in hb.run(comparable(m), (pictures(),))] == [40]


def test_nothing_to_learn_is_no_error() -> None:
    """The only layer keeps its 8 bits, is used twice, and float operations read it."""

    class Roots(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs().sqrt() * super().forward(x).sign()

    m = hb.quantize(Roots(3, 4, 3, bias=False), pictures(), bits="W4A4", rounding="blocks", iterations=4)
    assert torch.isfinite(hb.predict(m, pictures())[0]).all()


def test_diagnosis_of_indices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Labels()
    m = hb.quantize(net, pictures(), bits="W2A8", rounding="nearest")
    hb.export_onnx(m, tmp_path / "net.onnx")
    steps = {s.name: s for s in hb.diagnose(m, pictures(), file=tmp_path / "net.onnx", network=net).steps}
    assert steps["the module itself"].verdict == steps["the file"].verdict == "passed"  # by the outputs as they are
    assert steps["all quantized"].measured == pytest.approx(
        noise_to_signal(m, [(pictures()[:32],)], m.as_float()), rel=0.05
    )
