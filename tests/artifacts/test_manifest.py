import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.manifest import FOR_CLIENTS, FORMAT, EmbeddingContract, InputContract, Manifest, OnnxOrigin
from pmm.artifacts.measured_thresholds import MeasuredPoint, MeasuredThresholds
from pmm.artifacts.native_contracts import EngineContract
from pmm.data.crop_statistics import CropStatistics
from pmm.data.preprocessing import Preprocessing
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidInput, InvalidValue
from tests.refusals import refuses

ENGINE = EngineContract(
    flavor="tensorrt",
    version="11.4.0",
    batch=BatchProfiles((BatchProfile(least=1, best=4, most=16),)),
    onnx_sha256="0" * 64,
    platform="linux-x86_64",
    gpu="a GPU",
    compute_capability="8.9",
    hardware_compatibility="none",
    driver="13.0",
    flags=("no TF32",),
    precision_read_from="parsed network",
)
MANIFEST = Manifest(
    checkpoint_sha256="1" * 64,
    method="pmm",
    preprocessing=Preprocessing(height=8, width=4, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
    input=InputContract.of("float", "bgr"),
    embedding=EmbeddingContract(dim=12, normalised=True, metric="cosine"),
    precision="int8",
    precision_found="int8",
    precision_share={"int8": 0.9, "fp32": 0.1},
    macs=123,
    opset=20,
    versions={"torch": "2"},
    parity={"rows": 64, "min_cosine": 0.99},
    quantization={"target": "tensorrt", "kept_in_fp32": []},
    engine=ENGINE,
)


THRESHOLDS = MeasuredThresholds(
    precision="int8",
    metric="cosine",
    data="market1501",
    data_digest="d" * 64,
    genuine=100,
    impostor=100_000,
    points=(MeasuredPoint(fmr=1e-2, distance=0.4, tpr=0.9), MeasuredPoint(fmr=1e-3, distance=0.3, tpr=0.7)),
)


ANYTHING = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.integers()), st.none())
STATISTICS = CropStatistics(mean=(120.5, 110.25, 100.0), std=(50.0, 45.5, 40.0), crops=64)


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        dataclasses.replace(MANIFEST, engine=None, parity=None),
        dataclasses.replace(MANIFEST, thresholds=(THRESHOLDS,)),
        dataclasses.replace(MANIFEST, crop_statistics=STATISTICS),
    ],
)
def test_what_is_written_is_read(manifest):
    assert Manifest.from_json(manifest.to_json(), "x") == manifest


@given(
    kind=st.sampled_from((("uint8", "graph"), ("float32", "caller"), ("float32", "graph"))),
    layout=st.sampled_from(("NHWC", "NCHW")),
    colour=st.sampled_from(("rgb", "bgr")),
    images=st.integers(1, 3),
)
def test_each_pixel_stands_where_the_contract_has_it(kind, layout, colour, images):
    size = Preprocessing(height=4, width=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    crops = np.random.default_rng(images).integers(0, 256, (images, 4, 3, 3), dtype=np.uint8)
    dtype, by = kind
    contract = InputContract(dtype=dtype, layout=layout, colour=colour, normalised_by=by)
    fed = contract.feed(crops, size)
    assert (fed.dtype.name, fed.shape[1:], fed.flags.c_contiguous) == (dtype, contract.shape(size), True)
    for channel, (mean, std) in enumerate(zip(size.mean, size.std, strict=True)):
        at = 2 - channel if colour == "bgr" else channel
        plane = fed[..., at] if layout == "NHWC" else fed[:, at]
        expected = crops[..., channel] if by == "graph" else (crops[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(plane, expected, atol=1e-6)


def test_files_of_an_adopted_one_name_it_as_their_source():
    """The file itself cannot hold its own hash."""
    origin = OnnxOrigin(sha256="1" * 64, producer="pytorch 2.4.0", dataset="market1501", root="market")
    adopted = dataclasses.replace(MANIFEST, engine=None, adopted=origin)
    made_of_it = dataclasses.replace(adopted, checkpoint_sha256="a" * 64)
    assert (adopted.is_adopted_itself, made_of_it.is_adopted_itself, MANIFEST.is_adopted_itself) == (True, False, False)
    assert adopted.source_sha256("a" * 64) == made_of_it.source_sha256("b" * 64) == "a" * 64
    assert MANIFEST.source_sha256("b" * 64) == "1" * 64
    assert Manifest.from_json(adopted.to_json(), "x") == adopted


@given(ANYTHING)
def test_what_is_derived_is_ignored_when_it_is_read(value):
    values = json.loads(MANIFEST.to_json())
    for change in (lambda: values.update({FOR_CLIENTS: value}), lambda: values.pop(FOR_CLIENTS)):
        change()
        assert Manifest.from_json(json.dumps(values), "x") == MANIFEST


def test_a_manifest_of_another_format_is_refused_with_what_to_do():
    for form in ("pmm-manifest-2", 4, None):
        other = json.loads(MANIFEST.to_json()) | {"format": form}
        with refuses(InvalidFile, repr(form), path="x", expected=FORMAT, hint="export the file again"):
            Manifest.from_json(json.dumps(other), "x")


def test_impossible_manifests_are_one_line():
    for text in ("", "{", "[]", "3", "null", "{}", "[" * 100_000):
        with refuses(InvalidFile, "invalid manifest", path="x"):
            Manifest.from_json(text, "x")
    with refuses(InvalidFile, "pmm-manifest-1", path="x", expected=FORMAT):
        Manifest.from_json(MANIFEST.to_json().replace(FORMAT, "pmm-manifest-1"), "x")


def leaves(table, path=()):
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@given(st.sampled_from(list(leaves(json.loads(MANIFEST.to_json())))), ANYTHING)
def test_any_value_anywhere_is_kept_as_it_is_or_refused(path, value):
    values = json.loads(MANIFEST.to_json())
    table = values
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    text = json.dumps(values)
    try:
        manifest = Manifest.from_json(text, "x")
    except InvalidFile:
        return
    found, before = json.loads(manifest.to_json()), json.loads(text)
    assert found.pop(FOR_CLIENTS) == client_contract(manifest)  # not trusted, whatever it said
    del before[FOR_CLIENTS]
    assert found == before


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda v: v.pop("macs"), "no field macs"),
        (lambda v: v.update(extra=1), "unknown field extra; known: checkpoint_sha256, "),
        (lambda v: v["engine"].pop("gpu"), "no field engine.gpu"),
        (lambda v: v["engine"]["batch"]["profiles"][0].update(best=9, most=8), "batch is '1 9 8'"),
        (lambda v: v["input"].update(batch=0), "input.batch is 0; expected 1 to 4096"),
        (lambda v: v["input"].update(layout="NCWH"), "input.layout is 'NCWH'"),
        (lambda v: v["embedding"].update(dim=True), "embedding.dim is True; expected int"),
        (lambda v: v["preprocessing"].update(std=[1, 1]), "preprocessing.std"),
        (lambda v: v["preprocessing"].update(std=[1, 1, 0]), "preprocessing.std is (1.0, 1.0, 0.0)"),
        (lambda v: v["preprocessing"].update(mean=[1, 1, float("nan")]), "preprocessing.mean"),
        (lambda v: v["preprocessing"].update(interpolation="area"), "preprocessing.interpolation is 'area'"),
        (
            lambda v: v["preprocessing"].update(interpolation="bicubic", antialias=False),
            "interpolation bicubic needs antialias",
        ),
        (lambda v: v["preprocessing"].update(antialias=0), "preprocessing.antialias is 0; expected bool"),
        (lambda v: v["preprocessing"].update(padding=[0, 0, 256]), "preprocessing.padding is (0, 0, 256)"),
        (lambda v: v["preprocessing"].update(height=0), "preprocessing.height is 0; expected 1 or more"),
        (lambda v: v["versions"].update(torch=2), "versions.torch is 2; expected str"),
        (lambda v: v.update(precision="fp8"), "precision is 'fp8'; expected one of fp32, tf32"),
        (lambda v: v.update(precision_found="fp64"), "precision_found is 'fp64'"),
    ],
)
def test_the_field_that_is_wrong_is_named(change, fact):
    values = json.loads(MANIFEST.to_json())
    change(values)
    with refuses(InvalidFile, "invalid manifest", fact, path="x"):
        Manifest.from_json(json.dumps(values), "x")


def profiles(*sizes):
    return BatchProfiles(tuple(BatchProfile(least=a, best=b, most=c) for a, b, c in sizes))


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([(2, 3, 6)], {1: (0, 2), 2: (0, 2), 6: (0, 6)}),
        ([(1, 1, 1), (1, 8, 16), (16, 64, 64)], {1: (0, 1), 2: (1, 2), 16: (1, 16), 17: (2, 17), 64: (2, 64)}),
        ([(1, 1, 1), (8, 8, 8)], {1: (0, 1), 2: (1, 8), 8: (1, 8)}),
        ([(1, 2, 32), (1, 32, 64)], {1: (0, 1), 7: (0, 7), 9: (1, 9), 33: (1, 33)}),
    ],
)
def test_images_run_in_the_profile_that_is_nearest(sizes, runs):
    batch = profiles(*sizes)
    assert {count: batch.runs_as(count) for count in runs} == runs
    assert (batch.least, batch.most) == (sizes[0][0], sizes[-1][2])
    with pytest.raises(ValueError, match=str(batch.most)):
        batch.runs_as(batch.most + 1)


@pytest.mark.parametrize(
    "sizes", [[(1, 8, 64), (1, 8, 64)], [(1, 8, 64), (1, 1, 1)], [(2, 4, 8), (1, 8, 16)], [(1, 8, 64), (1, 9, 32)]]
)
def test_profiles_that_overlap_in_nonsense(sizes):
    before, after = (" ".join(map(str, size)) for size in sizes)
    with refuses(ConflictingOptions, f"batch {after} after batch {before}", options=("batch",)):
        profiles(*sizes)


def test_batches_that_cannot_be():
    with refuses(InvalidValue, "a batch profile", name="batch"):
        profiles()
    for size in ((0, 1, 1), (2, 1, 4), (1, 8, 4), (1, 8, 4097)):
        with refuses(InvalidValue, "4096", name="batch", value=" ".join(map(str, size))):
            profiles(size)
    for batch in (0, 4097):
        with refuses(InvalidValue, "1 to 4096", name="batch", value=batch):
            InputContract.of("uint8", "rgb", batch)
    InputContract().check_batch(7, "a.onnx")
    with refuses(InvalidInput, "7 images", "static batch is 4", path="a.onnx", hint="give 4"):
        InputContract.of("uint8", "rgb", 4).check_batch(7, "a.onnx")


def test_a_manifest_without_thresholds_says_nothing_of_them():
    """Nor of statistics that were not measured."""
    assert not {"thresholds", "crop_statistics"} & json.loads(MANIFEST.to_json()).keys()
    measured = dataclasses.replace(MANIFEST, thresholds=(THRESHOLDS,))
    measured.check_copy(MANIFEST, "x")  # the copy inside the file has none
    assert measured.thresholds[0].at(0.001).distance == 0.3
    assert measured.thresholds[0].at(1e-4) is None


@pytest.mark.parametrize(("field", "value"), [("fmr", 1.5), ("tpr", -0.1), ("distance", -1.0), ("distance", 1e400)])
def test_thresholds_that_cannot_be_are_refused(field, value):
    values = json.loads(dataclasses.replace(MANIFEST, thresholds=(THRESHOLDS,)).to_json())
    values["thresholds"][0]["points"][0][field] = value
    with refuses(InvalidFile, "invalid manifest", field, path="x"):
        Manifest.from_json(json.dumps(values), "x")
