"""Nodes are called after the modules that they come from."""

import json

import pytest
from onnx import helper

from pmm.artifacts.client_contract import client_steps
from pmm.artifacts.manifest import FOR_CLIENTS, EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.preprocessing import Preprocessing
from pmm.export.graph import _describe_interface
from pmm.export.node_names import SCOPES, name_nodes


def named(*nodes):
    """The names that nodes get; each is given as operator, scopes."""
    made = []
    for index, (operator, scopes) in enumerate(nodes):
        made.append(helper.make_node(operator, [f"v{index}"], [f"v{index + 1}"], name="same"))
        if scopes is not None:
            made[-1].metadata_props.add(key="pkg.other", value="x")
            made[-1].metadata_props.add(key=SCOPES, value=repr(scopes))
    proto = helper.make_model(helper.make_graph(made, "g", [], []))
    name_nodes(proto)
    return [node.name for node in proto.graph.node]


def test_a_node_is_named_for_its_innermost_module():
    assert named(
        ("Conv", ["", "trunk", "trunk.layer1", "trunk.layer1.conv", "conv2d"]), ("Slice", ["", "slice_1"])
    ) == ["trunk.layer1.conv/Conv", "Slice"]


def test_nodes_without_a_module_are_named_for_their_operator():
    made_up = ["_empty_nn_module_stack_from_metadata_hook", "sym_size"]
    assert named(("Shape", made_up), ("Relu", None), ("Relu", None), ("Relu", ["relu"])) == [
        "Shape", "Relu", "Relu_1", "Relu_2",
    ]  # fmt: skip


def test_no_two_nodes_share_a_name():
    relu, odd = ["", "block", "block.relu", "r"], ["", "block", "block.relu/Relu_1", "r"]
    names = named(("Relu", relu), ("Relu", relu), ("Relu", odd), ("Relu", relu), ("Relu", ["Relu"]), ("Relu", None))
    assert len(set(names)) == 6
    assert names[:2] == ["block.relu/Relu", "block.relu/Relu_1"]


def test_an_exported_file_has_such_names_and_no_trace_of_this_machine(exported):
    proto = read_onnx(exported).proto
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert {"trunk.backbone.trunk.conv1/Conv", "trunk.bottleneck.conv3/Conv", "tail.max_head.0/Gemm"} <= {*names}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert node.name == f"{node.input[1].removesuffix('.weight')}/{node.op_type}"
        assert not node.metadata_props


def test_its_input_and_output_say_how_to_feed_it_and_how_to_compare(exported):
    file = read_onnx(exported)
    steps = json.loads(file.manifest.to_json())[FOR_CLIENTS]["steps"]
    documented = [value.doc_string for value in (*file.proto.graph.input, *file.proto.graph.output)]
    assert len(documented) == 2
    for text, its in zip(documented, (steps[:4], steps[4:]), strict=True):
        assert text.lower() == "; ".join(its).lower() + "."
    assert "128 x 64" in documented[0]
    assert "384" in documented[1]


@pytest.mark.parametrize(("colour", "order"), [("rgb", 1), ("bgr", -1)])
def test_who_normalises_finds_the_numbers_in_the_order_of_the_channels(colour, order):
    size = Preprocessing(height=8, width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    image, embedding = helper.make_tensor_value_info("x", 1, ["batch"]), helper.make_tensor_value_info("y", 1, [1])
    proto = helper.make_model(helper.make_graph([], "g", [image], [embedding]))
    _describe_interface(proto, client_steps(size, InputContract.of("float", colour), EmbeddingContract(dim=2)))
    text = proto.graph.input[0].doc_string
    assert f"mean {[*size.mean[::order]]}, std {[*size.std[::order]]}" in text
