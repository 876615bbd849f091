"""W8A8 for OpenVINO: the file against the integer simulation on photos, and its speed beside NNCF's file of the same network.

    HALFBYTE_DATA=/path/to/data python benchmarks/other_engine.py [network ...] [--limit 800]

NNCF's column needs the package ``nncf``, which Halfbyte does not; it stays empty without. Both quantizers see the same float file
and images. Results go to ``benchmarks/results/openvino-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte as hb
from classification import NETWORKS
from dfq import Reference, images_of, save
from given import RESULTS, zoo
from halfbyte import engine, engine_openvino
from halfbyte.benchmark import float_file, interleaved
from halfbyte.integer import run_integer
from halfbyte.lower import lower
from low_bits import scored

PORTION = 8  # samples run at a time
EQUAL = 1e-5  # of the largest output: floats behind the last integers agree to rounding


def logits(session: Any, x: Tensor) -> Tensor:
    return torch.cat([torch.from_numpy(engine.infer(session, (b,))[0]) for b in x.split(PORTION)])


def by_nncf(float_path: Path, images: list[Tensor], path: Path) -> bool:
    """NNCF's own file with its defaults, if the package is there."""
    if importlib.util.find_spec("nncf") is None:
        return False
    import nncf

    openvino = engine_openvino.package()
    model = openvino.Core().read_model(str(float_path))
    single = [x[i : i + 1].numpy() for x in images for i in range(len(x))]
    quantized = nncf.quantize(model, nncf.Dataset(single), subset_size=len(single))
    openvino.save_model(quantized, str(path), compress_to_fp16=False)
    return True


def timed(files: dict[str, Path], x: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds of each file, and the median over the rounds of each one's time over Halfbyte's."""
    shape = [list(x.shape)]
    sessions = {k: engine_openvino.session(p, threads=torch.get_num_threads(), shapes=shape) for k, p in files.items()}
    calls = [lambda s=s: engine.infer(s, (x,)) for s in sessions.values()]
    times = dict(zip(sessions, interleaved(calls, rounds), strict=True))
    own = times["halfbyte"]
    return {
        k: {
            "ms": 1000 * statistics.median(t),
            "over_halfbyte": statistics.median(a / b for a, b in zip(t, own, strict=True)),
            "mb": (files[k].with_suffix(".bin") if files[k].suffix == ".xml" else files[k]).stat().st_size / 1e6,
        }
        for k, t in times.items()
    }


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    net, example = getattr(zoo, name)()
    m = hb.capture(net, example)
    folded = hb.fold_batchnorm(m)
    batches = list(zoo.calibration(name, options.samples))
    files = {"halfbyte": folder / "halfbyte.onnx", "float": folder / "float.onnx"}
    q = hb.quantize(m, batches, target="openvino", samples=options.samples)
    parity = hb.export_onnx(q, files["halfbyte"])
    float_file(folded, files["float"])
    if by_nncf(files["float"], batches, folder / "nncf.xml"):
        files["nncf"] = folder / "nncf.xml"
    reference = Reference(folded.as_float(), name, images_of(name, options.limit))
    x = torch.cat([x for x, _ in reference.batches])
    low = lower(q)
    expected = torch.cat([run_integer(low, (b,))[0] for b in x.split(PORTION)])
    found = {k: logits(engine_openvino.session(p), x) for k, p in files.items() if k != "float"}
    distance = (found["halfbyte"] - expected).abs().amax(1)
    return {
        "network": name,
        "engine": f"OpenVINO {engine_openvino.version()}, {engine.instruction_set()}",
        "images": len(x),
        "float": float(reference.right.mean()),
        "parity": str(parity),
        "same_decisions": float((found["halfbyte"].argmax(1) == expected.argmax(1)).double().mean()),
        "same_outputs": float((distance <= EQUAL * expected.abs().max()).double().mean()),
        "accuracy": {k: scored(reference, y) for k, y in found.items()},
        "speed": timed(files, batches[0][:1], options.rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--limit", type=int, default=800, help="labelled images to use")
    parser.add_argument("--rounds", type=int, default=200, help="runs of each file, in turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, options, Path(folder))
        save(found, options.results / f"openvino-{name}.json")
        print(found, flush=True)


if __name__ == "__main__":
    main()
