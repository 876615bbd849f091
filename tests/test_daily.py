"""The commands of daily use on one small result: limits, comparison, proof elsewhere."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import halfbyte as hb
from halfbyte.check import check, parse_size
from halfbyte.compare import compare
from halfbyte.data import calibration
from halfbyte.errors import UsageError
from halfbyte.evaluate import forwards
from halfbyte.output import open_output
from halfbyte.proof import write_proof
from halfbyte.prove import exposed, read
from tiny import files, halfbyte, network, pictures, quantized


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out`` (W8A8), ``few`` (W2A2 in every layer), and noise with labels that the float network gives."""
    folder = tmp_path_factory.mktemp("daily")
    out = quantized(folder)
    quantized(folder, "--bits", "W2A2", "--uniform", "--rounding", "nearest", out="few")
    noise = np.random.default_rng(5)
    x = (noise.standard_normal((256, 3, 1, 1)) + noise.standard_normal((256, 3, 8, 8))).astype(np.float32)
    (y,) = hb.predict(open_output(out)[0].as_float(), (torch.from_numpy(x),))
    np.savez(folder / "labelled.npz", x=x, target=y.argmax(1).numpy())
    np.save(folder / "unlabelled.npy", x)
    return folder


def disagreement(out: Path, x: np.ndarray) -> float:
    """Points of decisions that the file and the float network take differently, counted without Halfbyte's own counting."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    (expected,) = hb.predict(open_output(out)[0].as_float(), (torch.from_numpy(x),))
    return float((got.argmax(1) != expected.argmax(1).numpy()).mean() * 100)


@pytest.mark.parametrize("way", ["data", "unlabelled"])
def test_drop_is_what_was_counted(done: Path, way: str) -> None:
    source = done / ("labelled.npz" if way == "data" else "unlabelled.npy")
    lost = disagreement(done / "few", np.load(done / "unlabelled.npy"))
    assert lost > 0  # or the test says nothing
    for most, held in ((lost + 0.1, True), (lost - 0.1, False)):
        (limit,) = check(done / "few", max_drop=most, **{way: source}).limits
        assert limit.measured == pytest.approx(lost)
        assert limit.held is held


def test_check_in_a_pipeline(done: Path) -> None:
    size, before = (done / "out" / "model.onnx").stat().st_size, files(done / "out")
    good = ("check", done / "out", "--max-size", size, "--max-drop", 100, "--unlabelled", done / "unlabelled.npy")
    result = halfbyte(*good, "--min-speedup", 0.0001, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()] == ["held"] * 4
    result = halfbyte("check", done / "out", "--max-size", size - 1)
    assert result.exit_code == 3
    assert "1 of 1 limits missed" in result.output
    assert f"{size:,} bytes" in result.output
    told = json.loads(halfbyte("check", done / "out", "--max-size", size - 1, "--json").stdout)
    assert (told["held"], told["limits"][0]["measured"]) == (False, size)
    result = halfbyte("check", done / "out", "--min-speedup", 1e6, "--threads", 1, "-q")
    assert result.exit_code == 3
    assert files(done / "out") == before


def test_a_file_that_was_not_proven(done: Path, tmp_path: Path) -> None:
    for name, content in (("cut", b"short"), ("other", (done / "few" / "model.onnx").read_bytes())):
        shutil.copytree(done / "out", tmp_path / name)
        (tmp_path / name / "model.onnx").write_bytes(content)
        result = halfbyte("check", tmp_path / name, "--max-size", "5MB")
        assert result.exit_code == 4
        assert "is not the file that was proven" in result.output
    assert halfbyte("check", done / "out", "--max-size", "5MB").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [("--threads", 0), ("--threads", -1), ("--max-drop", "nan"), ("--max-drop", "inf"), ("--min-speedup", "nan")],
)
def test_numbers_that_make_no_sense(done: Path, options: tuple[str, object]) -> None:
    result = halfbyte("check", done / "out", "--max-size", "5MB", *options)
    assert result.exit_code == 2


def test_a_seed_that_makes_no_sense(tmp_path: Path) -> None:
    result = halfbyte("quantize", network(tmp_path, "pair"), "--data-free", "-o", tmp_path / "out", "--seed", -1)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_result_that_was_moved(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "out", tmp_path / "moved here")
    result = halfbyte("diagnose", tmp_path / "moved here", "--no-repairs", "--threads", 1)
    assert f"halfbyte evaluate '{tmp_path / 'moved here'}'" in result.output
    modes = {p.stat().st_mode for p in (done / "out" / "checkpoint").iterdir()}
    assert len(modes) == 1  # who may read one may read the other


def test_check_uses_what_was_measured_before(done: Path) -> None:
    out = shutil.copytree(done / "few", done / "evaluated")
    assert halfbyte("evaluate", out, "--data", done / "labelled.npz", "-q").exit_code == 0
    assert halfbyte("benchmark", out, "--rounds", 3, "--threads", 1, "-q").exit_code == 0
    stored = json.loads((out / "summary.json").read_text())
    drop, speed = check(out, max_drop=1, min_speedup=1).limits
    assert drop.measured == pytest.approx(-stored["evaluation"]["difference"]["points"])
    assert speed.measured == stored["benchmark"]["ratio"]


def test_check_refuses_what_it_cannot_know(done: Path) -> None:
    cases = {
        "there is no limit": (),
        "the drop is not known": ("--max-drop", 1),
        "not a size": ("--max-size", "big"),
        "were both given": ("--max-drop", 1, "--data", done / "labelled.npz", "--unlabelled", done / "unlabelled.npy"),
    }
    for words, options in cases.items():
        result = halfbyte("check", done / "out", *options)
        assert result.exit_code == 2
        assert words in result.output
    out = shutil.copytree(done / "out", done / "no file")
    (out / "model.onnx").unlink()
    assert halfbyte("check", out, "--max-size", "1MB").exit_code == 4


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5MB", "4.5 MiB", "10kb", "7", 7)] == [5_000_000, 4_718_592, 10_000, 7, 7]
    for bad in ("", "-5MB", "5 m", "MB"):
        with pytest.raises(UsageError, match="not a size"):
            parse_size(bad)


def test_compare_is_paired_on_the_same_samples(done: Path) -> None:
    x = np.load(done / "unlabelled.npy")
    found = compare([done / "out", done / "few"], unlabelled=done / "unlabelled.npy")
    first, second = found.results
    lost = [disagreement(done / name, x) for name in ("out", "few")]
    assert [first.score, second.score] == pytest.approx([1 - p / 100 for p in lost])
    assert second.difference is not None and second.against_first is not None and first.against_first is None
    assert second.difference.points == pytest.approx(-lost[1])
    assert second.against_first.points == pytest.approx(lost[0] - lost[1])
    labelled = compare([done / "out", done / "few"], data=done / "labelled.npz")
    assert [r.score for r in labelled.results] == [first.score, second.score]  # these labels are the float network's
    assert {c.name: c.formats for c in found.layers} == dict.fromkeys(("first", "last"), ("W8A8", "W2A2"))
    assert all(a is not None and b is not None and a > b for a, b in (c.noise for c in found.layers))


def test_compare_as_page_and_data(done: Path) -> None:
    evil = shutil.copytree(done / "few", done / "<b>few")
    page = done / "page.html"
    result = halfbyte(
        "compare", done / "out", evil, "--benchmark", "--rounds", 3, "--threads", 1, "--html", page, "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [r["bits"] for r in told["results"]] == ["W8A8", "W2A2"]
    assert all(r["proven"] and r["milliseconds"] > 0 for r in told["results"])
    assert "--data" in told["notes"][0]
    text = page.read_text()
    assert "&lt;b&gt;few" in text
    assert "<b>" not in text
    text = halfbyte("compare", done / "out", evil).output
    assert "2 layers differ" in text
    assert "W2A2" in text


def test_compare_refuses(done: Path, tmp_path: Path) -> None:
    for words, folders in {"at least two": ["out"], "twice": ["out", "out"], "no summary": ["out", "gone"]}.items():
        result = halfbyte("compare", *(done / f for f in folders))
        assert result.exit_code == 2
        assert words in result.output


WITHOUT = """
import sys
for name in "torch onnx onnx_ir onnxscript scipy safetensors PIL psutil jinja2 matplotlib".split():
    sys.modules[name] = None
from halfbyte.cli import main
main(["prove", sys.argv[1]])
"""


def test_prove_on_a_bare_folder_without_torch(done: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "proof.npz"):
        shutil.copy(done / "out" / name, tmp_path)
    found = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("equal on ONNX Runtime")


def test_prove_names_the_first_value_that_differs(done: Path, tmp_path: Path) -> None:
    """A proof that expects another integer, and a file that computes another one."""
    out = shutil.copytree(done / "out", tmp_path / "out")
    described, arrays = read(out / "proof.npz")
    names = [r["name"] for r in described["values"]]
    assert [r["name"] for r in described["values"] if r["output"]] == ["output"]
    assert any(r["exact"] for r in described["values"] if not r["output"])

    def rewritten(position: int | None, model: Path) -> str:
        changed, record = dict(arrays), json.loads(json.dumps(described))
        record["model"] = hashlib.sha256(model.read_bytes()).hexdigest()
        if position is not None:
            changed[f"value{position}"] = arrays[f"value{position}"] + 3
            record["values"][position]["digests"] = ["0" * 32] * record["samples"]
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        np.savez(out / "proof.npz", description=text, **changed)
        result = halfbyte("prove", out)
        assert result.exit_code == (4 if position is not None or model != done / "out" / "model.onnx" else 0)
        return result.output

    for position, name in enumerate(names):
        assert f"'{name}' differs at element 0" in rewritten(position, done / "out" / "model.onnx")
    model = onnx.load(str(out / "model.onnx"))
    weight = next(
        t for t in model.graph.initializer if t.name.startswith("last.weight") and t.data_type == TensorProto.INT8
    )
    values = onnx.numpy_helper.to_array(weight).copy()
    values.reshape(-1)[0] += 40 if values.reshape(-1)[0] < 0 else -40
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(out / "model.onnx"))
    assert "differs" in rewritten(None, out / "model.onnx")
    np.savez(out / "proof.npz", description=np.frombuffer(json.dumps(described).encode(), np.uint8), **arrays)
    assert "is not the file" in halfbyte("prove", out).output


def test_prove_refuses_what_it_cannot_read(done: Path, tmp_path: Path) -> None:
    assert halfbyte("prove", tmp_path).exit_code == 2
    shutil.copy(done / "out" / "model.onnx", tmp_path)
    for content in (b"", b"PK nothing", (done / "out" / "proof.npz").read_bytes()[:300]):
        (tmp_path / "proof.npz").write_bytes(content)
        result = halfbyte("prove", tmp_path)
        assert result.exit_code == 2
        assert "proof.npz' is damaged" in result.output


def test_values_behind_a_rounding_difference_are_not_judged(tmp_path: Path) -> None:
    """A network with a float operation between integer layers: its result may be off by a step elsewhere."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    )
    x = torch.randn(32, 6)
    m = hb.quantize(hb.capture(net.eval(), (x[:2],)), [x])
    hb.export_onnx(m, tmp_path / "model.onnx")
    write_proof(m, tmp_path / "model.onnx", tmp_path / "proof.npz")
    assert hb.prove(tmp_path).equal
    described, arrays = read(tmp_path / "proof.npz")
    position = next(i for i, r in enumerate(described["values"]) if not r["exact"] and r["behind"])  # the sigmoid's
    later = sum(position in r["behind"] for r in described["values"])
    assert later
    described["values"][position]["digests"] = ["0" * 32] * described["samples"]
    for shift, equal in ((1, True), (2, False)):
        codes = arrays[f"value{position}"].astype(np.int64) + shift
        text = np.frombuffer(json.dumps(described).encode(), np.uint8)
        np.savez(tmp_path / "proof.npz", **{**arrays, f"value{position}": codes}, description=text)
        found = hb.prove(tmp_path)
        assert (found.equal, found.rounded, found.unjudged) == ((True, 1, later) if equal else (False, 0, 0))


def test_outputs_added_without_a_parser(done: Path) -> None:
    data = (done / "out" / "model.onnx").read_bytes()
    names = [f"value{i}" for i in range(40)]
    before, after = onnx.load_from_string(data), onnx.load_from_string(exposed(data, names))
    copies = after.graph.node[len(before.graph.node) :]
    assert [(n.op_type, *n.input) for n in copies] == [("Identity", f"{n}:codes") for n in names]
    assert [o.name for o in after.graph.output[len(before.graph.output) :]] == [o for n in copies for o in n.output]
    del after.graph.output[len(before.graph.output) :], after.graph.node[len(before.graph.node) :]
    assert after == before


def test_a_file_of_raw_pixels_is_judged_like_one_of_floats(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 24)
    net, common = (
        network(tmp_path),
        ("--calibration", photos, "--size", 8, "--mean", 127, "--std", 64, "--threads", 1, "-q"),
    )
    for name, kind in (("floats", "float32"), ("pixels", "uint8")):
        assert halfbyte("quantize", net, *common, "--input", kind, "-o", tmp_path / name).exit_code == 0
    found = compare([tmp_path / "floats", tmp_path / "pixels"], unlabelled=photos)
    assert [r.samples for r in found.results] == [24, 24]
    assert found.results[1].agreement == agreed(tmp_path / "pixels", photos)


def agreed(out: Path, photos: Path) -> float:
    """Share of decisions on which file and float network agree, through the ways that ``evaluate`` runs."""
    m, file, preprocess, _ = open_output(out)
    ways = forwards(m, file)
    (x,) = next(iter(calibration(photos, preprocess=preprocess, input_names=("x",), samples=24, batch=24)))
    return float((ways["file"](x).argmax(1) == ways["float"](x).argmax(1)).double().mean())  # type: ignore[union-attr]
