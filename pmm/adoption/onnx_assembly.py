"""The graph that an adopted ONNX file holds: the foreign one, its operators unchanged, from the images to the
embeddings. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.adoption.onnx_interface import ImageInput, inputs_of
from pmm.adoption.onnx_reading import ForeignOnnx, nodes_in
from pmm.artifacts.describe import describe_tensor
from pmm.artifacts.manifest import InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.export.graph_folding import opset_of
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx

BATCH = "batch"
"""The name of a batch of any size, of graphs that give it none."""
PREFIX = "pmm_"
"""Of tensors and operators that adoption adds."""
CONSTANTS_ARE_NO_INPUTS = 4
"""The version of the format from which on they need not be listed among the inputs."""
AXES_ARE_AN_INPUT = 18
"""The opset from which on reductions read them."""
LEAST_NORM = 1e-12
"""Added to norms (opset 7 has no maximum of a vector and a number): zeros stay zeros, and others are the same."""
FLOAT, UINT8, FLOAT16 = 1, 2, 10
"""As onnx.TensorProto numbers them."""


def from_images_to(foreign: ForeignOnnx, images: ImageInput, output: onnx.ValueInfoProto) -> onnx.ModelProto:
    """A copy of the graph with that one input and that one output, its operators those that lie between.

    Its images have the size and batch of `images`. Raises InvalidFile if the output needs other inputs too, or not the
    images.
    """
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(foreign.proto)
    graph = proto.graph
    needed = _needed(graph, output.name)
    if images.name not in needed:
        raise InvalidFile(f"its output {output.name} does not depend on {images.name}", path=foreign.path)
    read = [value for value in inputs_of(graph) if value.name in needed]
    if others := [describe_tensor(value) for value in read if value.name != images.name]:
        problem = f"its output {output.name} needs more than the images: {', '.join(others)[:300]}"
        raise InvalidFile(problem, path=foreign.path, hint="export the network with the other inputs as constants")
    if len(graph.output) > 1 or len(inputs_of(graph)) > 1:
        _keep(graph.node, lambda node: not needed.isdisjoint(node.output))
        _keep(graph.initializer, lambda tensor: tensor.name in needed)
        _keep(graph.sparse_initializer, lambda tensor: tensor.values.name in needed)
        _keep(graph.input, lambda value: value.name in needed)
        _keep(graph.output, lambda value: value.name == output.name)
        _keep(graph.value_info, lambda value: value.name in needed)
    (value,) = inputs_of(graph)
    sides = {"N": images.batch, "C": 3, "H": images.height, "W": images.width}
    _set_shape(value, [sides[letter] for letter in images.layout])
    return proto


def contract_of(
    proto: onnx.ModelProto, images: ImageInput, colour: Literal["rgb", "bgr"], uint8: bool
) -> InputContract:
    """What the adopted graph takes: what the foreign one does, or with `uint8` what files of pmm export onnx take. No
    caller has float16: its images are float32."""
    unchanged = images.dtype == "uint8" or not (uint8 or images.dtype == "float16")
    name = images.name if unchanged else _new_name(proto, "images")
    if uint8 and images.normalised_by == "caller":
        return InputContract(name=name, batch=images.batch)
    dtype: Literal["uint8", "float32"] = "uint8" if images.dtype == "uint8" else "float32"
    return InputContract(
        name=name,
        dtype=dtype,
        layout=images.layout,
        colour=colour,
        normalised_by=images.normalised_by,
        batch=images.batch,
    )


def with_interface(
    proto: onnx.ModelProto,
    images: ImageInput,
    contract: InputContract,
    size: Preprocessing,
    colour: Literal["rgb", "bgr"],
    shape: Sequence[int],
    *,
    normalise: bool = False,
) -> str:
    """Give `proto`, in place, the input of `contract` and an output float32 [N, D], where it has others.

    Args:
        colour: of the foreign graph's own images.
        shape: of one image's output, as it was seen: [D] or [D, 1, 1].
        normalise: the output is given norm 1.

    Returns the name of the output.
    """
    from onnx import helper, numpy_helper

    graph, at = proto.graph, contract.name
    front, back = _front(images, contract, size, colour), _back(graph.output[0], shape)
    nodes = []
    for number, (operator, constant, attributes) in enumerate(front):
        names, name = [at], f"{PREFIX}{number}_{operator}"
        if constant is not None:
            names.append(f"{name}_by")
            graph.initializer.append(numpy_helper.from_array(constant, names[-1]))
        at = images.name if number == len(front) - 1 else name
        nodes.append(helper.make_node(operator, names, [at], name=name, **attributes))
    nodes.extend(graph.node)
    at = graph.output[0].name
    for number, (operator, attributes) in enumerate(back, start=1):
        name = f"{PREFIX}{operator}" if normalise or number < len(back) else _new_name(proto, "embeddings")
        nodes.append(helper.make_node(operator, [at], [name], name=f"{PREFIX}{operator}", **attributes))
        at = name
    if normalise:
        vectors, at = at, _new_name(proto, "embeddings")
        nodes += _to_unit_norm(proto, vectors, at)
    (value,) = inputs_of(graph)
    batch = value.type.tensor_type.shape.dim[0].dim_param or images.batch
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.append(helper.make_tensor_value_info(at, FLOAT, [batch, shape[0]]))
    if front or normalise:
        proto.ir_version = max(proto.ir_version, CONSTANTS_ARE_NO_INPUTS)
    if front:
        kind = UINT8 if contract.dtype == "uint8" else FLOAT
        graph.input.remove(value)
        graph.input.insert(0, helper.make_tensor_value_info(contract.name, kind, [batch, *contract.shape(size)]))
    return at


def _front(
    images: ImageInput, contract: InputContract, size: Preprocessing, colour: str
) -> list[tuple[str, npt.NDArray[Any] | None, dict[str, Any]]]:
    """From the images of `contract` to those that the graph takes: operators, what they take besides, and their
    attributes. In the order of `InputContract.feed`, but that TensorRT transposes no uint8."""
    steps: list[tuple[str, npt.NDArray[Any] | None, dict[str, Any]]] = []
    if contract.normalised_by == "graph" and images.normalised_by == "caller":
        scale, offset = size.scale_and_offset()
        steps += [("Cast", None, {"to": FLOAT}), ("Mul", scale, {}), ("Sub", offset, {})]
        if colour == "bgr":
            steps.append(("Gather", np.array([2, 1, 0]), {"axis": 3}))
        if images.layout == "NCHW":
            steps.append(("Transpose", None, {"perm": [0, 3, 1, 2]}))
    if images.dtype == "float16":
        steps.append(("Cast", None, {"to": FLOAT16}))
    return steps


def _back(output: onnx.ValueInfoProto, shape: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """From the graph's output to float32 [N, D]."""
    half = output.type.tensor_type.elem_type == FLOAT16
    casts: list[tuple[str, dict[str, Any]]] = [("Cast", {"to": FLOAT})] if half else []
    return casts + ([("Flatten", {"axis": 1})] if len(shape) > 1 else [])


def _to_unit_norm(proto: onnx.ModelProto, vectors: str, output: str) -> list[onnx.NodeProto]:
    """From vectors [N, D] to the same with norm 1, or 0 of zeros; what it takes becomes an initialiser."""
    from onnx import helper, numpy_helper

    norm, least, safe = f"{PREFIX}norm", f"{PREFIX}least_norm", f"{PREFIX}safe_norm"
    proto.graph.initializer.append(numpy_helper.from_array(np.array(LEAST_NORM, np.float32), least))
    names, attributes = [vectors], {"axes": [1]}
    if opset_of(proto) >= AXES_ARE_AN_INPUT:
        names, attributes = [vectors, f"{PREFIX}axes"], {}
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), names[1]))
    steps = [("ReduceL2", names, norm), ("Add", [norm, least], safe), ("Div", [vectors, safe], output)]
    made = [helper.make_node(operator, read, [name], name=f"{PREFIX}{operator}") for operator, read, name in steps]
    made[0].attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return made


def _needed(graph: onnx.GraphProto, output: str) -> set[str]:
    """The tensors that `output` is made of, and itself; those that graphs inside nodes read too."""
    needed = {output}
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    needed.update(name for each in nodes_in(inner) for name in each.input)
                    needed.update(value.name for value in inner.output)
    return needed


def _keep(entries: Any, wanted: Callable[[Any], bool]) -> None:
    kept = [entry for entry in entries if wanted(entry)]
    del entries[:]
    entries.extend(kept)


def _new_name(proto: onnx.ModelProto, name: str) -> str:
    """`name`, or one like it that no tensor has."""
    graph = proto.graph
    taken = {each for node in nodes_in(graph) for each in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    while name in taken:
        name = PREFIX + name
    return name


def _set_shape(value: onnx.ValueInfoProto, sizes: Sequence[int | None]) -> None:
    """A size that is None keeps its name, or gets that of a batch."""
    from onnx import TensorShapeProto

    dims = value.type.tensor_type.shape.dim
    before = [dim.dim_param for dim in dims] or [""] * len(sizes)
    del dims[:]
    dims.extend(
        TensorShapeProto.Dimension(dim_value=size)
        if size is not None
        else TensorShapeProto.Dimension(dim_param=name or BATCH)
        for size, name in zip(sizes, before, strict=True)
    )
