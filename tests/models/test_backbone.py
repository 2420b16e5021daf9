import torch
from torchvision.models import resnet50

from pmm.artifacts.pretrained import load_weights
from pmm.config import ModelConfig
from pmm.models.backbone import resnet10_backbone, resnet50_backbone


def test_resnet50_is_torchvisions_without_the_last_stride(tmp_path):
    torch.manual_seed(0)
    net = resnet50(weights=None)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone = resnet50_backbone()
    load_weights(backbone, ModelConfig(weights=str(tmp_path / "weights.pth")))
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    images = torch.randn(1, 3, 64, 32)
    expected = images
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        expected = getattr(net.eval(), name)(expected)
    with torch.inference_mode():
        assert torch.equal(backbone.eval()(images), expected)


def test_resnet10_map_is_a_sixteenth():
    assert resnet10_backbone()(torch.zeros(1, 3, 128, 64)).shape == (1, 128, 8, 4)
