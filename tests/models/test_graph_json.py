"""Networks as text: nothing of a file runs but operators that compute, and none needs endless memory."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pmm.models.adopted import AdoptedNetwork
from pmm.models.graph_json import graph_from_json, graph_to_json
from pmm.models.pure_operators import operator_of

SIZE = (16, 8)


def exported(module):
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        return program.run_decompositions({}).module(check_guards=False)


class Small(nn.Module):
    """A convolution, a batch-norm, a constant, sizes that follow from the batch, and memory as it is found."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)

    def forward(self, images):
        maps = self.norm(self.conv(images)).relu().clamp(max=float("inf"))
        rows = maps.view(images.shape[0] * 4, -1) + torch.arange(maps.shape[-1] * maps.shape[-2])
        means = torch.empty(images.shape[0], 4)
        means[:] = rows.mean(1).view(-1, 4)
        return means


@pytest.fixture(scope="module")
def small():
    module = Small()
    graph = exported(module)
    return module, *graph_to_json(graph)


def network(text, tensors):
    return AdoptedNetwork(graph_from_json(text, tensors), SIZE, normalised=False)


def test_a_graph_comes_back_with_the_bits_of_its_module(small):
    module, text, tensors = small
    found = network(text, tensors)
    assert found.embedding_dim == 4
    assert not found.training
    images = torch.randn(5, 3, *SIZE)
    for count in (1, 2, 5):
        assert torch.equal(found(images[:count]), module(images[:count]))
    assert {name for name, _ in found.named_parameters()} == {
        f"graph.graph.{name}" for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
    }
    again = graph_to_json(found.graph.graph)
    assert again[1].keys() == tensors.keys()
    assert graph_to_json(graph_from_json(*again))[0] == again[0]
    assert copy.deepcopy(found).half().graph.graph.conv.weight.dtype == torch.float16


def graph_of(*nodes, parameters=()):
    images = ["x", "placeholder", "x", [], {}]
    return json.dumps({"nodes": [images, *nodes], "parameters": list(parameters)})


def call(target, *args, name="y", **kwargs):
    return [name, "call_function", target, list(args), kwargs]


X, Y, OUT = {"node": "x"}, {"node": "y"}, ["output", "output", "output", [{"node": "y"}], {}]


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",
        "aten._print.default",
        "aten._assert_async.default",
        "aten.copy_.default",
        "aten.relu_.default",
        "aten.add.out",
        "aten.bernoulli.default",
        "aten.dropout.default",
        "aten.randn_like.default",
        "aten.empty.memory_format",
        "aten.as_strided.default",
        "aten.item.default",
        "aten._local_scalar_dense.default",
        "aten._embedding_bag.default",
        "aten.convolution_backward.default",
        "aten.sym_stride.int",
        "aten.is_contiguous.default",
        "aten.__class__.default",
        "aten.conv2d.__call__",
        "aten.nothing.default",
        "quantized.add.default",
        "prims.add.default",
        "operator.pow",
        "operator.concat",
        "operator.attrgetter",
        "operator.__call__",
        "os.system",
        "torch.load",
        "",
        "aten.relu.default; 1",
    ],
)
def test_operators_that_do_more_than_to_compute_are_refused_by_name(target):
    with pytest.raises(ValueError, match="operator"):
        operator_of(target)
    with pytest.raises(ValueError, match="operator"):
        graph_from_json(graph_of(call(target, X), OUT), {})


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ([call("aten.relu.default", X, **{"x=__import__('os').mkdir('/tmp/never')": 1}), OUT], "other arguments"),
        ([call("aten.relu.default", X, X), OUT], "other arguments"),
        ([call("operator.add", 1, 2, key=1), OUT], "keywords"),
        ([call("aten.zeros.default", [2, 4], device="cuda"), OUT], "device"),
        ([call("aten.to.device", X, "meta", {"torch": "float32"}), OUT], "device"),
        ([call("aten.scaled_dot_product_attention.default", X, X, X, None, 0.5), OUT], "dropout"),
        ([call("aten._upsample_bilinear2d_aa.default", X, [8, 8], False, 1e-6, 1e-6), OUT], "scale"),
        ([call("aten._upsample_bicubic2d_aa.vec", X, None, False, [2, 65]), OUT], "scale"),
        ([call("aten.upsample_bicubic2d.default", X, [8, 8], False, scales_w=float("nan")), OUT], "scale"),
        ([call("aten.upsample_linear1d.default", X, [8], False, "2"), OUT], "scale"),
        ([["y", "get_attr", "w", [], {}], OUT], "get_attr"),
        ([["y", "call_module", "w", [], {}], OUT], "call_module"),
        ([["y", "call_method", "relu", [X], {}], OUT], "call_method"),
        ([["y", "placeholder", "y", [], {}], OUT], "one output"),
        ([call("aten.relu.default", X)], "one output"),
        ([call("aten.relu.default", X), OUT, OUT], "one output"),
        ([["output", "output", "output", [[X]], {}]], "output"),
        ([["output", "output", "output", [3], {}]], "output"),
        ([call("aten.relu.default", Y), OUT], "KeyError"),
        ([call("aten.to.dtype", X, {"torch": "load"}), OUT], "KeyError"),
        ([call("aten.relu.default", {}), OUT], "KeyError"),
        ([call("aten.relu.default", {"node": [1]}), OUT], "TypeError"),
        ([["y", "call_function"], OUT], "not enough"),
        ([["y", "call_function", ["aten"], [X], {}], OUT], "not a graph"),
        ([3], "not a graph"),
    ],
)
def test_what_was_not_written_here_is_refused(nodes, problem):
    with pytest.raises(ValueError, match=problem):
        graph_from_json(graph_of(*nodes), {})


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"nodes": 3, "parameters": []}', '{"nodes": []}'])
def test_text_that_is_no_graph_is_refused(text):
    with pytest.raises(ValueError, match="not a graph"):
        graph_from_json(text, {})


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ([call("aten.zeros.default", [1 << 50]), OUT], "elements"),
        ([call("aten.zeros.default", [1 << 70]), OUT], "cannot run"),
        ([call("aten.expand.default", X, [1 << 40, 64, 3, *SIZE]), OUT], "elements"),
        ([call("aten.repeat.default", X, [1 << 24, 1, 1, 1]), OUT], "elements"),
        ([call("operator.mul", [0], 1 << 40), OUT], "no number"),
        ([call("operator.mod", "%999999999999d", 3), OUT], "no number"),
        ([call("operator.getitem", "text", 0), OUT], "no number"),
        ([call("operator.mul", 1 << 40, 1 << 40), OUT], "bits"),
        ([call("aten.sym_size.int", X, 0, name="n"), call("operator.mul", {"node": "n"}, {"node": "n"}), OUT], "sizes"),
        (
            [
                call("aten.mean.dim", X, [1, 2, 3], name="a"),
                call("aten.einsum.default", "a,b,c,d,e,f->abcdef", [{"node": "a"}] * 6),
                OUT,
            ],
            "elements",
        ),
        ([call("operator.add", 1, 1), OUT], "int"),
        ([call("aten.split.Tensor", X, 1), OUT], "tensor"),
        ([call("aten.relu.default", X), OUT], "[64, D]"),
        ([call("aten.sum.default", X), OUT], "[64, D]"),
        ([call("aten.zeros.default", [3, 4]), OUT], "[64, D]"),
        ([call("aten.zeros.default", [64, 4], dtype={"torch": "int64"}), OUT], "int64"),
        ([call("aten.nonzero.default", X), OUT], "cannot run"),
        ([call("aten.matmul.default", X, X), OUT], "cannot run"),
        ([call("aten.relu.default", "text"), OUT], "cannot run"),
    ],
)
def test_what_makes_no_embeddings_or_needs_endless_memory_is_refused_before_it_runs(nodes, problem):
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
        network(graph_of(*nodes), {})


def tensor_of(kind):
    plain = torch.zeros(2, 4)
    return {
        "not all in the file": torch.zeros(1).expand(1 << 40),
        "meta": torch.zeros(1 << 40, device="meta"),
        "sparse": plain.to_sparse(),
        "complex": plain.to(torch.complex64),
        "no tensor": "w",
    }[kind]


@pytest.mark.parametrize("kind", ["not all in the file", "meta", "sparse", "complex", "no tensor"])
def test_tensors_that_are_no_plain_ones_are_refused(kind):
    with pytest.raises(ValueError, match=r"w is torch|w of shape|not a graph"):
        graph_from_json(graph_of(["y", "get_attr", "w", [], {}], OUT), {"w": tensor_of(kind)})


@pytest.mark.parametrize(
    "name", ['w"), exit(3), ("', "w\nexit(3)", "w w", "", ".", "w..w", "__class__", "a.__dict__", "forward", "wé"]
)
def test_names_that_are_no_names_of_weights_are_refused(name):
    with pytest.raises(ValueError, match=r"of the name|not a graph"):
        graph_from_json(graph_of(["y", "get_attr", name, [], {}], OUT), {name: torch.zeros(2, 4)})


def test_weights_may_share_memory_and_no_change_of_one_reaches_the_other():
    shared = torch.arange(3.0)
    nodes = [
        ["a", "get_attr", "a", [], {}],
        ["b", "get_attr", "b", [], {}],
        call("aten.add.Tensor", {"node": "a"}, {"node": "b"}, name="c"),
        call("aten.mean.dim", X, [2, 3], name="m"),
        call("aten.add.Tensor", {"node": "m"}, {"node": "c"}),
        OUT,
    ]
    found = network(graph_of(*nodes, parameters=["a"]), {"a": shared.view(1, 3), "b": shared.view(1, 3)})
    assert torch.equal(found(torch.zeros(2, 3, *SIZE)), 2 * shared.expand(2, 3))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["x", "y", "call_function", "output", "aten.relu.default", "operator.mul", "conv.weight"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["node", "torch", "nodes"]), inner),
    max_leaves=4,
)  # fmt: skip


def places(value, path=()):
    """Where something can be put in place of what is there."""
    yield path
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


@given(st.data())
def test_changed_text_is_refused_or_makes_a_network(small, data):
    _, text, tensors = small
    content = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([place for place in places(content) if place]))
        owner = content
        for key in path:
            owner = owner[key]
        owner[last] = data.draw(VALUES)
    try:
        found = network(json.dumps(content), tensors)
    except ValueError:
        return
    assert found.embedding_dim >= 0
    assert math.isfinite(found.embedding_dim)
