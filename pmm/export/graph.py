"""The deployed graph as a torch module and as ONNX: input contract, trunk in its precision, tail in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pmm.data.crops import Preprocessing
from pmm.export.fold import fold_batch_norms
from pmm.export.recipe import Precision
from pmm.manifest import EmbeddingContract, InputContract
from pmm.models.output import Deployed, UnitLength
from pmm.models.registry import deployed
from pmm.runtime.eager import Normalise
from pmm.runtime.torch_graph import quiet

if TYPE_CHECKING:
    import onnx

IR_VERSION = 10
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
    """Trace `graph` with a dynamic batch, and check the result in full. The same graph gives the same bytes."""
    import onnx

    # a batch of 2: torch.export would take a batch of 1 for a constant
    example = torch.zeros(2, *input.shape(preprocessing), dtype=getattr(torch, input.dtype))
    with quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[input.name],
            output_names=[graph.embedding.name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    _strip_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    _check_interface(proto, list(example.shape[1:]), graph.embedding.dim)
    return proto


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


def _check_interface(proto: onnx.ModelProto, image: list[int], dim: int) -> None:
    dims = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*proto.graph.input, *proto.graph.output)}  # fmt: skip
    images, embeddings = dims.get("images", []), dims.get("embeddings", [])
    if images[1:] != image or embeddings[1:] != [dim]:
        raise RuntimeError(f"unexpected interface of the exported graph: {dims}")
    if not isinstance(images[0], str) or images[0] != embeddings[0]:
        raise RuntimeError(f"the exported batch dimension is not symbolic: {dims}")


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove what torch.onnx records of this machine (stack traces hold absolute paths)."""
    del proto.metadata_props[:]
    for holder in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer,
                   *proto.graph.value_info):  # fmt: skip
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.doc_string = proto.graph.doc_string = ""
