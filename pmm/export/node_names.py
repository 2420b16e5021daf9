"""Names of an exported graph's nodes: the modules of the network that they come from. Loads no torch."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the modules around it from the outermost in, as text of a Python list that ends with its own name
in torch's graph."""


def name_nodes(proto: onnx.ModelProto) -> None:
    """Name nodes as `trunk.backbone.layer4.conv1/Conv`, the second Relu of a module `.../Relu_1`, those of none `Add`.

    Profiles, logs and lists of layers kept in another precision show these names. Call it while the nodes have their
    metadata of torch's exporter. Those of adopted networks, whose module is one graph without modules, are named for
    their operators alone.
    """
    used: set[str] = set()
    for node in proto.graph.node:
        module = _module(node)
        base = f"{module}/{node.op_type}" if module else node.op_type
        name, count = base, 0
        while name in used:
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        node.name = name


def _module(node: onnx.NodeProto) -> str:
    """The innermost module that a node comes from; empty for the whole network, or where torch recorded nothing."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    modules = ast.literal_eval(scopes)[:-1]
    # what torch adds itself, as sizes, comes from a module that is none
    return modules[-1] if modules and not modules[-1].startswith("_") else ""
