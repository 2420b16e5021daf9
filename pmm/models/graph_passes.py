"""Changes of a network that is a graph of ATen operators: batch-norm folded into the layer before it, BGR images.

Such a graph takes one input, images float32 [N, 3, H, W], and has its weights as attributes, each read by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pmm.models.fold_batchnorm import check_folded
from pmm.models.graph_macs import CONVOLUTIONS, operator_name

_BATCH_NORMS = {"_native_batch_norm_legit_no_training": 6, "batch_norm": 7}
"""Operators, and the position of epsilon among their arguments."""


@torch.no_grad()
def fold_batch_norms_in_graph(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """Fold, in place, each batch-norm that is all that reads one convolution or linear layer, whose weights nothing
    else reads. Others, of sums or of layers that are read twice, remain.

    What follows from constants alone is computed first, so that it is done once and not for every batch.

    Args:
        graph: images [N, 3, H, W] float32 -> embeddings [N, D] float32.
        example: some images, on which the result is checked.

    Raises ValueError if the folded graph computes something else.
    """
    expected = graph(example)
    fold_constants(graph)
    _pool_by_means(graph)
    uses = _uses_of_tensors(graph)
    with known_shapes(graph, example):
        pairs = {norm: _layer_before(graph, norm, uses) for norm in graph.graph.nodes}
    for norm, layer in pairs.items():
        if layer is None:
            continue
        weight, bias = _folded(graph, layer, norm)
        name = str(layer.all_input_nodes[1].target)
        _set_argument(layer, 1, add_constant(graph, f"{name}_folded", weight, before=layer))
        _set_argument(layer, 2, add_constant(graph, f"{name}_bias_folded", bias, before=layer))
        for output in _normalised(norm):
            output.replace_all_uses_with(layer)
    remove_unused(graph)
    check_folded(graph(example), expected)
    return graph


@torch.no_grad()
def fold_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """Compute, in place, what depends on neither the images nor their number: the bias that Swin looks up by position,
    weights that are standardised."""
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(graph, node)
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if node.op == "call_function" and outside and isinstance(value, Tensor):
            constant = add_constant(graph, f"{node.name}_constant", value, before=node)
            node.replace_all_uses_with(constant, delete_user_cb=outside.__contains__)
    return remove_unused(graph)


@torch.no_grad()
def reverse_channels(graph: fx.GraphModule) -> fx.GraphModule:
    """Make `graph`, in place, take BGR images: by the weights of the convolutions that read them where nothing else
    does, so that no channel is moved when it runs, else by a step that moves them."""
    images = next(node for node in graph.graph.nodes if node.op == "placeholder")
    readers = [node for node in images.users if operator_name(node) != "sym_size"]
    if all(_convolves_all_channels(node, images) for node in readers):
        for node in readers:
            weights: Any = node.args[1]
            constant = add_constant(
                graph, f"{weights.target}_bgr", attribute(graph, weights).flip(1).contiguous(), before=node
            )
            _set_argument(node, 1, constant)
    else:
        with graph.graph.inserting_after(images):
            reversed_images = graph.graph.call_function(torch.ops.aten.flip.default, (images, [1]))
        images.replace_all_uses_with(reversed_images, delete_user_cb=readers.__contains__)
    return remove_unused(graph)


def attention_of_heads(graph: fx.GraphModule) -> fx.GraphModule:
    """Make attention without heads [N, L, D], in place, attention of one head [N, 1, L, D], which has the same bits:
    exporters to ONNX know no other. Nodes have a tensor of their shape as `meta["val"]`."""
    unsqueeze, squeeze = torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim
    for node in graph.graph.nodes:
        if operator_name(node) != "scaled_dot_product_attention" or node.meta["val"].dim() != 3:
            continue
        for tensor in node.all_input_nodes:
            if tensor.meta["val"].dim() == 3:  # a mask may be the same for all images
                with graph.graph.inserting_before(node):
                    node.replace_input_with(tensor, graph.graph.call_function(unsqueeze, (tensor, 1)))
        with graph.graph.inserting_after(node):
            output = graph.graph.call_function(squeeze, (node, 1))
        output.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(output, delete_user_cb=lambda user, output=output: user is not output)
    graph.recompile()
    return graph


def attribute(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def add_constant(graph: fx.GraphModule, name: str, value: Tensor, *, before: fx.Node) -> fx.Node:
    """Give `graph` the tensor `value` under `name`, or one like it that is free, and a node that reads it."""
    free = stem = name.replace(".", "_")
    numbers = count(2)
    while hasattr(graph, free):
        free = f"{stem}_{next(numbers)}"
    value = value.detach().clone(memory_format=torch.contiguous_format)
    if value.is_floating_point():  # as other weights, from which the type of a network is read
        graph.register_parameter(free, nn.Parameter(value, requires_grad=False))
    else:
        graph.register_buffer(free, value)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(free)
    return node


@contextmanager
def known_shapes(graph: fx.GraphModule, example: Tensor) -> Iterator[None]:
    """Each node has, as `meta["val"]`, a tensor without memory of the shape and type that it has on `example`."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(example)
    try:
        yield
    finally:
        for node in graph.graph.nodes:
            node.meta.pop("val", None)


def remove_unused(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the nodes, and the tensors, of which nothing follows: an export would write them."""
    graph.graph.eliminate_dead_code()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, module in list(graph.named_modules()):
        tensors = {
            **module._parameters,
            **module._buffers,
            **{k: v for k, v in vars(module).items() if torch.is_tensor(v)},
        }
        for name in tensors:
            if f"{path}.{name}".removeprefix(".") not in read:
                delattr(module, name)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _pool_by_means(graph: fx.GraphModule) -> None:
    """Write an average pooling to one value per channel as a mean, which it is: exporters to ONNX put a gathering
    behind the pooling, which hides that one value per channel comes out."""
    for node in graph.graph.nodes:
        if operator_name(node) == "adaptive_avg_pool2d" and list(node.args[1]) == [1, 1]:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-2, -1], True)


def _layer_before(graph: fx.GraphModule, norm: fx.Node, uses: Counter[int]) -> fx.Node | None:
    """The layer into which the batch-norm `norm` can be folded, if it is one and there is one."""
    if operator_name(norm) not in _BATCH_NORMS or (operator_name(norm) == "batch_norm" and norm.args[5]):
        return None
    layer, constants = norm.args[0], norm.args[1:5]
    if not isinstance(layer, fx.Node) or len(layer.users) > 1 or operator_name(layer) not in (*CONVOLUTIONS, "linear"):
        return None
    if operator_name(layer) == "linear" and layer.meta["val"].dim() != 2:  # channels are the second of three
        return None
    weights, bias = layer.args[1], _argument(layer, 2)
    if not all(each is None or _is_constant(each) for each in (bias, *constants)) or not _is_constant(weights):
        return None
    saved = [user for user in norm.users if user.target is getitem and user.args[1] != 0]
    return None if saved or uses[id(attribute(graph, weights))] > 1 else layer  # type: ignore[arg-type]


def _folded(graph: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Weights and bias of `layer` that do what it and `norm` do."""
    each: list[Any] = [layer.args[1], _argument(layer, 2), *norm.args[1:5]]
    weight, bias, scale, shift, mean, variance = (value if value is None else attribute(graph, value) for value in each)
    epsilon = norm.args[_BATCH_NORMS[operator_name(norm)]]
    fuse = fuse_linear_bn_weights if operator_name(layer) == "linear" else fuse_conv_bn_weights
    return fuse(weight, bias, mean, variance, epsilon, scale, shift)  # type: ignore[arg-type]


def _normalised(norm: fx.Node) -> list[fx.Node]:
    """The nodes that are the output of `norm`, which may be the first of several."""
    return [norm] if operator_name(norm) == "batch_norm" else [user for user in norm.users if user.target is getitem]


def _uses_of_tensors(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes read each tensor, by its id: two names may be one tensor."""
    uses: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            uses[id(attribute(graph, node))] += len(node.users)
    return uses


def _convolves_all_channels(node: fx.Node, images: fx.Node) -> bool:
    whole = operator_name(node) == "conv2d" and _argument(node, 6, 1) == 1
    return whole and node.args[0] is images and _is_constant(node.args[1])


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _argument(node: fx.Node, index: int, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else default


def _set_argument(node: fx.Node, index: int, value: fx.Node) -> None:
    args = list(node.args)
    args += [None] * (index + 1 - len(args))
    node.args = (*args[:index], value, *args[index + 1 :])
