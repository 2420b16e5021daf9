"""What exports for other programs find in their folder: only an earlier export like themselves is replaced."""

import shutil
from functools import partial

import pytest

from pmm.artifacts.artifact import manifest_path
from pmm.export.boxmot import export_boxmot
from pmm.export.deepstream import export_deepstream
from pmm.export.openvino import export_openvino
from pmm.export.options import VerifyOptions
from pmm.utils.errors import CannotWrite
from tests.adoption.onnx_graphs import foreign
from tests.export.targets import adopted_onnx, contents
from tests.refusals import refuses

UNVERIFIED = VerifyOptions(no_verify=True)
TARGETS = {
    "deepstream": export_deepstream,
    "openvino": export_openvino,
    "openvino --normalize": partial(export_openvino, normalize=True),
    "boxmot": export_boxmot,
    "boxmot --openvino": partial(export_boxmot, openvino=True),
}


@pytest.fixture(scope="module")
def adopted(tmp_path_factory, people):
    folder = tmp_path_factory.mktemp("adopted")
    return adopted_onnx(foreign(folder / "foreign.onnx", names=("images", "features")), people)


@pytest.fixture(autouse=True)
def needs_openvino(request):
    if "openvino" in request.node.name:
        pytest.importorskip("openvino", reason="openvino is not installed")


def copied(artifact, path):
    shutil.copy(artifact, path)
    shutil.copy(manifest_path(artifact), manifest_path(path))
    return path


def refused(folder, path, target, checkpoint, *facts):
    """`target` refuses to write `checkpoint` to `folder` because of what is at `path`, and changes nothing."""
    before = contents(folder)
    with refuses(CannotWrite, *facts, path=path):
        TARGETS[target](checkpoint, folder, verification=UNVERIFIED)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("best.onnx", "deepstream"),
        ("config_tracker_reid.yml", "deepstream"),
        ("best.onnx", "openvino"),
        ("best.xml", "openvino"),
        ("best.bin", "openvino"),
        ("best.onnx", "boxmot"),
        ("best.onnx.metadata.json", "boxmot"),
        ("best_openvino_model/best.xml", "boxmot"),
        ("best_openvino_model", "boxmot --openvino"),
        ("best_openvino_model/best.xml", "boxmot --openvino"),
        ("best_openvino_model/best.bin", "boxmot --openvino"),
        ("best_openvino_model/manifest.json", "boxmot --openvino"),
    ],
)
def test_files_of_others_stay(trained, tmp_path, name, target):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("theirs")
    refused(
        tmp_path, path.parent if (name, target) == ("best_openvino_model/best.xml", "boxmot") else path, target, trained
    )


@pytest.mark.parametrize("target", ["deepstream", "openvino --normalize", "boxmot"])
def test_another_export_of_the_same_checkpoint_stays(exported, trained, tmp_path, target):
    refused(tmp_path, copied(exported, tmp_path / "best.onnx"), target, trained, "another export of")


def test_an_export_of_another_model_that_takes_other_input_stays(trained, adopted, tmp_path):
    refused(tmp_path, copied(adopted, tmp_path / "best.onnx"), "deepstream", trained, "another model")


def test_the_same_export_is_made_anew_and_not_in_place_of_another_models(adopted, tmp_path, people):
    pytest.importorskip("openvino", reason="openvino is not installed")
    other = adopted_onnx(foreign(tmp_path / "foreign.onnx", names=("images", "features"), opset=18), people)
    for target, xml in (("openvino", "adopted.xml"), ("boxmot --openvino", "adopted_openvino_model/adopted.xml")):
        folder = tmp_path / target
        for _ in range(2):
            TARGETS[target](adopted, folder, verification=UNVERIFIED)
        refused(folder, folder / xml, target, other)
    refused(folder, folder / "adopted_openvino_model", "boxmot", adopted, "--openvino")


@pytest.mark.parametrize(
    ("name", "target"),
    [("x.onnx", "deepstream"), ("x.YML", "deepstream"), ("best.xml", "openvino"), ("best.xml", "boxmot")],
)
def test_no_folder_gets_the_name_of_a_file(trained, tmp_path, name, target):
    with refuses(CannotWrite, path=tmp_path / name, expected="a folder"):
        TARGETS[target](trained, tmp_path / name)
    assert not list(tmp_path.iterdir())
