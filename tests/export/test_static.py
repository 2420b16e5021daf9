"""Files of a static batch: the same embeddings as a file of any batch, in every runner and for any number of images."""

import dataclasses
import json

import numpy as np
import pytest

from pmm.artifacts.artifact import Artifact, read_manifest
from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.manifest import InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.export import int8_graph
from pmm.export import onnx as module
from pmm.export.half_precision import emulated, half_type
from pmm.export.onnx import describe_export
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.precision import onnx_precision
from pmm.export.reference import in_memory
from pmm.export.triton import write_model_repository
from pmm.export.triton_config import Serving
from pmm.export.trt import engine_from_onnx
from pmm.runtime.openvino import OpenVinoRunner
from pmm.runtime.ort import OrtRunner
from pmm.runtime.ort_session import check_interface, open_session
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, UserError
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

BATCH = 3
KINDS = {
    "fp32": ExportOptions(),
    "fp16": ExportOptions(precision="fp16"),
    "bf16": ExportOptions(precision="bf16"),
    "int8": ExportOptions(precision="int8"),
    "int8-fp16": ExportOptions(precision="int8", int8_fallback="fp16"),
    "int8-cpu": ExportOptions(precision="int8", target="cpu"),
    "flip": ExportOptions(flip_tta=True, normalize=True, input="float"),
}
QUICK = ("fp32", "int8")


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:7]], 128, 64)


def static(options, batch=BATCH):
    return dataclasses.replace(options, static_batch=batch)


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_it_has_the_embeddings_of_the_file_of_any_batch_to_the_bit(shared, crops, kind, tmp_path):
    files = [read_onnx(shared.onnx(options)) for options in (KINDS[kind], static(KINDS[kind]))]
    graph, manifest = files[1].proto.graph, files[1].manifest
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == BATCH
    assert "Shape" not in {node.op_type for node in graph.node}
    assert (manifest.input.batch, files[0].manifest.input.batch) == (BATCH, None)
    assert f", batch {BATCH}, " in describe_export(Artifact(files[1].path, manifest))
    assert manifest.macs == files[0].manifest.macs == onnx_precision(files[1].proto).total
    assert manifest.precision_share == files[0].manifest.precision_share
    assert manifest.parity["rows"] == 64

    half = half_type(manifest)  # ONNX Runtime runs no bf16 on CPUs, and of fp16 not the rounding
    runs = [
        in_memory(emulated(f.proto) if half else f.proto, f.manifest.input, manifest.preprocessing, optimise=not half)
        for f in files
    ]
    in_batches = np.concatenate([runs[0](np.resize(crops, (9, *crops.shape[1:]))[k : k + BATCH]) for k in (0, 3, 6)])
    assert np.array_equal(runs[1](crops), in_batches[: len(crops)])

    if KINDS[kind].target == "cpu":
        return
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(files[1], tmp_path / "model.plan", EngineOptions(flavor="rtx")).manifest
    only = BatchProfile(least=BATCH, best=BATCH, most=BATCH)
    assert engine.engine.batch == BatchProfiles((only,))
    assert engine.precision_share == pytest.approx(manifest.precision_share)


@pytest.mark.parametrize("runner", [OrtRunner, OpenVinoRunner])
def test_a_runner_takes_any_number_of_images(shared, crops, runner):
    with runner(shared.onnx(static(ExportOptions()))) as fixed, runner(shared.onnx()) as dynamic:
        for count in (0, 1, 3, 7):
            found = fixed(crops[:count])
            assert found.shape == (count, 384)
            np.testing.assert_allclose(found, dynamic(crops[:count]), rtol=1e-4, atol=1e-5)
        fixed.bind(crops[:3])()
        with refuses(InvalidInput, "model.onnx", "2 images", "static batch is 3"):
            fixed.bind(crops[:2])


@pytest.mark.slow
def test_openvino_finds_all_the_multiplications_of_a_static_int8_file(shared, crops):
    options = static(KINDS["int8-cpu"])
    with OpenVinoRunner(shared.onnx(options)) as runner, OrtRunner(shared.onnx(options)) as reference:
        assert runner.info.precision == "int8"
        assert runner(crops).shape == reference(crops).shape


def test_a_manifest_of_another_batch_is_refused(shared):
    fixed, dynamic = (read_onnx(shared.onnx(options)) for options in (static(ExportOptions()), ExportOptions()))
    for file, batch, found in ((fixed, None, "[3, 128"), (fixed, 4, "[3, 128"), (dynamic, 3, "['any', 128")):
        manifest = dataclasses.replace(file.manifest, input=InputContract(batch=batch))
        with refuses(InvalidFile, found, path="x", expected=f"{{'images': [{batch or repr('any')}, 128"):
            check_interface(open_session(file.content), manifest, "x")


def test_onnx_runtime_itself_names_both_batches(shared, crops):
    """Without a runner of ours."""
    session = open_session(read_onnx(shared.onnx(static(ExportOptions()))).content)
    with pytest.raises(Exception, match=r"Got: 2 Expected: 3"):
        session.run(None, {"images": crops[:2]})


@pytest.mark.parametrize("batch", [0, -4, 4097])
def test_an_impossible_batch_is_one_line(batch):
    with refuses(InvalidValue, name="static_batch", value=batch, expected="1 to 4096"):
        ExportOptions(static_batch=batch)


def test_the_commands_take_it_and_say_it(trained, shared, tmp_path):
    for script in ("export/to_onnx.py", "export/to_trt.py"):
        done = run_here(script, trained, "-o", tmp_path / "model.onnx", "--static-batch", "0")
        assert_one_line_error(done, "--static-batch", "1 to 4096")
    assert not list(tmp_path.iterdir())
    file = shared.onnx(static(ExportOptions()))
    done = run_here("export/to_trt.py", file, "-o", tmp_path / "model.plan", "--static-batch", "3")
    assert_one_line_error(done, "--static-batch", "the ONNX file")
    told = json.loads(run_here("-m", "pmm", "info", file, "--json").stdout)
    assert told["file"]["manifest"]["input"]["batch"] == BATCH
    with refuses(InvalidFile, "static (3)", path=file, hint="--static-batch"):
        write_model_repository([file], tmp_path / "models", serving=Serving())
    assert not list(tmp_path.iterdir())


def test_crops_are_calibrated_on_as_often_as_a_batch_needs_and_no_others(trained, tmp_path, monkeypatch):
    """Black ones, to fill the last batch up, could widen the ranges."""
    seen = []

    def stop(proto, target, images, name):
        seen.extend(images)
        raise UserError("seen")

    monkeypatch.setattr(int8_graph, "Quantizer", stop)
    options = ExportOptions(precision="int8", calibration_images=40, static_batch=7)
    with pytest.raises(UserError, match="seen"):
        module.export_onnx(trained, tmp_path / "model.onnx", options)
    assert [len(batch) for batch in seen] == [7] * 6
    rows = np.concatenate(seen)
    assert np.array_equal(rows[40:], rows[:2])
    assert len(np.unique(rows.reshape(42, -1), axis=0)) == 40


def test_a_file_of_one_image(shared, crops):
    file = shared.onnx(static(ExportOptions(), 1))
    assert read_manifest(file, read_onnx(file).sha256).input.batch == 1
    with OrtRunner(file) as fixed, OrtRunner(shared.onnx()) as dynamic:
        assert np.array_equal(fixed(crops[:2]), np.concatenate([dynamic(crops[k : k + 1]) for k in range(2)]))
