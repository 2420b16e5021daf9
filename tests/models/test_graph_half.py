"""Mixed precision in graphs that others' networks became: products in half, what is sensitive in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pmm.export.options import MIN_COSINE, MIN_SHARE
from pmm.models.graph_half import LEAST_HALF, cast_graph
from tests.models.aten import aten, graph_of, nodes_of, types_of

HALF, FULL = torch.float16, torch.float32
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 8)


class Transformer(nn.Module):
    """A token, attention with a bias looked up by position and attention with a mask, and a head of that token."""

    def __init__(self, dim=32, embedding=4):
        super().__init__()
        self.dim, self.patches = dim, nn.Conv2d(3, dim, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 9, dim))
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table, self.head = nn.Parameter(torch.randn(5)), nn.Linear(dim, embedding)
        self.register_buffer("positions", torch.randint(0, 5, (9, 9)))
        self.register_buffer("mask", torch.zeros(9, 9).index_fill_(1, torch.tensor([3]), -1e9))

    def forward(self, x):
        n = aten.sym_size.int(x, 0)
        x = aten.conv2d.default(x, self.patches.weight, self.patches.bias, [4, 4])
        x = aten.transpose.int(aten.reshape.default(x, [n, self.dim, -1]), 1, 2)
        x = aten.cat.default([aten.expand.default(self.token, [n, -1, -1]), x], 1)
        x = aten.add.Tensor(x, self.places)
        q, k, v = self._qkv(x, n)
        weights = aten.matmul.default(aten.mul.Tensor(q, self.dim**-0.5), aten.transpose.int(k, 1, 2))
        weights = aten.add.Tensor(weights, aten.index.Tensor(self.table, [self.positions]))
        x = aten.add.Tensor(x, aten.matmul.default(aten.softmax.int(weights, -1), v))
        q, k, v = self._qkv(x, n)
        x = aten.add.Tensor(x, aten.scaled_dot_product_attention.default(q, k, v, self.mask))
        token = aten.select.int(aten.slice.Tensor(self._norm(x), 1, 0, 9), 1, 0)
        return aten.linear.default(token, self.head.weight, self.head.bias)

    def _norm(self, x):
        return aten.layer_norm.default(x, [self.dim], self.norm.weight, self.norm.bias)

    def _qkv(self, x, n):
        qkv = aten.linear.default(aten.relu.default(self._norm(x)), self.qkv.weight, self.qkv.bias)
        each = aten.unbind.int(aten.reshape.default(qkv, [n, 9, 3, self.dim]), 2)
        return [each[index] for index in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_products_are_in_half_and_what_is_sensitive_is_not(dtype, images):
    graph = graph_of(Transformer())
    expected = graph(images)
    cast_graph(graph, dtype, images[:1])
    types = types_of(graph, images)
    half = [dtype] * 2
    assert types["conv2d"] == [dtype]
    assert types["matmul"] == half
    assert types["linear"] == [*half, FULL], "the head is in fp32"
    assert types["layer_norm"] == [FULL] * 3
    assert types["softmax"] == [FULL]
    assert types["scaled_dot_product_attention"] == [dtype]
    assert types["add"] == [dtype] * 4, "sums along the depth are in half"
    assert types["slice"] == [FULL], "from one step in fp32 to the next nothing is cast"
    casts = nodes_of(graph, "to")
    assert len(casts) == 9  # images, token, into 3 layer norms and out of 2, into and out of the softmax
    assert not [cast for cast in casts if cast.args[0] in casts]
    stored = {name: tensor.dtype for name, tensor in graph.state_dict().items()}
    assert stored["qkv_weight_half"] == dtype
    assert stored["norm.weight"] == stored["head.weight"] == FULL
    assert "qkv.weight" not in stored
    assert "positions" not in stored
    for count in (1, 3, 4):
        found = graph(images[:count])
        assert found.dtype is FULL
        assert F.cosine_similarity(found, expected[:count]).min() > MIN_COSINE[NAMES[dtype]]
        torch.testing.assert_close(found[0], graph(images)[0])


def test_a_head_with_many_multiplications_is_in_half_too(images):
    graph = cast_graph(graph_of(Transformer(embedding=1024)), HALF, images[:1])
    assert types_of(graph, images)["linear"] == [HALF] * 3
    assert graph(images).dtype is FULL
    assert {MIN_SHARE["fp16"], MIN_SHARE["bf16"]} == {LEAST_HALF}


class Steps(nn.Module):
    """Steps on a map between two convolutions, and one sum that skips them."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.first, self.last = steps, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = aten.conv2d.default(x, self.first.weight, self.first.bias)
        return aten.mean.dim(aten.conv2d.default(self.steps(x), self.last.weight, self.last.bias), [2, 3])


@pytest.mark.parametrize(
    ("steps", "name", "expected"),
    [
        (lambda x: aten.mul.Tensor(x, aten.sigmoid.default(x)), "mul", [HALF]),
        (lambda x: aten.mul.Tensor(x, 1e-6), "mul", [FULL]),
        (lambda x: aten.masked_fill.Scalar(x, aten.gt.Scalar(x, 1), -1e9), "masked_fill", [FULL]),
        (lambda x: aten.div.Tensor(x, 2.0), "div", [HALF]),
        (lambda x: aten.div.Tensor(x, aten.add.Tensor(x, 9)), "div", [FULL]),
        (lambda x: aten.sub.Tensor(x, aten.mean.dim(x, [1], True)), "sub", [FULL]),
        (lambda x: aten.div.Tensor(x, aten.linalg_vector_norm.default(x, 2, [1], True)), "div", [FULL]),
        (lambda x: aten.max_pool2d_with_indices.default(x, [2, 2])[0], "relu", [HALF]),
        (lambda x: aten.mul.Tensor(x, aten.conv2d.default(aten.adaptive_avg_pool2d.default(x, [1, 1]),
                                                         torch.ones(8, 8, 1, 1))), "mul", [HALF]),
    ],
)  # fmt: skip
def test_what_half_cannot_hold_is_in_fp32_until_the_next_product(steps, name, expected, images):
    net = Steps(lambda x: aten.relu.default(steps(x)))
    graph = graph_of(net)
    before = graph(images)
    cast_graph(graph, HALF, images[:1])
    types = types_of(graph, images)
    assert types[name] == expected
    assert types["relu"] == types[name]
    assert types["conv2d"][-1] is HALF
    assert F.cosine_similarity(graph(images), before).min() > MIN_COSINE["fp16"]


def test_a_mask_stays_finite_in_fp16(images):
    graph = cast_graph(graph_of(Transformer()), HALF, images[:1])
    mask = graph.state_dict()["mask_half"]
    assert mask.dtype is HALF
    assert mask.min() == torch.finfo(HALF).min


def test_a_batch_norm_that_was_not_folded_is_in_fp32(images):
    norm = nn.BatchNorm2d(8)

    def steps(x):
        statistics = norm.running_mean, norm.running_var
        return aten._native_batch_norm_legit_no_training.default(x, norm.weight, norm.bias, *statistics, 0.1, 1e-5)[0]

    net = Steps(steps)
    net.norm = norm
    graph = cast_graph(graph_of(net), HALF, images[:1])
    assert [str(tensor.dtype) for name, tensor in graph.state_dict().items() if "norm" in name] == ["torch.float32"] * 4
    assert types_of(graph, images)["conv2d"] == [HALF] * 2
