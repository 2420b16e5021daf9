"""The deployed graph (`pmm.runtime.deployed_graph`) as ONNX."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from pmm.artifacts.client_contract import client_steps
from pmm.artifacts.manifest import InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.export.node_names import name_nodes
from pmm.export.portable_graph import make_portable, remove_unread
from pmm.runtime.deployed_graph import DeployedGraph
from pmm.runtime.torch_graph import quiet
from pmm.utils.errors import ConflictingOptions

if TYPE_CHECKING:
    import onnx

IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 10, 21: 10, 22: 10}
"""Of the file's format, per opset: what readers of that age know (onnx.helper.OP_SET_ID_VERSION_MAP)."""


def to_onnx(graph: DeployedGraph, preprocessing: Preprocessing, input: InputContract, opset: int) -> onnx.ModelProto:
    """Trace `graph`, with a dynamic batch or that of `input`, and check the result in full. The same graph gives the
    same bytes.

    Args:
        preprocessing: of the caller, who reads it in the file's documentation of its input.

    Raises ConflictingOptions for a network that an older `opset` has no operators for.
    """
    import onnx

    image = input.shape(preprocessing)
    # a batch of 2: torch.export would take a batch of 1 for a constant; expanded: no memory for a large one
    example = torch.zeros(1, *image, dtype=getattr(torch, input.dtype)).expand(input.batch or 2, *image)
    with quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[input.name],
            output_names=[graph.embedding.name],
            dynamic_shapes=None if input.batch else ({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    proto = program.model_proto
    make_portable(proto)
    name_nodes(proto)
    if opset == 17:
        _to_opset_17(proto)
    proto.ir_version = IR_VERSION[opset]
    _strip_traces(proto)
    _describe_interface(proto, client_steps(preprocessing, input, graph.embedding))
    onnx.checker.check_model(proto, full_check=True)
    _check_interface(proto, input.batch, list(image), graph.embedding.dim, opset)
    return proto


def _to_opset_17(proto: onnx.ModelProto) -> None:
    """From 18, the oldest that torch writes (onnx's own converter leaves attributes that opset 17 does not know). All
    reductions but ReduceSum have their axes as an attribute, which became an input.

    Raises ConflictingOptions for what opset 17 cannot say.
    """
    import onnx
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    sizes = {value.name: str(value.type.tensor_type.shape) for value in (*proto.graph.value_info, *proto.graph.output)}
    for node in proto.graph.node:
        dropped = []
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and node.input[1:]:
            if node.input[1] not in constants:
                raise _newer(f"{node.op_type} over axes that are computed")
            axes = numpy_helper.to_array(constants[node.input.pop(1)])
            node.attribute.append(helper.make_attribute("axes", axes.tolist()))
            dropped.append("noop_with_empty_axes")
        if node.op_type == "Split" and len({sizes.get(name, name) for name in node.output}) == 1:
            dropped.append("num_outputs")  # parts of one size need no number
        _drop_newer(node, dropped)
    remove_unread(proto.graph)
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", 17))


def _drop_newer(node: onnx.NodeProto, dropped: Collection[str]) -> None:
    """Remove attributes that opset 17 does not know, those of `dropped` and others at their defaults.

    Raises ConflictingOptions for others, and for operators and inputs that it does not know.
    """
    from onnx import defs, helper

    newer = defs.get_schema(node.op_type, 18, "")
    try:
        older = defs.get_schema(node.op_type, 17, "")
    except defs.SchemaError as error:
        raise _newer(node.op_type) from error
    if any(node.input[older.max_input :]):
        raise _newer(f"{node.op_type} with {newer.inputs[older.max_input].name}")
    for attribute in [attribute for attribute in node.attribute if attribute.name not in older.attributes]:
        default = newer.attributes[attribute.name].default_value
        value = helper.get_attribute_value
        if attribute.name not in dropped and not (default.name and value(default) == value(attribute)):
            raise _newer(f"{node.op_type} with {attribute.name}")
        node.attribute.remove(attribute)


def _newer(what: str) -> ConflictingOptions:
    """What the network has, and opset 17 does not."""
    problem = f"--opset is 17, which does not have what the network needs: {what}"
    return ConflictingOptions(problem, "--opset", expected="--opset 18 or newer")


def _check_interface(proto: onnx.ModelProto, batch: int | None, image: list[int], dim: int, opset: int) -> None:
    dims = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*proto.graph.input, *proto.graph.output)}  # fmt: skip
    images, embeddings = dims.get("images", []), dims.get("embeddings", [])
    if images[1:] != image or embeddings[1:] != [dim]:
        raise RuntimeError(f"unexpected interface of the exported graph: {dims}")
    if images[0] != embeddings[0] or (images[0] != batch if batch else not isinstance(images[0], str)):
        raise RuntimeError(f"the exported batch dimension is not {batch or 'symbolic'}: {dims}")
    if [(entry.domain, entry.version) for entry in proto.opset_import] != [("", opset)]:
        raise RuntimeError(f"expected opset {opset}, torch wrote {proto.opset_import}")


def _describe_interface(proto: onnx.ModelProto, steps: list[str]) -> None:
    """Document the input by the first four of a client's steps, and the output by the others."""
    for value, its in ((proto.graph.input[0], steps[:4]), (proto.graph.output[0], steps[4:])):
        text = "; ".join(its)
        value.doc_string = f"{text[0].upper()}{text[1:]}."


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove what torch.onnx records of this machine (stack traces hold absolute paths)."""
    del proto.metadata_props[:]
    for holder in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer,
                   *proto.graph.value_info):  # fmt: skip
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.doc_string = proto.graph.doc_string = ""
