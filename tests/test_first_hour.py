"""A stranger's first hour on the command line: each likely mistake ends in one sentence that says what to do, and in no file."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfbyte.loading import load_callable
from tiny import array, files, halfbyte, pictures

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.first(x))).mean((2, 3))))


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


EXAMPLE = torch.zeros(1, 3, 8, 8)
build = lambda: Net().eval()
example = lambda: (build(), EXAMPLE)
training = lambda: (Net().train(), EXAMPLE)
state = lambda: Net().state_dict()
ready = build()
other_channels = lambda: (build(), torch.zeros(1, 1, 8, 8))
pixels = lambda: (build(), EXAMPLE.byte())
shape = lambda: (build(), (1, 3, 8, 8))
branching = lambda: (Branching().eval(), EXAMPLE)
recurrent = lambda: (Recurrent().eval(), torch.zeros(1, 5, 8))
activations = lambda: (nn.Tanh(), EXAMPLE)


def wide(width):
    return Net(width)


def forgotten():
    Net()


def diverged():
    net = build()
    net.head.weight.data[0, 0] = float("nan")
    return net, EXAMPLE
"""

QUANTIZE = "quantize net.py:example --calibration x.npy"
# what is typed, without -o -> what the answer has to say: what was wrong and where, and what to do
MISTAKES = {
    # the network
    "quantize nett.py:build": ("no file nett.py", "write 'path/file.py:function'"),
    "quantize net.py": ("'net.py' names no function", "write 'path/file.py:function'"),
    "quantize net.py:bild": ("net.py has no 'bild'", "near are build"),
    "quantize broken.py:build": ("broken.py cannot be imported: SyntaxError", "line 1"),
    "quantize net.py:wide": ("missing a required argument: 'width'", "name a function that needs no arguments"),
    "quantize net.py:forgotten": ("returned NoneType", "without 'return'"),
    "quantize net.py:state": ("returned OrderedDict, not a torch.nn.Module", "as --checkpoint"),
    "quantize net.pt --calibration x.npy": ("'net.pt' holds weights", "these as --checkpoint"),
    "quantize net.py:build": ("brings no example inputs", "return (module, example inputs), or give --size"),
    "quantize net.py:shape": ("must be tensors", "such as torch.zeros"),
    "quantize net.py:other_channels": ("does not run on an example of shape [1, 1, 8, 8]", "give an example as"),
    "quantize net.py:pixels": ("of uint8", "give an example as the network takes it"),
    "quantize net.py:branching": ("torch.export cannot capture Branching", "torch.where in place of an if"),
    "quantize net.py:diverged": ("'head.weight' holds NaN", "checkpoint is damaged or training diverged"),
    "quantize net.py:recurrent": ("range of 1 values is unknown", "give --calibration"),
    "quantize net.py:activations": ("nothing in this network can be quantized", "tanh: computed in float"),
    f"{QUANTIZE} --checkpoint wide.pt": ("'first.weight' has shape [16, 3, 3, 3] instead of [8, 3, 3, 3]", "wide.pt"),
    f"{QUANTIZE} --checkpoint half.pt": ("'half.pt' cannot be read", "save or copy it again"),
    # the data
    "quantize net.py:example --calibration fotos": ("no file or folder fotos", "give a folder of pictures"),
    "quantize net.py:example --calibration empty": ("empty holds no files", "give a folder with"),
    "quantize net.py:example --calibration texts": ("1 files but no picture", "give a folder with"),
    "quantize net.py:example --calibration photos": ("pictures, which need a preprocessing", "set --size"),
    "quantize net.py:example --calibration photos --size 9": ("the network takes [batch, 3, 8, 8]", "set --size 8"),
    "quantize net.py:example --calibration damaged --size 8": ("damaged/3.png cannot be decoded", "replace or remove it"),
    "quantize net.py:example --calibration photos --size 8 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225": (
        "are for pixels of 0..1", "multiply both by 255 (mean 123.675,116.28,103.53 and std 58.395,57.12,57.375)"),
    "quantize net.py:example --calibration nhwc.npy": ("data is NHWC", "move the channels"),
    "quantize net.py:example --calibration bytes.npy": ("is uint8", "convert to float32"),
    "quantize net.py:example --calibration nan.npy": ("holds NaN", "repair the data"),
    # the options
    f"{QUANTIZE} --bits W5A9": ("runs activations of 2 to 8 bits, not 9", "choose one of these"),
    f"{QUANTIZE} --bits int4": ("'int4' does not name widths", "write them as W8A8"),
    f"{QUANTIZE} --target tensorrt": ("no target 'tensorrt'", "choose one of onnxruntime"),
    f"{QUANTIZE} --recipe adarond": ("no recipe 'adarond'", "recipes are"),
    f"{QUANTIZE} --activation-range minmax": ("'minmax' is not one of", "'min-max'"),
    f"{QUANTIZE} --calibraton x.npy": ("No such option '--calibraton'", "--calibration"),
    f"{QUANTIZE} --keep-float hed": ("'hed' matches no value", "did you mean head?"),
    f"{QUANTIZE} --range 0..1": ("'0..1' is not a range", "write it as VALUE=LOWEST..HIGHEST"),
    f"{QUANTIZE} --weight-bits 4,8 --budget 14%": ("'14%' is no budget", "as in size=14%"),
    f"{QUANTIZE} --weight-bits 4,8 --budget size=1%": ("the least reachable is", "allow that"),
    # the result, where everything went well
    "evaluate ok": ("nothing to evaluate on", "give --data"),
    "evaluate okk --data x.npy": ("'okk' is not an output folder", "halfbyte quantize"),
    "evaluate ok --data photos": ("photos/0.png lies in no class folder", "one sub-folder for each class"),
    "evaluate ok --data four --size 8": ("four/3 is class 3 but the network has 3 outputs", "give a class file"),
    "evaluate ok --data five.npz": ("the class index 4", "valid are 0 to 2"),
    "check empty --max-drop 1": ("'empty' is not an output folder", "halfbyte quantize"),
    "check ok": ("no limit to check", "give --max-drop"),
    "compare ok": ("nothing to compare", "give at least two output folders"),
    "prove empty": ("cannot read 'empty/proof.npz'", "'halfbyte quantize' writes it"),
    "quantise net.py:example": ("No such command 'quantise'", "Did you mean 'quantize'?"),
}  # fmt: skip
FOLDERS = {
    "": ("the output folder 'ok' exists", "--overwrite to start again, or another -o"),
    "--resume --bits W4A8": ("--resume needs the same configuration", "different: bits"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stranger works: a network, data of every kind, and a result."""
    folder = tmp_path_factory.mktemp("first_hour")
    (folder / "net.py").write_text(NET)
    (folder / "broken.py").write_text("def build(:\n    pass\n")
    for name in ("empty", "texts", "mine"):
        (folder / name).mkdir()
    (folder / "texts" / "a.txt").write_text("no picture")
    (folder / "mine" / "thesis.txt").write_text("precious")
    pictures(folder / "photos")
    pictures(folder / "four", classes=4)
    damaged = pictures(folder / "damaged") / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    x = np.load(array(folder / "x.npy"))
    array(folder / "nan.npy", float("nan"))
    np.save(folder / "nhwc.npy", x.transpose(0, 2, 3, 1))
    np.save(folder / "bytes.npy", np.zeros(x.shape, np.uint8))
    np.savez(folder / "five.npz", x=x, target=np.arange(8) % 5)
    net = load_callable(f"{folder}/net.py:Net")
    torch.save(net().state_dict(), folder / "net.pt")
    torch.save(net(16).state_dict(), folder / "wide.pt")
    torch.save({f"module.{k}": t for k, t in net().state_dict().items()}, folder / "parallel.pt")
    (folder / "half.pt").write_bytes((folder / "net.pt").read_bytes()[:800])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = halfbyte(*QUANTIZE.split(), "-o", "ok", "--threads", 1)
        assert result.exit_code == 0, result.output
    return folder


def answered(place: Path, typed: str, wrong: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence at the end, exit status 2, no traceback, and everything on the disk as it was."""
    monkeypatch.chdir(place)
    before = {p: files(p) for p in (place, place / "ok", place / "mine")}
    result = halfbyte(*typed.split())
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    last = result.output.rstrip().splitlines()[-1]
    assert re.match(r"halfbyte: \S|Error: \S", last), result.output
    assert wrong in last and advice in last, last
    assert len(last) < 400
    after = {p: files(p) for p in before}
    after[place].pop("__pycache__", None)
    before[place].pop("__pycache__", None)
    assert after == before


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistake(place: Path, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(place, typed, *MISTAKES[typed], monkeypatch)


@pytest.mark.parametrize("options", FOLDERS)
def test_folder_that_is_there(place: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(place, f"{QUANTIZE} -o ok {options}", *FOLDERS[options], monkeypatch)


@pytest.mark.parametrize("options", ["", "--overwrite", "--resume"])
def test_folder_of_somebody_else(place: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(
        place, f"{QUANTIZE} -o mine {options}", "'mine' holds no earlier result", "name another folder", monkeypatch
    )
    assert (place / "mine" / "thesis.txt").read_text() == "precious"


def test_what_can_be_put_right_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network in train mode, one that is named instead of built, a checkpoint of DataParallel: work goes on."""
    monkeypatch.chdir(place)
    for spec, options in (("training", []), ("ready", ["--size", "8"]), ("example", ["--checkpoint", "parallel.pt"])):
        result = halfbyte("quantize", f"net.py:{spec}", "--calibration", "x.npy", *options, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "first" in result.output


def test_first_result_is_sound(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way without mistakes, up to the diagnosis."""
    monkeypatch.chdir(place)
    np.savez("three.npz", x=np.load("x.npy"), target=np.arange(8) % 3)
    assert "simulation" in halfbyte("evaluate", "ok", "--data", "three.npz", "--threads", 1).output
    (place / "three.npz").unlink()
    assert halfbyte("check", "ok", "--max-size", "1MB").exit_code == 0
    assert Image.open(place / "photos" / "0.png").size == (10, 12)  # nobody has touched the data


def test_raw_pixels_are_noticed_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and spread were forgotten: nothing is wrong with the command, so the work goes on, with a warning."""
    monkeypatch.chdir(place)
    result = halfbyte("quantize", "net.py:build", "--calibration", "photos", "--size", "8", "-o", "raw")
    assert result.exit_code == 0, result.output
    assert "warning: first: its input is unlike the training data" in result.output
    assert "were mean and std forgotten?" in result.output
