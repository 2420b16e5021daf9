"""The deployed graph as a torch module: input contract, trunk in its precision, tail in fp32."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.models.output import InferenceModel, L2Normalize
from pmm.models.registry import deployed
from pmm.runtime.eager import ChannelScale, Normalise

TRUNK_TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}
"""Precision -> type of the trunk's weights: TF32 is a way to compute with fp32 ones; files are quantised afterwards."""


class DeployedGraph(nn.Module):
    """images of the contract `input` -> embeddings float32 [N, D] of `embedding`.

    The trunk has the batch-norms that follow a layer folded into it in fp32, and is then cast; pooling, heads and
    normalisation stay in fp32, where neither a sum over the map nor the norm of a long embedding overflows.
    """

    def __init__(
        self,
        network: InferenceModel,
        preprocessing: Preprocessing,
        input: InputContract,
        embedding: EmbeddingContract,
        precision: str,
        fed: Preprocessing | None = None,
    ) -> None:
        """`preprocessing` is the network's; `fed` (default: the same) is that by which a caller normalises."""
        super().__init__()
        images = torch.randn(
            1, 3, preprocessing.height, preprocessing.width, generator=torch.Generator().manual_seed(0)
        )
        network.fold_batch_norms(images)
        if input.colour == "bgr":
            network.reverse_channels(images)
            preprocessing, fed = (_reversed(each) for each in (preprocessing, fed or preprocessing))
        self.normalise = _normalise(preprocessing, input, fed or preprocessing)
        network.cast(TRUNK_TYPES[precision])
        self.dtype = network.input_type
        self.trunk, self.tail, self.l2_normalize = network.trunk, network.tail, network.l2_normalize
        self.embedding = embedding
        # the mean of two embeddings of length 1 is shorter
        normalise_again = embedding.normalised and (embedding.flip_tta or not network.normalised)
        self.returned = L2Normalize() if normalise_again else nn.Identity()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalise(images)
        if self.embedding.flip_tta:
            # each crop, and its mirror image after it
            x = torch.cat([x, _mirrored(x)], 1).reshape(-1, *x.shape[1:])
        embeddings = self.l2_normalize(self.tail(*(maps.float() for maps in self.trunk(x.to(self.dtype)))))
        if self.embedding.flip_tta:
            dim = self.embedding.dim
            pairs = embeddings.reshape(-1, 2 * dim)  # a network may return a slice
            embeddings = (pairs[:, :dim] + pairs[:, dim:]) / 2
        return self.returned(embeddings)


def _mirrored(images: Tensor) -> Tensor:
    """Images [N, 3, H, W], mirrored: reflected at their left edge, of which only the reflection is kept. A file that
    steps through them backwards is one that OpenCV up to 4.13 cannot read."""
    width = images.shape[3]
    return F.pad(images, (width - 1, 0, 0, 0), mode="reflect")[..., :width]


def _reversed(size: Preprocessing) -> Preprocessing:
    return dataclasses.replace(size, mean=size.mean[::-1], std=size.std[::-1])


def _normalise(size: Preprocessing, input: InputContract, fed: Preprocessing) -> nn.Module:
    """Turn what the caller feeds into what the network takes."""
    if input.normalised_by == "graph":
        return Normalise(size) if input.dtype == "uint8" else ChannelScale(*size.scale_and_offset())
    if (size.mean, size.std) == (fed.mean, fed.std):
        return nn.Identity()
    return ChannelScale(*size.scale_and_offset_from(fed))


def deployed_graph(
    model: nn.Module,
    preprocessing: Preprocessing,
    input: InputContract,
    embedding: EmbeddingContract,
    precision: str,
    fed: Preprocessing | None = None,
) -> DeployedGraph:
    """The module that `to_onnx` writes, of a copy of `model`. For int8 it is fp32: the file is quantised afterwards.
    See `DeployedGraph`."""
    return DeployedGraph(deployed(model), preprocessing, input, embedding, precision, fed).eval()
