"""Random small networks: captured, quantized and exported, each is proven or refused with a readable reason.

``HALFBYTE_FUZZ=500:600`` runs another range of seeds.
"""

import operator
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte.errors import HalfbyteError, ParityError, VerifyError

Function = Callable[..., Any]
LARGEST = 4096  # values of one sample


class Net(nn.Module):
    """A program over a list of values: each step applies a function to earlier ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.parts = nn.ModuleList()
        self.program: list[tuple[Function, tuple[int, ...]]] = []
        self.described: list[str] = []
        kind = self.rng.choice(["images"] * 4 + ["tokens", "signal"])
        count = self.rng.choice([1, 1, 1, 2])
        self.example = tuple(self._input(kind) for _ in range(count))
        self.values: list[Tensor] = list(self.example)
        self.images = [i for i, v in enumerate(self.values) if v.ndim == 4]
        self._begin()
        for _ in range(self.rng.randint(2, 9)):
            self._grow()
        self.outputs = self._chosen_outputs()
        del self.values

    def _input(self, kind: str) -> Tensor:
        r = self.rng
        if kind == "images":
            return torch.randn(2, r.choice([1, 2, 3, 4]), r.randint(6, 10), r.randint(6, 10)) * r.choice([0.1, 1, 30])
        if kind == "tokens":
            return torch.randn(2, r.randint(2, 7), r.choice([4, 6, 8]))
        return torch.randn(2, r.choice([2, 4]), r.randint(9, 16))

    def _begin(self) -> None:
        x = 0
        v = self.values[0]
        if v.ndim == 4:
            self.add("conv", self.module(nn.Conv2d(v.shape[1], 8, 3, padding=self.rng.choice([0, 1]))), x)
        elif self.rng.random() < 0.5 and v.shape[1] in (2, 4):
            self.add("conv1d", self.module(nn.Conv1d(v.shape[1], 8, 3, padding=1)), x)
        else:
            self.add("linear", self.module(nn.Linear(v.shape[-1], 8)), x)

    def module(self, part: nn.Module) -> nn.Module:
        """Register a module with weights of a random spread and statistics that do something."""
        spread = self.rng.choice([0.3, 1, 1, 3])
        with torch.no_grad():
            for tensor in part.parameters():
                tensor.mul_(spread)
            for layer in part.modules():
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.running_mean.normal_()
                    layer.running_var.uniform_(0.3, 3)
                    layer.weight.normal_()
                    layer.bias.normal_()
        part.eval()
        self.parts.append(part)
        return part

    def add(self, name: str, function: Function, *sources: int) -> None:
        """Append a step, unless its result is empty, too large or no tensor of real numbers."""
        with torch.no_grad():
            result = function(*[self.values[i].clone() for i in sources])
        if (
            result.numel() == 0
            or result.numel() > 2 * LARGEST
            or result.ndim < 2
            or not bool(torch.isfinite(result).all())
        ):
            return
        self.program.append((function, sources))
        self.described.append(f"{len(self.values)} = {name}{sources} {list(result.shape)}")
        self.values.append(result)

    def _grow(self) -> None:
        x = max(self.rng.randrange(len(self.values)) for _ in range(3))  # the latest most often
        steps = {4: IMAGE_STEPS, 3: TOKEN_STEPS, 2: VECTOR_STEPS}.get(self.values[x].ndim, ())
        step = self.rng.choice((*steps, *steps, *ANY_STEPS))
        step(self, x, self.values[x])

    def peers(self, x: int) -> list[int]:
        """Values of the same shape."""
        return [i for i, v in enumerate(self.values) if v.shape == self.values[x].shape]

    def _chosen_outputs(self) -> list[int]:
        used = {s for _, sources in self.program for s in sources}
        ends = [i for i in range(len(self.example), len(self.values)) if i not in used]
        extra = [i for i in range(len(self.example), len(self.values)) if i in used and self.rng.random() < 0.08]
        return (ends + extra)[: self.rng.randint(1, 4)]

    def forward(self, *inputs: Tensor) -> Any:
        values: list[Any] = list(inputs)
        for function, sources in self.program:
            values.append(function(*[values[i] for i in sources]))
        chosen = [values[i] for i in self.outputs]
        return chosen[0] if len(chosen) == 1 else tuple(chosen)


def conv(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    c = v.shape[1]
    groups = r.choice([1, 1, c, 2 if c % 2 == 0 else 1])
    out = groups * r.choice([1, 2, 4]) if groups > 1 else r.choice([1, 4, 8, 12])
    kernel = r.choice([1, 3, 3, (1, 3), 5])
    dilation = r.choice([1, 1, 2])
    padding = r.choice([0, 1, 2, "same"])
    stride = 1 if padding == "same" else r.choice([1, 1, 2, (2, 1)])
    layer: nn.Module = nn.Conv2d(c, out, kernel, stride, padding, dilation, groups, bias=r.random() < 0.7)
    if r.random() < 0.4:
        layer = nn.Sequential(layer, nn.BatchNorm2d(out))
    if r.random() < 0.5:
        layer = nn.Sequential(layer, r.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 1.5)]))
    smallest = [d + 2 * (2 if padding == "same" else padding) for d in v.shape[2:]]
    reach = [(k - 1) * dilation + 1 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel))]
    if all(a >= b for a, b in zip(smallest, reach, strict=True)):
        net.add(str(layer).replace("\n", ""), net.module(layer), x)


def padded_conv(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    amounts = [r.randint(0, 2) for _ in range(4)]
    layer = net.module(nn.Sequential(nn.ZeroPad2d(amounts), nn.Conv2d(v.shape[1], 4, 2)))
    if v.shape[2] > 2 and v.shape[3] > 2:
        net.add(f"zeropad {amounts}, conv", layer, x)


def transposed(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    groups = r.choice([1, 1, 2 if v.shape[1] % 2 == 0 else 1])
    layer = nn.ConvTranspose2d(v.shape[1], 4, 3, stride=r.choice([1, 2]), padding=r.choice([0, 1]), groups=groups)
    net.add(str(layer), net.module(layer), x)


def pool(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    if min(v.shape[2:]) < 4:
        return
    kernel, stride = r.choice([2, 3, (2, 3)]), r.choice([1, 2, None])
    choices = [
        nn.MaxPool2d(kernel, stride, ceil_mode=r.random() < 0.3),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(kernel, stride),
        nn.AvgPool2d(3, 2, 1, count_include_pad=r.random() < 0.5),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(r.choice([1, 1, 2, (1, 2)])),
        nn.AdaptiveMaxPool2d(r.choice([1, 2])),
    ]
    layer = r.choice(choices)
    net.add(str(layer), net.module(layer), x)


def pad(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    mode = r.choice(["constant", "constant", "reflect", "replicate"])
    amounts = [r.randint(0, 2) for _ in range(4)]
    value = r.choice([0.0, 0.0, 1.5]) if mode == "constant" else None
    if min(v.shape[2:]) > 2:
        net.add(f"pad {mode} {amounts} {value}", lambda t: F.pad(t, amounts, mode, value), x)


def resize(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    mode = r.choice(["nearest", "nearest", "bilinear", "nearest-exact"])
    if v.numel() > LARGEST // 4:
        return
    if r.random() < 0.5:
        net.add(f"interpolate x2 {mode}", lambda t: F.interpolate(t, scale_factor=2, mode=mode), x)
    else:
        size = (r.randint(3, 9), r.randint(3, 9))
        net.add(f"interpolate {size} {mode}", lambda t: F.interpolate(t, size=size, mode=mode), x)


def split(net: Net, x: int, v: Tensor) -> None:
    if v.shape[1] < 2:
        return
    if net.rng.random() < 0.5:
        net.add("split, swap, cat", lambda t: torch.cat(t.chunk(2, 1)[::-1], 1), x)
    else:
        net.add("split, part", lambda t: t.split([1, t.shape[1] - 1], 1)[1], x)


def shuffle(net: Net, x: int, v: Tensor) -> None:
    if v.shape[1] % 4 == 0:
        net.add("pixel_shuffle", lambda t: F.pixel_shuffle(t, 2), x)


def slices(net: Net, x: int, v: Tensor) -> None:
    f = net.rng.choice([lambda t: t[:, :, 1:], lambda t: t[..., ::2], lambda t: t[:, :1], lambda t: t[:, :, :-1, 1:]])
    net.add("slice", f, x)


def to_tokens(net: Net, x: int, v: Tensor) -> None:
    net.add("to tokens", lambda t: t.flatten(2).transpose(1, 2), x)


def to_vector(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    choices = [
        lambda t: F.adaptive_avg_pool2d(t, 1).flatten(1),
        lambda t: t.mean((2, 3)),
        lambda t: t.flatten(1),
        lambda t: t.amax((2, 3)),
    ]
    if v[0].numel() < 600:
        net.add("to vector", r.choice(choices), x)


def squeeze_excite(net: Net, x: int, v: Tensor) -> None:
    c = v.shape[1]
    gate = net.module(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 2, 1), nn.ReLU(), nn.Conv2d(2, c, 1), nn.Sigmoid())
    )
    net.add("squeeze excite", lambda t: t * gate(t), x)


def norm_image(net: Net, x: int, v: Tensor) -> None:
    c = v.shape[1]
    layer = net.rng.choice(
        [nn.BatchNorm2d(c), nn.BatchNorm2d(c), nn.GroupNorm(1, c), nn.InstanceNorm2d(c, affine=True)]
    )
    net.add(str(layer), net.module(layer), x)


def channel_prelu(net: Net, x: int, v: Tensor) -> None:
    net.add("prelu", net.module(nn.PReLU(net.rng.choice([1, v.shape[1]]))), x)


def conv1d(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    layer = nn.Conv1d(v.shape[1], 4, r.choice([1, 3]), padding=1, groups=r.choice([1, 2]) if v.shape[1] % 2 == 0 else 1)
    net.add(
        str(layer), net.module(layer if r.random() < 0.5 else nn.Sequential(layer, nn.BatchNorm1d(4), nn.ReLU())), x
    )


def linear(net: Net, x: int, v: Tensor) -> None:
    layer: nn.Module = nn.Linear(v.shape[-1], net.rng.choice([1, 4, 8]), bias=net.rng.random() < 0.8)
    if v.ndim == 2 and net.rng.random() < 0.3:
        layer = nn.Sequential(layer, nn.BatchNorm1d(layer.out_features))
    if net.rng.random() < 0.4:
        layer = nn.Sequential(layer, nn.ReLU())
    net.add(f"linear {layer}".replace("\n", ""), net.module(layer), x)


def product_with_parameter(net: Net, x: int, v: Tensor) -> None:
    holder = net.module(nn.Linear(3, v.shape[-1], bias=False))
    net.add("x @ parameter", lambda t: t @ holder.weight, x)


def attention(net: Net, x: int, v: Tensor) -> None:
    d = v.shape[-1]
    if d % 2:
        return
    heads = 2
    qkv, out = net.module(nn.Linear(d, 3 * d)), net.module(nn.Linear(d, d))
    fused = net.rng.random() < 0.5

    def attend(t: Tensor) -> Tensor:
        n, s, _ = t.shape
        q, k, w = (p.reshape(n, s, heads, d // heads).transpose(1, 2) for p in qkv(t).chunk(3, -1))
        by_hand = torch.softmax(q @ k.transpose(-2, -1) / (d // heads) ** 0.5, -1) @ w
        y = F.scaled_dot_product_attention(q, k, w) if fused else by_hand
        return t + out(y.transpose(1, 2).reshape(n, s, d))

    net.add(f"attention fused={fused}", attend, x)


def token_norm(net: Net, x: int, v: Tensor) -> None:
    net.add("layer norm", net.module(nn.LayerNorm(v.shape[-1])), x)


def token_product(net: Net, x: int, v: Tensor) -> None:
    net.add("t @ t.T", lambda t: t @ t.transpose(1, 2), x)


def token_mean(net: Net, x: int, v: Tensor) -> None:
    f = net.rng.choice(
        [
            lambda t: t.mean(1),
            lambda t: t[:, 0],
            lambda t: t.flatten(1),
            lambda t: t.mean(-1, keepdim=True),
            lambda t: t.mean(2),
        ]
    )
    net.add("token mean", f, x)


def tokens_to_image(net: Net, x: int, v: Tensor) -> None:
    net.add("tokens to image", lambda t: t.transpose(1, 2).unsqueeze(-1), x)


def activation(net: Net, x: int, v: Tensor) -> None:
    r = net.rng
    choices = {
        "relu": F.relu,
        "relu again": F.relu,
        "relu6": F.relu6,
        "leaky": lambda t: F.leaky_relu(t, 0.1),
        "hardswish": F.hardswish,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu tanh": lambda t: F.gelu(t, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softmax": lambda t: F.softmax(t, 1),
        "clamp": lambda t: t.clamp(-0.7, 1.1),
        "clamp min": lambda t: t.clamp(min=0.2),
        "clamp max": lambda t: t.clamp(max=-0.2),
        "elu": F.elu,
        "softplus": F.softplus,
        "hardsigmoid": F.hardsigmoid,
        "mish": F.mish,
        "abs": torch.abs,
        "square": torch.square,
    }
    name = r.choice(sorted(choices))
    net.add(name, choices[name], x)


def residual(net: Net, x: int, v: Tensor) -> None:
    y = net.rng.choice(net.peers(x))
    f = net.rng.choice(
        [operator.add, operator.add, operator.mul, operator.sub, lambda a, b: F.relu(a + b), torch.maximum]
    )
    net.add(f"two operands {f}", f, x, y)


def scalar(net: Net, x: int, v: Tensor) -> None:
    f = net.rng.choice(
        [
            lambda t: t * 2,
            lambda t: t + 1,
            lambda t: 1 - t,
            lambda t: t / 3,
            lambda t: -t,
            lambda t: t * 0,
            lambda t: t.add(t, alpha=2),
        ]
    )
    net.add("scalar", f, x)


def parameter_operand(net: Net, x: int, v: Tensor) -> None:
    holder = net.module(nn.Linear(v.shape[-1], 1))
    f = net.rng.choice([lambda t: t + holder.weight[0], lambda t: t * holder.weight[0], lambda t: t + holder.bias])
    net.add("with parameter", f, x)


def concat(net: Net, x: int, v: Tensor) -> None:
    same = [i for i, w in enumerate(net.values) if w.ndim == v.ndim and w.shape[2:] == v.shape[2:]]
    y = net.rng.choice(same)
    if v.shape[1] + net.values[y].shape[1] <= 24:
        net.add("cat", lambda a, b: torch.cat([a, b], 1), x, y)


def broadcast(net: Net, x: int, v: Tensor) -> None:
    if v.ndim == 4:
        net.add("add its mean", lambda t: t + t.mean((2, 3), keepdim=True), x)
    elif v.ndim == 3:
        net.add("add its first", lambda t: t + t[:, :1], x)


def reuse(net: Net, x: int, v: Tensor) -> None:
    """An earlier module again, where its input fits."""
    if not net.parts:
        return
    part = net.rng.choice(list(net.parts))
    try:
        with torch.no_grad():
            part(v.clone())
    except (RuntimeError, ValueError):
        return
    net.add("reuse", part, x)


def inplace(net: Net, x: int, v: Tensor) -> None:
    def f(t: Tensor) -> Tensor:
        y = t * 1.5
        y += 0.25
        y.relu_()
        return y

    net.add("in place", f, x)


IMAGE_STEPS = (
    conv, conv, conv, padded_conv, transposed, pool, pool, pad, resize, split, shuffle, slices, to_tokens, to_vector,
    squeeze_excite, norm_image, channel_prelu,
)  # fmt: skip
TOKEN_STEPS = (
    linear,
    linear,
    conv1d,
    product_with_parameter,
    attention,
    token_norm,
    token_product,
    token_mean,
    tokens_to_image,
)
VECTOR_STEPS = (linear, linear, linear)
ANY_STEPS = (activation, activation, residual, residual, scalar, parameter_operand, concat, broadcast, reuse, inplace)


def seeds() -> range:
    first, _, last = os.environ.get("HALFBYTE_FUZZ", "0:40").partition(":")
    return range(int(first), int(last))


@pytest.mark.parametrize("seed", seeds())
def test_random_network_is_proven_or_refused(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    net = Net(seed)
    print("\n".join(net.described), "outputs", net.outputs)
    r = random.Random(seed)
    widths = r.choice([(8, 8)] * 3 + [(4, 8), (4, 4), (2, 8), (3, 6), (8, 2)])
    print("widths", widths)
    batch = r.choice([1, 2])
    example = tuple(t[:batch] for t in net.example)
    data = [tuple(torch.randn(8, *t.shape[1:]) * t.std() + r.choice([0, 0, 0.5]) for t in net.example)]
    path, refusal = tmp_path / "net.onnx", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = hb.capture(net, example)
            quantized = hb.quantize(model, data, weight_bits=widths[0], activation_bits=widths[1])
            parity = hb.export_onnx(quantized, path)
    except (ParityError, VerifyError):
        raise
    except HalfbyteError as error:
        refusal = str(error)
    if refusal:
        print("refused:", refusal)
        assert 20 < len(refusal) < 600
        assert not path.exists()
        return
    assert parity.proven
    assert parity.integer_mismatches == 0
    assert path.exists()
