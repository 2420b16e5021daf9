"""Networks that others trained, as a graph of ATen operators: models like those of the methods, but only for
inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from pmm.models.graph_check import IMAGES, output_of
from pmm.models.graph_half import cast_graph
from pmm.models.graph_macs import product_macs
from pmm.models.graph_passes import fold_batch_norms_in_graph, known_shapes, reverse_channels
from pmm.models.output import EmbeddingModel, InferenceModel
from pmm.models.pure_operators import makes_tensors, written_as


class NetworkGraph(nn.Module):
    """The graph, whose constants go where its weights do."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        return self.graph(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NetworkGraph:
        super()._apply(fn, recurse)
        device = next((each.device for each in (*self.parameters(), *self.buffers())), None)
        made = [node for node in self.graph.graph.nodes if makes_tensors(node.target)]
        for node in made if device else ():
            node.kwargs = {**node.kwargs, "device": device}
        self.graph.recompile()
        return self


class AdoptedNetwork(EmbeddingModel):
    """normalised images [N, 3, H, W] -> embeddings [N, D]."""

    def __init__(self, graph: fx.GraphModule, size: tuple[int, int], *, normalised: bool) -> None:
        """`size`: height and width of its images. Raises ValueError for a graph that makes no embeddings of them."""
        super().__init__()
        self.graph, self.size, self.normalised = NetworkGraph(graph), size, normalised
        output = output_of(graph, *size)
        if output.dim() != 2 or output.shape[0] != IMAGES or not output.shape[1] or output.dtype != torch.float32:
            dtype = str(output.dtype).removeprefix("torch.")
            raise ValueError(
                f"its output for {IMAGES} images is {dtype} {list(output.shape)}, not float32 [{IMAGES}, D]"
            )
        self.embedding_dim = output.shape[1]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        # as its own code had them: other layouts of memory give other last bits
        return self.graph(images.contiguous())

    def deployed(self) -> InferenceModel:
        return _AdoptedInference(self)

    def macs(self) -> int | None:
        """Multiply-accumulates of its products for one image; None if they cannot be counted."""
        graph = self.graph.graph
        with known_shapes(graph, torch.zeros(1, 3, *self.size)):
            try:
                return sum(product_macs(node) or 0 for node in graph.graph.nodes)
            except ValueError:
                return None

    def operators(self) -> dict[str, int]:
        """How many there are of each, as `aten.conv2d.default`, the most frequent first."""
        nodes = [node for node in self.graph.graph.graph.nodes if node.op == "call_function"]
        return dict(Counter(written_as(node.target) for node in nodes).most_common())


class _AdoptedInference(InferenceModel):
    """The same graph, which casts for itself and ends in its embeddings."""

    def __init__(self, network: AdoptedNetwork) -> None:
        super().__init__(_OneOutput(network.graph), nn.Identity(), normalised=False)
        self.normalised = network.normalised  # by the graph itself
        self.size = network.size

    def fold_batch_norms(self, example: Tensor) -> None:
        fold_batch_norms_in_graph(self._graph, example)

    def cast(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            cast_graph(self._graph, dtype, torch.zeros(1, 3, *self.size))

    def reverse_channels(self, images: Tensor) -> None:
        reverse_channels(self._graph)

    @property
    def _graph(self) -> fx.GraphModule:
        return cast("_OneOutput", self.trunk).network.graph


class _OneOutput(nn.Module):
    """images -> (embeddings,)."""

    def __init__(self, network: NetworkGraph) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        return (self.network(images),)
