"""A network of a few hundred parameters as a file, pictures for it, and the command line in this process."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from PIL import Image

from halfbyte.cli import main

NET = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Linear(8, 3)
    def forward(self, x):
        return self.last(torch.relu(self.first(x)).mean((2, 3)))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)
    def forward(self, a, b):
        return self.left(a) + self.right(b)

def build():
    torch.manual_seed(1)
    return Tiny()

def pair():
    return build(), torch.zeros(1, 3, 8, 8)

def two():
    torch.manual_seed(1)
    return Two(), (torch.zeros(1, 4), torch.zeros(1, 5))

def batches():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 8, 8, generator=g) for _ in range(3)]

def raises():
    raise ValueError("no weights here")

def number():
    return 3

def nan():
    net = build()
    net.first.weight.data[0, 0, 0, 0] = float("nan")
    return net, torch.zeros(1, 3, 8, 8)

class Branch(Tiny):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

def branch():
    return Branch(), torch.zeros(1, 3, 8, 8)

def mean_output(forward, data):
    return {"mean": float(torch.cat([forward(*x) for x, _ in data]).mean())}

def alone(forward):
    return float(forward(torch.ones(2, 3, 8, 8)).abs().mean())

def bad_metric(forward):
    return float("nan")

def failing_metric(forward):
    raise KeyError("label")
"""


def network(folder: Path, name: str = "build") -> str:
    """``file.py:callable`` of one of the networks above."""
    path = folder / "tinynet.py"
    if not path.exists():
        path.write_text(NET)
    return f"{path}:{name}"


def pictures(folder: Path, count: int = 6, classes: int = 0) -> Path:
    """A folder of noise, with a folder for each class if there are classes."""
    noise = np.random.default_rng(0)
    for i in range(count):
        place = folder / str(i % classes) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (12, 10, 3), np.uint8)).save(place / f"{i}.png")
    return folder


def array(path: Path, value: float | None = None) -> Path:
    """``.npy`` with eight samples."""
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    if value is not None:
        x[0, 0, 0, 0] = value
    np.save(path, x)
    return path


def halfbyte(*arguments: object) -> Result:
    """Run a command; a traceback fails the test."""
    threads = torch.get_num_threads()
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    torch.set_num_threads(threads)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def quantized(folder: Path, *options: object, out: str = "out") -> Path:
    """An output folder made from ``.npy`` data."""
    data = array(folder / "x.npy")
    result = halfbyte(
        "quantize", network(folder, "pair"), "--calibration", data, "-o", folder / out, "-q", "--threads", 1, *options
    )
    assert result.exit_code == 0, result.output
    return folder / out


def files(folder: Path) -> dict[str, Any]:
    """What a folder holds."""
    return {p.name: p.stat().st_size for p in folder.iterdir()} if folder.exists() else {}
