"""What this machine and installation can do, and what is missing for what. Needs nothing that might be missing itself."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from halfbyte.shown import Shown

# Distribution -> what Halfbyte needs it for; without those of the first table nothing works.
REQUIRED = {
    "torch": "capturing and quantizing networks",
    "numpy": "everything",
    "onnx": "reading exported files",
    "onnx-ir": "exporting",
    "onnxscript": "exporting",
    "onnxruntime": "proofs, benchmarks and evaluation of files",
    "safetensors": "checkpoints",
    "scipy": "range rules and the choice of widths",
    "pillow": "folders of pictures",
    "psutil": "memory limits",
    "jinja2": "reports",
    "rich": "progress and tables",
}
OPTIONAL = {"openvino": "running and timing files on OpenVINO"}
_SCARCE = 2 << 30  # bytes: below, networks of the size of MobileNetV2 may not fit beside torch


@dataclass(frozen=True, repr=False)
class Doctor(Shown):
    """What was found.

    versions: distribution -> version, None where it is missing. instruction_set, saturates: of 8-bit products in ONNX
    Runtime, None where it cannot be asked. memory: bytes, free and total. missing: distribution -> what it is needed for.
    broken: those without which nothing works. advice: sentences.
    """

    versions: Mapping[str, str | None]
    system: str
    instruction_set: str | None
    saturates: bool | None
    threads: int | None
    cores: int | None
    accelerator: str | None
    memory_free: int | None
    memory_total: int | None
    cache: str
    cache_bytes: int
    cache_writable: bool
    missing: Mapping[str, str]
    broken: tuple[str, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        def gib(n: int | None) -> str:
            return "unknown" if n is None else f"{n / 2**30:.1f} GiB"

        versions = [f"{name:16} {version or 'missing'}" for name, version in self.versions.items()]
        return "\n".join(
            [
                *versions,
                f"{'system':16} {self.system}",
                f"{'instruction set':16} {self.instruction_set or 'unknown'}",
                f"{'threads':16} {self.threads or 'unknown'} of {self.cores} cores",
                f"{'accelerator':16} {self.accelerator or 'none'}",
                f"{'memory':16} {gib(self.memory_free)} free of {gib(self.memory_total)}",
                f"{'cache':16} {self.cache} ({self.cache_bytes / 1e6:.1f} MB{'' if self.cache_writable else ', not writable'})",
                *(f"missing: {name}, needed for {what}" for name, what in self.missing.items()),
                *self.advice,
            ]
        )


def doctor() -> Doctor:
    """Look at versions, instruction set, threads, memory and cache; nothing is changed."""
    wanted = {**REQUIRED, **OPTIONAL}
    versions = {"halfbyte": _version("halfbyte"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in wanted}
    missing = {name: what for name, what in wanted.items() if versions[name] is None}
    exact, instructions, problem = _products()
    broken = [name for name in REQUIRED if name in missing]
    threads, accelerator = _torch()
    free, total = _memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"
    writable = os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK)
    advice = [problem] if problem else []
    if exact is False:
        advice.append(
            "this CPU adds pairs of 8-bit products in 16 bits, where they can saturate: the targets that end in -avx2 are for it"
        )
    if free is not None and free < _SCARCE:
        advice.append("little memory is free: use a smaller --batch and fewer --samples")
    if not writable:
        advice.append(f"'{cache}' cannot be written, so that speeds are measured anew each time: set XDG_CACHE_HOME")
    return Doctor(
        versions=versions,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        instruction_set=instructions,
        saturates=None if exact is None else not exact,
        threads=threads,
        cores=os.cpu_count(),
        accelerator=accelerator,
        memory_free=free,
        memory_total=total,
        cache=str(cache),
        cache_bytes=sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) if cache.is_dir() else 0,
        cache_writable=writable,
        missing=missing,
        broken=tuple(broken),
        advice=tuple(advice),
    )


def _version(name: str) -> str | None:
    if name == "halfbyte":
        import halfbyte

        return halfbyte.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _products() -> tuple[bool | None, str | None, str | None]:
    """Whether 8-bit products are exact, the instruction set, and why neither is known."""
    try:
        from halfbyte import engine

        return not engine.saturates(), engine.instruction_set(), None
    except Exception as error:  # a broken installation fails in many ways
        return None, None, f"ONNX Runtime cannot be asked for its instruction set: {type(error).__name__}: {error}"


def _torch() -> tuple[int | None, str | None]:
    try:
        import torch

        accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        return torch.get_num_threads(), accelerator
    except Exception:
        return None, None


def _memory() -> tuple[int | None, int | None]:
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)
