"""Recipes: listed, read, checked, followed; guards keep the better model; no data at all works from start to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import halfbyte as hb
from halfbyte import recipe
from halfbyte.cli import main
from halfbyte.pipeline import NO_DATA
from halfbyte.preprocess import Preprocess

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).train()
    for _ in range(10):
        net(torch.randn(16, 3, 8, 8))
    return net.eval(), torch.zeros(1, 3, 8, 8)

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)
"""


def network() -> hb.QModel:
    space: dict[str, object] = {}
    exec(NET, space)
    net, example = space["build"]()  # type: ignore[operator]
    return hb.capture(net, example)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:build"


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_round_trips_through_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe.text(name))
    assert recipe.load_recipe(str(path)) == recipe.load_recipe(name)
    code, out, _ = invoke("recipes", name)
    assert code == 0
    assert out.strip() == recipe.text(name).strip()


def test_recipes_are_listed() -> None:
    code, out, _ = invoke("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe.names()
    assert [r["name"] for r in json.loads(invoke("recipes", "--json")[1])] == recipe.names()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('version = 1\n[[steps]]\nstep = "equalise"', "did you mean 'equalize'"),
        ('version = 1\n[[steps]]\nstep = "equalize"\nmetod = "noise"', "unknown key 'metod'; did you mean 'method'"),
        ('version = 1\n[[steps]]\nstep = "equalize"\nmethod = "both"', "'both' is not one of 'noise', 'weights'"),
        ('version = 1\n[[steps]]\nstep = "equalize"\nguard = 1', "1 is not true or false"),
        ('version = 1\n[[steps]]\nstep = "split_tensor"\nshare = 2', "2 is not a number from 0 to 1"),
        ('version = 2\n[[steps]]\nstep = "equalize"', "reads version 1"),
        ('version = 1\ntitle = "x"\n[[steps]]\nstep = "equalize"', "unknown key 'title'"),
        ("version = 1", "needs [[steps]]"),
        ("version = ", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_one_readable_error(text: str, message: str, tmp_path: Path, file: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    code, _, err = invoke("quantize", file, "--data-free", "--recipe", str(path), "-o", str(tmp_path / "out"))
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(hb.UsageError, match="did you mean 'dfq'"):
        recipe.load_recipe("dqf")


def test_a_recipe_without_grids_is_refused() -> None:
    short = recipe.parse({"version": 1, "steps": [{"step": "fold_batchnorm"}]}, "short")
    with pytest.raises(hb.UsageError, match="place and calibrate"):
        hb.quantize(network(), recipe=short)


def test_no_data_at_all_is_proven(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = invoke("quantize", file, "-o", str(out), "--target", "onnxruntime-per-tensor")
    assert code == 0, err
    assert err.startswith(f"no calibration data: {NO_DATA}")
    described = json.loads((out / "summary.json").read_text())
    assert described["parity"]["proven"]
    assert described["configuration"]["recipe"]["name"] == "dfq"
    assert described["configuration"]["calibration_samples"] == 0
    code, _, err = invoke("quantize", file, "-o", str(tmp_path / "asked"), "--data-free")
    assert code == 0, err
    assert "no calibration data" not in err


def test_no_data_is_close_to_float() -> None:
    m = network()
    x = torch.cat(batches())
    q = hb.quantize(m, target="onnxruntime-per-tensor")
    a, b = hb.run(m, (x,))[0], hb.predict(q, (x,))[0]
    assert float((a - b).square().mean() / a.var()) < 0.01


def test_data_and_no_data_contradict_each_other(file: str) -> None:
    code, _, err = invoke("quantize", file, "--data-free", "--calibration", "x")
    assert code == 2
    assert "contradict" in err


def test_a_network_without_batch_norm_is_told_what_is_missing(file: str, tmp_path: Path) -> None:
    plain, out = file.replace(":build", ":plain"), str(tmp_path / "out")
    code, _, err = invoke("quantize", plain, "--data-free", "-o", out)
    assert code == 2
    assert "--range" in err
    assert "input" in err
    assert not Path(out).exists()
    names = err.split("describes them: ")[1].split(";")[0].split(", ")
    ranges = [f"--range={name}=-3..3" for name in names]
    code, _, err = invoke("quantize", plain, "--data-free", "-o", out, *ranges)
    assert code == 0, err


def test_the_input_range_follows_from_the_preprocessing() -> None:
    pre = Preprocess(size=8, mean=(0.0, 127.5, 255.0), std=(255.0, 127.5, 51.0))
    q = hb.quantize(network(), preprocess=pre)
    grid = q.grid("input")
    assert grid is not None
    assert float(grid.minimum) == pytest.approx(-5.0, abs=0.05)
    assert float(grid.maximum) == pytest.approx(1.0, abs=0.05)


def test_a_guard_undoes_what_makes_things_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(m: hb.QModel, c: recipe.Context) -> hb.QModel:
        return hb.QModel(**{**vars(m), "params": {k: v * 2 if "bias" in k else v for k, v in m.params.items()}})

    good = hb.quantize(network(), batches(), recipe="dfq")
    monkeypatch.setitem(recipe.STEPS, "absorb_bias", worse)
    # The float reference of a damaged model is damaged too, so the guard must compare with the model before.
    guarded = hb.quantize(network(), batches(), recipe="dfq")
    messages = [e.message for e in guarded.log if e.stage == "absorb_bias"]
    assert any("on held-out samples" in m for m in messages)
    assert any(m.startswith("undone") for m in messages)
    x = batches()[0]
    assert torch.equal(
        hb.predict(guarded, (x,))[0], hb.predict(hb.quantize(network(), batches(), recipe=without_absorb()), (x,))[0]
    )
    assert good.grids


def test_blocks_that_do_worse_together_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may do better on its own; what they do to the outputs decides."""
    options = {"bits": "W3A4", "rounding": "blocks", "iterations": 2}
    kept = [e.message for e in hb.quantize(network(), batches(), **options).log if e.message.startswith("blocks ")]
    assert len(kept) == 1 and "at the outputs on held-out samples" in kept[0]

    def worse(m: hb.QModel, *_: object, **__: object) -> hb.QModel:
        return replace(m, tuned={k: v + 3 if "bias" in k else v for k, v in m.parameters.items()})

    monkeypatch.setattr("halfbyte.steps.refine", worse)
    m = hb.quantize(network(), batches(), **options)
    assert any(e.message.startswith("blocks undone") for e in m.log)
    x = batches()[0]
    (got,), (wanted,) = hb.predict(m, (x,)), hb.predict(m.as_float(), (x,))
    assert float((got - wanted).abs().mean()) < 1, "the damage is gone"


def without_absorb() -> recipe.Recipe:
    found = recipe.load_recipe("dfq")
    steps = tuple(s for s in found.steps if s["step"] != "absorb_bias")
    return recipe.Recipe(found.name, found.description, steps)


def test_cross_entropy_never_has_a_larger_loss_than_squared_error() -> None:
    from halfbyte.affine import fake_quantize
    from halfbyte.grids import MSE, cross_entropy
    from halfbyte.stats import histogram

    torch.manual_seed(0)
    logits = torch.randn(256, 10) * 8 - 20  # most are far below the two that matter
    logits[:, :2] = torch.randn(256, 2) + 4
    form = hb.Format(3, signed=False)
    start = MSE().activation(histogram(logits), form)
    better = cross_entropy(logits, form, start)

    def loss(grid: hb.Grid) -> float:
        return -float((logits.softmax(1) * fake_quantize(logits, grid).log_softmax(1)).sum(1).mean())

    assert loss(better) < loss(start)


def test_the_white_papers_pipeline_uses_cross_entropy_for_quantized_logits() -> None:
    quick = recipe.load_recipe("whitepaper-ptq").changed("reconstruct", iterations=10)
    q = hb.quantize(network(), batches(), recipe=quick, target="generic")
    assert any("cross entropy" in e.message for e in q.log)
    guarded = ("equalize", "absorb_bias", "correct_bias")
    assert sum("held-out" in e.message for e in q.log if e.stage in guarded) == 3
    assert {e.figures["method"] for e in q.log if "method" in e.figures} == {"adaround"}


def test_rules_of_the_command_line_go_before_the_recipes(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = invoke("quantize", file, "--data-free", "--activation-range", "percentile", "-o", str(out))
    assert code == 0, err
    steps = json.loads((out / "summary.json").read_text())["configuration"]["recipe"]["steps"]
    assert next(s for s in steps if s["step"] == "calibrate")["activations"] == "percentile"
