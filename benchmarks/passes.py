"""What Descent alone costs, in float passes over the same calibration images.

    HALFBYTE_DATA=/path/to/data python benchmarks/passes.py [network ...] [--threads 2]

Each network runs in a process of its own. A float pass is the PyTorch network itself, batch after batch, before Descent (when the
process has hardly any memory yet, and every large tensor is new pages) and after it. Medians of three. Results go to
``benchmarks/results/passes-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfbyte as hb
from dfq import environment, save
from given import RESULTS, zoo
from halfbyte.job import Stages
from solvers import calibrated

NETWORKS = ("efficientnet_lite0", "mobilenet_v2", "resnet50", "resnet20_cifar10")
PASSES = 3


@torch.no_grad()
def float_pass(net: nn.Module, batches: list[Tensor]) -> float:
    start = time.perf_counter()
    for x in batches:
        net(x)
    return time.perf_counter() - start


def measure(name: str, samples: int, threads: int, path: Path) -> None:
    torch.set_num_threads(threads)
    net, example = getattr(zoo, name)()
    batches = list(zoo.calibration(name, samples))
    before = [float_pass(net, batches) for _ in range(PASSES)]
    data = [(x,) for x in batches]
    q = calibrated(net, example, data)
    stages = Stages()
    stages.run("descent", lambda: hb.reconstruct(q, data, hb.Descent()))
    seconds, peak = stages.rows[0]["seconds"], stages.rows[0]["peak_memory_bytes"]
    found: dict[str, Any] = {"network": name, "engine": environment(), "threads": threads, "samples": samples}
    found |= {"descent": seconds, "peak_bytes": peak, "before": statistics.median(before)}
    found["after"] = statistics.median(float_pass(net, batches) for _ in range(PASSES))
    save(found, path)
    print(found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        path = options.results / f"passes-{name}.json"
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.samples, options.threads, path)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
