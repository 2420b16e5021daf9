"""A client that reads nothing but the table makes our embeddings: written here with PIL and numpy."""

import dataclasses
import json
import math
from functools import partial

import cv2
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.manifest import FOR_CLIENTS, EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import embed_manifest, read_onnx
from pmm.artifacts.resize_calls import RESIZE_CALLS
from pmm.data.crop_statistics import CropStatistics
from pmm.data.crops import load_crops
from pmm.data.preprocessing import RESIZES, Preprocessing
from pmm.export.options import ExportOptions
from pmm.runtime.open import open_runner
from pmm.utils.files import sha256
from tests.artifacts.test_manifest import MANIFEST, THRESHOLDS

FILTERS = {
    "bilinear": lambda t: np.clip(1 - t, 0, None),
    "bicubic": lambda t: np.where(
        t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0)
    ),
    "lanczos": lambda t: np.where(t < 3, np.sinc(t) * np.sinc(t / 3), 0),
}


def weights(before, after, table):
    """[after, before], as `definition` says."""
    i, x = np.arange(after)[:, None], np.arange(before)[None]
    if not table["antialias"]:
        place = np.clip((i + 0.5) * before / after - 0.5, 0, before - 1)
        return np.clip(1 - np.abs(x - place), 0, None)
    found = FILTERS[table["interpolation"]](np.abs(x + 0.5 - (i + 0.5) * before / after) / max(1, before / after))
    return found / found.sum(1, keepdims=True)


def by_definition(pixels, height, width, table, *, columns_first=False):
    if columns_first:
        return by_definition(pixels.swapaxes(0, 1), width, height, table).swapaxes(0, 1)
    whole = (lambda levels: np.rint(np.clip(levels, 0, 255))) if table["antialias"] else (lambda levels: levels)
    rows = whole(np.einsum("ix,yxc->yic", weights(pixels.shape[1], width, table), pixels.astype(float)))
    columns = np.einsum("iy,yxc->ixc", weights(pixels.shape[0], height, table), rows)
    return np.rint(np.clip(columns, 0, 255)).astype(np.uint8)


def by_library(pixels, height, width, table):
    if table["as"] == "OpenCV's bilinear":
        return cv2.resize(pixels, (width, height))
    filters = {"PIL's bilinear": Image.Resampling.BILINEAR}
    return np.asarray(Image.fromarray(pixels).resize((width, height), filters[table["as"]]))


def prepared(path, contract, resized):
    """One image as the file takes it, by the table `contract` alone."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    fit, resize, images = contract["fit"], contract["resize"], contract["input"]
    h, w, (height, width) = *pixels.shape[:2], (resize["height"], resize["width"])
    if fit["mode"] == "letterbox":
        tall = h * width > w * height
        inner = (height, max(1, round(w * height / h))) if tall else (max(1, round(h * width / w)), width)
        crop = np.full((height, width, 3), fit["padding_rgb"], np.uint8)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        crop[top : top + inner[0], left : left + inner[1]] = resized(pixels, *inner, resize)
    else:
        crop = resized(pixels, height, width, resize)
    if images["colour"] == "bgr":
        crop = crop[..., ::-1]
    values = crop.astype(np.float32)
    if images["formula"] == "(pixel / 255 - mean) / std":
        values = (values / 255 - np.float32(images["mean"])) / np.float32(images["std"])
        same = crop * np.float32(images["multiply"]) + np.float32(images["add"])
        np.testing.assert_allclose(values, same, rtol=1e-5, atol=1e-4)
    else:
        assert images["formula"] == "none: the file normalises"
    values = values.transpose(2, 0, 1) if images["layout"] == "NCHW" else values
    assert list(values.shape) == images["shape"][1:]
    return values.astype(images["type"])


def contract_of(**changes):
    return json.loads(dataclasses.replace(MANIFEST, engine=None, **changes).to_json())[FOR_CLIENTS]


BGR = {"input": "float", "input_colour": "bgr", "flip_tta": True, "normalize": True}
sides = st.integers(1, 40)


@given(
    before=st.tuples(sides, sides),
    after=st.tuples(sides, sides),
    how=st.sampled_from(sorted(RESIZES)),
    padding=st.none() | st.tuples(*[st.integers(0, 255)] * 3),
    dtype=st.sampled_from(("uint8", "float32")),
    layout=st.sampled_from(("NHWC", "NCHW")),
    colour=st.sampled_from(("rgb", "bgr")),
    by=st.sampled_from(("graph", "caller")),
    orientation=st.integers(1, 8),
)
def test_the_table_alone_says_what_to_feed(
    tmp_path_factory, before, after, how, padding, dtype, layout, colour, by, orientation
):
    """As other arithmetic may round, in one of Pillow's two orders."""
    size = Preprocessing(
        height=after[0], width=after[1], interpolation=how[0], antialias=how[1], padding=padding,
        mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7),
    )  # fmt: skip
    contract = InputContract(dtype=dtype, layout=layout, colour=colour, normalised_by=by)
    path = tmp_path_factory.mktemp("image") / "image.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(before).integers(0, 256, (*before, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    expected = contract.feed(load_crops([path], size), size)[0]
    both = [
        prepared(path, contract_of(preprocessing=size, input=contract), resized)
        for resized in (by_definition, partial(by_definition, columns_first=True))
    ]
    assert all((found.dtype, found.shape) == (expected.dtype, expected.shape) for found in both)
    level = 1 / (255 * 0.5) if dtype == "float32" and by == "caller" else 1
    # of bicubic and Lanczos the sizes of the weights add up to more than 1: one level in the first step is two at last
    level *= 1 if how[0] == "bilinear" else 2
    assert min(np.abs(found.astype(float) - expected.astype(float)).max() for found in both) <= 1.01 * level


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {}),
        ({}, {"padding": (124, 116, 104), "antialias": False}),
        (BGR, {"padding": (124, 116, 104)}),
    ],
    ids=["uint8", "uint8-letterbox-opencv", "float-bgr-letterbox"],
)
def test_embeddings_are_ours(shared, people, tmp_path, options, change):
    file, out = read_onnx(shared.onnx(ExportOptions(**options))), tmp_path / "model.onnx"
    preprocessing = dataclasses.replace(file.manifest.preprocessing, **change)
    manifest = dataclasses.replace(file.manifest, preprocessing=preprocessing, sha256="", parity=None)
    del file.proto.metadata_props[:]
    embed_manifest(file.proto, manifest)
    out.write_bytes(file.proto.SerializeToString())
    manifest_path(out).write_text(dataclasses.replace(manifest, sha256=sha256(out)).to_json())
    paths = []
    for number, path in enumerate(sorted((people / "query").glob("*.jpg"))[:6]):
        paths.append(tmp_path / f"{number}.png")
        Image.open(path).resize((41 + 30 * number, 150 - 20 * number)).save(paths[-1])
    with open_runner(out) as runner:
        expected = runner(load_crops(paths, runner.preprocessing))

    contract = json.loads(manifest_path(out).read_text())[FOR_CLIENTS]
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    images = np.stack([prepared(path, contract, by_library) for path in paths])
    (found,) = session.run([contract["output"]["name"]], {contract["input"]["name"]: images})
    assert found.shape[1:] == tuple(contract["output"]["shape"][1:])
    assert contract["output"]["norm_is_1"] == bool(options.get("normalize"))
    if contract["output"]["norm_is_1"]:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    if change:  # which the graph does not show
        plain = contract | {"fit": {"mode": "stretch"}, "resize": contract["resize"] | {"as": "PIL's bilinear"}}
        images = np.stack([prepared(path, plain, by_library) for path in paths])
        (wrong,) = session.run(None, {contract["input"]["name"]: images})
        assert np.abs(wrong - expected).max() > 100 * np.abs(found - expected).max()


def test_a_distance_is_the_one_that_its_formula_gives():
    a, b = np.random.default_rng(0).normal(size=(2, 8))
    for metric, normalised, expected in (
        ("euclidean", False, np.linalg.norm(a - b)),
        ("cosine", False, 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        ("cosine", True, 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
    ):
        pair = [each / np.linalg.norm(each) if normalised else each for each in (a, b)]
        compare = contract_of(embedding=EmbeddingContract(dim=8, metric=metric, normalised=normalised))["compare"]
        formula = compare["distance"].replace("^", "**")
        assert eval(formula, {"a": pair[0], "b": pair[1], "sum": np.sum, "sqrt": math.sqrt}) == pytest.approx(expected)
        assert (compare["metric"], compare["nearer"]) == (metric, "the lower distance")


def test_what_was_not_measured_is_not_said():
    assert "training_crops" not in contract_of()
    assert "one_person_where" not in contract_of()["compare"]
    statistics = CropStatistics(mean=(100.0, 90.0, 80.0), std=(50.0, 40.0, 30.0), crops=7)
    found = contract_of(crop_statistics=statistics, thresholds=(THRESHOLDS,))
    assert found["training_crops"]["mean_rgb"] == [100.0, 90.0, 80.0]
    assert [point["distance_at_most"] for point in found["compare"]["one_person_where"]] == [0.4, 0.3]


def test_numbers_of_images_are_those_that_the_file_takes():
    def images(**changes):
        return client_contract(dataclasses.replace(MANIFEST, **changes))["input"]["images_per_run"]

    assert images() == {"least": 1, "most": 16}  # of the engine's profile
    assert images(engine=None) == {"least": 1, "most": None}
    assert images(engine=None, input=InputContract(batch=4)) == {"least": 4, "most": 4}


def test_every_resize_of_a_contract_has_calls_of_which_the_first_is_exact():
    assert set(RESIZE_CALLS) == set(RESIZES.values())
    for calls in RESIZE_CALLS.values():
        assert (calls[0].shrunk, calls[0].enlarged) == ((0.0, 0.0), (0.0, 0.0))
        assert len({(call.library, call.call) for call in calls}) == len(calls)
