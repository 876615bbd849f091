"""Fewer than eight bits on real classifiers: accuracy of the exported file, and what each way to round the weights costs.

    HALFBYTE_DATA=/path/to/data python benchmarks/low_bits.py [network ...] [--rows W4A8 ...] [--methods descent ...]

Every row is quantized with unlabelled images, exported, proven equal to the integer simulation and scored in ONNX Runtime; W4A32
(weights alone) is scored by the fake-quantizing float simulation. A float pass over the calibration images is timed before each
row. Results go to ``benchmarks/results/low-bits-<network>.json`` after every row; a row measured again with the same ``--time-limit``
and ``--seed`` replaces the earlier one, the others stay. Besides the networks of ``HALFBYTE_DATA``, ``efficientnet_lite1`` and 2 may
be named (``lite.py``). ``benchmarks/tables.py`` makes BENCHMARKS.md from the results, ``benchmarks/figures.py`` a figure.
"""

import argparse
import cProfile
import json
import math
import pstats
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte as hb
from classification import NETWORKS, float_pass
from dfq import Reference, environment, images_of, save
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.evaluate import paired
from halfbyte.job import Stages
from halfbyte.recipe import Recipe, check, load_recipe
from lite import adopt
from ranges import weight_names

METHODS = ("nearest", "descent", "adaround", "adaquant", "blocks")
CLOSED = ("nearest", "descent")  # they take no iterations
STAGES = ("reconstruct", "blocks")  # whose log entries carry losses before and after
PROFILED = ("W4A8", "descent")
LISTED = 10  # functions of the profile
ENOUGH, MOST = 5.0, 5  # float passes are repeated for so many seconds, so many times at most


@dataclass(frozen=True)
class Widths:
    """One row of the table."""

    weight_bits: int
    activation_bits: int
    target: str = "onnxruntime"
    uniform: bool = False  # the first and the last layer, too
    weights_alone: bool = False


ROWS = {
    "W4A8": Widths(4, 8),
    "W4A8 per tensor": Widths(4, 8, target="onnxruntime-per-tensor"),
    "W3A8": Widths(3, 8),
    "W4A4": Widths(4, 4),
    "W2A8": Widths(2, 8),
    "W4A32": Widths(4, 8, weights_alone=True),
    "uniform W4A8": Widths(4, 8, uniform=True),
    "uniform W4A4": Widths(4, 4, uniform=True),
}


def recipe(method: str, iterations: int | None, weights_alone: bool = False) -> Recipe:
    """The recipe for few bits with this method. Raises :class:`UsageError` for a method that it does not know."""
    options: dict[str, Any] = {"iterations": None if method in CLOSED else iterations}
    options["activations"] = False if weights_alone else None
    found = load_recipe("low-bit").changed("reconstruct", method=method, **options)
    check(found)
    return found


def losses(q: hb.QModel) -> dict[str, dict[str, float]]:
    """What the method says of its layers or blocks: the mean of log10(after / before) on held-out samples, and how many it kept."""
    found = {}
    for stage in STAGES:
        parts = [e.figures for e in q.log if e.stage == stage and "before" in e.figures]
        if parts:
            gains = [math.log10(max(f["after"], 1e-30) / max(f["before"], 1e-30)) for f in parts]
            kept = sum(bool(f["kept"]) for f in parts)
            found[stage] = {"log10_gain": statistics.fmean(gains), "kept": kept, "all": len(parts)}
    return found


def float_cost(m: hb.QModel, batches: list[Tensor]) -> tuple[float, int]:
    """Median seconds and peak memory of a float pass; short passes are repeated, for one alone tells little."""
    passes = [float_pass(m, batches)]
    while len(passes) < MOST and sum(seconds for seconds, _ in passes) < ENOUGH:
        passes.append(float_pass(m, batches))
    return statistics.median(seconds for seconds, _ in passes), max(peak for _, peak in passes)


def scored(reference: Reference, logits: Tensor) -> dict[str, Any]:
    """Top-1, its paired difference from float, and how often the decision is that of float."""
    right = reference.scored(logits)
    return {
        "top1": float(right.mean()),
        "difference": vars(paired(reference.right, right)),
        "agreement": float((logits.argmax(1) == reference.logits.argmax(1)).double().mean()),
    }


def from_file(q: hb.QModel, reference: Reference, stages: Stages) -> dict[str, Any]:
    """The exported file, proven, and scored in its engine."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        parity = stages.run("export and prove", lambda: hb.export_onnx(q, file))
        session = engine.session(file)
        logits = torch.cat([torch.from_numpy(engine.infer(session, (x,))[0]) for x, _ in reference.batches])
        return {**scored(reference, logits), "parity": str(parity), "bytes": file.stat().st_size}


class Network:
    """A network with its images, ready to measure rows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        net, example = getattr(zoo, name)()
        self.m, self.options = hb.capture(net, example), options
        self.folded = hb.fold_batchnorm(self.m).as_float()
        self.batches = list(zoo.calibration(name, options.samples))
        self.reference = Reference(self.folded, name, images_of(name, options.limit))

    def quantized(self, kind: str, method: str) -> hb.QModel:
        wide = ROWS[kind]
        return hb.quantize(
            self.m,
            self.batches,
            recipe=recipe(method, self.options.iterations, wide.weights_alone),
            target=wide.target,
            weight_bits=wide.weight_bits,
            activation_bits=wide.activation_bits,
            uniform=wide.uniform,
            samples=self.options.samples,
            time_limit=self.options.time_limit,
            seed=self.options.seed,
        )

    def row(self, kind: str, method: str) -> dict[str, Any]:
        reference, closed = self.reference, method in CLOSED
        found: dict[str, Any] = {
            "row": kind,
            "method": method,
            "iterations": None if closed else self.options.iterations,
            "time_limit": None if closed else self.options.time_limit,
            "seed": self.options.seed,
            "samples": sum(len(x) for x in self.batches),
            "images": len(reference.targets),
            "float": float(reference.right.mean()),
        }
        before, float_peak = float_cost(self.folded, self.batches)
        stages = Stages()
        try:
            q = stages.run("quantize", lambda: self.quantized(kind, method))
            cost = stages.rows[0]
            found |= {
                "target": q.target.name if q.target else "",
                "seconds": cost["seconds"],
                "float_pass_seconds": before,
                "ratio": cost["seconds"] / before,
                "peak_bytes": cost["peak_memory_bytes"],
                "float_peak_bytes": float_peak,
                "losses": losses(q),
                "shortened": sum(e.stage in STAGES and " iterations, to end within " in e.message for e in q.log),
            }
            if ROWS[kind].weights_alone:
                weights = weight_names(q)
                return found | scored(reference, reference.run(q, hb.simulate(q, only=lambda value: value in weights)))
            return found | from_file(q, reference, stages) | {"export_seconds": stages.rows[1]["seconds"]}
        except hb.HalfbyteError as error:  # widths that the target has not, or a file that does not prove
            return found | {"impossible": str(error)}

    def profile(self) -> dict[str, Any]:
        """Where the time of a descent goes: the functions with the largest own time, and their shares."""
        profiler = cProfile.Profile()
        profiler.runcall(self.quantized, *PROFILED)
        own = {where: entry[2] for where, entry in pstats.Stats(profiler).stats.items()}  # type: ignore[attr-defined]
        total = sum(own.values())
        largest = sorted(own.items(), key=lambda item: -item[1])[:LISTED]
        functions = [(function_name(*where), seconds, seconds / total) for where, seconds in largest]
        return {"row": PROFILED[0], "method": PROFILED[1], "seconds": total, "functions": functions}


def function_name(file: str, line: int, function: str) -> str:
    """``reparam.py:fit``, or what C calls itself."""
    return f"{Path(file).name}:{function}" if line else function.strip("<>{}")


def key(row: dict[str, Any]) -> tuple[int, int, float, int]:
    """What tells rows apart, in their order: widths, method, the time it was given, and the seed."""
    return list(ROWS).index(row["row"]), METHODS.index(row["method"]), row["time_limit"] or 0.0, row.get("seed", 0)


def measure(name: str, options: argparse.Namespace, path: Path) -> None:
    network = Network(name, options)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    found |= {"network": name, "engine": environment(), "threads": torch.get_num_threads()}
    kept = {key(r): r for r in found["rows"]}
    for kind in options.rows:
        for method in options.methods:
            row = network.row(kind, method)
            kept[key(row)] = row
            found["rows"] = [kept[k] for k in sorted(kept)]
            save(found, path)
            print(name, row, flush=True)
    if options.profile:
        found["profile"] = network.profile()
        save(found, path)
        print(name, found["profile"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="others keep earlier results")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--limit", type=int, help="labelled images to use")
    parser.add_argument("--iterations", type=int, help="of learned methods, in place of their own number")
    parser.add_argument("--time-limit", type=float, help="seconds for a learned method to choose the weights")
    parser.add_argument("--seed", type=int, default=0, help="rows of other seeds are kept beside those of 0")
    parser.add_argument("--profile", action="store_true", help="also profile one descent at W4A8")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for method in options.methods:  # a method that does not exist is told at once, not after hours
        recipe(method, options.iterations)
    adopt(zoo)
    for name in options.networks:
        measure(name, options, options.results / f"low-bits-{name}.json")


if __name__ == "__main__":
    main()
