"""Running a graph: what memory looks like changes no number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.run import _FEWEST, _WIDEST, evaluate_plainly, laid_out, portions, run


class Viewed(nn.Module):
    """Flattens images by ``view``, which asks for channels before rows in memory."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * size * size, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).clamp(0, 1)
        return self.head(y.view(x.shape[0], -1)), y


def captured(size: int = 8) -> tuple[nn.Module, hb.QModel, Tensor]:
    torch.manual_seed(0)
    net, x = Viewed(size).eval(), torch.randn(6, 3, size, size)
    return net, hb.capture(net, x[:2]), x


def test_channels_last_changes_neither_numbers_nor_what_is_returned() -> None:
    net, m, x = captured()
    with torch.no_grad():
        for given in (x, laid_out(x)):
            for found, wanted in zip(run(m, (given,)), net(x), strict=True):
                torch.testing.assert_close(found, wanted)
                assert found.is_contiguous()
    assert laid_out(x).is_contiguous(memory_format=torch.channels_last)
    tokens, ids = torch.randn(2, 3, 4), torch.arange(24).reshape(1, 2, 3, 4)
    assert laid_out(tokens) is tokens and laid_out(ids) is ids


def test_the_cheaper_kernel_of_a_clamp_has_the_same_gradient() -> None:
    _, m, x = captured()
    node = next(n for n in m.graph.nodes if str(n.target) == "aten.clamp.default")
    y = (4 * x).requires_grad_()
    found = evaluate_plainly(node, (y, 0.0, 1.0), {})
    assert "Hardtanh" in type(found.grad_fn).__name__
    (slope,) = torch.autograd.grad((found * x).sum(), y)
    (wanted,) = torch.autograd.grad((torch.clamp(y, 0.0, 1.0) * x).sum(), y)
    assert torch.equal(slope, wanted)
    assert torch.equal(found, torch.clamp(y, 0.0, 1.0))
    assert "Clamp" in type(evaluate_plainly(node, (y, None, 1.0), {}).grad_fn).__name__


@pytest.mark.parametrize("size", [8, 1024])
def test_portions_hold_all_samples_in_order_and_stay_small(size: int) -> None:
    _, m, _ = captured(8)
    m.inputs[0].meta["shape"] = ("batch", 3, size, size)
    data = [(torch.arange(70.0),), (torch.arange(7.0) + 70,)]
    parts = [x for (x,) in portions(m, data)]
    assert torch.equal(torch.cat(parts), torch.arange(77.0))
    longest = max(_FEWEST, _WIDEST // (3 * size * size))
    assert max(map(len, parts)) == min(70, longest)
    assert max(len(x) for (x,) in portions(m, data, most=5)) == min(5, longest)


def test_a_fixed_number_of_samples_is_not_cut() -> None:
    _, m, x = captured()
    for node in m.inputs:
        node.meta["shape"] = (6, *node.meta["shape"][1:])
    assert [len(b) for (b,) in portions(m, [(x,)], most=2)] == [6]


def test_limits_of_channels_have_the_gradient_of_clamp() -> None:
    node = torch.fx.Graph().call_function(torch.ops.halfbyte.clamp_channels.default)
    x, g = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 5, 5)
    lower, upper = torch.rand(4, 1, 1) - 1, torch.rand(4, 1, 1)
    found = evaluate_plainly(node, (x, lower, upper), {})
    (slope,) = torch.autograd.grad(found, x, g)
    (wanted,) = torch.autograd.grad(torch.clamp(x, lower, upper), x, g)
    assert torch.equal(slope, wanted)
    assert 0 < int((slope == 0).sum()) < slope.numel()


def test_a_tensor_in_place_of_batches_is_one_sentence() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    m = hb.quantize(hb.capture(net, x), [(x,)], bits="W4A8")
    steps: list[Callable[[], object]] = [
        lambda: hb.calibrate(m, x),  # type: ignore[arg-type]
        lambda: hb.reconstruct(m, x, hb.Descent()),  # type: ignore[arg-type]
        lambda: hb.refine(m, x),  # type: ignore[arg-type]
        lambda: hb.correct_bias(m, x),  # type: ignore[arg-type]
        lambda: hb.refine_ranges(m, x),  # type: ignore[arg-type]
        lambda: hb.run(m, x),  # type: ignore[arg-type]
    ]
    for step in steps:
        with pytest.raises(
            UsageError, match=r"the network takes \[batch, 3, 8, 8\]: give a list of batches, \[\(x,\)\]"
        ):
            step()
    with pytest.raises(UsageError, match="give a list of batches"):
        hb.reconstruct(m, [(x,), (x[0],)], hb.Descent())
    assert torch.equal(hb.predict(m, x)[0], hb.predict(m, (x,))[0])


def test_inputs_in_any_form() -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + 2 * b

    one, two = torch.ones(2, 3), torch.full((2, 3), 5.0)
    m = hb.capture(Net(), (one, two))
    for given in ((one, two), [one, two], {"b": two, "a": one, "label": one}):
        assert torch.equal(hb.predict(m, given)[0], torch.full((2, 3), 11.0))
    with pytest.raises(UsageError, match="the network takes a, b, and b was not given"):
        hb.predict(m, {"a": one})
