"""BENCHMARKS.md from the files in benchmarks/results: ``python benchmarks/tables.py``."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Measured elsewhere on 800 other photos (CIFAR: first 2,000 test images), newest releases of November 2026, on a CPU with VNNI:
# float accuracy there, and the best and ONNX Runtime's W8A8 per channel. Compare drops, not levels.
ANCHORS = {
    "efficientnet_lite0": (88.5, "88.25 (torchao, Intel NC)", 87.9),
    "mobilenet_v2": (85.25, "83.63 (NNCF)", 80.12),
    "resnet50": (91.25, "91.37 (NNCF)", 90.75),
    "resnet20_cifar10": (91.65, "91.8 (Sony MCT)", 91.7),
}


def read(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((HERE / "results").glob(pattern))]


def percent(x: float) -> str:
    return f"{100 * x:.2f}"


def classification(rows: list[dict[str, Any]]) -> list[str]:
    out = ["| network | images | float | simulation | file | from float (95 %, paired) | file = simulation | `quantize_static` |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        e, rival = r["evaluation"], r["rivals"]["quantize_static"]
        d = e["difference"]
        out.append(
            f"| {r['network']} | {e['samples']} | {percent(e['float'])} | {percent(e['simulation'])} | {percent(e['file'])} "
            f"| {d['points']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}) | {percent(e['agreement']['file_simulation'])} % "
            f"| {percent(rival['top1'])} ({rival['difference']['points']:+.2f}) |"
        )
    return out


def work(rows: list[dict[str, Any]]) -> list[str]:
    out = [
        "| network | float pass over the images | quantize | ratio | peak memory, float | peak memory, quantize |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        c = r["cost"]
        out.append(
            f"| {r['network']} | {c['float_pass_seconds']:.1f} s | {c['quantize_seconds']:.1f} s | {c['ratio']:.1f} "
            f"| {c['float_peak_bytes'] / 1e6:.0f} MB | {c['quantize_peak_bytes'] / 1e6:.0f} MB |"
        )
    return out


def speed(rows: list[dict[str, Any]]) -> list[str]:
    out = ["| network | float | halfbyte | float / halfbyte | per channel / halfbyte | defaults / halfbyte | MB, float | MB |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        s = r["speed"]
        out.append(
            f"| {r['network']} | {s['float_ms']:.2f} ms | {s['halfbyte_ms']:.2f} ms | {s['float_over_halfbyte']:.2f} "
            f"| {s['quantize_static_over_halfbyte']:.2f} | {s['quantize_static_default_over_halfbyte']:.2f} "
            f"| {r['float_bytes'] / 1e6:.1f} | {r['bytes'] / 1e6:.1f} |"
        )
    return out


def tasks(rows: list[dict[str, Any]]) -> list[str]:
    out = [
        "| network | metric | float | simulation | file | difference | operations in float in the engine |",
        "|---|---|---|---|---|---|---|",
    ]
    out += [
        f"| {r['network']} | {r['metric']} | {r['float']:.4f} | {r['simulation']:.4f} | {r['file']:.4f} "
        f"| {r['file'] - r['float']:+.4f} | {r['float_nodes']} |"
        for r in rows
    ]
    return out


def main() -> None:
    rows, others = read("classification-*.json"), read("task-*.json")
    engine = rows[0]["engine"] if rows else ""
    lines = [
        "# Benchmarks",
        "",
        "Every figure comes from a script in `benchmarks/` and can be measured again:",
        "`HALFBYTE_DATA=... python benchmarks/classification.py`, `python benchmarks/other_tasks.py`, then",
        "`python benchmarks/tables.py`. Two CPU cores, " + engine + ".",
        "",
        "## W8A8 on classifiers, 256 unlabelled calibration images",
        "",
        "Every file is proven equal to the integer simulation before it is evaluated. `quantize_static` is ONNX Runtime's own",
        "quantizer on the same network, images and machine: per channel, unsigned activations, with `reduce_range` where the",
        "CPU saturates pairs of products.",
        "",
        *classification(rows),
        "",
        "Measured elsewhere on 800 other photos, on a CPU with VNNI (compare drops): "
        + "; ".join(f"{n}: float {f}, best {best}, ONNX Runtime {o}" for n, (f, best, o) in ANCHORS.items())
        + ".",
        "",
        "## Speed of the result, batch 1, interleaved runs in one process",
        "",
        "*Per channel* and *defaults* are `quantize_static` with the settings above and with its own defaults.",
        "",
        *speed(rows),
        "",
        "## Cost of the work",
        "",
        *work(rows),
        "",
        "## Other tasks, W8A8",
        "",
        *(tasks(others) if others else ["Not measured yet: `python benchmarks/other_tasks.py`."]),
        "",
    ]
    (HERE.parent / "BENCHMARKS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
