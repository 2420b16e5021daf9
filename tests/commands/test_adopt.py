"""`pmm adopt`: what it says, that later commands need none of the user's code, and what it refuses."""

import sys

import pytest
import torch

from pmm.artifacts.adopted_file import ADOPTED
from pmm.artifacts.known_checkpoints import TORCHREID, adoption_command, describe_known
from pmm.artifacts.trained_model import read_model
from tests.adoption.networks import Plain
from tests.conftest import assert_one_line_error, run_here
from tests.without_torch import run_all_without_torch

SIZE = ("--height", "64", "--width", "32")
SOURCE = """
import torch
from torch import nn

def build(dim=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, dim, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten())
"""


def command(*args, **kwargs):
    return run_here("-m", "pmm", *args, **kwargs)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net_of_a_user.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("net_of_a_user", None)


def test_a_network_is_adopted_and_its_code_never_needed_again(folder, people):
    done = command("adopt", "net_of_a_user:build(dim=6)", "-o", "model.pth", *SIZE,
                   "--dataset", "synthetic", "--root", people, "--metric", "euclidean",
                   "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.1", "--colour", "bgr",
                   cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, assumed, written, after = done.stdout.splitlines()
    assert "checksum" in weights
    assert assumed == (
        "assumed, as not given: --scale 1/255, --interpolation bilinear, --antialias (as PIL resizes), "
        "stretched without --padding"
    )
    assert "embeddings [48] for euclidean distances" in written
    assert after == "next: pmm evaluate model.pth, pmm bench model.pth"
    (folder / "net_of_a_user.py").unlink()
    trained = read_model(folder / "model.pth")
    assert trained.preprocessing.mean == (0.3, 0.4, 0.5)
    assert trained.source["factory"] == "net_of_a_user:build(dim=6)"
    assert trained.source["flags"] == (
        "--height 64 --width 32 --mean 0.5 0.4 0.3 --std 0.2 0.2 0.1 --colour bgr --metric euclidean"
    )
    told = command("info", folder / "model.pth").stdout
    for fact in (
        "adopted network",
        "operators.aten.conv2d.default",
        "net_of_a_user:build(dim=6)",
        "PIL's bilinear",
        "--colour bgr",
    ):
        assert fact in told
    done = command("visualize", folder / "model.pth", "--what", "lists,cam", "--out", folder / "pictures")
    assert_one_line_error(done, "adopted", "--what lists")
    assert (folder / "pictures" / "lists.png").is_file()
    done = command("train", "--init", folder / "model.pth", "--dataset", "synthetic", "--root", people)
    assert_one_line_error(done, "adopted network")


def test_weights_are_accounted_for_and_the_file_is_whole_or_not_there(folder):
    torch.save({"state_dict": {"0.weight": torch.ones(8, 3, 5, 5), "0.bias": torch.zeros(8)}}, folder / "w.pth")
    args = ("adopt", "net_of_a_user.py:build", "-o", "model.pth", *SIZE)
    done = command(*args, "--weights", "w.pth", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "taken         2  needed by the embeddings: state_dict.0.weight, state_dict.0.bias" in done.stdout
    assert read_model(folder / "model.pth").source["weights"] == "w.pth"
    before = (folder / "model.pth").read_bytes()
    torch.save({"0.weight": torch.ones(8, 3, 5, 5), "neck": torch.zeros(3)}, folder / "w.pth")
    assert_one_line_error(command(*args, "--weights", "w.pth", cwd=folder), "0.bias", "neck")
    assert_one_line_error(command(*args[:3], "w.pth", *SIZE, "--weights", "w.pth", cwd=folder), "w.pth")
    assert (folder / "model.pth").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_is_wrong_with_a_command_line_is_noticed_without_torch(tmp_path):
    out = ("-o", tmp_path / "model.pth")
    wrong = [
        (("m:f", *out, "--height", "64"), "--width"),
        (("m:f", *out, *SIZE, "--mean", "0", "0", "0"), "--std"),
        (("m:f", *out, *SIZE, "--scale", "1"), "--mean 0 0 0 --std 1 1 1"),
        (("m:f", *out, *SIZE, "--mean", "0", "0", "0", "--std", "0", "1", "1"), "--std"),
        (("m:f", *out, *SIZE, "--interpolation", "bicubic", "--no-antialias"), "antialias"),
        (("m:f", *out, *SIZE, "--colour", "gbr"), "did you mean rgb"),
        (("m:f", *out, *SIZE, "--root", tmp_path), "--dataset"),
        (("m:f", *out, *SIZE, "--dataset", "market1502"), "market1501"),
        (("m:f", *out, *SIZE, "--dataset", "market1501", "--root", tmp_path / "no"), "no: it is not a folder"),
        (("m:f", *out, *SIZE, "--ignore", "a.*"), "--weights"),
        (("m:f", *out, *SIZE, "--weights", tmp_path / "no.pth"), "no.pth"),
        (("m:f", *out, *SIZE, "--layout", "NHWC"), "--layout"),
        (("m:f", "-o", tmp_path / "model.onnx", *SIZE), ".pth"),
        (("f", *out, *SIZE), "MODULE:FACTORY"),
        (("no.onnx", *out, *SIZE), "does not exist"),
        (("no.SafeTensors", *out), "does not exist"),
        (("no.pt", *out, *SIZE), "MODULE:FACTORY"),
    ]
    answers = run_all_without_torch(*(("-m", "pmm", "adopt", *args) for args, _ in wrong))
    for (args, fact), done in zip(wrong, answers, strict=True):
        assert done.returncode in (1, 2), args
        assert_one_line_error(done, fact)
    assert not (tmp_path / "model.pth").exists()


@pytest.mark.parametrize(
    ("content", "name", "facts"),
    [
        ({"state_dict": Plain().state_dict()}, "w.pth.tar", ("MODULE:FACTORY", "--weights", "w.pth.tar")),
        ({"classifier.weight": torch.zeros(751, 8)}, "osnet_ain_x1_0_msmt17_256x128_amsgrad.pth",
         ("build_model('osnet_ain_x1_0', num_classes=751, pretrained=False)", "--height 256 --width 128", "out.pth")),
        ({"format": "pmm-checkpoint-1"}, "best.pth", ("PMM checkpoint",)),
        ({"format": ADOPTED}, "adopted.pth", ("adopted", "pmm evaluate")),
    ],
)  # fmt: skip
def test_a_file_of_weights_is_answered_with_the_line_to_type(content, name, facts, tmp_path):
    torch.save(content, tmp_path / name)
    assert_one_line_error(command("adopt", tmp_path / name, "-o", tmp_path / "out.pth"), *facts)


def test_a_program_of_torch_is_no_source(tmp_path):
    torch.jit.script(torch.nn.Conv2d(3, 4, 3)).save(str(tmp_path / "program.pt"))
    done = command("adopt", tmp_path / "program.pt", "-o", tmp_path / "out.pth")
    assert_one_line_error(done, "TorchScript", "ONNX")


OSNET = {
    "conv1.conv.weight": (64, 3, 7, 7),
    "conv2.0.conv2a.conv1.weight": (64, 256, 1, 1),
    "classifier.weight": (4101, 512),
}
RESNET = {"layer4.0.conv1.weight": (1,), "classifier.weight": (702, 512)}
PROPOSED = [
    (OSNET, "anything.pt", "'osnet_x1_0', num_classes=4101"),
    (OSNET | {"conv1.conv.weight": (16, 3, 7, 7)}, "anything.pt", "'osnet_x0_25'"),
    (OSNET | {"conv2.0.IN.weight": (256,)}, "anything.pt", "'osnet_ibn_x1_0'"),
    ({"conv1.conv.weight": (32, 3, 7, 7), "conv2.0.conv2.0.layers.0.bn.weight": (1,)}, "a.pth", "'osnet_ain_x0_5'"),
    ({"conv1.conv.weight": (44, 3, 3, 3), "conv9.conv.weight": (1,)}, "a.pt", "'mobilenetv2_x1_4'"),
    ({"feature.0.fm_conv1.weight": (1,), "fc_s.0.weight": (1,)}, "a.pth", "'mlfn'"),
    ({"classifier_global.weight": (7, 5), "classifier_local.weight": (7, 5)}, "a.pth", "--height 160 --width 64"),
    (RESNET, "resnet50_fc512_dukemtmcreid.pt", "'resnet50_fc512', num_classes=702"),
    (RESNET, "resnet50mid.pth", "'resnet50mid'"),
    ({"image_encoder.conv1.weight": (1,)}, "clip_market1501.pt", "MODULE:FACTORY"),
    ({"base.cls_token": (1,)}, "transreid.pth", "--mean 0.5 0.5 0.5"),
    ({"backbone.conv1.weight": (1,), "heads.weight": (1,)}, "sbs.pth", "--scale 1 --mean 0 0 0 --std 1 1 1"),
    ({"n_ids": (1,)}, "lmbn_n_duke.pth", "MODULE:FACTORY"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "file", "fact"), PROPOSED)
def test_the_network_is_known_by_its_weights_or_by_the_name_of_the_file(shapes, file, fact):
    state = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    line = adoption_command(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}}, f"my dir/{file}"
    )
    assert fact in line
    assert f"--weights 'my dir/{file}'" in line
    assert ("--no-antialias --metric cosine" in line) == (file.endswith(".pt") and "torchreid" in line)
    if known := describe_known(state, file):
        assert adoption_command(state, file) in known
        assert ("BoxMOT" in known) == ("--no-antialias" in known)


def test_each_network_of_torchreid_is_known_by_the_name_of_its_file():
    for network in TORCHREID:
        line = adoption_command({"classifier.weight": torch.zeros(751, 8)}, f"{network}_market1501.pt")
        assert f"build_model('{network}', num_classes=751" in line
        assert ("use_gpu=False" in line) == (network == "hacnn")
