"""Budgets: what a network may cost, and how a text says so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from halfbyte.costs import CostTable
from halfbyte.errors import UsageError
from halfbyte.sensitivity import SensitivityTable

Amount = float | str
BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "size": BYTES,
    "logical_size": {**{k: 8 * v for k, v in BYTES.items()}, "bit": 1.0, "kbit": 1e3, "Mbit": 1e6},
    "bops": {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "drop": {},
}
SHOWN = {"size": "bytes", "logical_size": "bits", "bops": "bit operations", "latency": "seconds", "drop": "points"}


@dataclass(frozen=True)
class Budget:
    """Upper bounds that all have to hold; at least one.

    size: bytes of tensors in the file. logical_size: bits of codes and biases. bops: multiply-accumulates times both widths, for
    one sample. latency: seconds of all layers, each timed alone in the engine. Numbers up to 1 are shares of what the float
    network costs, larger ones bytes, bits, operations, seconds; texts such as ``"14%"``, ``"1.2MB"``, ``"4ms"`` say it exactly.
    drop: points (samples of a hundred) that decide otherwise than the float network, as the divergence predicts it; for outputs that
    are no class scores hundredths of noise-to-signal. With it the smallest network under the bound is sought, without it the
    one of least loss.
    """

    size: Amount | None = None
    logical_size: Amount | None = None
    bops: Amount | None = None
    latency: Amount | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        for kind, amount in self.given.items():
            _amount(kind, amount)
        if not self.given:
            raise UsageError('a budget needs at least one bound, as in Budget(size=0.14) or Budget.parse("size=14%")')

    @property
    def given(self) -> dict[str, Any]:
        """The bounds that are set."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``"size=14%"``, ``"size=1.2MB,latency=4ms"``, ``"bops=10%"``, ``"drop=0.5"``. Raises :class:`UsageError`."""
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, _, amount = (t.strip() for t in part.partition("="))
            kind = name.replace("-", "_")
            if kind not in _UNITS or not amount:
                known = ", ".join(k.replace("_", "-") for k in _UNITS)
                raise UsageError(
                    f"'{part.strip()}' is no budget: write NAME=AMOUNT with a name of {known}, as in size=14%"
                )
            if kind in found:
                raise UsageError(f"the budget names {name} twice: give it once")
            found[kind] = float(_amount(kind, amount)[0]) if kind == "drop" else amount
        return cls(**found)

    def __str__(self) -> str:
        return ", ".join(f"{k.replace('_', '-')}={v}" for k, v in self.given.items())

    def limits(self, costs: CostTable) -> dict[str, float]:
        """The bounds on costs in bytes, bits, operations, seconds. Raises :class:`UsageError` where costs were not measured."""
        found = {}
        for kind, amount in self.given.items():
            if kind == "drop":
                continue
            if kind not in costs.reference:
                raise UsageError(
                    f"there is a budget for {kind}, but it was not measured: give costs(candidates, latency=EngineLatency())"
                )
            number, share = _amount(kind, amount)
            found[kind] = number * costs.reference[kind] if share else number
        return found

    def loss(self, table: SensitivityTable) -> float | None:
        """The bound on the predicted loss increase that ``drop`` means; None without it. Raises :class:`UsageError`."""
        if self.drop is None:
            return None
        if table.metric != "divergence":
            raise UsageError(f"a budget for drop needs metric 'divergence': the table was made with '{table.metric}'")
        if table.points is None:
            return self.drop / 100 - table.base
        return (self.drop / table.points) ** 2 - table.base


def _amount(kind: str, amount: Any) -> tuple[float, bool]:
    """The number, and whether it is a share of the float network's."""
    if isinstance(amount, str):
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*([A-Za-z%]*)", amount.strip())
        unit = match[3] if match else ""
        valid = ["%", *_UNITS[kind]] if kind != "drop" else []
        if match is None or (unit and unit not in valid):
            hint = f"a number, alone or with one of {', '.join(valid)}" if valid else "a number of points"
            raise UsageError(f"'{amount}' is no amount of {kind.replace('_', '-')}: write {hint}")
        number = float(match[1]) * 10.0 ** int(match[2] or 0)
        if unit:
            return _positive(kind, number / 100 if unit == "%" else number * _UNITS[kind][unit]), unit == "%"
        amount = number
    return _positive(kind, amount), kind != "drop" and amount <= 1


def _positive(kind: str, number: Any) -> float:
    if not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise UsageError(f"a budget for {kind.replace('_', '-')} must be a positive number, not {number!r}")
    return float(number)
