"""Small networks as graphs of ATen operators, as adopted ones are stored."""

import torch
from torch import Tensor, fx, nn

from pmm.models.graph_macs import operator_name
from pmm.models.graph_passes import known_shapes

aten = torch.ops.aten


def graph_of(net: nn.Module) -> fx.GraphModule:
    """Of a network whose `forward` calls ATen operators alone: torch.export takes half a second for any."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return fx.symbolic_trace(net.eval())


def nodes_of(graph: fx.GraphModule, *names: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if operator_name(node) in names]


def types_of(graph: fx.GraphModule, images: Tensor) -> dict[str, list[torch.dtype]]:
    """What each operator gives, by its name, in the order of the graph."""
    types: dict[str, list[torch.dtype]] = {}
    with known_shapes(graph, images):
        for node in graph.graph.nodes:
            value = node.meta["val"]
            if node.op == "call_function" and torch.is_tensor(value):
                types.setdefault(operator_name(node), []).append(value.dtype)
    return types
