"""Networks as plain data: a graph of ATen operators as JSON, which is read without running code of anyone's.

torch's own loader of exported programs falls back to pickle, evaluates strings and resolves any name below `torch`;
here an operator is one that computes tensors from tensors (see `pmm.models.pure_operators`), or one of a few on whole
numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pmm.models.pure_operators import check_arguments, operator_of, written_as

WORDS = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout)
}
_DEVICES = ("device", "pin_memory")
_TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_NAME = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)
"""Of a tensor: fx writes it into the Python source that it runs, as it is."""


def graph_to_json(graph: fx.GraphModule) -> tuple[str, dict[str, Tensor]]:
    """`graph` as text and the tensors that it reads, by name, on the CPU: parameters and buffers alike.

    Raises ValueError, naming the operator, for what `graph_from_json` would refuse.
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
            if _only_checks(node):
                continue
            target = written_as(node.target)
            operator_of(target)
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"a {node.op} of {target}")
        args = [_encoded(value) for value in node.args]
        if node.op == "output" and isinstance(args[0], list) and len(args[0]) == 1:  # as torch.export writes it
            args = args[0]
        kwargs = {key: _encoded(value) for key, value in node.kwargs.items() if key not in _DEVICES}
        if target == "aten.zeros.default":  # in place of memory as it is found, which may have a layout
            kwargs.pop("memory_format", None)
        nodes.append([node.name, node.op, target, args, kwargs])
    return json.dumps({"nodes": nodes, "parameters": parameters}), tensors


def graph_from_json(text: str, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Inverse of `graph_to_json`, in eval mode.

    Raises ValueError for text that it did not write, an operator that is not allowed, or tensors that are missing or no
    plain ones.
    """
    try:
        content = json.loads(text)
        for name, value in tensors.items():
            _check_tensor(name, value)
        parameters = set(content["parameters"])
        graph = _graph_of(content["nodes"], tensors)
        root = {
            name: nn.Parameter(value, requires_grad=False) if name in parameters else value
            for name, value in tensors.items()
        }
        return fx.GraphModule(root, graph, "AdoptedGraph").eval()
    except (
        json.JSONDecodeError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        RecursionError,
        SyntaxError,
    ) as error:
        raise ValueError(f"not a graph ({type(error).__name__}: {str(error)[:200]})") from error


def _graph_of(nodes: list[Any], tensors: Mapping[str, Tensor]) -> fx.Graph:
    """Raises ValueError for what `graph_to_json` does not write, and the errors of Python for nodes of another form."""
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for name, op, target, args, kwargs in nodes:
        values = tuple(_decoded(value, made) for value in args)
        named = {key: _decoded(value, made) for key, value in kwargs.items()}
        if op == "call_function":
            function = operator_of(target)
            check_arguments(function, values, named)
            made[name] = graph.call_function(function, values, named)
        elif op == "get_attr" and target in tensors:
            made[name] = graph.get_attr(target)
        elif op == "placeholder":
            made[name] = graph.placeholder("images")
        elif op == "output" and isinstance(values[0], fx.Node):
            graph.output(values[0])
        else:
            raise ValueError(f"a {op} of {str(target)[:60]!r}")
    ends = [node.op for node in graph.nodes if node.op in ("placeholder", "output")]
    if ends != ["placeholder", "output"]:
        raise ValueError("it does not lead from images to one output")
    graph.lint()
    return graph


def _only_checks(node: fx.Node) -> bool:
    """Whether it asserts something of its arguments, and computes nothing."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.returns
        and not node.users
        and (not node.target._schema.is_mutable)
    )


def _attribute(module: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{target} is a {type(value).__name__}, and no tensor")
    _check_tensor(target, value)
    return value


def _check_tensor(name: str, value: Tensor) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a tensor of the name {name[:60]!r}")
    if value.layout != torch.strided or value.dtype not in _TYPES:
        raise ValueError(f"{name[:60]} is {value.dtype} ({value.layout})")
    if value.device.type == "meta" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{name[:60]} of shape {list(value.shape)} is not in the file")


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
        return nodes[value["node"]] if "node" in value else WORDS[value["torch"]]
    return value
