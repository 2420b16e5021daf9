"""Networks as plain data: a graph of ATen operators as JSON, which is read without running code of anyone's.

torch's own loader of exported programs falls back to pickle, evaluates strings and resolves any name below `torch`;
here an operator is one of `aten` that computes tensors from tensors, or one of a few on whole numbers.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

OPERATORS = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
"""Of Python's `operator`, on sizes that follow from the batch."""
SAME_WITHOUT_STRIDES = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
"""Operators that take one layout of memory only, and those that compute the same from any."""
FACTORIES = ("arange", "zeros", "ones", "full", "scalar_tensor", "empty", "eye", "linspace")
_DEVICES = ("device", "pin_memory")
_WORDS = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout)
}


def graph_to_json(graph: fx.GraphModule) -> tuple[str, dict[str, Tensor]]:
    """`graph` as text and the tensors that it reads, by name, on the CPU: parameters and buffers alike.

    Raises ValueError, naming the operator, for one that `graph_from_json` would refuse.
    """
    nodes, tensors, parameters = [], {}, []
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            value = _attribute(graph, target)
            tensors[target] = value.detach().cpu().clone()
            if isinstance(value, nn.Parameter):
                parameters.append(target)
        elif node.op == "call_function":
            target = _name_of(node.target)
            _operator_of(target)
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"a {node.op} of {target}")
        args = [_encoded(value) for value in node.args]
        if node.op == "output" and isinstance(args[0], list) and len(args[0]) == 1:  # as torch.export writes it
            args = args[0]
        kwargs = {key: _encoded(value) for key, value in node.kwargs.items() if key not in _DEVICES}
        nodes.append([node.name, node.op, target, args, kwargs])
    return json.dumps({"nodes": nodes, "parameters": parameters}), tensors


def graph_from_json(text: str, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Inverse of `graph_to_json`, in eval mode.

    Raises ValueError for text that it did not write, an operator that is not allowed, or tensors that are missing.
    """
    try:
        content = json.loads(text)
        parameters, graph = set(content["parameters"]), fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for name, op, target, args, kwargs in content["nodes"]:
            values = tuple(_decoded(value, nodes) for value in args)
            named = {str(key): _decoded(value, nodes) for key, value in kwargs.items()}
            if op == "call_function":
                nodes[name] = graph.call_function(_operator_of(target), values, named)
            elif op == "get_attr" and target in tensors:
                nodes[name] = graph.get_attr(target)
            elif op == "placeholder" and not any(node.op == op for node in graph.nodes):
                nodes[name] = graph.placeholder("images")
            elif op == "output":
                graph.output(values[0])
            else:
                raise ValueError(f"a {op} of {str(target)[:60]!r}")
        root = {
            name: nn.Parameter(value, requires_grad=False) if name in parameters else value
            for name, value in tensors.items()
        }
        graph.lint()
        return fx.GraphModule(root, graph, "AdoptedGraph").eval()
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"not a graph ({type(error).__name__}: {str(error)[:200]})") from error


def _attribute(module: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{target} is a {type(value).__name__}, and no tensor")
    return value


def _name_of(target: Any) -> str:
    """`aten.conv2d.default`, `operator.getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return SAME_WITHOUT_STRIDES.get(name, name)
    return f"operator.{getattr(target, '__name__', target)}"


def _operator_of(name: str) -> Callable[..., Any]:
    """Raises ValueError for an operator that is not allowed, or that this torch does not have."""
    if name.startswith("operator."):
        if (word := name.removeprefix("operator.")) not in OPERATORS:
            raise ValueError(f"operator {word[:60]!r}")
        return getattr(operator, word)
    match = re.fullmatch(r"aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)", name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    overload = getattr(packet, match[2], None) if match else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise ValueError(f"operator {name[:60]!r}")
    schema = overload._schema
    computes = any("Tensor" in str(argument.type) for argument in schema.arguments) or match[1] in FACTORIES  # type: ignore[index]
    if schema.is_mutable or not schema.returns or not computes:
        raise ValueError(f"operator {name[:60]!r}, which does more than to compute")
    return overload


def _encoded(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encoded(each) for each in value]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a constant of type {type(value).__name__}")


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, nodes) for each in value]
    if isinstance(value, dict):
        return nodes[value["node"]] if "node" in value else _WORDS[value["torch"]]
    return value
