"""What later training needs: a captured graph with a tap as a submodule trains, compiled and distributed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn

from halfbyte import capture
from halfbyte.affine import round_even


class Tap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return round_even(x / self.scale).clamp(-8, 7) * self.scale


def tapped() -> fx.GraphModule:
    m = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 6, 6))
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied = graph.graph_copy(m.graph, mapping)
    names = {name: name.replace(".", "_") for name in m.params}
    for name, flat in names.items():
        root.register_parameter(flat, nn.Parameter(m.params[name].clone()))
    root.add_module("tap", Tap())
    for node in graph.nodes:
        node.target = names.get(str(node.target), node.target) if node.op == "get_attr" else node.target
    value = copied[0] if isinstance(copied, tuple | list) else copied
    assert isinstance(value, fx.Node)
    assert mapping
    graph.output(graph.call_module("tap", (value,)))
    return fx.GraphModule(root, graph)


def step(net: Any) -> None:
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.train()
    net(torch.randn(4, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_compiled() -> None:
    net = tapped()
    step(torch.compile(net, backend="aot_eager"))


def test_distributed(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        step(nn.parallel.DistributedDataParallel(tapped()))
    finally:
        distributed.destroy_process_group()
