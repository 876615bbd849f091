"""A saved model comes back as it was, and a damaged one is refused in words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import StoreError
from tiny import quantized


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("store")) / "checkpoint"


def copied(saved: Path, folder: Path) -> Path:
    hb.save(hb.load(saved), folder)
    return folder


def test_comes_back_the_same(saved: Path, tmp_path: Path) -> None:
    m, again = hb.load(saved), hb.load(copied(saved, tmp_path / "copy"))
    assert (m.plan, m.ties, m.log, m.outputs, m.dynamic) == (
        again.plan,
        again.ties,
        again.log,
        again.outputs,
        again.dynamic,
    )
    assert m.target == again.target
    assert all(torch.equal(t, again.params[k]) for k, t in m.params.items())
    x = m.samples
    tap, other = hb.simulate(m), hb.simulate(again)
    assert torch.equal(hb.run(m, x, tap)[0], hb.run(again, x, other)[0])


def test_nothing_is_pickled(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {"graph.json", "tensors.safetensors", "state.json"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "another version"),
        (
            {
                "graph": [
                    {"op": "call_function", "target": "os.system", "args": [], "kwargs": {}, "name": "x", "meta": {}}
                ]
            },
            "os.system",
        ),
        ({"graph": 3}, "damaged"),
        ({"plan": {"a": {"bits": "x"}}}, "damaged"),
        ({"target": {}}, "damaged"),
    ],
)
def test_damaged_graph(saved: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = copied(saved, tmp_path) / "graph.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=words):
        hb.load(tmp_path)


def test_damaged_tensors(saved: Path, tmp_path: Path) -> None:
    path = copied(saved, tmp_path) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged"):
        hb.load(tmp_path)
    with pytest.raises(StoreError, match="not a checkpoint"):
        hb.load(tmp_path / "gone")


def test_a_model_loads_where_nothing_else_has_run(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    hb.save(hb.capture(net.eval(), torch.zeros(2, 3, 8, 8)), tmp_path / "model")
    code = f"import halfbyte as hb; print(len(hb.load({str(tmp_path / 'model')!r}).params))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
