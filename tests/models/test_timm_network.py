"""Networks of timm: which are taken, with which stride, and all that is wrong with others. Nothing is downloaded."""

import dataclasses
import shlex
import sys

import pytest
import torch
from torch import nn

from pmm.config import ModelConfig
from pmm.models import timm_network as module
from pmm.models.backbone import build_backbone, map_size, with_sync_batch_norm
from pmm.models.registry import build_model, deployed
from pmm.models.timm_network import has_imagenet_weights, imagenet_state, other_statistics, timm_network
from pmm.presets import preset
from pmm.utils.errors import InvalidValue, MissingLibrary, UserError
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [
        pytest.param("mobilenetv4_conv_small", 960, 16, marks=pytest.mark.slow),
        ("resnet18", 512, 16),
        ("ghostnet_100", 160, 32),
    ],
)
def test_the_map_has_stride_16_where_timm_can_make_it_so(name, channels, stride):
    net, *facts = timm_network(name)
    with torch.inference_mode():
        assert net.eval()(torch.zeros(1, 3, 64, 32))[-1].shape == (1, channels, 64 // stride, 32 // stride)
    assert facts == [channels, stride]
    assert map_size(f"timm:{name}", 100, 50) == (-(-100 // stride), -(-50 // stride))


def test_its_weights_are_timms_own_and_random_numbers_are_drawn_once():
    torch.manual_seed(0)
    net = build_backbone("timm:resnet18").net
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(-1,), output_stride=16)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vit_tiny_patch16_224", ["224x224 only", "not purely convolutional"]),
        pytest.param("swin_tiny_patch4_window7_224", ["224x224 only", "[1, 7, 7, 768]"], marks=pytest.mark.slow),
        ("selecsls42b", ["8x8 cells for 512x512 pixels"]),
        pytest.param("rexnet_100", ["185 channels"], marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", ["66 of its weights"], marks=pytest.mark.slow),
        ("resnet18.nix", ["timm:resnet18", "timm:resnet18.a1_in1k"]),
    ],
)
def test_all_that_is_wrong_is_named(name, wrong):
    with refuses(InvalidValue, *wrong, name="--backbone", value=f"timm:{name}"):
        build_backbone(f"timm:{name}")


def test_the_nearest_names_are_offered(capsys):
    with refuses(InvalidValue, "timm:mobilenetv4_conv_small", name="--backbone", value="timm:mobilenetv4_conv_smal"):
        timm_network("mobilenetv4_conv_smal")
    with refuses(InvalidValue, hint=module.LIST, name="--backbone", value="timm:nonsense"):
        timm_network("nonsense")
    exec(shlex.split(module.LIST)[2])
    assert "resnet18" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet18", "timm:resnet18"),
        ("TIMM:resnet18", "timm:resnet18"),
        ("resnet5", "resnet50"),
        ("timm:", "timm:NAME"),
    ],
)
def test_what_another_name_may_have_meant_is_offered(name, meant):
    with refuses(InvalidValue, meant, value=name):
        ModelConfig(backbone=name)


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    module._facts.cache_clear()
    with refuses(MissingLibrary, library="timm", hint="pip install timm"):
        build_backbone("timm:resnet18")
    with refuses(InvalidValue, hint="did you mean resnet10?", value="resnet18"):
        ModelConfig(backbone="resnet18")


def test_blocks_are_counted_on_its_own_map():
    base = preset("tiny")
    model = dataclasses.replace(base.model, backbone="timm:ghostnet_100", num_classes=4, k=9)
    with refuses(InvalidValue, "8 at most", "4x2", name="--k"):
        build_model(dataclasses.replace(base, model=model))


def test_timms_weights_and_their_statistics(monkeypatch):
    """With timm's download in place of the network."""
    assert has_imagenet_weights("resnet18")
    assert not other_statistics("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "--mean 0.5 0.5 0.5" in other_statistics(
        "tf_efficientnet_lite0", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    expected = timm_network("resnet18").net.state_dict()

    def create(name, *, pretrained, features_only, out_indices, output_stride):
        assert (name, pretrained) == ("resnet18", True)
        if not online:
            raise OSError("no route to host\nand more")
        net = nn.Module()
        net.state_dict = lambda: expected
        return net

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(module, "_reach", lambda repository: None)
    online = True
    assert imagenet_state("resnet18") == expected
    online = False
    with refuses(UserError, "timm:resnet18", "no route to host", hint="--init FILE"):
        imagenet_state("resnet18")


@pytest.fixture
def refused(monkeypatch):
    """The requests to the server of timm's weights, each of which is refused."""
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", "/nowhere")
    client = type(hub.get_session())

    def request(self, *args, **options):
        asked.extend(arg.url for arg in args if "resnet18" in str(arg.url))
        raise hub.errors.OfflineModeIsEnabled("no route to host")

    monkeypatch.setattr(client, "send", request)
    return asked


def test_a_server_that_is_not_reached_is_tried_once(refused, capfd):
    with refuses(UserError, "timm:resnet18", "no route to host", hint="--init FILE"):
        imagenet_state("resnet18")
    assert len(refused) == 1
    assert not capfd.readouterr().err


def test_weights_that_lie_here_need_no_server(refused, monkeypatch, tmp_path):
    import huggingface_hub as hub

    folder = tmp_path / "models--timm--resnet18.a1_in1k"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    module._reach("timm/resnet18.a1_in1k")
    assert not refused


def test_synchronised_batch_norms_keep_timms_activations():
    model = nn.Module()
    model.backbone = build_backbone("timm:mobilenetv3_small_100")
    model.head = nn.Sequential(nn.BatchNorm1d(4))
    images = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        expected = model.backbone.eval()(images)
    synced = with_sync_batch_norm(model).eval()
    norms = [child for child in synced.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 30
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    with torch.inference_mode():
        assert torch.equal(synced.backbone(images), expected)


@pytest.mark.slow
def test_branches_that_timm_can_merge_are_merged_in_what_is_deployed():
    torch.manual_seed(0)
    base = preset("tiny")
    model = dataclasses.replace(base.model, method="baseline", backbone="timm:repvgg_a0", num_classes=4)
    model = build_model(dataclasses.replace(base, model=model))
    images = torch.randn(4, 3, 64, 32)
    with torch.no_grad():
        model(images)
        expected = model.eval()(images)
        network = deployed(model)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in network.modules())
    assert any(isinstance(child, nn.BatchNorm2d) for child in model.modules())


def test_a_training_refuses_it_before_data_are_drawn(tmp_path):
    flags = ("--backbone", "timm:selecsls42b", "--root", tmp_path / "people", "--out", tmp_path / "run")
    done = run_here("-m", "pmm.train", "--preset", "tiny", "--device", "cpu", *flags)
    assert_one_line_error(done, "--backbone is 'timm:selecsls42b'", "8x8 cells")
    assert not list(tmp_path.iterdir())
