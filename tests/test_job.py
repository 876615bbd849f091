"""The main job from Python leaves the caller's process as it was; its settings are checked before work starts."""

from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.opening import open_network
from halfbyte.output import check_output
from halfbyte.settings import Settings, parse_ranges
from tiny import array, network


def state() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_caller_is_left_as_found(tmp_path: Path) -> None:
    net, example = open_network(network(tmp_path, "pair"))
    assert isinstance(net, torch.nn.Module)
    assert example is not None
    net.train()
    net.get_submodule("last").eval()
    torch.manual_seed(5)
    before, random, modes = state(), torch.get_rng_state(), [m.training for m in net.modules()]
    weights = {k: t.clone() for k, t in net.state_dict().items()}
    m = hb.quantize(hb.capture(net, example), array(tmp_path / "x.npy"))
    assert hb.export_onnx(m, tmp_path / "net.onnx").proven
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(t, weights[k]) for k, t in net.state_dict().items())


def test_ranges() -> None:
    assert parse_ranges(("input=0..1", "a=b=-1..2")) == {"input": (0.0, 1.0), "a=b": (-1.0, 2.0)}
    for text in ("input", "input=1", "=0..1", "input=2..1", "input=a..b"):
        with pytest.raises(UsageError, match=r"LOWEST\.\.HIGHEST"):
            parse_ranges((text,))


def test_settings_for_others_name_no_folder() -> None:
    settings = Settings("/home/me/net.py:build", "/home/me/photos", "/home/me/out", checkpoint="/home/me/w.pt")
    assert "/home" not in str(settings.without_folders())


def test_output(tmp_path: Path) -> None:
    check_output(tmp_path / "new", resume=False, overwrite=False)
    check_output(tmp_path, resume=False, overwrite=False)  # empty
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", resume=False, overwrite=True)
