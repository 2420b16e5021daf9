"""A network becomes a graph with the same bits; each of a user's mistakes is one line, at a line of the user's code."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from pmm.adoption.embeddings import EmbeddingNetwork, choose_output
from pmm.adoption.program import trace
from pmm.adoption.user_code import CannotAdopt
from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.data.preprocessing import Preprocessing
from pmm.utils.errors import InvalidValue
from tests.adoption import networks
from tests.adoption.networks import SIZE
from tests.refusals import refuses

CONTRACT = Preprocessing(height=SIZE[0], width=SIZE[1], mean=IMAGENET_MEAN, std=IMAGENET_STD)
IMAGES = torch.randn(4, 3, *SIZE)


def made(kind, *args):
    """With weights that are neither of the start nor the same for all channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(*args)
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1)
    return module.eval()


def place(kind, words):
    """`networks.py:12`, of the line of `kind` that holds `words`."""
    lines, first = inspect.getsourcelines(kind)
    return f"networks.py:{first + next(at for at, line in enumerate(lines) if words in line)}"


def test_the_graph_gives_the_bits_of_the_module_which_stays_as_it_was():
    module = made(networks.Plain)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    traced = trace(module, CONTRACT)
    with torch.no_grad():
        assert torch.equal(traced.network(IMAGES), module(IMAGES))
    assert {name: torch.equal(value, before[name]) for name, value in module.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert traced.read == {f"conv.{part}" for part in ("weight", "bias")} | {
        f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")
    }
    assert {name.removeprefix("graph.graph.") for name in traced.network.state_dict()} == traced.read
    assert not traced.network.normalised
    assert not traced.notes


def test_an_output_bgr_and_cosine_are_in_the_graph():
    module = made(networks.Several)
    network = trace(module, CONTRACT, output="1", bgr=True, cosine=True).network
    assert network.normalised
    with torch.no_grad():
        assert torch.equal(network(IMAGES), F.normalize(module.features(IMAGES.flip(1))))
    with refuses(CannotAdopt, "0 [2, 5], 1 [2, 8]", hint="--output"):
        trace(module, CONTRACT)


@pytest.mark.parametrize(
    ("kind", "output"), [("tuple", "1"), ("dict", "features"), ("dataclass", "features"), ("nested", "1.a")]
)
def test_outputs_are_chosen_by_their_names(kind, output):
    module = made(networks.Several, kind)
    value = module(IMAGES)
    assert choose_output(value, output) == output
    assert torch.equal(EmbeddingNetwork(module, output, bgr=False, normalise=False)(IMAGES), module.features(IMAGES))
    with refuses(CannotAdopt, output, "[4, 8]", hint="--output"):
        choose_output(value, "")
    with refuses(InvalidValue, output, name="--output"):
        choose_output(value, "3")


def test_what_is_only_another_shape_is_taken_and_said_and_images_stay_as_they_are():
    traced = trace(made(networks.ChangesImages), CONTRACT)
    images = IMAGES.clone()
    with torch.no_grad():
        assert torch.equal(traced.network(images), made(networks.Plain)(IMAGES - 0.5))
    assert torch.equal(images, IMAGES)
    assert "[2, 8, 1, 1]" in traced.notes[0]


def test_embeddings_that_tell_nothing_apart_are_noticed():
    assert "0.00%" in trace(made(networks.Constant), CONTRACT).notes[0]


@pytest.mark.parametrize(
    ("kind", "where", "facts"),
    [
        (networks.LooksAtValues, "if features.sum()", ("torch.where", "ONNX")),
        (networks.FixedBatch, "int(images.shape[0])", ("one number of images", "flatten(1)")),
        (networks.BranchesOnBatch, "if images.shape[0] > 6", ("some numbers of images", "branches", "flatten(1)")),
        (networks.BranchesOnOne, "if images.shape[0] == 1", ("one image", "branches")),
        (networks.ReadsData, "def forward", ("constant's list);", "ONNX")),
        (networks.OtherSize, "assert", ("[2, 3, 32, 16]", "Input height doesn't match model")),
        (networks.OnCuda, "raise", ("NVIDIA driver", "CPU")),
        (networks.TwoInputs, "def forward", ("cameras",)),
    ],
)
def test_what_the_users_code_does_wrong_is_told_at_its_line(kind, where, facts):
    with refuses(CannotAdopt, *facts) as caught:
        trace(made(kind), CONTRACT)
    assert str(caught.value.path).endswith(place(kind, where))


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (networks.Maps, ("[2, 8, 15, 7]", "[2, D]")),
        (networks.Labels, ("int64", "floating point")),
        (networks.OneBatch, ("1 images", "[2, 4]")),
        (networks.TrainsAlways, ("batch", "batch-norm")),
        (networks.KeepsStatistics, ("norm.num_batches_tracked",)),
        (networks.DropsAlways, ("dropout",)),
        (networks.NotFinite, ("NaN",)),
        (networks.Unusual, ("aten.logcumsumexp.default", "ONNX")),
    ],
)
def test_what_is_no_embedding_network_is_told(kind, facts):
    with refuses(CannotAdopt, *facts):
        trace(made(kind), CONTRACT)


def test_a_network_that_returns_nothing_is_told():
    with refuses(CannotAdopt, "dict", expected="[N, D]"):
        trace(made(networks.Several, "none"), CONTRACT)
