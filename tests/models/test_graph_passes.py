"""Batch-norms folded in graphs that others' networks became, constants computed once, BGR images."""

import pytest
import torch
from torch import nn

from pmm.models.graph_passes import (
    attention_of_heads,
    fold_batch_norms_in_graph,
    fold_constants,
    known_shapes,
    reverse_channels,
)
from tests.models.aten import aten, graph_of, nodes_of

NORM = "_native_batch_norm_legit_no_training"


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 3, 8, 8)


def warm(norm):
    """With statistics and weights that are not those at the start."""
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    return norm


def normalise(x, norm):
    statistics = norm.running_mean, norm.running_var
    return aten._native_batch_norm_legit_no_training.default(x, norm.weight, norm.bias, *statistics, 0.1, norm.eps)[0]


def close(graph, images, expected):
    torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-5)


class Foldable(nn.Module):
    """Convolutions with and without bias, both operators of batch-norm, a residual sum and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), warm(nn.BatchNorm2d(6))
        self.second, self.plain = nn.Conv2d(6, 6, 1, groups=2), warm(nn.BatchNorm2d(6, affine=False))
        self.head, self.head_norm = nn.Linear(6, 5), warm(nn.BatchNorm1d(5))

    def forward(self, x):
        x = aten.relu.default(normalise(aten.conv2d.padding(x, self.first.weight, None, [1, 1], "same"), self.norm))
        second = aten.conv2d.default(x, self.second.weight, self.second.bias, [1, 1], [0, 0], [1, 1], 2)
        statistics = self.plain.running_mean, self.plain.running_var
        second = aten.batch_norm.default(second, None, None, *statistics, False, 0.1, self.plain.eps, True)
        pooled = aten.mean.dim(aten.add.Tensor(x, second), [2, 3])
        return aten.relu.default(
            normalise(aten.linear.default(pooled, self.head.weight, self.head.bias), self.head_norm)
        )


def test_what_follows_a_layer_is_folded_for_every_batch(images):
    graph = graph_of(Foldable())
    expected = graph(images)
    fold_batch_norms_in_graph(graph, images[:1])
    assert not nodes_of(graph, NORM, "batch_norm")
    for count in (1, 3, 4):
        close(graph, images[:count], expected[:count])
    # three weights and three biases: nothing of the batch-norms is left to be written
    assert {name: tensor.dim() for name, tensor in graph.named_parameters()} == {
        "first_weight_folded": 4, "first_weight_bias_folded": 1, "second_weight_folded": 4,
        "second_weight_bias_folded": 1, "head_weight_folded": 2, "head_weight_bias_folded": 1,
    }  # fmt: skip
    assert not list(graph.buffers())


class Kept(nn.Module):
    """Batch-norms that belong to no layer alone; the linear layer has as many outputs as the map has channels."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.tokens = kind, nn.Conv2d(3, 3, 1), nn.Linear(8, 3)
        self.norm = warm(nn.BatchNorm2d(3))

    def forward(self, x):
        out = aten.conv2d.default(x, self.layer.weight, self.layer.bias)
        if self.kind == "of tokens":
            out = aten.linear.default(aten.mean.dim(out, [2]), self.tokens.weight, self.tokens.bias)
            return aten.mean.dim(normalise(out, self.norm), [2])
        if self.kind == "of a sum":
            out = aten.add.Tensor(out, x)
        if self.kind == "of shared weights":
            out = aten.conv2d.default(out, self.layer.weight, self.layer.bias)
        normed = normalise(out, self.norm)
        if self.kind == "of a layer that is read twice":
            normed = aten.add.Tensor(normed, out)
        return aten.mean.dim(normed, [2, 3])


@pytest.mark.parametrize("kind", ["of a sum", "of shared weights", "of a layer that is read twice", "of tokens"])
def test_a_batch_norm_that_belongs_to_no_layer_alone_stays(kind, images):
    graph = graph_of(Kept(kind))
    expected = graph(images)
    fold_batch_norms_in_graph(graph, images[:1])
    assert len(nodes_of(graph, NORM)) == 1
    assert torch.equal(graph(images), expected)


def test_a_folded_graph_that_computes_something_else_is_refused():
    net = Kept("alone")
    nn.init.constant_(net.layer.weight, 1e30)
    nn.init.constant_(net.norm.weight, 1e10)  # their product is infinite, and nothing on a black image
    with pytest.raises(ValueError, match="changed the output by nan"):
        fold_batch_norms_in_graph(graph_of(net), torch.zeros(1, 3, 8, 8))


class Biased(nn.Module):
    """A bias looked up by position, and one token per image: only the first is a constant."""

    def __init__(self):
        super().__init__()
        self.table, self.token = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("positions", torch.randint(0, 5, (4,)))

    def forward(self, x):
        bias = aten.reshape.default(aten.index.Tensor(self.table, [self.positions]), [8])
        token = aten.select.int(aten.expand.default(self.token, [aten.sym_size.int(x, 0), -1, -1]), 1, 0)
        return aten.add.Tensor(aten.add.Tensor(aten.mean.dim(x, [1, 2]), bias), token)


def test_what_follows_from_constants_alone_is_computed_once(images):
    graph = graph_of(Biased())
    expected = graph(images)
    fold_constants(graph)
    assert sorted(tuple(tensor.shape) for tensor in graph.state_dict().values()) == [(1, 1, 8), (8,)]
    assert not nodes_of(graph, "index", "reshape")
    for count in (1, 4):
        assert torch.equal(graph(images[:count]), expected[:count])


class Reading(nn.Module):
    """Convolutions that read the images, and something else that does."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.grouped = kind, nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, groups=3)

    def forward(self, x):
        out = aten.conv2d.default(x, self.conv.weight, self.conv.bias)
        if self.kind == "twice":
            out = aten.add.Tensor(out, aten.conv2d.default(x, self.conv.weight, None))
        if self.kind == "grouped":
            out = aten.conv2d.default(x, self.grouped.weight, None, [1, 1], [0, 0], [1, 1], 3)
        return aten.mean.dim(out, [2, 3])


@pytest.mark.parametrize(("kind", "flips"), [("once", 0), ("twice", 0), ("grouped", 1)])
def test_bgr_images_cost_nothing_where_plain_convolutions_alone_read_them(kind, flips, images):
    graph = graph_of(Reading(kind))
    expected = graph(images)
    reverse_channels(graph)
    assert len(nodes_of(graph, "flip")) == flips
    close(graph, images.flip(1), expected)


class Attends(nn.Module):
    """Without heads and with them; the mask is of all images, or of each."""

    def forward(self, x):
        attend, rows = aten.scaled_dot_product_attention.default, aten.flatten.using_ints(x, 1, 2)
        mixed = attend(attend(rows, rows, rows), rows, rows, aten.matmul.default(rows, aten.mT.default(rows)))
        one = attend(mixed, rows, mixed, aten.mean.dim(aten.matmul.default(rows, aten.mT.default(rows)), [0]))
        return aten.add.Tensor(aten.flatten.using_ints(attend(x, x, x), 1, 2), one)


def test_attention_without_heads_becomes_that_of_one_with_the_same_bits(images):
    graph = graph_of(Attends())
    expected = graph(images)
    with known_shapes(graph, images):
        attention_of_heads(graph)
    assert torch.equal(graph(images), expected)
    with known_shapes(graph, images):
        attention = nodes_of(graph, "scaled_dot_product_attention")
        assert [node.meta["val"].dim() for node in attention] == [4] * 4


class Pooled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return aten.adaptive_avg_pool2d.default(aten.relu.default(x), self.size)


def test_pooling_to_one_value_per_channel_is_a_mean(images):
    graph, other = graph_of(Pooled([1, 1])), graph_of(Pooled([2, 1]))
    expected = graph(images)
    for each in (graph, other):
        fold_batch_norms_in_graph(each, images)
    assert not nodes_of(graph, "adaptive_avg_pool2d")
    close(graph, images, expected)
    assert nodes_of(other, "adaptive_avg_pool2d")
