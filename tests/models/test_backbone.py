import torch
from torchvision.models import resnet50

from pmm.models.backbone import resnet10_backbone, resnet50_backbone


def test_resnet50_is_torchvisions_without_the_last_stride():
    torch.manual_seed(0)
    net = resnet50(weights=None)
    backbone = resnet50_backbone()
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    backbone.load_state_dict({key if key.startswith("layer4.") else f"trunk.{key}": state[key] for key in state})
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    images = torch.randn(1, 3, 64, 32)
    expected = images
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        expected = getattr(net.eval(), name)(expected)
    with torch.inference_mode():
        assert torch.equal(backbone.eval()(images), expected)


def test_resnet10_map_is_a_sixteenth():
    assert resnet10_backbone()(torch.zeros(1, 3, 128, 64)).shape == (1, 128, 8, 4)
