"""The deployed graph (`pmm.runtime.deployed_graph`) as ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pmm.artifacts.client_contract import client_steps
from pmm.artifacts.manifest import InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.export.node_names import name_nodes
from pmm.export.portable_graph import make_portable, remove_unread
from pmm.runtime.deployed_graph import DeployedGraph
from pmm.runtime.torch_graph import quiet

if TYPE_CHECKING:
    import onnx

IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 10, 21: 10, 22: 10}
"""Of the file's format, per opset: what readers of that age know (onnx.helper.OP_SET_ID_VERSION_MAP)."""


def to_onnx(graph: DeployedGraph, preprocessing: Preprocessing, input: InputContract, opset: int) -> onnx.ModelProto:
    """Trace `graph`, with a dynamic batch or that of `input`, and check the result in full. The same graph gives the
    same bytes.

    Args:
        preprocessing: of the caller, who reads it in the file's documentation of its input.
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
    """From 18, the oldest that torch writes. Of its operators only the reductions differ: in 17 all but ReduceSum have
    their axes as an attribute, which became an input (onnx's own converter leaves `noop_with_empty_axes`, which
    opset 17 does not know)."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            axes = numpy_helper.to_array(constants[node.input.pop(1)])
            unchanged = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
            del node.attribute[:]
            node.attribute.extend([*unchanged, helper.make_attribute("axes", axes.tolist())])
    remove_unread(proto.graph)
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", 17))


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
