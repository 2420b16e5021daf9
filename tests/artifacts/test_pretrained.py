import pytest
import torch
from torchvision.models import resnet50

from pmm.artifacts.pretrained import load_weights
from pmm.config import ModelConfig
from pmm.models.backbone import resnet10_backbone, resnet50_backbone
from pmm.utils.errors import ConflictingOptions, InvalidFile, UserError
from tests.refusals import refuses


def test_none_changes_nothing():
    backbone = resnet10_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    load_weights(backbone, ModelConfig(backbone="resnet10", weights="none"))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    state = resnet50(weights=None).state_dict()
    backbone = resnet50_backbone()

    def refused(path, *facts):
        with refuses(InvalidFile, *facts, path=path, expected="a ResNet-50 state dict for --weights"):
            load_weights(backbone, ModelConfig(weights=str(path)))

    for value, fact in (
        ({k: v for k, v in state.items() if k != "conv1.weight"}, "1 missing (as trunk.conv1.weight)"),
        ({**state, "extra": torch.zeros(1)}, "1 unknown (as trunk.extra)"),
        ({**state, "conv1.weight": torch.zeros(1)}, "1 of another shape (as trunk.conv1.weight)"),
        ([1, 2], "not a state dict"),
        ({0: torch.zeros(1)}, "not a state dict"),
    ):
        torch.save(value, tmp_path / "w.pth")
        refused(tmp_path / "w.pth", fact)
    for content in (b"", b"no weights", b"<html>", b"PK\x03\x04"):
        (tmp_path / "w.pth").write_bytes(content)
        refused(tmp_path / "w.pth", "truncated, or not a checkpoint")
    refused(tmp_path / "missing.pth", "does not exist")
    with refuses(ConflictingOptions, "imagenet", "resnet10", hint="--weights none", options=("--weights",)):
        load_weights(resnet10_backbone(), ModelConfig(backbone="resnet10", weights="imagenet"))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path, error):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with refuses(UserError, "--weights imagenet", error, hint="--weights FILE"):
        load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))


def test_a_damaged_download_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    with refuses(InvalidFile, "truncated", path=kept, expected="--weights imagenet", hint="remove that file"):
        load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))
    torch.save(resnet50(weights=None).state_dict(), kept)
    load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))
