import dataclasses
import json

import onnx
import pytest
import torch

from pmm.artifacts.artifact import manifest_path, read_manifest, selftest_paths
from pmm.artifacts.checkpoint import load, restore_model, save
from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.config import Config
from pmm.data.preprocessing import preprocessing_of
from pmm.export import onnx as module
from pmm.export.onnx import check_overwrite, describe_export, export_onnx, export_onnx_cached
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision
from pmm.runtime.deployed_graph import deployed_graph
from pmm.utils.build_info import build_version, describe_build
from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

traced_once = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def graph(exported):
    return onnx.load(exported)


def test_the_interface_is_the_contract(graph):
    (images,), (embeddings,) = graph.graph.input, graph.graph.output
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert isinstance(shape[0], str)
    assert shape[1:] == [128, 64, 3]
    assert embeddings.name == "embeddings"
    assert embeddings.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_param or d.dim_value for d in embeddings.type.tensor_type.shape.dim] == [shape[0], 384]
    assert [o.version for o in graph.opset_import if o.domain == ""] == [20]
    assert graph.ir_version == 10


def test_the_graph_is_folded_merged_and_clean(graph):
    operators = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in operators
    assert "Dropout" not in operators
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    products = [shapes[n.input[1]] for n in graph.graph.node if n.op_type in ("Gemm", "MatMul")]
    assert sorted(map(sorted, products)) == [[128, 128], [128, 256]]
    # uint8 is cast before it is transposed: TensorRT's Transpose takes no uint8
    first = {name: operators.index(name) for name in ("Cast", "Transpose")}
    assert first["Cast"] < first["Transpose"]
    assert onnx_precision(graph).share == {"fp32": 1.0}
    text = str(graph)
    assert "stack_trace" not in text
    assert "/site-packages/" not in text
    assert ".py" not in text


def test_two_exports_are_byte_equal(trained, exported, tmp_path):
    again = export_onnx(trained, tmp_path / "other-name.onnx")
    assert again.path.read_bytes() == exported.read_bytes()


def test_the_manifest_says_what_is_in_the_file(trained, exported):
    manifest = Manifest.from_json(manifest_path(exported).read_text(), "x")
    assert read_manifest(exported, sha256(exported)) == manifest
    assert manifest.checkpoint_sha256 == sha256(trained)
    assert (manifest.precision, manifest.precision_found, manifest.opset) == ("fp32", "fp32", 20)
    assert manifest.precision_share == {"fp32": 1.0}
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == (128, 64)
    assert (manifest.embedding.dim, manifest.embedding.metric) == (384, "euclidean")
    assert (manifest.input.dtype, manifest.input.layout, manifest.input.normalised_by) == ("uint8", "NHWC", "graph")
    assert manifest.parity["min_cosine"] > 0.99999
    assert manifest.parity["rows"] == 64
    assert manifest.parity["batches"] == [1, 3, 60]
    assert "CPUExecutionProvider" in manifest.parity["ran_on"]
    inside = {p.key: p.value for p in onnx.load(exported).metadata_props}
    embedded = Manifest.from_json(inside["pmm_manifest"], "inside")
    assert dataclasses.replace(embedded, sha256=manifest.sha256, parity=manifest.parity) == manifest


@traced_once
def test_the_manifest_names_the_kernels_here_and_those_of_the_training(trained, exported, tmp_path, built_with):
    said = read_manifest(exported, sha256(exported)).versions
    assert said["pmm kernels"] == said["pmm kernels in training"] == build_version()
    old = load(trained)
    del old["versions"]["pmm kernels"]
    save(tmp_path / "old.pth", old)
    built_with()
    made = export_onnx(tmp_path / "old.pth", tmp_path / "model.onnx").manifest
    assert (made.versions["pmm kernels"], made.versions["pmm kernels in training"]) == ("none", "unknown")
    kept = export_onnx_cached(tmp_path / "old.pth", tmp_path / "model.onnx")
    assert kept.manifest == made


@traced_once
def test_which_kernels_are_here_is_said_by_info_alone(trained, tmp_path):
    for script, name in (("export/to_onnx.py", "m.onnx"), ("export/to_trt.py", "m.plan")):
        done = run_here(script, trained, "-o", tmp_path / name)
        assert "kernels of the mix" not in done.stdout
        assert str(tmp_path / name) in done.stdout.splitlines()[-1], done.stderr
    printed = run_here("-m", "pmm", "info").stdout
    assert f"kernels {describe_build()}" in " ".join(printed.split())


@traced_once
def test_embeddings_that_moved_leave_no_file(trained, tmp_path, monkeypatch):
    original = module._build

    def broken(*args):
        proto, quantization = original(*args)
        bias = next(t for t in proto.graph.initializer if list(t.dims) == [256])
        values = onnx.numpy_helper.to_array(bias).copy()
        values[:128] += 5.0
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return proto, quantization

    monkeypatch.setattr(module, "_build", broken)
    with refuses(ParityFailed, "has cosine 0.", "for fp32", "nothing was written", path=tmp_path / "model.onnx"):
        export_onnx(trained, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@traced_once
def test_another_precision_than_asked_for_leaves_no_file(trained, tmp_path, monkeypatch):
    from pmm.runtime.deployed_graph import TRUNK_TYPES

    monkeypatch.setitem(TRUNK_TYPES, "fp16", torch.float32)
    with refuses(InvalidFile, "100.0% fp32", "in fp16", path=tmp_path / "model.onnx"):
        export_onnx(trained, tmp_path / "model.onnx", ExportOptions(precision="fp16"))
    assert not list(tmp_path.iterdir())


@traced_once
def test_no_crops_is_refused_unless_asked_for(trained, tmp_path, people):
    state = load(trained)
    state["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pth")
    out = tmp_path / "model.onnx"
    done = run_here("export/to_onnx.py", tmp_path / "moved.pth", "-o", out)
    assert_one_line_error(done, "to verify", "--verify-root DIR", "--no-verify")
    assert not out.exists()
    unverified = export_onnx(tmp_path / "moved.pth", out, verification=VerifyOptions(no_verify=True))
    assert unverified.manifest.parity is None
    assert "parity NOT verified" in describe_export(unverified)
    verified = export_onnx(tmp_path / "moved.pth", out, verification=VerifyOptions(verify_root=str(people)))
    assert verified.manifest.parity["rows"] == 64


def test_commands_name_the_file_they_cannot_use(tmp_path, trained):
    (tmp_path / "bad.pth").write_bytes(trained.read_bytes()[:1000])
    for script in ("export/to_onnx.py", "export/to_trt.py"):
        assert_one_line_error(run_here(script, tmp_path / "bad.pth"), "bad.pth: truncated, or not a checkpoint")
        assert_one_line_error(run_here(script, tmp_path / "none.pth"), "none.pth: it does not exist")
    assert {p.name for p in tmp_path.iterdir()} == {"bad.pth"}
    (tmp_path / "file").write_text("")
    assert_one_line_error(run_here("export/to_onnx.py", trained, "-o", tmp_path / "file" / "x.onnx"), "it is a file")


def test_the_checkpoint_is_never_the_output(trained, tmp_path):
    checkpoint = tmp_path / "model.pth"
    checkpoint.write_bytes(trained.read_bytes())
    for script in ("export/to_onnx.py", "export/to_trt.py"):
        assert_one_line_error(run_here(script, checkpoint, "-o", checkpoint), "is the file to read; give another name")
    assert_one_line_error(
        run_here("export/to_trt.py", checkpoint, "-o", tmp_path / "m.onnx"), "ends in .plan or .engine"
    )
    command = ("-m", "pmm", "evaluate", checkpoint, "--dataset", "synthetic", "--root", tmp_path, "--json", checkpoint)
    assert_one_line_error(run_here(*command), "is the file to read; give another name")
    assert checkpoint.read_bytes() == trained.read_bytes()


@traced_once
def test_a_verified_export_is_used_again_and_only_then(trained, tmp_path):
    out = tmp_path / "model.onnx"
    export_onnx(trained, out, verification=VerifyOptions(no_verify=True))
    first = export_onnx_cached(trained, out)
    assert first.manifest.parity is not None
    written = out.stat().st_mtime_ns
    assert export_onnx_cached(trained, out) == first
    assert out.stat().st_mtime_ns == written
    beside = selftest_paths(out)[1]
    vectors = beside.read_bytes()
    beside.unlink()  # as of an earlier version
    assert export_onnx_cached(trained, out) == first
    assert beside.read_bytes() == vectors
    out.write_bytes(b"damaged")
    assert export_onnx_cached(trained, out).manifest.sha256 == first.manifest.sha256
    unit = ExportOptions(normalize=True)
    assert export_onnx_cached(trained, out, unit).manifest.embedding.normalised
    text = manifest_path(out).read_text().replace('"onnx": "', '"onnx": "0.')
    manifest_path(out).write_text(text)
    written = out.stat().st_mtime_ns
    export_onnx_cached(trained, out, unit)
    assert out.stat().st_mtime_ns != written, "a file that another version made was used again"
    assert export_onnx_cached(trained, out, ExportOptions(precision="fp16")).manifest.precision_found == "fp16"


def test_exporting_does_not_change_the_model(trained):
    state = load(trained)
    model, config = restore_model(state, trained)
    deployed_graph(model, preprocessing_of(config), InputContract(colour="bgr"), EmbeddingContract(dim=384), "fp16")
    assert all(torch.equal(value, state["model"][key]) for key, value in model.state_dict().items())
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@traced_once
def test_through_a_link_the_artifact_it_leads_to_is_replaced_with_its_manifest(trained, tmp_path):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "model.onnx", tmp_path / "current.onnx"
    unverified = VerifyOptions(no_verify=True)
    export_onnx(trained, real, verification=unverified)
    link.symlink_to(real)
    export_onnx(trained, link, ExportOptions(normalize=True), unverified)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["current.onnx"]
    for path in (real, link):
        assert read_manifest(path, sha256(path)).embedding.normalised


@traced_once
def test_what_the_user_has_is_not_replaced_in_passing(trained, tmp_path):
    out, unverified = tmp_path / "model.onnx", VerifyOptions(no_verify=True)
    check_overwrite(out, trained, ExportOptions())
    out.write_bytes(b"mine")
    with refuses(CannotWrite, "pmm did not export", path=out, hint="-o"):
        check_overwrite(out, trained, ExportOptions())
    assert_one_line_error(run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan"), str(out), "-o")
    assert out.read_bytes() == b"mine"
    export_onnx(trained, out, ExportOptions(normalize=True), unverified)
    check_overwrite(out, trained, ExportOptions(normalize=True))
    with refuses(CannotWrite, "another export", path=out, hint="build from that file"):
        check_overwrite(out, trained, ExportOptions())
    graph = onnx.load(out)
    graph.doc_string = "simplified"
    onnx.save(graph, out)
    with refuses(CannotWrite, "changed", path=out, hint="-o"):
        check_overwrite(out, trained, ExportOptions(normalize=True))
    out.write_bytes(out.read_bytes()[:-9])  # damaged: made anew
    check_overwrite(out, trained, ExportOptions())


@traced_once
def test_another_calibration_is_another_export(trained, tmp_path):
    out, asked = tmp_path / "model.onnx", ExportOptions(precision="int8", calibration_images=64)
    export_onnx(trained, out, asked, VerifyOptions(no_verify=True))
    check_overwrite(out, trained, asked)
    for other in (
        {"calibration_images": 40}, {"target": "cpu"}, {"calibration_root": str(tmp_path)},
        {"int8_fallback": "fp16"}, {"opset": 21}, {"static_batch": 2},
    ):  # fmt: skip
        with refuses(CannotWrite, "another export", path=out):
            check_overwrite(out, trained, dataclasses.replace(asked, **other))


@traced_once
def test_an_engine_without_verification_keeps_the_verified_file(trained, tmp_path):
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan")
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "model.onnx.json").read_bytes()
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx.json").read_bytes() == before
