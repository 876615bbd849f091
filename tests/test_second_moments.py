"""Patches are what a layer reads, and the moments of many batches are those of all rows at once."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import halfbyte as hb
from halfbyte.graph import bias_of, blocks, groups, layers, weight_of
from halfbyte.ops import LINEAR
from halfbyte.second_moments import Accumulator, Patches, gathered, pooled, rows_of, sampled_patches

ALL = 1 << 30
# What makes the layer, and the shape of two samples.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 11)),
    "2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 7, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 0, 1)), (2, 2, 4, 5, 3)),
    "one tap": (lambda: nn.Conv2d(4, 3, 1), (2, 4, 3, 5)),
    "no bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (2, 3, 5, 6)),
    "strided": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 3, 8, 9)),
    "dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=(2, 1), padding=(2, 3)), (2, 3, 8, 7)),
    "strided, dilated": (lambda: nn.Conv1d(3, 4, 4, stride=3, dilation=2, padding=5), (2, 3, 17)),
    "even and same": (lambda: nn.Conv2d(3, 5, (2, 4), padding="same"), (2, 3, 6, 5)),
    "padded on one side": (lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(3, 4, 3)), (2, 3, 5, 6)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1), (2, 4, 7, 6)),
    "depthwise, two each": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3), (2, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1), (2, 3, 7)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 2, 3, 3)),
    "transposed, all options": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (3, 2), (1, 2), (2, 1), groups=2, dilation=(2, 3)),
        (2, 4, 5, 6),
    ),
    "transposed, grouped, no bias": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), (2, 4, 3, 3)),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4), (2, 4, 4, 3)),
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "tokens in a plane": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 5, 6)),
}


@functools.cache
def example(kind: str) -> tuple[fx.Node, Tensor, Tensor, Tensor, Tensor | None]:
    """The layer, what it reads, what it puts out, its weight and its bias."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    m = hb.capture(make().eval(), x)
    (layer,) = layers(m.graph)
    weight, bias = weight_of(layer), bias_of(layer)
    assert weight is not None
    read = hb.run(m, (x,), stop=str(layer.args[0].meta["value"]))[0] if layer.args[0] is not m.inputs[0] else x  # type: ignore[union-attr]
    y = hb.run(m, (x,))[0]
    return layer, read, y, m.params[str(weight.target)], None if bias is None else m.params[str(bias.target)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def computed(layer: fx.Node, p: Patches, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs that patches give: [groups, rows, outputs of a group]."""
    found = p.inputs @ blocks(layer, weight).flatten(2).transpose(1, 2)
    return found if bias is None else found + bias.reshape(groups(layer), 1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_what_the_layer_computes_with(kind: str) -> None:
    layer, x, y, weight, bias = example(kind)
    p = sampled_patches(layer, x, y, ALL, generator())
    assert p.inputs.shape[1] == rows_of(y, layer)
    assert torch.allclose(computed(layer, p, weight, bias), p.outputs, atol=1e-5)
    if layer.target is LINEAR:
        assert torch.equal(p.outputs[0], y.flatten(0, -2))
        return
    everywhere = p.outputs.reshape(groups(layer), len(y), -1, p.outputs.shape[2])
    assert torch.equal(everywhere.permute(1, 0, 3, 2).reshape(y.shape), y)


@pytest.mark.parametrize("kind", KINDS)
def test_some_positions_are_as_good_as_all(kind: str) -> None:
    layer, x, y, weight, bias = example(kind)
    p = sampled_patches(layer, x, y, 5, generator())
    positions = min(rows_of(y, layer) // len(y), -(-5 // len(y)))  # of all samples alike
    assert p.inputs.shape[1] == p.outputs.shape[1] == len(y) * positions
    assert torch.allclose(computed(layer, p, weight, bias), p.outputs, atol=1e-5)
    assert len(p.inputs[0].unique(dim=0)) > 1
    again = sampled_patches(layer, x, y, 5, generator())
    assert torch.equal(p.inputs, again.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stand_sample_after_sample(kind: str) -> None:
    layer, x, y, _, _ = example(kind)
    some = sampled_patches(layer, x, y, 5, generator())
    alone = [sampled_patches(layer, x[i : i + 1], y[i : i + 1], -(-5 // len(y)), generator()) for i in range(len(y))]
    assert torch.equal(some.inputs, torch.cat([p.inputs for p in alone], 1))
    assert torch.equal(some.outputs, torch.cat([p.outputs for p in alone], 1))


def test_rows_are_shared_out_by_what_each_batch_holds() -> None:
    layer, x, y, _, _ = example("2d")
    parts = list(gathered(layer, [x, x[:1], x], [y, y[:1], y], 25, generator()))
    assert [p.inputs.shape[1] for p in parts] == [10, 5, 10]
    every = list(gathered(layer, [x, x], [y, y], ALL, generator()))
    assert [p.inputs.shape[1] for p in every] == [rows_of(y, layer)] * 2
    assert parts[0].inputs.shape[2] == 27


def patches(sizes: tuple[int, ...], inputs: int, mean: float, parts: int = 2) -> list[Patches]:
    """Correlated rows whose means may be much larger than their spread, and that differ from batch to batch."""
    g = generator()
    mix = torch.randn(parts, inputs, inputs, generator=g) / inputs**0.5
    found = []
    for rows in sizes:
        x = torch.randn(parts, rows, inputs, generator=g) @ mix + mean + 0.3 * torch.randn(1, 1, 1, generator=g)
        y = x[:, :, :3] * 2 - mean + torch.randn(parts, rows, 3, generator=g)
        found.append(Patches(x, y))
    return found


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-6), (3.0, 1e-6), (3000.0, 3e-6)])
@pytest.mark.parametrize("inputs", [5, 300])  # the larger one is multiplied in strips
def test_moments_of_all_batches(centred: bool, mean: float, tolerance: float, inputs: int) -> None:
    every = patches((40, 1, 700, 300), inputs, mean)
    sums = Accumulator()
    for p in every:
        sums.add(p)
    found = sums.moments(centred=centred)
    x, y = torch.cat([p.inputs for p in every], 1).double(), torch.cat([p.outputs for p in every], 1).double()
    x_mean, y_mean = (t.mean(1) if centred else torch.zeros_like(t[:, 0]) for t in (x, y))
    x, y = x - x_mean[:, None], y - y_mean[:, None]
    wanted = {
        "x_mean": x_mean,
        "y_mean": y_mean,
        "gram": x.transpose(1, 2) @ x / x.shape[1],
        "cross": y.transpose(1, 2) @ x / x.shape[1],
        "y_var": y.square().mean(1),
    }
    assert found.rows == x.shape[1] == 1041
    for name, exact in wanted.items():
        size = max(1.0, float(exact.abs().max()))
        assert float((getattr(found, name) - exact).abs().max()) < tolerance * size, name
    assert torch.equal(found.gram, found.gram.transpose(1, 2)) or inputs == 5


@pytest.mark.parametrize("centred", [True, False])
def test_moments_of_two_parts_are_pooled(centred: bool) -> None:
    every = patches((40, 700, 300), 5, 3.0)
    parts, whole = (Accumulator(), Accumulator()), Accumulator()
    for i, p in enumerate(every):
        parts[i % 2].add(p)
        whole.add(p)
    found, wanted = pooled(*(s.moments(centred=centred) for s in parts)), whole.moments(centred=centred)
    assert found.rows == wanted.rows == 1040
    for name in ("x_mean", "y_mean", "gram", "cross", "y_var"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4), name


def test_one_row_has_no_spread() -> None:
    sums = Accumulator()
    (p,) = patches((1,), 4, 1.0)
    sums.add(p)
    found = sums.moments(centred=True)
    assert torch.equal(found.x_mean, p.inputs[:, 0])
    assert not found.gram.any()
    assert not found.y_var.any()
