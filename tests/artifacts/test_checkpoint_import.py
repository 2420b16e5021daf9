"""Checkpoints of the PMM authors' code and of BDB's: the same features, or one line that says what is wrong."""

import collections
import copy
import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.models import resnet18, resnet50

from pmm.artifacts.checkpoint import KEYS, load, restore_model
from pmm.artifacts.checkpoint_import import convert, import_checkpoint
from pmm.artifacts.known_checkpoints import describe_known, known_method
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.torch_file import read_torch_file
from pmm.artifacts.trained_model import load_model
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.presets import preset
from pmm.runtime.deployed_graph import deployed_graph
from pmm.runtime.open import open_runner
from pmm.training.snapshot import restore_training
from pmm.training.state import make_train_state
from pmm.utils.errors import InvalidFile
from tests.authors import authors_network, hollow
from tests.conftest import assert_one_line_error, examples, run_here
from tests.refusals import refuses

DATA = dataclasses.replace(preset("paper").data, dataset="market1501")
COUNTER = "num_batches_tracked"
HOLLOW = {method: hollow(method) for method in ("pmm", "bdb")}
WEIGHTS = {method: sorted(key for key in state if not key.endswith(COUNTER)) for method, state in HOLLOW.items()}
COUNTERS = len(HOLLOW["pmm"]) - len(WEIGHTS["pmm"])


def saved(path, state, epoch=400, **options):
    torch.save({"state_dict": state, "epoch": epoch}, path, **options)
    return path


def imported(source, tmp_path):
    line = import_checkpoint(source, tmp_path / "ours.pth", DATA)
    return line, tmp_path / "ours.pth"


def relative_error(expected, found):
    return ((expected - found).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module", params=["pmm", pytest.param("bdb", marks=pytest.mark.slow)])
def network(request):
    return request.param, authors_network(request.param)


@pytest.fixture(scope="module")
def probes(network):
    """Images [2, 3, 384, 128] and the authors' features of them."""
    images = torch.randn(2, 3, 384, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return images, network[1](images)


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    """An imported checkpoint."""
    method, net = network
    folder = tmp_path_factory.mktemp(method)
    return imported(saved(folder / "checkpoint_ep400.pth.tar", net.state_dict()), folder)[1]


@pytest.fixture(scope="module")
def restored(checkpoint):
    """What it holds, and the model and configuration made of that; not to be changed."""
    state = load(checkpoint)
    return state, *restore_model(state, checkpoint)


def test_the_features_are_the_authors(network, probes, checkpoint):
    method, net = network
    images, expected = probes
    model = load_model(checkpoint)
    assert type(model).__name__.lower() == method
    assert model.embedding_dim == expected.shape[1] == 1536
    spread = (expected - expected.mean(0)).abs().max() / expected.abs().max()
    assert spread > 0.01  # else any network would do
    assert (expected > 0).float().mean() > 0.2
    with torch.inference_mode():
        assert relative_error(expected, model(images)) <= 1e-5
        small = images[:1, :, :96].double()
        assert relative_error(net.double()(small), model.double()(small)) <= 1e-12
    net.float()


def test_every_weight_has_arrived(network, restored):
    """Sorted by shape and content: no tensor lost, doubled or changed, whatever the names."""
    net, found = network[1], restored[0]["model"]

    def prints(state):
        return sorted((value.numel(), value.double().sum().item()) for value in state.values())

    assert prints(found) == prints(net.state_dict())
    classifiers = [value for key, value in found.items() if key.endswith("classifier.weight")]
    ours = [value for key, value in net.state_dict().items() if "softmax" in key and key.endswith("weight")]
    assert all(torch.equal(a, b) for a, b in zip(classifiers, ours, strict=True))


def test_the_checkpoint_is_one_of_ours(network, restored):
    method, _ = network
    state, model, config = restored
    assert set(state) == set(KEYS)
    assert not model.training
    assert (config.model.method, config.model.num_classes, config.model.feature_dim) == (method, 5, 512)
    assert (config.model.weights, config.preset) == ("none", "paper")
    assert (config.data.dataset, config.data.root) == ("market1501", "")
    assert state["epoch"] == 400
    assert [state[key] for key in ("optimizer", "scheduler", "scaler", "rng")] == [None] * 4
    assert all(
        value.is_contiguous() and value.dtype in (torch.float32, torch.int64) for value in state["model"].values()
    )
    assert state["versions"]["pmm kernels"].startswith("none, imported from the ")
    assert len(state["versions"]["imported"]) == 64


def test_a_run_cannot_be_resumed_from_it(restored, checkpoint, tmp_path):
    state, model, config = restored
    train_state = make_train_state(copy.deepcopy(model), config, torch.device("cpu"), 1)
    with refuses(InvalidFile, "optimizer", "imported", path=checkpoint, hint="new run"):
        restore_training(state, train_state, checkpoint)
    shutil.copy(checkpoint, tmp_path / "last.pth")
    assert_one_line_error(run_here("-m", "pmm.train", "--out", tmp_path, "--resume"), "no run to resume")


def read(path):
    return convert(read_torch_file(path, "a checkpoint"), path)


@pytest.mark.parametrize("method", ["pmm", pytest.param("bdb", marks=pytest.mark.full)])
@pytest.mark.parametrize("form", ["plain", "module", "legacy", "bare", "parameters", "numpy"])
def test_every_way_they_save(method, form, tmp_path):
    state = hollow(method, 7)
    file = tmp_path / "file.pth.tar"
    if form == "plain":
        saved(file, state, 12)
    elif form == "module":
        saved(file, collections.OrderedDict((f"module.{key}", value) for key, value in state.items()), 12)
    elif form == "legacy":
        saved(file, state, 12, _use_new_zipfile_serialization=False)
        assert file.read_bytes()[:1] == b"\x80"
    elif form == "bare":
        torch.save(state, file)
    elif form == "parameters":
        saved(file, {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}, 12)
    else:
        torch.save({"state_dict": state, "epoch": np.int64(12), "rank1": np.float64(0.941), "mAP": np.float32(1)}, file)
    found = read(file)
    assert (found.method, found.num_classes, found.feature_dim, found.tensors) == (method, 7, 512, len(state))
    assert found.epoch == (None if form == "bare" else 12)
    assert found.notes == ()
    assert all((value == (3 if key.endswith(COUNTER) else 0.5)).all() for key, value in found.model.items())
    assert not any(value.requires_grad for value in found.model.values())


def test_numpy_scalars_are_told_by_either_name(tmp_path):
    """Files of numpy 1 say numpy.core, those of numpy 2 numpy._core."""
    buffer = io.BytesIO()
    content = {"state_dict": HOLLOW["pmm"], "epoch": 1, "rank1": np.float64(0.5)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert (new in buffer.getvalue()) != (old in buffer.getvalue())
    for name in (new, old):
        (tmp_path / "f.pth.tar").write_bytes(buffer.getvalue().replace(new, name).replace(old, name))
        assert read(tmp_path / "f.pth.tar").epoch == 1


@pytest.mark.parametrize("epoch", [None, "400", -1, 2.5, torch.zeros(2)])
def test_an_epoch_that_is_none_is_unknown(epoch):
    assert convert({"state_dict": HOLLOW["bdb"], "epoch": epoch}, "f").epoch is None


def test_files_of_torch_before_counters(tmp_path):
    state = {key: value for key, value in HOLLOW["pmm"].items() if not key.endswith(COUNTER)}
    line, out = imported(saved(tmp_path / "f.pth.tar", state), tmp_path)
    assert line.endswith(f"; {COUNTERS} num_batches_tracked missing (torch before 0.4.1 wrote none): set to 0")
    assert all(value == 0 for key, value in load(out)["model"].items() if key.endswith(COUNTER))
    load_model(out)


def test_half_precision_files_are_converted():
    state = {key: value.half() if value.is_floating_point() else value for key, value in HOLLOW["pmm"].items()}
    found = convert(state, "f")
    assert found.notes == (f"{len(state) - COUNTERS} tensors converted from float16 to float32",)
    assert {v.dtype for key, v in found.model.items() if not key.endswith(COUNTER)} == {torch.float32}
    state["res_part2.bn1.num_batches_tracked"] = torch.tensor(3.0).half()  # some tools convert all there is
    assert {v.dtype for key, v in convert(state, "f").model.items() if key.endswith(COUNTER)} == {torch.int64}


def test_every_tensor_has_a_storage_of_its_own():
    """A small part of a large tensor would carry all of it into the new file."""
    large = torch.zeros(100, 5)
    found = convert(HOLLOW["pmm"] | {"softmax1.bias": large[3]}, "f").model["stages.1.classifier.bias"]
    assert found.untyped_storage().nbytes() == 20


# --- what is refused ---


def refused(content, *texts):
    with refuses(InvalidFile, *texts, path="f.pth.tar"):
        convert(content, "f.pth.tar")


@settings(examples(40), suppress_health_check=[HealthCheck.too_slow])
@given(method=st.sampled_from(["pmm", "bdb"]), data=st.data())
def test_keys_that_are_not_exactly_theirs_are_refused_by_name(method, data):
    state = dict(HOLLOW[method])
    gone = data.draw(st.lists(st.sampled_from(WEIGHTS[method]), max_size=3, unique=True), "missing")
    rest = [key for key in WEIGHTS[method] if key not in gone]
    bent = data.draw(st.lists(st.sampled_from(rest), max_size=3, unique=True), "misshapen")
    words = st.text("abcdefghijklmnopqrstuvwxyz0123456789.", min_size=1, max_size=12)
    names = st.builds("{}.{}".format, st.sampled_from(["backbone", "res_part", "extra", "softmax9"]), words)
    new = data.draw(st.lists(names.filter(lambda key: key not in HOLLOW[method]), max_size=3, unique=True), "unknown")
    for key in gone:
        del state[key]
    for key in bent:
        shape = list(state[key].shape)
        other = data.draw(st.sampled_from([[], [*shape, 1], [shape[0] + 1, *shape[1:]], [1, *shape], [0, *shape[1:]]]))
        state[key] = torch.zeros(()).expand(other) if 0 not in other else torch.zeros(other)
    state |= dict.fromkeys(new, torch.zeros(1))
    wrapped = data.draw(st.sampled_from(["", "module."]))
    content = {"state_dict": {wrapped + key: value for key, value in state.items()}}
    if gone or bent or new:
        counts = [(gone, "missing"), (new, "unknown"), (bent, "of another shape")]
        with refuses(InvalidFile, path="f.pth.tar") as refusal:
            convert(content, "f.pth.tar")
        text = str(refusal.value)
        if "different numbers of identities" in text:  # a classifier bent as a whole
            assert {key.split(".")[0] for key in bent} & {key.split(".")[0] for key in state if "softmax" in key}
        else:
            assert all(f"{len(keys)} {what} (" in text for keys, what in counts if keys)
            assert all(key in text for key in (*gone, *bent, *new))
    else:
        assert convert(content, "f.pth.tar").num_classes == 5


def test_a_long_list_is_cut():
    state = {key: value for key, value in HOLLOW["pmm"].items() if not key.startswith("res_part.")}
    refused(
        {"state_dict": state},
        "not a whole checkpoint of the PMM authors' code",
        "50 missing (res_part.0.conv1.weight, res_part.0.bn1.weight, res_part.0.bn1.bias, ...)",
    )


def test_counters_must_have_their_shape():
    refused(
        {**HOLLOW["pmm"], "res_part2.bn1.num_batches_tracked": torch.zeros(2)}, "res_part2.bn1.num_batches_tracked [2]"
    )


FLOATS = ("res_part2.bn1.running_var", "global_reduction.0.weight", "softmax.bias")
NO_NUMBERS = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        pytest.param(key, bad, marks=[] if place == kind else pytest.mark.full)
        for place, key in enumerate(FLOATS)
        for kind, bad in enumerate(NO_NUMBERS)
    ],
)
def test_weights_that_are_no_numbers_are_refused(key, bad):
    weight = HOLLOW["bdb"][key].clone()
    weight.view(-1)[-1] = bad
    refused({"state_dict": {**HOLLOW["bdb"], key: weight}}, f"{key} holds NaN or Inf")


def test_other_kinds_of_weights_are_refused():
    key = "softmax1.bias"
    refused({**HOLLOW["pmm"], key: torch.full((5,), 1e300, dtype=torch.float64)}, f"{key} holds NaN or Inf")
    refused({**HOLLOW["pmm"], key: torch.ones(5, dtype=torch.int8)}, f"{key} is int8", "floating-point")
    refused({**HOLLOW["pmm"], key: torch.ones(5).to_sparse()}, f"{key} is float32", "plain")
    refused({**HOLLOW["pmm"], key: [1.0] * 5}, f"no tensor at {key} of its state dict")


def test_classifiers_must_agree():
    other = {"softmax2.weight": torch.zeros(6, 512), "softmax2.bias": torch.zeros(6)}
    refused(HOLLOW["pmm"] | other, "different numbers of identities (global_softmax 5, softmax1 5, softmax2 6)")


def test_a_bdb_head_on_a_pmm_file_is_accounted_for():
    bdb = {key: value for key, value in HOLLOW["bdb"].items() if key.startswith(("reduction.", "softmax."))}
    refused(HOLLOW["pmm"] | bdb, "PMM authors", f"{len(bdb)} unknown (reduction.0.weight")


OSNET = {"conv1.conv.weight": 0, "conv2.0.conv2a.conv1.weight": 0, "classifier.weight": 0}
RESNET = dict.fromkeys(("conv1.weight", "layer3.5.conv3.weight", "layer4.2.conv3.weight"), 0)
OTHERS = {
    "fast-reid": {"model": {"backbone.conv1.weight": 0, "heads.weight": 0, "pixel_mean": 0}, "iteration": 1},
    "OSNet checkpoint of torchreid": {"state_dict": OSNET, "epoch": 1, "rank1": 0.9, "optimizer": {}},
    "a torchreid checkpoint": {"state_dict": RESNET | {"classifier.weight": 0}, "epoch": 1, "rank1": 0.9},
    "TransReID or CLIP-ReID": {"base.cls_token": 0, "base.blocks.0.norm1.weight": 0, "classifier.weight": 0},
    "a TransReID or CLIP": {"image_encoder.conv1.weight": 0, "prompt_learner.cls_ctx": 0},
    "pmm train --init FILE": RESNET | {"fc.weight": 0},
    "the bare weights of a PMM model": {"backbone.trunk.conv1.weight": 0, "stages.0.bn.weight": 0},
}


@pytest.mark.parametrize("text", OTHERS)
def test_other_code_bases_are_recognised(text, tmp_path):
    refused(OTHERS[text], text)
    torch.save(OTHERS[text], tmp_path / "f.pth")
    with refuses(
        InvalidFile,
        "not a PMM checkpoint",
        path=tmp_path / "f.pth",
        hint=describe_known(OTHERS[text], tmp_path / "f.pth"),
    ):
        load(tmp_path / "f.pth")  # as every other command does


def test_torchvisions_own_state_dict_is_recognised():
    with torch.device("meta"):
        refused(resnet50().state_dict(), "a ResNet-50", "pmm train --init FILE")
        refused(resnet18().state_dict(), "conv1.weight, bn1.weight, bn1.bias, ...")


@pytest.mark.parametrize("content", [[1, 2], {}, {1: 2}, {"state_dict": {}}, {"a": 1, "b": 2, "c": 3, "d": 4}, None, 3])
def test_anything_else_is_shown(content):
    assert known_method(content) is None
    refused(content, "unknown checkpoint (it holds: ", "a checkpoint of the PMM authors' code or of BDB's")


def test_a_trunk_without_heads_is_not_a_whole_checkpoint():
    state = {key: value for key, value in HOLLOW["bdb"].items() if key.startswith(("backbone", "res_part"))}
    refused(state, "not a whole checkpoint", "missing (global_reduction.0.weight")


# --- what becomes of it ---


def test_the_exported_graph_gives_the_authors_features(probes, restored):
    """The module that is written to ONNX: batch-norm folded, reductions of one map stacked."""
    images, expected = probes
    _, model, config = restored
    contract = InputContract.of("float", "rgb")
    graph = deployed_graph(model, preprocessing_of(config), contract, EmbeddingContract(dim=1536), "fp32")
    with torch.inference_mode():
        assert relative_error(expected, graph(images)) <= 1e-5


@pytest.mark.slow
def test_every_later_command_takes_it(network, people, tmp_path):
    """At a small size: the networks take any, and these commands are proved at full size elsewhere."""
    _, net = network
    source, ours, onnx = saved(tmp_path / "f.pth.tar", net.state_dict()), tmp_path / "ours.pth", tmp_path / "ours.onnx"
    done = run_here("-m", "pmm", "import", source, "-o", ours, "--height", "128", "--width", "64")
    assert done.returncode == 0, done.stderr
    done = run_here("-m", "pmm", "evaluate", ours, "--dataset", "synthetic", "--root", people, "--device", "cpu")
    assert "mAP" in done.stdout, done.stderr
    assert_one_line_error(run_here("export/to_onnx.py", ours, "-o", onnx), "no crops to verify", "--verify-root DIR")
    done = run_here("export/to_onnx.py", ours, "-o", onnx, "--verify-root", people)
    assert done.returncode == 0, done.stderr
    crops = load_crops([sample.path for sample in read_dataset("synthetic", people).query[:4]], 128, 64)
    images = torch.from_numpy(preprocessing_of(preset("paper")).normalise(crops))
    with torch.inference_mode(), open_runner(onnx, device="cpu") as runner:
        assert relative_error(net(images), torch.from_numpy(runner(crops))) <= 1e-5
