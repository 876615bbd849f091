"""What each step of data-free quantization gains (arXiv 1906.04721, its tables by step): W8A8 with one scale per weight tensor.

    HALFBYTE_DATA=/path/to/data python benchmarks/dfq.py [network ...]

Every step is measured with ranges from the batch norms, where no image is needed at all, and with ranges from calibration
images; equalization and absorption themselves never see an image. Results go to ``benchmarks/results/dfq-<network>.json``, after
every row; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

import halfbyte as hb
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.evaluate import evaluate, paired
from halfbyte.run import Tap, keep
from halfbyte.targets import find

NETWORKS = ("mobilenet_v2", "efficientnet_lite0", "resnet50")
TIMED = 100  # images of the float pass that the whole data-free path is compared with
# Row, the network it starts from, whether the rounding error of the weights goes into the biases.
STEPS = (
    ("original", "original", False),
    ("original + corrected", "original", True),
    ("equalized as published", "published", False),
    ("equalized as published + absorbed", "published, absorbed", False),
    ("equalized as published + absorbed + corrected", "published, absorbed", True),
    ("equalized for noise", "noise", False),
    ("equalized for noise + absorbed + corrected", "noise, absorbed", True),
)
RECIPE = STEPS[-1][0]
PER_CHANNEL = "original, per channel"


class Reference:
    """The float network on the labelled images: what every row is compared with."""

    def __init__(self, m: hb.QModel, name: str, limit: int | None) -> None:
        self.batches = list(zoo.labelled(name, limit=limit))
        self.targets = torch.cat([y for _, y in self.batches])
        self.logits = self.run(m.as_float(), keep)
        self.right = self.scored(self.logits)

    def run(self, m: hb.QModel, tap: Tap) -> Tensor:
        with torch.inference_mode():
            return torch.cat([hb.run(m, (x,), tap)[0] for x, _ in self.batches])

    def scored(self, logits: Tensor) -> Tensor:
        return (logits.argmax(1) == self.targets).double()

    def compared(self, m: hb.QModel, tap: Tap) -> dict[str, Any]:
        """Top-1 of a simulation, and how far it is from float."""
        logits = self.run(m, tap)
        right = self.scored(logits)
        noise = float((logits.double() - self.logits.double()).square().sum())
        signal = float(self.logits.double().square().sum())
        return {
            "top1": float(right.mean()),
            "difference": vars(paired(self.right, right)),
            "agreement": float((logits.argmax(1) == self.logits.argmax(1)).double().mean()),
            "snr_db": 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)),
        }


def save(found: dict[str, Any], path: Path) -> None:
    """Write whole files only: an interruption leaves the previous one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def environment() -> str:
    return f"ONNX Runtime {ort.__version__}, {engine.instruction_set()}"


def images_of(name: str, limit: int | None) -> int | None:
    return limit or (2000 if name.endswith("cifar10") else None)


def transformed(folded: hb.QModel, per_channel: bool) -> dict[str, hb.QModel]:
    """The float networks that the rows start from; all compute the same function."""
    found = {
        "original": folded,
        "published": hb.equalize(folded, method="weights"),
        "noise": hb.equalize(folded, method="noise", per_channel=per_channel),
    }
    return found | {f"{k}, absorbed": hb.absorb_bias(found[k]) for k in ("published", "noise")}


def float_change(networks: dict[str, hb.QModel], x: Tensor) -> dict[str, float]:
    """The largest change of a float output that a transform causes, relative to the largest output."""
    with torch.inference_mode():
        outputs = {k: hb.run(m.as_float(), (x,))[0] for k, m in networks.items()}
    before = outputs.pop("original")
    return {k: float((y - before).abs().max() / before.abs().max()) for k, y in outputs.items()}


def data_free(m: hb.QModel, target: hb.Target) -> hb.QModel:
    """The whole path without data, from the captured network to one that can be exported."""
    m = hb.equalize(hb.fold_batchnorm(m), method="noise", per_channel=target.per_channel)
    return hb.calibrate(hb.place(hb.absorb_bias(m), target), None)


def cost(m: hb.QModel, name: str, target: hb.Target, rounds: int) -> dict[str, float]:
    """Seconds of the data-free path and of a float pass in turns, so that both see the same machine; medians over the rounds."""
    batches = list(zoo.calibration(name, TIMED))
    reference = hb.fold_batchnorm(m).as_float()

    def float_pass() -> None:
        with torch.inference_mode():
            for x in batches:
                hb.run(reference, (x,))

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    float_pass()
    times = [(seconds(float_pass), seconds(lambda: data_free(m, target))) for _ in range(rounds)]
    before, after = zip(*times, strict=True)
    return {
        "images": sum(len(x) for x in batches),
        "float_pass_seconds": statistics.median(before),
        "data_free_seconds": statistics.median(after),
        "ratio": statistics.median(a / b for b, a in times),
        "rounds": rounds,
    }


def exported(q: hb.QModel, name: str, limit: int | None) -> dict[str, Any]:
    """The file of a row, proven and evaluated in the engine."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        parity = hb.export_onnx(q, file)
        result = evaluate(q, (((x,), y) for x, y in zoo.labelled(name, limit=limit)), file=file)
        return {**result.to_dict(), "parity": str(parity), "bytes": file.stat().st_size}


def measure(name: str, samples: int, limit: int | None, target: hb.Target, rounds: int, path: Path) -> None:
    net, example = getattr(zoo, name)()
    m = hb.capture(net, example)
    batches = [(x,) for x in zoo.calibration(name, samples)]
    networks = transformed(hb.fold_batchnorm(m), target.per_channel)
    reference = Reference(networks["original"], name, limit)
    found: dict[str, Any] = {
        "network": name,
        "target": target.name,
        "samples": sum(len(x) for (x,) in batches),
        "images": len(reference.targets),
        "float": float(reference.right.mean()),
        "float_change": float_change(networks, batches[0][0]),
        "cost": cost(m, name, target, rounds),
        "engine": environment(),
        "rows": [],
    }
    wide = find("onnxruntime", saturates=engine.saturates())
    rows = [(*step, target) for step in STEPS] + [(PER_CHANNEL, "original", False, wide)]
    for ranges, data in (("batch norms", None), ("data", batches)):
        for step, start, correct, where in rows:
            row: dict[str, Any] = {"step": step, "ranges": ranges, "target": where.name}
            try:
                q = hb.calibrate(hb.place(networks[start], where), data, correct=correct)
            except hb.UsageError as error:  # a network whose batch norms do not describe every value
                row["impossible"] = str(error)
            else:
                row.update(reference.compared(q, hb.simulate(q)))
            found["rows"].append(row)
            save(found, path)
            print(name, row, flush=True)
            if step == RECIPE and data is None and "top1" in row:
                found["file"] = exported(q, name, limit)
                save(found, path)
                print(name, {k: found["file"][k] for k in ("float", "simulation", "file", "agreement")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images where ranges come from data")
    parser.add_argument("--limit", type=int, help="labelled images to use")
    parser.add_argument("--rounds", type=int, default=3, help="how often the seconds are measured")
    parser.add_argument("--target", default="onnxruntime-per-tensor")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    target = find(options.target, saturates=engine.saturates())
    for name in options.networks:
        limit = images_of(name, options.limit)
        measure(name, options.samples, limit, target, options.rounds, options.results / f"dfq-{name}.json")


if __name__ == "__main__":
    main()
