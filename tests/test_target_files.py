"""A device described in TOML: what it inherits, what it changes, what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
import tiny
from halfbyte.targets import ONNXRUNTIME, find


def written(folder: Path, text: str) -> str:
    (folder / "npu.toml").write_text(text)
    return str(folder / "npu.toml")


def test_a_file_inherits_and_changes(tmp_path: Path) -> None:
    text = (
        'base = "onnxruntime"\nper_channel = false\nwidths = [8, 4]\ninteger = ["conv", "linear", "clamp", "codes"]\n'
    )
    found = find(written(tmp_path, text), saturates=True)
    assert found == hb.Target(
        name="npu",
        engine="onnxruntime",
        integer=frozenset({"conv", "linear", "clamp", "codes"}),
        float_output=ONNXRUNTIME.float_output,
        per_channel=False,
        widths=(4, 8),
        narrow_products=True,
        asymmetric_weights=True,
    )
    assert not find(written(tmp_path, 'name = "other"'), saturates=False).narrow_products
    assert find(written(tmp_path, 'base = "openvino-vnni"'), saturates=True).engine == "openvino"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("per_chanel = true", "unknown key 'per_chanel'; did you mean 'per_channel'"),
        ('integer = ["convolution"]', "integer names 'convolution'; did you mean"),
        ('base = "onnxruntme"', "did you mean 'onnxruntime'"),
        ('base = "npu.toml"', "is not the name of a target"),
        ("per_channel = 1", "per_channel = 1 is not true or false"),
        ("widths = 8", "not a list of widths"),
        ("widths = [1, 8]", "1 bits are not supported"),
        ("widths = [", "not valid TOML"),
        ("engine = 3", "engine = 3 is not a text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(hb.UsageError) as caught:
        find(written(tmp_path, text), saturates=False)
    assert why in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(hb.UsageError, match="cannot be read"):
        find(str(tmp_path / "none.toml"), saturates=False)


def test_the_plan_obeys_the_file_and_the_engine_of_its_base_proves(tmp_path: Path) -> None:
    file = written(tmp_path, 'per_channel = false\ninteger = ["conv", "clamp", "codes"]\nfloat_output = []')
    out = tiny.quantized(tmp_path, "--target", file)
    import json

    described = json.loads((out / "summary.json").read_text())
    assert described["target"] == "npu" and described["parity"]["proven"] is True
    rows = {r["name"]: r for r in described["layers"]}
    assert rows["first"]["integer"] and not rows["last"]["integer"]
    assert "per tensor" in next(v["format"] for v in described["values"] if v["name"] == "first.weight")


class Tokens(nn.Module):
    """Codes that move in front of a float operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize("bits", ["W8A8", "W4A4"])
def test_running_values_with_sign_are_proven(tmp_path: Path, bits: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    file = written(tmp_path, "signed_activations = true\nper_channel = false")
    m = hb.quantize(hb.capture(Tokens().eval(), x[:2]), [x], target=file, bits=bits)
    assert all(f is None or f.signed for f in m.plan.values())
    hb.export(m, tmp_path / "out")
    assert hb.prove(tmp_path / "out").equal


def test_an_engine_that_nobody_has_is_refused(tmp_path: Path) -> None:
    data = tiny.array(tmp_path / "x.npy")
    options = ("--calibration", data, "-o", tmp_path / "out", "--target", written(tmp_path, 'engine = "npu"'))
    result = tiny.halfbyte("quantize", tiny.network(tmp_path, "pair"), *options)
    assert result.exit_code == 2 and "there is no engine 'npu'" in result.output
