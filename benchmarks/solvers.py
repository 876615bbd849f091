"""Layer solvers on the same problems: held-out loss and time of Descent, AdaRound and AdaQuant, layer by layer.

    HALFBYTE_DATA=/path/to/data python benchmarks/solvers.py [network ...] [--adaround 10000] [--adaquant 1000] [--layers 8]

The network is quantized to W4A8 layer after layer by Descent; each layer's problem, what the quantized network so far gives it and
what the float network expects of it, goes to every solver. The loss is the squared error on held-out samples over the power of what
is expected, before the activation function that follows and behind it. ``--layers`` takes so many layers, evenly spread. Results go
to ``benchmarks/results/solvers-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import halfbyte as hb
from classification import NETWORKS
from dfq import environment, save
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.affine import fake_quantize
from halfbyte.graph import blocks, layers, macs
from halfbyte.local import Problem, Solution
from halfbyte.model import value_name
from halfbyte.reconstruct import why_not
from halfbyte.targets import find

Print = Callable[[dict[str, Any]], None]


def relative(p: Problem, weight: Tensor, bias: Tensor | None) -> dict[str, float]:
    """Noise-to-signal on the held-out samples, before and behind the activation function."""
    wanted, found = p.held_out.outputs, p.held_out.inputs @ blocks(p.layer, weight).flatten(2).transpose(1, 2)
    if bias is not None:
        found = found + bias.reshape(found.shape[0], 1, -1)
    plain = float((found - wanted).square().sum() / wanted.square().sum())
    if p.following is None:
        return {"loss": plain, "behind": plain}
    a, b = (p.following(_channels(t)) for t in (found, wanted))
    return {"loss": plain, "behind": float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))}


def _channels(rows: Tensor) -> Tensor:
    """[groups, rows, outputs] as [rows, channels, 1, 1], as an activation function with limits for each channel reads it."""
    return rows.permute(1, 0, 2).flatten(1)[:, :, None, None]


@dataclass
class Contest:
    """Gives every problem to all solvers, keeps what Descent finds, and writes down what each was worth."""

    solvers: dict[str, Any]
    wanted: set[str]
    told: Print
    rows: list[dict[str, Any]] = field(default_factory=list)
    residual: bool = True
    unrounded: bool = False
    iterations: Literal[0] = 0
    name: str = "contest"

    def solve(self, p: Problem) -> Solution:
        name = value_name(p.layer)
        if name not in self.wanted:
            return hb.Descent().solve(p)
        row: dict[str, Any] = {
            "layer": name,
            "shape": list(p.weight.shape),
            "macs": macs(p.layer),
            "nearest": relative(p, fake_quantize(p.weight, p.grid), p.bias),
        }
        kept: Solution | None = None
        for label, solver in self.solvers.items():
            start = time.perf_counter()
            found = solver.solve(p)
            seconds = time.perf_counter() - start
            bias = p.bias if found.bias is None else found.bias
            row[label] = {"seconds": seconds, **relative(p, found.weight, bias)}
            kept = found if label == "descent" else kept
        self.rows.append(row)
        self.told(row)
        assert kept is not None
        return kept


def spread(m: hb.QModel, count: int | None) -> list[str]:
    """The layers with fewer than eight bits, or so many of them, evenly spread."""
    few = []
    for layer in layers(m.graph):
        form = m.plan[value_name(layer.args[1])] if not why_not(m, layer) else None  # type: ignore[arg-type]
        if form is not None and form.bits < 8:
            few.append(value_name(layer))
    if count is None or count >= len(few):
        return few
    return [few[round(i * (len(few) - 1) / max(1, count - 1))] for i in range(count)]


def calibrated(net: nn.Module, example: Any, images: list[tuple[Tensor]]) -> hb.QModel:
    """A network at W4A8 whose weights wait for a solver."""
    m = hb.absorb_bias(hb.equalize(hb.fold_batchnorm(hb.capture(net, example)), weight_bits=4))
    where = find("onnxruntime", saturates=engine.saturates())
    return hb.calibrate(hb.place(m, where, weight_bits=4, activation_bits=8, uniform=False), images)


def measure(name: str, options: argparse.Namespace, path: Path) -> None:
    images = [(x,) for x in zoo.calibration(name, options.samples)]
    q = calibrated(*getattr(zoo, name)(), images)
    found: dict[str, Any] = {"network": name, "engine": environment(), "threads": torch.get_num_threads()}
    found |= {"samples": options.samples, "adaround": options.adaround, "adaquant": options.adaquant}
    found["layers"] = sum(not why_not(q, n) for n in layers(q.graph))

    def told(row: dict[str, Any]) -> None:
        found["rows"] = contest.rows
        save(found, path)
        print(name, json.dumps(row), flush=True)

    solvers = {
        "descent": hb.Descent(),
        "adaround": hb.AdaRound(iterations=options.adaround),
        "adaquant": hb.AdaQuant(iterations=options.adaquant),
    }
    contest = Contest(solvers, set(spread(q, options.layers)), told)
    hb.reconstruct(q, images, contest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--adaround", type=int, default=10_000, help="iterations of AdaRound for each layer")
    parser.add_argument("--adaquant", type=int, default=1_000, help="iterations of AdaQuant for each layer")
    parser.add_argument("--layers", type=int, help="so many layers, evenly spread, in place of all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        measure(name, options, options.results / f"solvers-{name}.json")


if __name__ == "__main__":
    main()
