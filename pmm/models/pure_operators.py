"""Which operators a network in a file may consist of: those whose result follows from the values they are given."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

ON_NUMBERS = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
"""Of Python's `operator`, on sizes that follow from the batch."""
FACTORIES = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")
"""Operators that make tensors of numbers alone."""
COMPOSED = (
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "affine_grid_generator",
    "argsort", "baddbmm", "batch_norm", "broadcast_tensors", "broadcast_to", "cdist", "channel_shuffle", "chunk",
    "column_stack", "concat", "concatenate", "contiguous", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "cosine_similarity", "cross", "cummax", "cummin", "cumprod", "detach",
    "diag", "diag_embed", "diff", "dist", "dot", "dstack", "einsum", "expand_as", "flatten", "floor_divide",
    "glu", "grid_sampler", "group_norm", "hardswish", "hstack", "im2col", "index_add", "index_copy", "index_fill",
    "inner", "instance_norm", "layer_norm", "lift", "lift_fresh", "lift_fresh_copy", "linalg_cross", "linalg_matmul",
    "linalg_matrix_norm", "linalg_norm", "linalg_vecdot", "linear", "log_sigmoid", "log_softmax", "mT", "matmul",
    "max_pool1d", "max_pool2d", "max_pool3d", "mean", "median", "meshgrid", "moveaxis", "movedim", "mv", "narrow",
    "new_full", "new_ones", "new_zeros", "norm", "numpy_T", "one_hot", "ones_like", "outer", "pad",
    "pairwise_distance", "permute", "pixel_shuffle", "pixel_unshuffle", "prelu", "ravel", "repeat_interleave",
    "replication_pad1d", "reshape", "reshape_as", "rms_norm", "roll", "rot90", "scaled_dot_product_attention",
    "slow_conv_dilated2d", "softmax", "split", "squeeze", "stack", "swapaxes", "swapdims", "t", "take_along_dim",
    "tensor_split", "tensordot", "tile", "to", "trace", "transpose", "tril", "triu", "type_as", "unbind", "unflatten",
    "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "upsample_bicubic2d",
    "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "vdot", "view_as",
    "zeros_like",
)  # fmt: skip
"""Operators of more than one step, which torch does not mark as pure."""
OF_LAYOUT = ("as_strided", "empty", "empty_strided", "new_empty", "empty_like")
"""Operators whose result depends on how memory is laid out, or on what was there before."""
REPLACED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.new_empty.default": "aten.new_zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
}
"""Operators that take one layout of memory only, or read what was there before, and those that are stored for them."""
_PURE = {torch.Tag.core, torch.Tag.pointwise, torch.Tag.reduction}
_PRIVATE = (
    "_adaptive_avg_pool2d", "_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_softmax", "_to_copy", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
)  # fmt: skip
_NOT_FROM_FILES = ("Device", "Generator")
_LARGEST_SCALE = 64
"""Of resizing, up or down: torch reads beyond its memory where one is next to nothing."""


def written_as(target: Any) -> str:
    """The name of a node's target in a file: `aten.conv2d.default`, `operator.getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return REPLACED.get(str(target), str(target))
    return f"operator.{getattr(target, '__name__', target)}"


def operator_of(name: str) -> Callable[..., Any]:
    """Inverse of `written_as`. Raises ValueError for an operator that is not allowed, or that this torch lacks."""
    module, _, rest = name.partition(".")
    if module == "operator" and rest in ON_NUMBERS:
        return getattr(operator, rest)
    match = re.fullmatch(r"aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    overload = getattr(packet, match[2], None) if match else None
    if not isinstance(overload, torch._ops.OpOverload) or not _is_pure(overload):
        raise ValueError(f"operator {name[:60]!r}")
    return overload


def makes_tensors(target: Any) -> bool:
    """Whether a node of this target is one of `FACTORIES`, which takes the device."""
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket.__name__ in FACTORIES


def _is_pure(overload: torch._ops.OpOverload) -> bool:
    word, schema = overload.overloadpacket.__name__, overload._schema
    results, tags = [str(result.type) for result in schema.returns], set(overload.tags)
    if schema.is_mutable or not results or word in OF_LAYOUT or word.endswith("backward"):
        return False
    if word == "sym_size":
        return True
    if word.startswith("_") and word not in _PRIVATE:
        return False
    if not set(results) <= {"Tensor", "List[Tensor]"} or torch.Tag.data_dependent_output in tags:
        return False
    if word in (*FACTORIES, *COMPOSED, *_PRIVATE):
        return True
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return takes_tensors and bool(_PURE & tags) and torch.Tag.nondeterministic_seeded not in tags


def check_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a keyword that `function`, of `operator_of`, does not have, or that chooses a device or
    random numbers: fx writes keywords into the Python source that it runs, as they are. Also for a scale of resizing
    that torch does not survive."""
    if not isinstance(function, torch._ops.OpOverload):
        if kwargs:
            raise ValueError(f"{function.__name__} with keywords")
        return
    schema = function._schema.arguments
    types = {argument.name: str(argument.type) for argument in schema}
    given = {**dict(zip(types, args, strict=False)), **kwargs}
    if len(args) > len(schema) or not kwargs.keys() <= types.keys():
        raise ValueError(f"{function} with other arguments than it has")
    for name, value in given.items():
        if value is not None and any(word in types[name] for word in _NOT_FROM_FILES):
            raise ValueError(f"{function} with {name}")
        if name.startswith("scales") or name == "scale_factors":
            for scale in value if isinstance(value, list | tuple) else (value,):
                plain = isinstance(scale, int | float) and 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE
                if scale is not None and not plain:
                    raise ValueError(f"{function} with a scale of {str(scale)[:60]}")
    if given.get("dropout_p"):
        raise ValueError(f"{function} with dropout")


def check_numbers(node: fx.Node, args: Sequence[Any]) -> None:
    """Raises ValueError for operands of one of `ON_NUMBERS` that are no numbers, of which Python can make endless lists
    and texts, and for a product of two sizes: squared again and again, a number has no end."""
    if node.target is operator.getitem:
        fits = isinstance(args[0], list | tuple) and isinstance(args[1], int)
    else:
        fits = all(isinstance(each, int | float | torch.SymInt | torch.SymFloat | torch.SymBool) for each in args)
    if not fits:
        raise ValueError(f"{node.name} takes what is no number")
    if node.target is operator.mul and all(isinstance(each, fx.Node) for each in node.args):
        raise ValueError(f"{node.name} is a product of two sizes")
