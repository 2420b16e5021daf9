"""ResNet-50-IBN-a: its norms, and the keys of the files that hold its weights."""

import torch
from torchvision.models import resnet50

from pmm.models.instance_batch_norm import InstanceBatchNorm, resnet50_ibn_a


def test_the_first_half_is_normalised_per_image_and_the_rest_over_the_batch():
    torch.manual_seed(0)
    maps, norm = torch.randn(4, 6, 5, 3) * 3 + 1, InstanceBatchNorm(6)
    out = norm(maps)
    per_image, over_batch = out[:, :3].flatten(2), out[:, 3:].transpose(0, 1).flatten(1)
    for part, axis in ((per_image, 2), (over_batch, 1)):
        torch.testing.assert_close(part.mean(axis), torch.zeros_like(part.mean(axis)), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(axis, correction=0), torch.ones_like(part.mean(axis)), atol=1e-3, rtol=0)
    assert not torch.allclose(out[:, 3:].flatten(2).mean(2), torch.zeros(4, 3), atol=1e-2)


def test_its_keys_are_resnet_50s_but_for_the_first_norm_of_three_stages():
    """As in the published code: 13 blocks (3 + 4 + 6) of half the channels each."""
    with torch.device("meta"):
        mine, plain = resnet50_ibn_a().state_dict(), resnet50(weights=None).state_dict()
    new = mine.keys() - plain.keys()
    assert len(new) == 13 * 7
    counted = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"IN.weight", "IN.bias", *(f"BN.{name}" for name in counted)}
    assert {key for key in new if key.startswith("layer2.3.")} == {f"layer2.3.bn1.{name}" for name in names}
    assert mine["layer3.5.bn1.IN.weight"].shape == mine["layer3.5.bn1.BN.running_var"].shape == (128,)
    assert {key for key in plain.keys() - mine.keys() if key.startswith(("layer4", "bn1"))} == set()
    assert all(mine[key].shape == plain[key].shape for key in mine.keys() & plain.keys())
