"""A user's nn.Module -> its network as a graph of operators, proved to compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pmm.data.preprocessing import Preprocessing
from pmm.models.adopted import AdoptedNetwork
from pmm.models.graph_json import graph_from_json, graph_to_json

PROBES = 3
"""Images on which the graph must give the bits of the module."""
UNIT_NORM = 1e-4
"""By which the norm of an embedding may differ from 1 for all of them to count as normalised."""


def network_of(module: nn.Module, size: Preprocessing) -> AdoptedNetwork:
    """The network of `module` in eval mode, which maps images [N, 3, H, W] to embeddings [N, D].

    Raises ValueError if the graph computes something else.
    """
    module = module.eval().cpu().float()
    shape = (3, size.height, size.width)
    images = torch.randn(PROBES, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(images)
        graph = _exported(module, images)
    network = AdoptedNetwork(
        graph_from_json(*graph_to_json(graph)), (size.height, size.width), normalised=_has_unit_norm(expected)
    )
    with torch.no_grad():
        if not torch.equal(network(images), expected):
            raise ValueError("the exported graph computes something else")
    return network


def _exported(module: nn.Module, images: Tensor) -> fx.GraphModule:
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # what writes into its input becomes what does not, and dropout goes
    graph = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def _has_unit_norm(embeddings: Tensor) -> bool:
    return bool(((embeddings.norm(dim=1) - 1).abs() < UNIT_NORM).all())
