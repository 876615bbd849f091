"""`make demo`: quantize a real network with real photos, prove the file, measure it, report. About three minutes on 2 cores.

The photos are those that lie in the scikit-image package, cut into overlapping pieces: half of the pieces calibrate, the other
half, which the quantizer never sees, are evaluated. Nobody has labelled them, so the float network's own decisions serve as
labels: the scores below are agreement with the float network.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo-out"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
PIECES, PIXELS = 32, 256
NETWORK = "demo/net.py:build"
PICTURES = ["--size", "224", "--mean", "127", "--std", "128"]


def pieces(folder: Path, other: Path) -> int:
    """Cut each photo into squares of different sizes, alternately for calibration and evaluation."""
    rng, count = np.random.default_rng(0), 0
    for name in PHOTOS:
        file = Path(skimage.data.__file__).parent / name
        if not file.exists():
            continue
        photo = Image.open(file).convert("RGB")
        for i in range(PIECES):
            side = int(min(photo.size) * rng.uniform(0.5, 1.0))
            left, top = (int(rng.integers(0, d - side + 1)) for d in photo.size)
            cut = photo.crop((left, top, left + side, top + side)).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            target = folder if i % 2 == 0 else other
            target.mkdir(parents=True, exist_ok=True)
            cut.save(target / f"{file.stem}-{i:02}.png")
            count += 1
    return count


def labels(folder: Path, file: Path) -> None:
    """The float network's decisions on the pieces for evaluation, as labelled data."""
    sys.path.insert(0, str(HERE))
    import torch
    from net import build

    from halfbyte import Preprocess

    prepare, net = Preprocess(size=224, mean=127, std=128), build()
    x = torch.stack([prepare(Image.open(p)) for p in sorted(folder.glob("*.png"))])
    with torch.inference_mode():
        target = torch.cat([net(part).argmax(1) for part in x.split(32)])
    np.savez(file, inputs=x.numpy(), target=target.numpy())


def halfbyte(*arguments: str) -> None:
    """Show a command and run it."""
    print(f"\n$ halfbyte {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "halfbyte", *arguments], check=True, cwd=HERE.parent)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    count = pieces(OUT / "photos", OUT / "held-out")
    print(f"{count} pieces of {len(PHOTOS)} photos from scikit-image in {OUT.name}/")
    labels(OUT / "held-out", OUT / "held-out.npz")
    result = f"{OUT.name}/result"
    halfbyte("quantize", NETWORK, "--calibration", f"{OUT.name}/photos", *PICTURES, "--bits", "W8A8", "-o", result)
    halfbyte("evaluate", result, "--data", f"{OUT.name}/held-out.npz")
    halfbyte("benchmark", result)
    halfbyte("report", result)


if __name__ == "__main__":
    main()
