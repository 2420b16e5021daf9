"""Every export has its selftest beside it, with its own hash and its own tolerances; it goes where the file goes."""

import json
import shutil

import numpy as np
import pytest

from pmm.artifacts.artifact import manifest_path, selftest_paths
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.trained_model import read_model
from pmm.export.cached import has_selftest
from pmm.export.onnx import export_onnx
from pmm.export.options import MIN_COSINE, EngineOptions, ExportOptions, VerifyOptions
from pmm.export.selftest import checkpoint_vectors, onnx_vectors, tolerances
from pmm.export.triton import write_model_repository
from pmm.export.trt import engine_from_onnx
from pmm.runtime.open import open_runner
from pmm.selftest.run import judge_embeddings, open_selftest, run_selftest
from pmm.selftest.vectors import MeasuredDifference
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256
from tests.refusals import refuses

UNVERIFIED = VerifyOptions(no_verify=True)


def test_it_has_the_checkpoints_own_embeddings(trained, exported):
    selftest = open_selftest(exported)
    with open_runner(trained, device="cpu") as runner:
        expected = runner(selftest.vectors.images)
    assert np.allclose(selftest.vectors.expected, expected, rtol=1e-4, atol=1e-4)
    assert selftest.vectors.source_sha256 == sha256(trained)
    assert selftest.measured.min_cosine > 1 - 1e-9
    assert "CPUExecutionProvider" in selftest.measured.ran_on


def test_the_network_is_run_once_for_all_files_of_a_contract(trained, exported, monkeypatch):
    source, input, embedding = read_model(trained), InputContract(), EmbeddingContract.of(read_model(trained).model)
    first = checkpoint_vectors(source, "c" * 64, source.preprocessing, input, embedding)
    monkeypatch.setattr(source.model, "forward", None)
    assert checkpoint_vectors(source, "c" * 64, source.preprocessing, input, embedding) is first
    unique = {image.tobytes() for image in first.images}
    assert len(unique) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True, "flip_tta": True, "static_batch": 3, "input_colour": "bgr"},
        pytest.param({"input": "float255"}, marks=pytest.mark.slow),
    ],
)
def test_contracts_are_kept(trained, tmp_path, options):
    out = tmp_path / "model.onnx"
    manifest = export_onnx(trained, out, ExportOptions(**options), UNVERIFIED).manifest
    vectors = open_selftest(out).vectors
    assert vectors.normalised == manifest.embedding.normalised
    assert np.allclose(np.linalg.norm(vectors.expected, axis=1), 1, atol=1e-5) == vectors.normalised
    verdict = run_selftest(out, device="cpu")
    assert verdict.passed
    assert verdict.min_cosine > 1 - 1e-9


def test_statistics_of_the_caller_are_those_of_the_selftest(trained, tmp_path):
    out, half = tmp_path / "model.onnx", (0.5, 0.5, 0.5)
    export_onnx(trained, out, ExportOptions(input="float", input_mean=half, input_std=half), UNVERIFIED)
    selftest = open_selftest(out)
    assert run_selftest(out, device="cpu").passed
    names = {each.name for each in selftest.vectors.mistakes}
    assert "imagenet" in names
    assert "minus_one_to_one" not in names, "which is right here"
    assert judge_embeddings(out, selftest.vectors.wrong("imagenet")).mistakes == ("imagenet",)


def test_two_exports_have_the_same_arrays_and_another_takes_the_place_of_the_first(trained, exported, tmp_path):
    out = tmp_path / "model.onnx"
    export_onnx(trained, out)
    before = [path.read_bytes() for path in selftest_paths(out)]
    assert before == [path.read_bytes() for path in selftest_paths(exported)]
    export_onnx(trained, out, ExportOptions(normalize=True), UNVERIFIED)
    assert run_selftest(out, device="cpu").passed
    assert not {path.read_bytes() for path in selftest_paths(out)} & set(before)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_has_a_selftest_if_it_is_whole_and_its_own(exported, tmp_path):
    places = [tmp_path / path.name for path in (exported, *selftest_paths(exported))]
    whole = [path.read_bytes() for path in (exported, *selftest_paths(exported))]
    for changed in (None, *range(3)):
        for number, (path, content) in enumerate(zip(places, whole, strict=True)):
            path.write_bytes(content[:-9] if number == changed else content)
        assert has_selftest(places[0]) == (changed is None)
    for path in places[1:]:
        path.write_bytes(b"")
        assert not has_selftest(places[0])
        path.unlink()
        assert not has_selftest(places[0])


def test_an_engine_has_those_of_its_onnx_file_under_its_own_hash(exported, shared, tmp_path):
    engine = shared.engine()
    ours, source = open_selftest(engine), open_selftest(exported)
    assert ours.artifact_sha256 == sha256(engine)
    assert np.array_equal(ours.vectors.expected, source.vectors.expected)
    assert ours.measured is None or ours.measured.ran_on != source.measured.ran_on
    for path in (exported, manifest_path(exported)):  # of an earlier version, without a selftest
        shutil.copyfile(path, tmp_path / path.name)
    file = read_onnx(tmp_path / exported.name)
    engine_from_onnx(file, tmp_path / "m.plan", EngineOptions(flavor="rtx"))
    without = open_selftest(tmp_path / "m.plan")
    assert "ONNX Runtime" in without.vectors.reference
    assert np.allclose(without.vectors.expected, source.vectors.expected, rtol=1e-4, atol=1e-4)


def test_a_file_in_int8_says_itself_what_mistakes_make_of_it(shared):
    for target in ("cpu", "tensorrt"):
        path = shared.onnx(ExportOptions(precision="int8", target=target))
        vectors = open_selftest(path).vectors
        assert vectors.has_own
        assert not np.array_equal(vectors.own, vectors.expected)
        assert run_selftest(path, device="cpu").passed
        assert onnx_vectors(read_onnx(path)).has_own, "for its engine"


def test_an_engine_that_may_run_in_tf32_is_to_be_as_near_as_that(exported, tmp_path):
    for tf32, precision in ((False, "fp32"), (True, "tf32")):
        engine_from_onnx(read_onnx(exported), tmp_path / "m.plan", EngineOptions(flavor="rtx", tf32=tf32))
        assert open_selftest(tmp_path / "m.plan").precision == precision


def test_a_repository_for_triton_has_it_and_is_replaced_with_it(exported, tmp_path):
    ((copy, _),) = write_model_repository([exported], tmp_path / "models")
    assert run_selftest(copy.path, device="cpu").passed
    write_model_repository([exported], tmp_path / "models", overwrite=True, name=exported.stem)
    alone = tmp_path / "alone.onnx"
    shutil.copyfile(exported, alone)
    ((copy, _),) = write_model_repository([alone], tmp_path / "models")
    with refuses(InvalidFile, "selftest"):
        open_selftest(copy.path)


def test_tolerances_are_those_of_the_file_and_of_its_client_whichever_is_wider():
    plain = tolerances("fp32", None)
    assert list(plain) == list(MIN_COSINE)
    assert 1e-7 < 1 - plain["fp32"].min_cosine < 1e-5
    assert plain["fp16"].min_cosine == MIN_COSINE["fp16"]
    assert {each.min_cosine for each in tolerances("int8", None).values()} == {MIN_COSINE["int8"]}
    worse = MeasuredDifference(min_cosine=0.97, max_norm_error=0.2, ran_on="x")
    widened = tolerances("int8", worse)["int8"]
    assert widened.min_cosine < 0.97
    assert widened.max_norm_error > 0.2
    better = MeasuredDifference(min_cosine=0.9999, max_norm_error=1e-3, ran_on="x")
    assert tolerances("int8", better) == tolerances("int8", None)
    for broken in ({"min_cosine": 0.9, "max_norm_error": 0.0}, {"min_cosine": 1.0, "max_norm_error": 0.5}):
        assert tolerances("int8", MeasuredDifference(ran_on="x", **broken)) == tolerances("int8", None)


@pytest.mark.slow
def test_a_package_has_one(shared):
    package = shared.package()
    assert run_selftest(package).passed
    assert json.loads(selftest_paths(package)[0].read_text())["artifact_sha256"] == sha256(package)
