"""Networks and checkpoints of others are opened as data; whatever could run code needs to be trusted."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import CaptureError, UsageError
from halfbyte.opening import open_network
from tiny import network


class Custom:
    """Something that a safe loader refuses."""


def program(path: Path) -> Path:
    exported = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.zeros(2, 4),))
    torch.export.save(exported, path)
    return path


def rewritten(path: Path, change: dict[str, bytes]) -> Path:
    """The same archive with members replaced, by the ending of their names."""
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, next((v for k, v in change.items() if name.endswith(k)), data))
    return out


def test_checkpoint_is_loaded(tmp_path: Path) -> None:
    net, _ = open_network(network(tmp_path))
    assert isinstance(net, torch.nn.Module)
    state = {k: torch.full_like(v, 0.5) for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded, _ = open_network(network(tmp_path), checkpoint=tmp_path / name)
        assert isinstance(loaded, torch.nn.Module)
        assert all(bool((t == 0.5).all()) for t in loaded.state_dict().values())
        assert not loaded.training


def test_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    spec = network(tmp_path)
    cases = {"missing": {}, "is not a dictionary": {"a": 3}}
    for words, state in cases.items():
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UsageError, match=words):
            open_network(spec, checkpoint=tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        open_network(spec, checkpoint=tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="no checkpoint"):
        open_network(spec, checkpoint=tmp_path / "gone.pt")
    with pytest.raises(UsageError, match="holds weights"):
        open_network("w.pt")


def test_pickle_needs_trust(tmp_path: Path) -> None:
    torch.save({"x": Custom()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="--trust"):
        open_network(network(tmp_path), checkpoint=tmp_path / "w.pt")


def test_program_opens(tmp_path: Path) -> None:
    _, example = open_network(str(program(tmp_path / "net.pt2")))
    assert example is not None
    assert example[0].shape == (2, 4)
    with pytest.raises(UsageError, match="leave out"):
        open_network(str(tmp_path / "net.pt2"), checkpoint="w.pt")


def test_program_with_pickled_object_needs_trust(tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2")
    torch.save((Custom(),), tmp_path / "object.pt")
    pickled = rewritten(path, {"model.pt": (tmp_path / "object.pt").read_bytes()})
    with pytest.raises(CaptureError, match="--trust"):
        open_network(str(pickled))


def test_program_whose_sizes_are_code(tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2")
    formula = b'{"expr_str": "exec(chr(49))"}'
    with pytest.raises(CaptureError, match="--trust"):
        open_network(str(rewritten(path, {"model.json": formula})))


def test_dynamic_program_opens(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        torch.nn.Linear(4, 2).eval(), (torch.zeros(2, 4),), dynamic_shapes={"input": {0: batch}}
    )
    torch.export.save(exported, tmp_path / "net.pt2")
    open_network(str(tmp_path / "net.pt2"))


def test_damaged_program(tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CaptureError, match=r"net\.pt2"):
        open_network(str(path))
    with pytest.raises(UsageError, match="no file"):
        open_network(str(tmp_path / "gone.pt2"))
