"""W8A8 on real classifiers: accuracy, cost of the work, speed of the result, beside ONNX Runtime's own quantizer.

    HALFBYTE_DATA=/path/to/data python benchmarks/classification.py [network ...]

Results go to ``benchmarks/results/classification-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import halfbyte as hb
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.benchmark import float_file, interleaved
from halfbyte.evaluate import evaluate, forwards, paired
from halfbyte.job import Stages
from halfbyte.run import run

NETWORKS = ("efficientnet_lite0", "mobilenet_v2", "resnet50", "resnet20_cifar10", "resnet56_cifar10")


class Reader(CalibrationDataReader):
    """The same calibration images for ONNX Runtime's quantizer."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = iter(part for b in batches for part in b.split(8))

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        part = next(self.batches, None)
        return None if part is None else {"x": part.numpy()}


def rival(reference: Path, folder: Path, batches: list[torch.Tensor], **options: Any) -> tuple[Path, float]:
    """ONNX Runtime's quantize_static on the same network and images; its file and seconds."""
    file = folder / f"rival-{len(list(folder.iterdir()))}.onnx"
    prepared = folder / "prepared.onnx"
    start = time.perf_counter()
    quant_pre_process(str(reference), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(file), Reader(batches), **options)
    return file, time.perf_counter() - start


def labelled(name: str, limit: int | None) -> Any:
    return (((x,), y) for x, y in zoo.labelled(name, limit=limit))


def correct(forward: Any, name: str, limit: int | None) -> torch.Tensor:
    return torch.cat([(forward(*x).argmax(1) == y).double() for x, y in labelled(name, limit)])


def float_pass(m: hb.QModel, batches: list[torch.Tensor]) -> tuple[float, int]:
    """Seconds and peak memory of running the float network over the calibration images."""
    stages = Stages()
    with torch.inference_mode():
        run(m, (batches[0],))
        stages.run("float", lambda: [run(m, (b,)) for b in batches])
    return stages.rows[0]["seconds"], stages.rows[0]["peak_memory_bytes"]


def speeds(files: dict[str, Path], shape: tuple[int, ...], rounds: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of each file, and the ratios of rounds against float and against the rival."""
    x = np.random.default_rng(0).standard_normal((1, *shape[1:])).astype(np.float32)
    sessions = {k: engine.session(f, threads=threads) for k, f in files.items()}
    calls = [lambda s=s: s.run(None, {s.get_inputs()[0].name: x}) for s in sessions.values()]
    times = dict(zip(files, interleaved(calls, rounds), strict=True))
    found: dict[str, Any] = {f"{k}_ms": statistics.median(t) * 1e3 for k, t in times.items()}
    for other in files:
        if other != "halfbyte":
            ratios = [a / b for a, b in zip(times[other], times["halfbyte"], strict=True)]
            found[f"{other}_over_halfbyte"] = statistics.median(ratios)
    return found


def measure(
    name: str, samples: int, limit: int | None, rounds: int, target: str, bits: tuple[int, int]
) -> dict[str, Any]:
    net, example = getattr(zoo, name)()
    batches = list(zoo.calibration(name, samples))
    m = hb.capture(net, example)
    folded = hb.fold_batchnorm(m)
    seconds, memory = float_pass(folded, batches)
    stages = Stages()
    q = stages.run(
        "quantize",
        lambda: hb.quantize(m, batches, target=target, weight_bits=bits[0], activation_bits=bits[1], samples=samples),
    )
    cost = stages.rows[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file, reference = folder / "model.onnx", folder / "float.onnx"
        parity = stages.run("export and prove", lambda: hb.export_onnx(q, file))
        result = evaluate(q, labelled(name, limit), file=file)
        float_file(folded, reference)
        narrow = engine.saturates()
        kinds = {
            "quantize_static": {
                "per_channel": True,
                "reduce_range": narrow,
                "weight_type": QuantType.QInt8,
                "activation_type": QuantType.QUInt8,
            },
            "quantize_static_default": {},
        }
        files, rivals = {"halfbyte": file, "float": reference}, {}
        before = correct(forwards(q, None)["float"], name, limit)
        for kind, options in kinds.items():
            files[kind], spent = rival(reference, folder, batches, **options)
            rivals[kind] = {"seconds": spent, "bytes": files[kind].stat().st_size}
            if kind == "quantize_static":  # the default (signed activations, per tensor) is timed only
                s = engine.session(files[kind])
                right = correct(lambda x, s=s: torch.from_numpy(engine.infer(s, (x,))[0]), name, limit)
                rivals[kind] |= {"top1": float(right.mean()), "difference": vars(paired(before, right))}
        return {
            "network": name,
            "target": q.target.name if q.target else "",
            "bits": list(bits),
            "samples": samples,
            "evaluation": result.to_dict(),
            "rivals": rivals,
            "cost": {"float_pass_seconds": seconds, "quantize_seconds": cost["seconds"], "ratio": cost["seconds"] / seconds,
                     "float_peak_bytes": memory, "quantize_peak_bytes": cost["peak_memory_bytes"]},
            "bytes": file.stat().st_size,
            "float_bytes": reference.stat().st_size,
            "speed": speeds(files, tuple(example[0].shape), rounds, torch.get_num_threads()),
            "parity": str(parity),
            "kernels": parity.kernels,
            "float_nodes": [list(n) for n in parity.float_nodes],
            "engine": f"ONNX Runtime {ort.__version__}, {engine.instruction_set()}",
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, help="labelled images to use")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--bits", default="W8A8")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.networks:
        limit = options.limit or (2000 if name.endswith("cifar10") else None)
        found = measure(name, options.samples, limit, options.rounds, options.target, hb_bits(options.bits))
        suffix = (
            "" if (options.target, options.bits) == ("onnxruntime", "W8A8") else f"-{options.target}-{options.bits}"
        )
        (RESULTS / f"classification-{name}{suffix}.json").write_text(json.dumps(found, indent=1) + "\n")
        e = found["evaluation"]
        print(
            name,
            {k: e[k] for k in ("float", "simulation", "file", "difference", "agreement")},
            {k: r.get("top1") for k, r in found["rivals"].items()},
            found["cost"],
            found["speed"],
            flush=True,
        )


def hb_bits(text: str) -> tuple[int, int]:
    from halfbyte.formats import parse_bits

    return parse_bits(text)


if __name__ == "__main__":
    main()
