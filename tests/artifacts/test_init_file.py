"""Files of other toolkits as the start of a training: the whole backbone under any wrapping, or one line."""

import re
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18, resnet50, resnet101, resnext50_32x4d

from pmm.artifacts.init_file import read_init_file
from pmm.artifacts.known_checkpoints import describe_known
from pmm.models.backbone import build_backbone
from pmm.utils.errors import InvalidFile
from tests.authors import hollow
from tests.conftest import examples
from tests.refusals import refuses

COUNTER = "num_batches_tracked"


def hollow_state(network, **options):
    """Its state dict with hardly a byte in it."""
    with torch.device("meta"):
        state = network(**options).state_dict()
    half = torch.tensor(0.5)
    return {key: half.expand(v.shape) if v.is_floating_point() else torch.tensor(3) for key, v in state.items()}


RESNET = hollow_state(resnet50)
TRUNK = {key: value for key, value in RESNET.items() if not key.startswith("fc.")}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def numbered(state):
    """As in nn.Sequential(*net.children())."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {re.sub(r"^\w+", lambda name: places[name[0]], key): value for key, value in state.items()}


def read(path, content, backbone="resnet50"):
    torch.save(content, path)
    return read_init_file(path, backbone)


def refused(path, content, *facts, **attributes):
    torch.save(content, path)
    with refuses(InvalidFile, *facts, path=path, **attributes):
        read_init_file(path, "resnet50")


OURS = under("backbone.", hollow_state(build_backbone, name="resnet50"))
HEAD = {"heads.bottleneck.0.weight": torch.zeros(2048), "heads.weight": torch.zeros(751, 2048)}
NON_LOCAL = {"backbone.NL_2.0.g.weight": torch.zeros(1), "backbone.NL_3.2.W.1.running_var": torch.zeros(1)}
MOCO = {"queue": torch.zeros(128, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
MOCO |= under("encoder_q.fc.0.", {"weight": torch.zeros(2, 2)}) | under("encoder_k.", RESNET)
ADAM = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
AS_WRITTEN = {
    "torchvision": (RESNET, ""),
    "torchreid": (
        {"state_dict": RESNET | {"classifier.weight": torch.zeros(751, 2048)}, "optimizer": ADAM},
        "state_dict.",
    ),
    "torchreid, several GPUs": ({"state_dict": under("module.", RESNET), "rank1": 0.9}, "state_dict.module."),
    "fast-reid": ({"model": under("backbone.", TRUNK) | HEAD | NON_LOCAL, "iteration": 1}, "model.backbone."),
    "reid-strong-baseline": (under("base.", TRUNK) | {"bottleneck.weight": torch.zeros(2048)}, "base."),
    "MoCo": (
        {"arch": "resnet50", "state_dict": under("module.", under("encoder_q.", TRUNK) | MOCO)},
        "state_dict.module.encoder_q.",
    ),
    "timm": ({"state_dict": RESNET, "state_dict_ema": {**RESNET}, "args": {"lr": 0.1}}, "state_dict_ema."),
    "torchvision's training": ({"model": RESNET, "model_ema": under("module.", RESNET)}, "model_ema.module."),
    "children of a sequence": (under("base.", numbered(TRUNK)), "base."),
    "bare weights of pmm": (OURS, "backbone."),
}
"""Toolkit -> what it writes, and below which prefix the backbone is to be found."""


def count(value):
    return sum(map(count, value.values())) if isinstance(value, dict) and value else 1


@pytest.mark.parametrize("toolkit", AS_WRITTEN)
def test_the_whole_backbone_of_other_toolkits_is_taken_and_every_key_accounted_for(toolkit, tmp_path):
    content, prefix = AS_WRITTEN[toolkit]
    found = read(tmp_path / "file.pth", content)
    assert found.weights.keys() == OURS.keys()
    assert all(key.startswith(prefix) for key in found.stored_names.values())
    names = {key.removeprefix(prefix) for key in found.stored_names.values()}
    assert names in (TRUNK.keys(), numbered(TRUNK).keys(), {key.removeprefix("backbone.") for key in found.weights})
    assert not names & {key.removeprefix(prefix) for key in found.left_out if key.startswith(prefix)}
    assert len(found.weights) + len(found.left_out) == count(content)


def test_the_maps_are_those_of_the_network_that_the_file_is_of(tmp_path):
    """Every weight another, the second copy of MoCo too."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net, backbone = resnet50(weights=None).eval(), build_backbone("resnet50").eval()
    net, backbone = net.to_empty(device="cpu"), backbone.to_empty(device="cpu")
    for key, value in net.state_dict().items():
        if COUNTER not in key:
            positive = value.dim() == 1 and not key.endswith(("bias", "mean"))
            value.uniform_(*((0.5, 1.5) if positive else (-0.05, 0.05)))
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    images = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        expected = nn.Sequential(*list(net.children())[:-2])(images)
    state = {key: value for key, value in net.state_dict().items() if COUNTER not in key}
    other = {key: torch.tensor(0.1).expand(value.shape) for key, value in state.items()}
    content = {"state_dict": under("module.", under("encoder_q.", state) | under("encoder_k.", other))}
    weights = read(tmp_path / "file.pth", content).weights
    missing = backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items()}, strict=False)
    assert all(COUNTER in key for key in missing.missing_keys)
    with torch.inference_mode():
        assert torch.equal(backbone(images), expected)


SMALL = {
    key: torch.tensor(float(place)).expand(value.shape) if value.is_floating_point() else torch.tensor(place)
    for place, (key, value) in enumerate(hollow_state(build_backbone, name="resnet10").items())
}
"""Every weight another."""
WORDS = st.sampled_from(
    ["state_dict", "model", "module", "backbone", "base", "encoder_q", "encoder", "net", "0", "a b"]
)


@examples(60)
@given(data=st.data())
def test_any_nesting_of_wrappings_gives_the_same_weights(data, tmp_path_factory):
    """Dicts within dicts and prefixes, in any order and depth, with other things beside them at each level."""
    public = {key.removeprefix("trunk."): value for key, value in SMALL.items()}
    content, place = dict(public), ""
    for level in range(data.draw(st.integers(0, 5))):
        word = data.draw(WORDS)
        place = f"{word}.{place}"
        beside = {f"beside{level}.fc.weight": torch.zeros(2), f"epoch{level}": level}
        inside = (
            {word: content} if data.draw(st.booleans()) else {f"{word}.{key}": value for key, value in content.items()}
        )
        content = {**inside, **beside} if data.draw(st.booleans()) else {**beside, **inside}
    found = read(tmp_path_factory.mktemp("init") / "file.pth", content, "resnet10")
    assert found.stored_names["backbone.trunk.conv1.weight"] == f"{place}conv1.weight"
    assert found.weights.keys() == under("backbone.", SMALL).keys()
    assert all(torch.equal(value, SMALL[key.removeprefix("backbone.")]) for key, value in found.weights.items())
    assert len(found.weights) + len(found.left_out) == count(content)


def test_half_precision_and_missing_counters_do_no_harm(tmp_path):
    half = {key: torch.tensor(0.5).half().expand(v.shape) for key, v in TRUNK.items() if COUNTER not in key}
    found = read(tmp_path / "half.pth", half)
    assert {value.dtype for value in found.weights.values()} == {torch.float32}
    large = {**half, "conv1.weight": torch.tensor(3e38).expand(half["conv1.weight"].shape)}  # finite, unlike their sum
    assert read(tmp_path / "large.pth", large).weights.keys() == found.weights.keys()
    assert len(found.weights) == len(half)


def test_a_network_of_timm_by_timms_own_names(tmp_path):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("test_resnet", "test_convnext"):  # whose feature maps have flattened names
        torch.manual_seed(1)
        net, images = timm.create_model(name).eval(), torch.randn(1, 3, 96, 64)
        path = tmp_path / f"{name}.safetensors"
        safetensors.save_file(net.state_dict(), path)
        found = read_init_file(path, f"timm:{name}")
        assert len(found.weights) + len(found.left_out) == len(net.state_dict())
        backbone = build_backbone(f"timm:{name}").eval()
        backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in found.weights.items()})
        maps = timm.create_model(name, features_only=True, out_indices=(-1,), output_stride=16).eval()
        flat = dict(zip(maps.state_dict(), (net.state_dict()[key] for key in net.state_dict()), strict=False))
        maps.load_state_dict(flat)
        with torch.inference_mode():
            assert torch.equal(backbone(images), maps(images)[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["densenet121", "ghostnet_100", "mobilenetv4_conv_small", "regnety_004", "resnetv2_50"]
)
def test_timms_names_are_found_though_its_feature_maps_have_others_and_leave_out_the_end(name, tmp_path):
    timm = pytest.importorskip("timm")
    state = hollow_state(timm.create_model, model_name=name)
    found = read(tmp_path / "file.pth", {"state_dict": under("module.", state)}, f"timm:{name}")
    with torch.device("meta"):
        shapes = build_backbone(f"timm:{name}").state_dict()
    assert {key: value.shape for key, value in found.weights.items()} == {
        f"backbone.{key}": value.shape for key, value in shapes.items()
    }
    assert len(found.weights) + len(found.left_out) == len(state)
    first = next(iter(found.stored_names.values())).removeprefix("state_dict.module.")
    torch.save({**state, f"{first}.more": torch.zeros(1)}, tmp_path / "file.pth")
    with refuses(InvalidFile, f"{first}.more", path=tmp_path / "file.pth"):
        read_init_file(tmp_path / "file.pth", f"timm:{name}")


# --- what is refused ---


def test_less_than_the_whole_backbone_is_refused(tmp_path):
    file = tmp_path / "file.pth"
    refused(file, {key: value for key, value in TRUNK.items() if key != "conv1.weight"}, "1 are missing (conv1.weight)")
    top = {key: value for key, value in TRUNK.items() if not key.startswith("layer4.")}
    refused(file, {"state_dict": top}, "50 are missing", "layer4.0.conv1.weight")
    refused(
        file, {**TRUNK, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]"
    )


def test_other_architectures_are_refused_by_name(tmp_path):
    file, expected = tmp_path / "file.pth", "the weights of a resnet50 backbone"
    refused(file, hollow_state(resnet101), "a ResNet-101", "layer3.6.conv1.weight", expected=expected)
    hint = "--backbone timm:resnet18" if find_spec("timm") else ""
    refused(file, hollow_state(resnet18), "are missing", "layer1.0.conv3.weight", expected=expected, hint=hint)
    refused(file, hollow_state(resnext50_32x4d), "of another shape", expected=expected)
    se = {f"layer1.{block}.se.fc.0.weight": torch.zeros(16, 256) for block in range(3)}
    refused(
        file, TRUNK | se, "3 weights more than a resnet50 backbone has", "layer1.0.se.fc.0.weight", expected=expected
    )
    osnet = {"conv1.conv.weight": torch.zeros(2), "conv2.0.conv2a.conv1.weight": torch.zeros(2)}
    refused(
        file, {"state_dict": osnet}, "an OSNet checkpoint of torchreid", "no weights of a resnet50", expected=expected
    )
    refused(file, SMALL, "its backbone is resnet10", expected="resnet50", hint="--backbone resnet10")
    refused(file, {"state_dict": hollow("pmm")}, expected=expected, hint="pmm import")


def test_an_instance_batch_norm_network_is_no_plain_one(tmp_path):
    ibn = under("module.", hollow_state(build_backbone, name="resnet50-ibn-a"))
    public = {key.replace("module.trunk.", "module."): value for key, value in ibn.items()}
    refused(tmp_path / "file.pth", {"state_dict": public}, expected="resnet50", hint="--backbone resnet50-ibn-a")
    assert len(read(tmp_path / "file.pth", {"state_dict": public}, "resnet50-ibn-a").weights) == len(ibn)
    torch.save(TRUNK, tmp_path / "file.pth")
    with refuses(InvalidFile, expected="resnet50-ibn-a", hint="--backbone resnet50"):
        read_init_file(tmp_path / "file.pth", "resnet50-ibn-a")


class Unsafe:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (ADAM, "the state of an optimizer"),
        ({"optimizer": ADAM}, "the state of an optimizer"),
        ([1, 2], "no weights"),
        ({0: torch.zeros(1)}, "no weights"),
        ({}, "no weights"),
        (torch.zeros(3), "no weights"),
        ({**TRUNK, "bn1.running_var": torch.full((64,), torch.nan)}, "bn1.running_var holds NaN or Inf"),
        ({**TRUNK, "conv1.weight": torch.zeros(64, 3, 7, 7, dtype=torch.int8)}, "conv1.weight is int8"),
        ({"model": TRUNK, "trainer": Unsafe()}, "save its state_dict()"),
        (torch.nn.Linear(2, 2), "could run code"),
        ({"format": "pmm-checkpoint-9"}, "'pmm-checkpoint-9'"),
    ],
)
def test_what_holds_no_usable_weights_is_one_line(tmp_path, content, fact, capsys):
    refused(tmp_path / "file.pth", content, fact)
    assert "must never run" not in capsys.readouterr().out


def test_files_that_are_none_are_one_line(tmp_path):
    expected = "the weights of a resnet50 backbone"
    with refuses(InvalidFile, "does not exist", path=tmp_path / "missing.pth", expected=expected):
        read_init_file(tmp_path / "missing.pth", "resnet50")
    with refuses(InvalidFile, "folder", path=tmp_path, expected=expected, hint=""):
        read_init_file(tmp_path, "resnet50")
    (tmp_path / "best.pth").touch()
    with refuses(InvalidFile, "folder", path=tmp_path, expected=expected, hint=f"{tmp_path / 'best.pth'}"):
        read_init_file(tmp_path, "resnet50")
    for name in ("file.pth", "file.safetensors"):
        for content in (b"", b"no weights", b"<html>", b"PK\x03\x04"):
            (tmp_path / name).write_bytes(content)
            with refuses(InvalidFile, "truncated, or not a", path=tmp_path / name, expected=expected):
                read_init_file(tmp_path / name, "resnet50")


def test_a_dict_that_holds_itself_is_read_to_its_end(tmp_path):
    content = {"model": TRUNK}
    content["again"] = content
    assert len(read(tmp_path / "file.pth", content).weights) == len(TRUNK)


def test_the_advice_of_other_commands_is_true(tmp_path):
    """`pmm train --init FILE` for those files whose backbone it takes."""
    known = [advice for content, _ in AS_WRITTEN.values() if (advice := describe_known(content))]
    assert len(known) > 4
    assert all("pmm train --init FILE" in advice for advice in known)
    for content in (under("base.", {"cls_token": torch.zeros(1)}), {"conv2.0.conv2a.conv1.weight": torch.zeros(2)}):
        assert "--init" not in describe_known(content)
    ibn = hollow_state(build_backbone, name="resnet50-ibn-a")
    names = {f"backbone.{key.removeprefix('trunk.')}": value for key, value in ibn.items()}
    assert "--backbone resnet50-ibn-a" in describe_known({"model": names | HEAD})
    small = hollow_state(resnet18) | {"classifier.weight": torch.zeros(751, 512)}
    for state in (small, hollow_state(resnet101)):
        assert "if timm has it" in describe_known(state)
        assert "pmm train --init FILE --backbone timm:NAME" in describe_known(state)
    pytest.importorskip("timm")
    assert read(tmp_path / "file.pth", small, "timm:resnet18").weights
