import pytest
import torch
from torchvision.models import resnet50

from pmm.artifacts.pretrained import load_weights
from pmm.config import ModelConfig
from pmm.models.backbone import resnet10_backbone, resnet50_backbone
from pmm.utils.errors import UserError


def test_none_changes_nothing():
    backbone = resnet10_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    load_weights(backbone, ModelConfig(backbone="resnet10", weights="none"))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    state = resnet50(weights=None).state_dict()
    backbone = resnet50_backbone()

    def refused(value, text):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(UserError, match=text) as error:
            load_weights(backbone, ModelConfig(weights=str(tmp_path / "w.pth")))
        assert "\n" not in str(error.value)

    refused({k: v for k, v in state.items() if k != "conv1.weight"}, r"1 missing \(as trunk.conv1.weight\)")
    refused({**state, "extra": torch.zeros(1)}, r"1 unknown \(as trunk.extra\)")
    refused({**state, "conv1.weight": torch.zeros(1)}, "1 of another shape")
    refused([1, 2], "not a state dict")
    refused({0: torch.zeros(1)}, "not a state dict")
    for content in (b"", b"no weights", b"<html>", b"PK\x03\x04"):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(
            UserError, match=r"--weights .*w.pth: truncated, or not a checkpoint.*; expected imagenet, none"
        ):
            load_weights(backbone, ModelConfig(weights=str(tmp_path / "w.pth")))
    with pytest.raises(
        UserError, match=r"missing\.pth does not exist; expected imagenet, none or a ResNet-50 state dict"
    ):
        load_weights(backbone, ModelConfig(weights=str(tmp_path / "missing.pth")))
    with pytest.raises(UserError, match="resnet10 trunk has no such weights"):
        load_weights(resnet10_backbone(), ModelConfig(backbone="resnet10", weights="imagenet"))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path, error):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=rf"the download failed \({error}\); give a file with --weights FILE"):
        load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))


def test_a_damaged_download_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    with pytest.raises(UserError, match=r"--weights imagenet: .*resnet50-0676ba61.pth: truncated.*remove that file"):
        load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))
    torch.save(resnet50(weights=None).state_dict(), kept)
    load_weights(resnet50_backbone(), ModelConfig(weights="imagenet"))
