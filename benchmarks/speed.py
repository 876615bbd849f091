"""Only the speed of the results, for a quiet machine: replaces the ``speed`` part of ``benchmarks/results/classification-*.json``.

    HALFBYTE_DATA=/path/to/data python benchmarks/speed.py [network ...]

Speed does not depend on the ranges, so 32 calibration images serve.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType

import halfbyte as hb
from classification import NETWORKS, rival, speeds
from given import RESULTS, zoo
from halfbyte import engine
from halfbyte.benchmark import float_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    for name in parser.parse_args().networks:
        result = RESULTS / f"classification-{name}.json"
        net, example = getattr(zoo, name)()
        batches = list(zoo.calibration(name, 32))
        m = hb.capture(net, example)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = {"halfbyte": folder / "model.onnx", "float": folder / "float.onnx"}
            hb.export_onnx(hb.quantize(m, batches), files["halfbyte"])
            float_file(hb.fold_batchnorm(m), files["float"])
            per_channel = {"per_channel": True, "weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            kinds = {
                "quantize_static": {**per_channel, "reduce_range": engine.saturates()},
                "quantize_static_default": {},
            }
            for kind, options in kinds.items():
                files[kind] = rival(files["float"], folder, batches, **options)[0]
            measured = speeds(files, tuple(example[0].shape), 60, torch.get_num_threads())
        found = json.loads(result.read_text())
        found["speed"] = measured
        result.write_text(json.dumps(found, indent=1) + "\n")
        print(name, measured, flush=True)


if __name__ == "__main__":
    main()
