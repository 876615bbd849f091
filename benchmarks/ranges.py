"""How the range rules compare (white paper 2106.08295, tables 1 and 2): only weights or only running values on a grid.

    HALFBYTE_DATA=/path/to/data python benchmarks/ranges.py [network ...]

Weights at 8, 6 and 4 bits with float running values, per tensor and per channel; running values at 8, 6 and 4 bits with float
weights. No bias is corrected, so that the rules alone make the difference. Results go to
``benchmarks/results/ranges-<network>.json``, after every row; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import halfbyte as hb
from dfq import Reference, images_of, save
from given import RESULTS, zoo
from halfbyte.graph import is_depthwise, layers, weight_of
from halfbyte.model import value_name
from halfbyte.targets import GENERIC

NETWORKS = ("mobilenet_v2", "resnet20_cifar10")
WIDTHS = (8, 6, 4)
Row = tuple[dict[str, Any], Callable[[], hb.QModel]]


@dataclass(frozen=True)
class PlainMSE(hb.MSE):
    """Least squared error of the weights themselves, as in the paper: every weight counts the same."""

    def weight(self, w: Tensor, form: hb.Format, pairs: bool, power: Tensor | None = None) -> hb.Grid:
        """Grid by the same search, without the power of the inputs."""
        return super().weight(w, form, pairs)


# Name, rule, whether the data decide on the weights' grids.
WEIGHT_RULES = (
    ("min-max", hb.MinMax(), False),
    ("MSE", PlainMSE(), False),
    ("MSE by input power", hb.MSE(), True),
)


def weight_names(m: hb.QModel) -> set[str]:
    return {value_name(w) for layer in layers(m.graph) if (w := weight_of(layer)) is not None}


def weight_rows(m: hb.QModel, batches: list[tuple[Tensor, ...]]) -> Iterator[Row]:
    """Weights on a grid. The running values' ranges do not matter, so a rule that ignores the data sees one batch of it."""
    for per_channel in (False, True):
        target = replace(GENERIC, per_channel=per_channel)
        for name, rule, informed in WEIGHT_RULES:
            for bits in WIDTHS:
                row = {"what": "weights", "bits": bits, "rule": name, "per_channel": per_channel}
                data = batches if informed else batches[:1]

                def make(b: int = bits, r: Any = rule, t: hb.Target = target, d: Any = data) -> hb.QModel:
                    return hb.calibrate(hb.place(m, t, weight_bits=b), d, weights=r, correct=False)

                yield row, make


def activation_rows(m: hb.QModel, batches: list[tuple[Tensor, ...]]) -> Iterator[Row]:
    """Running values on a grid."""
    rules: list[tuple[str, Any, dict[str, Any]]] = [
        ("min-max", batches, {"activations": hb.MinMax()}),
        ("MSE", batches, {"activations": hb.MSE()}),
        ("batch norms", None, {}),
    ]
    if "logits" in inspect.signature(hb.calibrate).parameters:
        rules.insert(2, ("MSE, logits by cross-entropy", batches, {"activations": hb.MSE(), "logits": "cross-entropy"}))
    for name, data, options in rules:
        for bits in WIDTHS:
            row = {"what": "activations", "bits": bits, "rule": name}

            def make(b: int = bits, d: Any = data, o: dict[str, Any] = options) -> hb.QModel:
                placed = hb.place(m, GENERIC, activation_bits=b)
                return hb.calibrate(placed, d, weights=hb.MinMax(), correct=False, **o)

            yield row, make


def measure(name: str, samples: int, limit: int | None, path: Path) -> None:
    net, example = getattr(zoo, name)()
    folded = hb.fold_batchnorm(hb.capture(net, example))
    batches = [(x,) for x in zoo.calibration(name, samples)]
    equalized = any(is_depthwise(layer) for layer in layers(folded.graph))
    for_weights = hb.equalize(folded, method="weights") if equalized else folded
    reference, weights = Reference(folded, name, limit), weight_names(folded)
    found: dict[str, Any] = {
        "network": name,
        "samples": sum(len(x) for (x,) in batches),
        "images": len(reference.targets),
        "float": float(reference.right.mean()),
        "equalized_for_weights": equalized,
        "rows": [],
    }
    for row, make in (*weight_rows(for_weights, batches), *activation_rows(folded, batches)):
        only_weights = row["what"] == "weights"
        try:
            q = make()
        except hb.UsageError as error:  # a network whose batch norms do not describe every value
            row["impossible"] = str(error)
        else:
            tap = hb.simulate(q, only=lambda value, wanted=only_weights: (value in weights) == wanted)
            row.update(reference.compared(q, tap))
        found["rows"].append(row)
        save(found, path)
        print(name, row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--limit", type=int, help="labelled images to use")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        limit = images_of(name, options.limit)
        measure(name, options.samples, limit, options.results / f"ranges-{name}.json")


if __name__ == "__main__":
    main()
