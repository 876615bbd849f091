"""Widths chosen layer by layer: the programme's front against uniform widths and a greedy choice, and the recipes that use it.

    HALFBYTE_DATA=/path/to/data python benchmarks/widths.py [network ...] [--parts front files recipes] [--budgets size=13% ...]

``front``: candidates by Descent for each width of the weights, their costs in time, and the loss of whole networks on test images
(noise-to-signal at the outputs) along the front; Spearman's rank correlation of predicted and measured loss over its points.
``files``: accuracy of exported files under budgets. ``recipes``: the recipes of the field at W4A4 and W4A8, fake-quantized.
Results go to ``benchmarks/results/widths-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import halfbyte as hb
from classification import float_pass
from dfq import Reference, environment, images_of, save
from given import RESULTS, zoo
from halfbyte.errors import UsageError
from halfbyte.job import Stages
from halfbyte.mixed import widths
from halfbyte.pipeline import context
from halfbyte.recipe import load_recipe
from halfbyte.sensitivity import output_loss
from halfbyte.units import units
from low_bits import from_file, scored

NETWORKS = ("resnet20_cifar10", "mobilenet_v2", "efficientnet_lite0", "resnet50")
WIDTHS = (2, 3, 4, 6, 8)
POINTS = 10
BUDGETS = ("size=13%", "logical-size=11%", "logical-size=13%")
RECIPES = ("calibtip-light", "calibtip-advanced", "omse", "low-bit")
MMSE = "kernel-wise MMSE"
MEASURED = 128  # images of a front


class Network:
    """A network with its images."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        net, example = getattr(zoo, name)()
        self.m, self.name, self.options = hb.capture(net, example), name, options
        self.folded = hb.fold_batchnorm(self.m)
        self.batches = [(x,) for x in zoo.calibration(name, options.samples)]
        self.reference = Reference(self.folded, name, images_of(name, options.limit))
        self.test = [(x,) for x, _ in zoo.labelled(name, limit=MEASURED)]

    def front(self) -> dict[str, Any]:
        """The front, uniform widths and greedy choices, all measured as whole networks on test images."""
        m = hb.absorb_bias(hb.equalize(self.folded, self.batches, method="noise", weight_bits=4))
        choice, c = widths(WIDTHS, 8), context("onnxruntime", widths(WIDTHS, 8), None, lambda *_: None)
        seconds: dict[str, float] = {}

        def make(pair: hb.Bits) -> hb.QModel:
            placed = hb.place(m, c.target, weight_bits=pair.weights, activation_bits=pair.activations, uniform=False)
            calibrated = hb.calibrate(placed, self.batches)
            start = time.perf_counter()
            found = hb.reconstruct(calibrated, self.batches, hb.Descent(), inputs="float")
            seconds[str(pair)] = time.perf_counter() - start
            return found

        start = time.perf_counter()
        candidates = {pair: make(pair) for pair in choice.pairs}
        made = time.perf_counter()
        table = hb.sensitivity(candidates, self.batches, metric="outputs")
        allocation = time.perf_counter() - made
        costs = hb.costs(candidates)

        def measured(q: hb.QModel) -> float:
            return output_loss(q, self.test, metric="outputs", samples=MEASURED)

        rows = [{"kind": "uniform", "label": str(b), "loss": measured(q)} for b, q in candidates.items()]
        points = hb.front(candidates, table, by="logical_size", points=POINTS, costs=costs)
        for a in points:
            row = {
                "kind": "programme",
                "share": a.shares["logical_size"],
                "size": a.shares["size"],
                "predicted": a.loss,
            }
            rows.append({**row, "loss": measured(hb.select(candidates, a))})
            try:
                budget = hb.Budget(logical_size=a.costs["logical_size"] + 0.5)
                b = hb.greedy(candidates, table, budget, costs=costs)
                rows.append({"kind": "greedy", "share": b.shares["logical_size"], "predicted": b.loss,
                             "loss": measured(hb.select(candidates, b))})  # fmt: skip
            except UsageError as error:
                rows.append({"kind": "greedy", "impossible": str(error)})
        own = [r for r in rows if r["kind"] == "programme"]
        for row in rows:
            if row["kind"] == "uniform":
                pair = hb.bits(row["label"])
                u = dict.fromkeys(table.losses, pair.weights)
                row["share"] = (
                    costs.total(units(candidates).complete(u))["logical_size"] / costs.reference["logical_size"]
                )
        return {
            "rows": rows,
            "rank_correlation": float(spearmanr([r["predicted"] for r in own], [r["loss"] for r in own]).statistic),
            "descent_seconds": seconds,
            "candidates_seconds": made - start,
            "sensitivity_seconds": allocation,
            "allocation_over_descent": (sum(seconds.values()) + allocation) / (len(seconds) * statistics.median(seconds.values())),
        }  # fmt: skip

    def files(self) -> list[dict[str, Any]]:
        """Exported networks under budgets."""
        rows = []
        for budget in self.options.budgets:
            row: dict[str, Any] = {"budget": budget, "widths": "2, 3, 4, 8"}
            try:
                stages = Stages()
                q = stages.run("quantize", lambda b=budget: hb.quantize(  # type: ignore[misc]
                    self.m, self.batches, weight_bits=(2, 3, 4, 8), budget=b, samples=self.options.samples))  # fmt: skip
                entry = next(e for e in q.log if e.stage == "allocate" and e.value is None)
                row |= {"seconds": stages.rows[0]["seconds"], "shares": dict(entry.figures["shares"]),
                        "predicted": entry.figures["loss"], **from_file(q, self.reference, stages)}  # fmt: skip
            except hb.HalfbyteError as error:
                row["impossible"] = str(error)
            rows.append(row)
            print(self.name, row, flush=True)
        return rows

    def recipes(self) -> list[dict[str, Any]]:
        """The recipes, and what statistics and bias tuning bring, as the fake-quantizing float simulation."""
        rows = []
        before = float_pass(self.folded, [x for (x,) in self.batches])[0]
        for name in RECIPES:
            for bits in ("W4A4", "W4A8", "W8A8"):
                pair = hb.bits(bits)
                for recipe, label in self._variants(name):
                    if bits == "W8A8" and label != MMSE:  # what a gap is measured to
                        continue
                    start = time.perf_counter()
                    q = hb.quantize(self.m, self.batches, recipe=recipe, weight_bits=pair.weights,
                                    activation_bits=pair.activations, samples=self.options.samples)  # fmt: skip
                    took = time.perf_counter() - start
                    row = {"recipe": label, "bits": bits, "seconds": took, "passes": took / before,
                           "noise": output_loss(q, self.test, metric="outputs", samples=MEASURED),
                           **scored(self.reference, self.reference.run(q, hb.simulate(q)))}  # fmt: skip
                    rows.append(row)
                    print(self.name, row, flush=True)
        return rows

    @staticmethod
    def _variants(name: str) -> list[tuple[Any, str]]:
        """The recipe as it is, and without the tuning at its end."""
        recipe = load_recipe(name)
        found = [(recipe, name)]
        tuning = ("tune_statistics", "tune", "split_tensor")
        for i, step in enumerate(recipe.steps):
            if step["step"] in tuning:
                fewer = tuple(s for j, s in enumerate(recipe.steps) if s["step"] not in tuning or j < i)
                found.append((replace(recipe, steps=fewer), f"{name} without {step['step']}"))
        if name == "omse":  # what it starts from: the scales of least squared error, and nothing else
            alone = tuple(s for s in recipe.steps if s["step"] in ("fold_batchnorm", "place", "calibrate"))
            found.append((replace(recipe, steps=alone).changed("calibrate", correct=False), MMSE))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument(
        "--parts", nargs="*", choices=("front", "files", "recipes"), default=["front", "files", "recipes"]
    )
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS), help="of the files")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--limit", type=int, help="labelled images to use")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        path = options.results / f"widths-{name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        network = Network(name, options)
        found |= {"network": name, "engine": environment(), "images": len(network.reference.targets),
                  "float": float(network.reference.right.mean()), "samples": options.samples}  # fmt: skip
        for part in options.parts:
            found[part] = getattr(network, part)()
            save(found, path)
            print(name, part, found[part], flush=True)


if __name__ == "__main__":
    main()
