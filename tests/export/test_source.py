"""Exports of an adopted ONNX file: other precisions, engines, and everything that finds it again."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx
from pmm.adoption.onnx_options import OnnxOptions
from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.origin import checkpoint_of, training_dataset
from pmm.export import onnx as module
from pmm.export import reference
from pmm.export.onnx import check_overwrite, describe_export, export_onnx, export_onnx_cached
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.export.triton import write_model_repository
from pmm.gallery.model_of import source_of
from pmm.runtime.open import open_runner
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile
from pmm.utils.files import sha256
from tests.adoption.onnx_graphs import DIM, foreign
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture
def adopted(tmp_path, people):
    """An adopted file of opset 11 that takes NHWC floats."""
    path = foreign(tmp_path / "foreign.onnx", layout="NHWC", opset=11, names=("x:0", "features"))
    out = tmp_path / "adopted.onnx"
    return adopt_onnx(path, out, ImageOptions(), OnnxOptions(), dataset="market1501", root=str(people)).path


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(),
        ExportOptions(precision="fp16"),
        pytest.param(ExportOptions(precision="bf16"), marks=pytest.mark.slow),
        pytest.param(ExportOptions(precision="int8", target="cpu", calibration_images=40), marks=pytest.mark.slow),
        ExportOptions(precision="int8", calibration_images=40, int8_fallback="fp16"),
    ],
    ids=lambda options: options.precision + options.suffix,
)
def test_every_precision_is_made_of_it_and_compared_with_it(adopted, options, tmp_path):
    artifact = export_onnx(adopted, tmp_path / "made.onnx", options)
    manifest, source = artifact.manifest, read_onnx(adopted).manifest
    assert manifest.precision_found == options.precision
    assert manifest.checkpoint_sha256 == sha256(adopted)
    assert "adopted ONNX file" in manifest.parity["against"]
    assert "the adopted ONNX file" in describe_export(artifact)
    assert (manifest.input, manifest.embedding, manifest.preprocessing) == (
        source.input, source.embedding, source.preprocessing,
    )  # fmt: skip
    proto = read_onnx(artifact.path).proto
    assert manifest.opset == next(each.version for each in proto.opset_import if not each.domain)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert checkpoint_of(artifact.path, manifest) == adopted
    assert training_dataset(artifact.path) == training_dataset(adopted)
    assert not manifest.is_adopted_itself


def test_int8_of_it_runs_and_names_what_it_kept(adopted, tmp_path):
    options = ExportOptions(precision="int8", target="cpu", calibration_images=40)
    artifact = export_onnx(adopted, tmp_path / "made.onnx", options)
    assert artifact.manifest.quantization["target"] == "cpu"
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 8, 3), dtype=np.uint8)
    with open_runner(adopted) as own, open_runner(artifact.path) as made:
        assert made.info.precision == "int8"
        contracts = [source_of(path, runner) for path, runner in ((adopted, own), (artifact.path, made))]
        assert {each.checkpoint_sha256 for each in contracts} == {sha256(adopted)}  # an index of one takes the other
        expected, found = own(images), made(images)
    assert (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1) == (
        pytest.approx(np.ones(5), abs=0.02)
    )


def test_what_the_file_has_decided_cannot_be_asked_for(adopted, tmp_path):
    for options, flag in (
        (ExportOptions(opset=18), "--opset"),
        (ExportOptions(input="float"), "--input"),
        (ExportOptions(input_colour="bgr"), "--input-colour"),
        (ExportOptions(normalize=True), "--normalize"),
        (ExportOptions(flip_tta=True), "--flip-tta"),
        (ExportOptions(static_batch=2), "--static-batch"),
    ):
        with refuses(ConflictingOptions, flag, options=(flag,)):
            export_onnx(adopted, tmp_path / "made.onnx", options)
    assert not (tmp_path / "made.onnx").exists()


def test_only_an_adopted_file_in_fp32_is_a_source(adopted, tmp_path, exported):
    made = export_onnx(adopted, tmp_path / "made.onnx")
    with refuses(InvalidFile, path=made.path, hint="the adopted file"):
        export_onnx(made.path, tmp_path / "again.onnx")
    with refuses(InvalidFile, path=exported, hint="its checkpoint"):
        export_onnx(exported, tmp_path / "again.onnx")
    half = foreign(tmp_path / "half.onnx", dtype="float16")
    adopt_onnx(half, tmp_path / "adopted-half.onnx", ImageOptions(), OnnxOptions())
    with refuses(InvalidFile, "fp16", path=tmp_path / "adopted-half.onnx", expected="fp32"):
        export_onnx(tmp_path / "adopted-half.onnx", tmp_path / "again.onnx", ExportOptions(precision="int8"))


def test_embeddings_that_moved_leave_no_file(adopted, tmp_path, monkeypatch):
    original = module._build

    def broken(*args):
        proto, quantization = original(*args)
        weight = next(each for each in proto.graph.initializer if len(each.dims) == 4)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[:2] = -values[:2]
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return proto, quantization

    monkeypatch.setattr(module, "_build", broken)
    with refuses(ParityFailed, "the adopted ONNX file's", path=tmp_path / "made.onnx"):
        export_onnx(adopted, tmp_path / "made.onnx")
    assert not (tmp_path / "made.onnx").exists()


def test_an_export_is_used_again_only_while_it_is_right(adopted, tmp_path, monkeypatch):
    made = []
    original = module.export_onnx
    monkeypatch.setattr(module, "export_onnx", lambda *args: made.append(args[2].precision) or original(*args))
    half = ExportOptions(precision="fp16")
    for options in (half, half, ExportOptions(), half):
        export_onnx_cached(adopted, tmp_path / "made.onnx", options)
    assert made == ["fp16", "fp32", "fp16"]
    check_overwrite(tmp_path / "made.onnx", adopted, half)
    with refuses(CannotWrite, "another export of the adopted ONNX file", path=tmp_path / "made.onnx"):
        check_overwrite(tmp_path / "made.onnx", adopted, ExportOptions())


def test_without_a_data_set_it_asks_for_crops(adopted, tmp_path, people):
    nowhere = adopt_onnx(tmp_path / "foreign.onnx", tmp_path / "nowhere.onnx", ImageOptions(), OnnxOptions()).path
    with refuses(InvalidFile, hint="--verify-root DIR"):
        export_onnx(nowhere, tmp_path / "made.onnx")
    verification = VerifyOptions(verify_root=str(people))
    assert export_onnx(nowhere, tmp_path / "made.onnx", verification=verification).manifest.parity["rows"] == 64


def test_the_command_takes_it(adopted, tmp_path):
    done = run_here("-m", "pmm", "export", "onnx", adopted, "--precision", "fp16")
    assert done.returncode == 0, done.stderr
    assert "parity with the adopted ONNX file" in done.stdout
    assert "kernels" not in done.stdout
    assert (tmp_path / "adopted-fp16.onnx").exists()
    assert_one_line_error(run_here("-m", "pmm", "export", "onnx", adopted), "the file to read")


def test_engines_are_built_of_it_in_its_own_precision_and_by_way_of_others(adopted, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    for flags, between in (((), None), (("--precision", "fp16"), "adopted-fp16.onnx")):
        done = run_here("export/to_trt.py", adopted, *flags, "--batch", "1", "2", "4")
        assert done.returncode == 0, done.stderr
        plan = tmp_path / (f"{Path(between).stem}.plan" if between else "adopted.plan")
        manifest = module.read_manifest(plan)
        assert manifest.precision_found == (flags[1] if flags else "fp32")
        assert manifest.checkpoint_sha256 == sha256(adopted)
        assert manifest.engine.onnx_sha256 == sha256(tmp_path / (between or "adopted.onnx"))
        assert "x:0: batch 1 2 4" in manifest.engine.flags
        assert checkpoint_of(plan, manifest) == adopted
        assert not manifest.is_adopted_itself
    refused = run_here("export/to_trt.py", adopted, "--static-batch", "2")
    assert_one_line_error(refused, "--static-batch", "adopt")


def test_an_engine_is_compared_with_the_adopted_file(adopted, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "gpu_for", lambda flavor, device: "a GPU")
    made = export_onnx(adopted, tmp_path / "made.onnx", ExportOptions(precision="fp16"))
    file, verification = read_onnx(made.path), VerifyOptions()
    of_source = reference.engine_parity_check(file, adopted, verification, "rtx")
    of_itself = reference.engine_parity_check(read_onnx(adopted), None, verification, "rtx")
    of_half = reference.engine_parity_check(file, None, verification, "rtx")
    np.testing.assert_array_equal(of_source.expected, of_itself.expected)
    assert "adopted" in of_source.against
    assert "verified ONNX file" in of_half.against
    np.testing.assert_allclose(of_half.expected, of_source.expected, rtol=1e-2, atol=1e-2)


def test_a_server_gets_its_names_layout_and_type(adopted, tmp_path):
    ((_, model),) = write_model_repository([adopted], tmp_path / "repository")
    assert all(fact in model.config for fact in ('"x:0"', "TYPE_FP32", "FORMAT_NHWC", '"features"'))
    assert f"dims: {DIM}" in model.config


def test_a_copy_without_its_manifest_beside_it_is_the_same_source(adopted, tmp_path):
    shutil.copyfile(adopted, tmp_path / "copy.onnx")
    assert not manifest_path(tmp_path / "copy.onnx").exists()
    made = export_onnx(tmp_path / "copy.onnx", tmp_path / "made.onnx", verification=VerifyOptions(no_verify=True))
    assert made.manifest.checkpoint_sha256 == sha256(adopted)
