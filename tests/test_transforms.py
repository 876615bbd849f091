"""The law of the float transforms: outputs stay. And what is not done is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte.ops import CONV, CONV_TRANSPOSE, GLOBAL_AVERAGE_POOL, LINEAR, base_name


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def trained(net: nn.Module) -> nn.Module:
    """Batch norms with statistics and parameters that do something, some of them negative."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.2, 4)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return net.eval()


def close(net: nn.Module, m: hb.QModel, x: Tensor) -> None:
    with torch.no_grad():
        expected = net(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(expected, hb.run(m, (x,)), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max().clamp(min=1))


def operations(m: hb.QModel) -> list[str]:
    return [base_name(n) for n in m.graph.nodes if n.op == "call_function"]


IMAGE, SIGNAL, VOLUME, VECTOR = (2, 4, 7, 8), (2, 4, 9), (2, 4, 5, 5, 4), (3, 6)
FOLDED = {
    "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)), IMAGE),
    "no bias": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "not affine": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), IMAGE),
    "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), IMAGE),
    "same padding": (nn.Sequential(nn.Conv2d(4, 4, (2, 4), padding="same"), nn.BatchNorm2d(4)), IMAGE),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), SIGNAL),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), VOLUME),
    "transposed 1d": (nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6)), SIGNAL),
    "transposed 2d": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)), IMAGE),
    "linear": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), VECTOR),
    "two in a row": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), IMAGE),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_outputs(name: str) -> None:
    torch.manual_seed(1)
    net, shape = FOLDED[name]
    net = trained(net)
    m = hb.capture(net, torch.randn(shape))
    assert "batch_norm" in operations(m)
    x = 3 * torch.randn(shape)
    close(net, m, x)
    folded = hb.fold_batchnorm(m)
    assert "batch_norm" not in operations(folded)
    close(net, folded, x)
    close(net, m, x)  # the original is as it was
    (moments, *_) = folded.moments.values()
    assert moments.mean.shape == moments.std.shape
    assert bool((moments.std >= 0).all())


def test_a_shared_layer_gets_a_copy_for_each_norm() -> None:
    torch.manual_seed(2)
    net = trained(
        Function(lambda x, c, a, b: (a(c(x)), b(c(x)), c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    )
    x = torch.randn(IMAGE)
    folded = hb.fold_batchnorm(hb.capture(net, x))
    assert "batch_norm" not in operations(folded)
    assert len({k for k in folded.params if "weight" in k}) == 3
    close(net, folded, x)


def test_a_shared_norm_folds_into_each_layer() -> None:
    torch.manual_seed(2)
    net = trained(
        Function(lambda x, a, b, n: n(a(x)) + n(b(x)), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    x = torch.randn(IMAGE)
    folded = hb.fold_batchnorm(hb.capture(net, x))
    assert "batch_norm" not in operations(folded)
    close(net, folded, x)


REFUSED = {
    "no layer": (Function(lambda x, n: n(F.relu(x)), nn.BatchNorm2d(4)), IMAGE, "what comes before it is relu"),
    "two readers": (
        Function(lambda x, c, n: (lambda y: n(y) + y)(c(x)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),  # noqa: PLC3002
        IMAGE,
        "also used elsewhere",
    ),
    "an output": (
        Function(lambda x, c, n: (lambda y: (n(y), y))(c(x)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),  # noqa: PLC3002
        IMAGE,
        "also used elsewhere",
    ),
    "grouped transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
        IMAGE,
        "grouped transposed",
    ),
    "tokens": (nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(4)), SIGNAL, "another dimension"),
    "no statistics": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        "statistics",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_folded_stays_with_its_reason(name: str) -> None:
    torch.manual_seed(3)
    net, shape, reason = REFUSED[name]
    net = trained(net)
    x = torch.randn(shape)
    folded = hb.fold_batchnorm(hb.capture(net, x))
    assert {"batch_norm", "instance_norm"} & set(operations(folded))
    (entry,) = [e for e in folded.log if e.stage == "fold_batchnorm"]
    assert "not folded" in entry.message
    assert reason in entry.message
    close(net, folded, x)


CANONICAL: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...], Any]] = {
    "mean": (lambda x: x.mean((2, 3)), IMAGE, GLOBAL_AVERAGE_POOL),
    "mean, negative dimensions": (lambda x: x.mean((-1, -2), keepdim=True), IMAGE, GLOBAL_AVERAGE_POOL),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), IMAGE, GLOBAL_AVERAGE_POOL),
    "mean of a volume": (lambda x: x.mean((2, 3, 4)), VOLUME, GLOBAL_AVERAGE_POOL),
    "channel mean": (lambda x: x.mean(1), IMAGE, None),
    "identities": (lambda x: (x.contiguous().clone()[:, :] * 1.0).view(2, -1).float(), IMAGE, None),
    "views of transposed values": (
        lambda x: x.transpose(1, 2).contiguous().view(2, -1).t().contiguous().view(-1, 2),
        IMAGE,
        None,
    ),
    "ceiling average": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), IMAGE, None),
}


ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2),
    "scaled": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
    "masked": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :, :, :1] * torch.ones(5)),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "causal, of other lengths": lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3], is_causal=True),
    "chosen": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :1, :1, :1] + x[:, :1, :, 1:2].mT > 0),
    "nothing chosen": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :, :, :1] > torch.ones(5) * 0.5),
    "of shared heads": lambda x: F.scaled_dot_product_attention(x, x[:, ::2], x[:, 1::2], enable_gqa=True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_becomes_two_products(name: str) -> None:
    torch.manual_seed(4)
    net = Function(lambda x, layer: ATTENTION[name](layer(x)), nn.Linear(4, 4))
    m = hb.capture(net, torch.randn(3, 4, 5, 4))
    assert operations(m).count("matmul") == 2 and "scaled_dot_product_attention" not in operations(m)
    close(net, m, x := torch.randn(3, 4, 5, 4))
    if name == "nothing chosen":
        assert bool((net(x).abs().amax(-1) == 0).any())


@pytest.mark.parametrize("name", CANONICAL)
def test_canonical_forms_keep_outputs(name: str) -> None:
    torch.manual_seed(4)
    function, shape, target = CANONICAL[name]
    net = Function(lambda x, layer: function(layer(x)), nn.Identity() if len(shape) != 4 else nn.PReLU())
    m = hb.capture(net, torch.randn(shape))
    close(net, m, torch.randn(shape))
    targets = [n.target for n in m.graph.nodes]
    assert target is None or target in targets
    left = {"view", "clone", "contiguous", "dropout", "mean"} if target else {"view", "contiguous"}
    assert not left & set(operations(m))


def test_products_with_parameters_become_linear_layers() -> None:
    torch.manual_seed(5)
    net = Function(
        lambda x, a, b: x @ a.weight + torch.addmm(b.bias, x, b.weight.t()),
        nn.Linear(4, 6, bias=False),
        nn.Linear(6, 4),
    )
    m = hb.capture(net, torch.randn(VECTOR))
    assert [n.target for n in m.graph.nodes].count(LINEAR) == 2
    close(net, m, torch.randn(VECTOR))


def test_paddings_are_absorbed_by_the_convolution() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(
        nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 3, 3, padding=1), nn.ConstantPad2d(1, 2.0), nn.Conv2d(3, 3, 3)
    )
    m = hb.capture(net, torch.randn(IMAGE))
    convolutions = [n for n in m.graph.nodes if n.target is CONV]
    assert [list(n.args[4]) for n in convolutions] == [[3, 2, 2, 1], [0, 0, 0, 0]]
    assert operations(m).count("pad") == 1
    close(net, m, torch.randn(IMAGE))


def test_transposed_convolutions_have_one_form() -> None:
    torch.manual_seed(7)
    net = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    m = hb.capture(net, torch.randn(IMAGE))
    assert [n.target for n in m.graph.nodes].count(CONV_TRANSPOSE) == 1
    close(net, m, torch.randn(IMAGE))
