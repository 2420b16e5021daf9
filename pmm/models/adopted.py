"""Networks that others trained, as a graph of ATen operators: models like those of the methods, but only for
inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pmm.models.graph_json import FACTORIES
from pmm.models.output import EmbeddingModel, InferenceModel


class NetworkGraph(nn.Module):
    """The graph, whose constants go where its weights do."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        return self.graph(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NetworkGraph:
        super()._apply(fn, recurse)
        tensor = next((each for each in (*self.parameters(), *self.buffers())), None)
        for node in self.graph.graph.nodes:
            if tensor is not None and str(node.target).split(".")[1:2] in [[name] for name in FACTORIES]:
                node.kwargs = {**node.kwargs, "device": tensor.device}
        self.graph.recompile()
        return self


class AdoptedNetwork(EmbeddingModel):
    """normalised images [N, 3, H, W] -> embeddings [N, D]."""

    def __init__(self, graph: fx.GraphModule, size: tuple[int, int], *, normalised: bool) -> None:
        """`size`: height and width of its images. Raises ValueError for a graph that makes no embeddings of them."""
        super().__init__()
        self.graph, self.normalised = NetworkGraph(graph), normalised
        try:
            with torch.no_grad():
                shape = tuple(self(torch.zeros(2, 3, *size)).shape)
        except Exception as error:  # a graph from a file may do anything
            raise ValueError(f"it cannot run on images {[2, 3, *size]} ({type(error).__name__}: {error})") from error
        if len(shape) != 2 or shape[0] != 2:
            raise ValueError(f"its output for 2 images is {list(shape)}, not [2, D]")
        self.embedding_dim = shape[1]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        # as its own code had them: other layouts of memory give other last bits
        return self.graph(images.contiguous())

    def deployed(self) -> InferenceModel:
        return _AdoptedInference(self.graph, normalised=self.normalised)


class _AdoptedInference(InferenceModel):
    """The same graph, which casts for itself and ends in its embeddings."""

    def __init__(self, graph: NetworkGraph, *, normalised: bool) -> None:
        super().__init__(_OneOutput(graph), nn.Identity(), normalised=False)
        self.normalised = normalised  # by the graph itself

    def fold_batch_norms(self, example: Tensor) -> None:
        from pmm.models.graph_passes import fold_batch_norms_in_graph

        fold_batch_norms_in_graph(self.trunk.network.graph)  # type: ignore[union-attr]

    def cast(self, dtype: torch.dtype) -> None:
        from pmm.models.graph_passes import cast_graph

        if dtype is not torch.float32:
            cast_graph(self.trunk.network.graph, dtype)  # type: ignore[union-attr]

    def reverse_channels(self, images: Tensor) -> None:
        from pmm.models.graph_passes import reverse_channels

        reverse_channels(self.trunk.network.graph)  # type: ignore[union-attr]


class _OneOutput(nn.Module):
    """images -> (embeddings,)."""

    def __init__(self, network: NetworkGraph) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        return (self.network(images),)
