"""``--max-drop`` on real networks: what the search ends with, what it costs, and what the file loses on photos it has not seen.

    HALFBYTE_DATA=/path/to/data python benchmarks/limits.py [network ...] [--max-drop 0.5] [--bits W8A8]

No labels: points are of decisions that differ from the float network's. Results go to ``benchmarks/results/``, as
``limits-<network>-<bits>-<limit>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import halfbyte as hb
from classification import NETWORKS
from dfq import Reference, images_of, save
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.shown import plain
from low_bits import scored
from other_engine import logits


def measured(name: str, options: argparse.Namespace, file: Path) -> dict[str, Any]:
    net, example = getattr(zoo, name)()
    m, bits = hb.capture(net, example), hb.bits(options.bits)
    photos = list(zoo.calibration(name, options.images))
    widths = {"weight_bits": bits.weights, "activation_bits": bits.activations, "samples": options.samples}
    start = time.perf_counter()
    hb.quantize(m, photos, **widths)
    single = time.perf_counter() - start
    start = time.perf_counter()
    found = hb.search(m, photos, max_drop=options.max_drop, **widths)
    seconds = time.perf_counter() - start
    hb.export_onnx(found.model, file)
    reference = Reference(found.model.as_float(), name, images_of(name, options.limit))
    session = engine.session(file)
    unseen = scored(reference, torch.cat([logits(session, x) for x, _ in reference.batches]))
    return {
        "network": name,
        "bits": str(bits),
        "images": options.images,
        "plain_seconds": single,
        "seconds": seconds,
        "unseen": {
            "images": len(reference.targets),
            "changed": 100 * (1 - unseen["agreement"]),
            "lost": -unseen["difference"]["points"],
        },
        **{k: getattr(found, k) for k in ("reached", "limit", "samples", "verdict", "left_out")},
        "chosen": plain(found.chosen),
        "attempts": plain(found.attempts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--max-drop", type=float, default=0.5, help="points")
    parser.add_argument("--bits", default="W8A8", help="widths")
    parser.add_argument("--images", type=int, default=512, help="unlabelled images, of which some are held out")
    parser.add_argument("--samples", type=int, default=256, help="calibration images among them")
    parser.add_argument("--limit", type=int, default=2000, help="images that the search has not seen")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, options, Path(folder) / "model.onnx")
        save(found, options.results / f"limits-{name}-{found['bits'].lower()}-{options.max_drop:g}.json")
        print(found, flush=True)


if __name__ == "__main__":
    main()
