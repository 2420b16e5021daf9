"""The deployed graph as a torch module and as ONNX: input contract, trunk in its precision, tail in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.export.fold_batchnorm import fold_batch_norms
from pmm.export.options import Precision
from pmm.models.output import Deployed, UnitLength
from pmm.models.registry import deployed
from pmm.runtime.eager import Normalise
from pmm.runtime.torch_graph import quiet

if TYPE_CHECKING:
    import onnx

IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 10, 21: 10, 22: 10}
"""Of the file's format, per opset: what readers of that age know (onnx.helper.OP_SET_ID_VERSION_MAP)."""
_TRUNK_TYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


class DeployedGraph(nn.Module):
    """images as `input` says -> embeddings float32 [N, D] as `embedding` says.

    The trunk has its batch-norms folded in fp32 and is then cast; pooling, heads and normalisation stay in fp32, where
    neither a sum over the map nor the norm of a long embedding overflows.
    """

    def __init__(
        self,
        network: Deployed,
        preprocessing: Preprocessing,
        input: InputContract,
        embedding: EmbeddingContract,
        precision: Precision,
    ) -> None:
        super().__init__()
        fold_batch_norms(network)
        if input.colour == "bgr":
            preprocessing = _reverse_channels(network.trunk, preprocessing)
        self.normalise = Normalise(preprocessing) if input.normalised_by == "graph" else nn.Identity()
        self.dtype = _TRUNK_TYPE[precision]
        self.trunk, self.tail, self.finish = network.trunk.to(self.dtype), network.tail, network.finish
        self.embedding = embedding
        # the mean of two embeddings of length 1 is shorter
        again = embedding.normalised and (embedding.flip_tta or not network.normalised)
        self.returned = UnitLength() if again else nn.Identity()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalise(images)
        if self.embedding.flip_tta:
            x = torch.cat([x, x.flip(3)])
        found = self.finish(self.tail(*(maps.float() for maps in self.trunk(x.to(self.dtype)))))
        if self.embedding.flip_tta:
            found = found.view(2, -1, self.embedding.dim).mean(0)
        return self.returned(found)


def deployed_graph(
    model: nn.Module,
    preprocessing: Preprocessing,
    input: InputContract,
    embedding: EmbeddingContract,
    precision: Precision,
) -> DeployedGraph:
    """The module that `to_onnx` writes, of a copy of `model`. For int8 it is fp32: the file is quantised afterwards."""
    return DeployedGraph(deployed(model), preprocessing, input, embedding, precision).eval()


def to_onnx(graph: DeployedGraph, preprocessing: Preprocessing, input: InputContract, opset: int) -> onnx.ModelProto:
    """Trace `graph`, with a dynamic batch or that of `input`, and check the result in full. The same graph gives the
    same bytes."""
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
    if opset == 17:
        _to_opset_17(proto)
    proto.ir_version = IR_VERSION[opset]
    _strip_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    _check_interface(proto, input.batch, list(image), graph.embedding.dim, opset)
    return proto


def _to_opset_17(proto: onnx.ModelProto) -> None:
    """From 18, the oldest that torch writes. Of the operators in our graphs only the reductions are others there: they
    have their axes as an attribute, which became an input (onnx's own converter leaves `noop_with_empty_axes`, which
    opset 17 does not know)."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce"):
            axes = numpy_helper.to_array(constants[node.input.pop(1)])
            kept = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("axes", axes.tolist())])
    used = {name for node in proto.graph.node for name in node.input}
    unused = [tensor for name, tensor in constants.items() if name not in used]
    for tensor in unused:
        proto.graph.initializer.remove(tensor)
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", 17))


def _reverse_channels(trunk: nn.Module, preprocessing: Preprocessing) -> Preprocessing:
    """Make the first convolution, and the statistics, take BGR: no channel is moved when the graph runs."""
    first = next(m for m in trunk.modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != 3:
        raise ValueError(f"the trunk's first convolution takes {first.in_channels} channels, not a colour image's 3")
    first.weight = nn.Parameter(first.weight.detach().flip(1).contiguous(), requires_grad=False)
    return Preprocessing(
        height=preprocessing.height, width=preprocessing.width,
        mean=preprocessing.mean[::-1], std=preprocessing.std[::-1],
    )  # fmt: skip


def _check_interface(proto: onnx.ModelProto, batch: int | None, image: list[int], dim: int, opset: int) -> None:
    dims = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*proto.graph.input, *proto.graph.output)}  # fmt: skip
    images, embeddings = dims.get("images", []), dims.get("embeddings", [])
    if images[1:] != image or embeddings[1:] != [dim]:
        raise RuntimeError(f"unexpected interface of the exported graph: {dims}")
    if images[0] != embeddings[0] or (images[0] != batch if batch else not isinstance(images[0], str)):
        raise RuntimeError(f"the exported batch dimension is not {batch or 'symbolic'}: {dims}")
    if [(entry.domain, entry.version) for entry in proto.opset_import] != [("", opset)]:
        raise RuntimeError(f"asked for opset {opset}, torch wrote {proto.opset_import}")


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove what torch.onnx records of this machine (stack traces hold absolute paths)."""
    del proto.metadata_props[:]
    for holder in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer,
                   *proto.graph.value_info):  # fmt: skip
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.doc_string = proto.graph.doc_string = ""
