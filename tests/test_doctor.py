"""What doctor finds out about this machine, and about one where packages are missing."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte import engine
from halfbyte.doctor import OPTIONAL, REQUIRED
from tiny import halfbyte


def test_doctor_tells_what_is_there() -> None:
    found = hb.doctor()
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert found.versions["halfbyte"] == hb.__version__
    assert found.saturates is engine.saturates()
    assert found.threads == torch.get_num_threads()
    assert 0 < found.memory_free < found.memory_total  # type: ignore[operator]
    assert found.broken == ()
    text = halfbyte("doctor").output
    assert engine.instruction_set() in text
    assert set(json.loads(halfbyte("doctor", "--json").stdout)["versions"]) == {
        "halfbyte",
        "python",
        *REQUIRED,
        *OPTIONAL,
    }


def test_every_dependency_has_its_reason() -> None:
    """Except those that the command line and the report's pictures bring along."""
    declared = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    block = declared[declared.index("dependencies = [") : declared.index("[project.optional")]
    names = {line.strip().strip('",').split(">=")[0] for line in block.splitlines() if ">=" in line}
    assert names - set(REQUIRED) == {"click", "matplotlib"}


def test_missing_packages_are_named_with_what_they_are_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("torch", "openvino"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = halfbyte("doctor")
    assert result.exit_code == 1
    assert f"missing: torch, needed for {REQUIRED['torch']}" in result.output
    assert f"missing: openvino, needed for {OPTIONAL['openvino']}" in result.output
    assert (hb.doctor().broken, hb.doctor().cache_bytes) == (("torch",), 0)


def test_doctor_without_torch() -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom halfbyte.cli import main\nmain(['doctor'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    assert "instruction set  unknown" in found.stdout
    assert "cannot be asked" in found.stdout
