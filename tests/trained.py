"""Small networks with batch norms and depthwise layers, trained for a few seconds on patterns drawn for them."""

import functools

import torch
from torch import Tensor, nn

CLASSES, SIZE = 8, 16
MEAN, STD = (140.0, 100.0, 60.0), (60.0, 50.0, 30.0)  # of pixels of 0..255, so that the order of colours matters


def pixels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of 0..255, [count, 3, 16, 16], and their classes: one smooth pattern each, shifted, with noise of its own."""
    shapes = torch.Generator().manual_seed(11)
    coarse = torch.randn(CLASSES, 3, 5, 5, generator=shapes)
    patterns = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=g)
    moves = torch.randint(-3, 4, (count, 2), generator=g).tolist()
    x = torch.stack([patterns[c].roll(tuple(d), (1, 2)) for c, d in zip(y.tolist(), moves, strict=True)])
    x = x * (0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=g)) + 1.2 * torch.randn(x.shape, generator=g)
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (MEAN, STD))
    return (x * std + mean).clamp(0, 255), y


def prepared(x: Tensor) -> Tensor:
    """What the networks take."""
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (MEAN, STD))
    return (x - mean) / std


class Separable(nn.Module):
    """As MobileNetV2: expansion, depthwise, projection, with ReLU6 and a residual connection."""

    def __init__(self, tracked: bool = True) -> None:
        super().__init__()

        def block(i: int, o: int, k: int, groups: int = 1, stride: int = 1, relu: bool = True) -> nn.Sequential:
            conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o, track_running_stats=tracked), *([nn.ReLU6()] if relu else []))

        self.stem = block(3, 16, 3)
        self.one = nn.Sequential(block(16, 32, 1), block(32, 32, 3, 32), block(32, 16, 1, relu=False))
        self.two = nn.Sequential(block(16, 32, 1), block(32, 32, 3, 32, 2), block(32, 24, 1))
        self.last = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        return self.last(self.two(x).mean((2, 3)))


class Plain(nn.Module):
    """Three convolutions, one of them depthwise, ReLU and pooling."""

    def __init__(self, tracked: bool = True) -> None:
        super().__init__()
        self.first, self.n1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12, track_running_stats=tracked)
        self.second = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.n2 = nn.BatchNorm2d(12, track_running_stats=tracked)
        self.third, self.n3 = nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24, track_running_stats=tracked)
        self.last = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.first(x)))
        x = torch.relu(self.n2(self.second(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.n3(self.third(x)))
        return self.last(x.mean((2, 3)))


NETWORKS = {"separable": Separable, "plain": Plain}


@functools.cache
def trained(name: str, tracked: bool = True) -> nn.Module:
    """One of the networks after a few epochs; the caller must not change it."""
    torch.manual_seed(0)
    net = NETWORKS[name](tracked)
    x, y = pixels(768, 1)
    x = prepared(x)
    epochs, size = 6, 48
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(x) // size))
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for part in order.split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()
