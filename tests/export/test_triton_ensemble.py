"""Image files in, embeddings out: the models beside an exported one that let Triton take JPEG files."""

import ast
import dataclasses
import io
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmm.artifacts.manifest import InputContract
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Preprocessing
from pmm.export import triton_preprocess
from pmm.export.triton import write_model_repository
from pmm.export.triton_config import Serving
from pmm.runtime.open import open_runner
from pmm.utils.errors import CannotWrite, ConflictingOptions
from tests.conftest import examples, run_here
from tests.export.test_triton import MEAN, STD, make_engine, make_manifest, make_onnx, tree, write_manifest
from tests.refusals import refuses

server = pytest.importorskip("tests.export.triton_server", reason="tritonclient is not installed")
ORIENTATION = 0x0112
SIZE = {"height": 12, "width": 6, "mean": MEAN, "std": STD}
CONTRACTS = {
    "bytes": ("uint8", "rgb", Preprocessing(**SIZE)),
    "floats, BGR": ("float", "bgr", Preprocessing(**SIZE)),
    "255": ("float255", "rgb", Preprocessing(**SIZE, interpolation="bicubic")),
    "Lanczos, padded": ("uint8", "rgb", Preprocessing(**SIZE, interpolation="lanczos", padding=(124, 0, 7))),
    "OpenCV's": ("float", "rgb", Preprocessing(**SIZE, antialias=False)),
    "OpenCV's, padded": ("uint8", "bgr", Preprocessing(**SIZE, antialias=False, padding=(0, 0, 0))),
}


def drawn(height=30, width=17, mode="RGB", seed=0):
    """A smooth picture with an edge, so that a wrong resize and a wrong side up are seen."""
    rows, columns = np.mgrid[0:height, 0:width]
    shift = np.random.default_rng(seed).integers(0, 99, 3)
    planes = [(rows * 5 + columns * (9 - 3 * c) + shift[c] + 80 * (columns > width // 2)) % 256 for c in range(3)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", orientation=1, **options):
    out, exif = io.BytesIO(), Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(out, kind, **options)
    return out.getvalue()


def deep():
    return Image.fromarray((np.arange(40 * 20).reshape(40, 20) * 80).astype(np.uint16))


KINDS = {
    "baseline": encoded(drawn()),
    "progressive": encoded(drawn(), progressive=True, quality=60),
    "4:4:4": encoded(drawn(), subsampling=0),
    "grey": encoded(drawn(mode="L")),
    "CMYK": encoded(drawn(mode="CMYK")),
    "of the size": encoded(drawn(12, 6)),
    "tall": encoded(drawn(90, 8)),
    "wide": encoded(drawn(7, 70)),
    "tiny": encoded(drawn(1, 1)),
    "alpha": encoded(drawn(mode="RGBA"), "PNG"),
    "palette": encoded(drawn(mode="P"), "PNG"),
    "16-bit grey": encoded(deep(), "PNG"),
    "WebP": encoded(drawn(), "WEBP", lossless=True),
    **{f"turned, {k}": encoded(drawn(seed=k), orientation=k) for k in range(2, 9)},
}
BROKEN = {
    "empty": (b"", "it is empty"),
    "text": (b"no image", "cannot identify"),
    "cut": (encoded(drawn(200, 100))[:-900], "truncated"),
    "floats": (encoded(drawn(mode="F"), "TIFF"), "no known range"),
}


def served(source, tmp_path, **options):
    """The repository of `source` with an ensemble."""
    write_model_repository([source], tmp_path / "models", name="m", image_files=True, **options)
    return tmp_path / "models"


@pytest.fixture(params=CONTRACTS)
def contract(request, tmp_path):
    kind, colour, size = CONTRACTS[request.param]
    source = make_onnx(tmp_path / "a.onnx", kind, input=InputContract.of(kind, colour), preprocessing=size)
    return source, kind, colour, size


def test_crops_are_ours_to_the_last_grey_level(contract, tmp_path):
    source, kind, colour, size = contract
    paths = []
    for number, content in enumerate(KINDS.values()):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(content)
    expected = InputContract.of(kind, colour).feed(load_crops(paths, size), size)
    with server.Server(served(source, tmp_path)) as running:
        [answer] = running.infer("m-preprocess", [{"files": server.files(*KINDS.values())}])
    assert np.array_equal(answer["images"], expected)


@examples(60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.sampled_from(sorted(CONTRACTS)))
def test_images_of_any_size_are_prepared_as_ours(tmp_path_factory, height, width, orientation, name):
    _, _, size = CONTRACTS[name]
    content = encoded(drawn(height, width), orientation=orientation)
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    path.write_bytes(content)
    model = triton_preprocess.TritonPythonModel()
    model._how = {each: getattr(size, each) for each in ("height", "width", "interpolation", "antialias", "padding")}
    model._opencv = None if size.antialias else sys.modules["pmm.data.resize_opencv"]
    assert np.array_equal(model._crop(content), load_crops([path], size)[0])


def test_embeddings_are_ours(shared, people, tmp_path):
    """Of a trained network, on the data set's own files."""
    source = shared.onnx()
    paths = sorted((people / "query").iterdir())[:6]
    with open_runner(source) as runner:
        ours = runner(load_crops(paths, runner.preprocessing))
    with server.Server(served(source, tmp_path)) as running:
        [answer] = running.infer("m-jpeg", [{"files": server.files(*(path.read_bytes() for path in paths))}])
    assert np.allclose(answer["embeddings"], ours, atol=1e-5)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_bad_image_fails_its_own_request_alone(tmp_path, fault):
    content, reason = BROKEN[fault]
    good = KINDS["baseline"]
    with server.Server(served(make_onnx(tmp_path / "a.onnx"), tmp_path)) as running:
        asked = [(good,), (good, content, good, content), (KINDS["grey"], good)]
        first, bad, last = running.infer("m-jpeg", [{"files": server.files(*each)} for each in asked])
        [alone] = running.infer("m-jpeg", [{"files": server.files(good)}])
    assert bad.code() == server.TritonError.INVALID_ARG
    assert "2 of 4 images" in bad.message()
    assert reason in bad.message()
    assert "files[1]" in bad.message()
    assert "files[3]" in bad.message()
    assert "files[0]" not in bad.message()
    assert first["embeddings"].shape == (1, 5)
    assert np.array_equal(last["embeddings"][1], alone["embeddings"][0])


@examples(60)
@given(st.lists(st.lists(st.sampled_from([*KINDS, *BROKEN]), min_size=1, max_size=4), min_size=1, max_size=5))
def test_requests_that_come_together_have_the_answers_of_their_own(running, asked):
    contents = {**KINDS, **{name: content for name, (content, _) in BROKEN.items()}}
    answers = running.infer("m-preprocess", [{"files": server.files(*map(contents.get, names))} for names in asked])
    for names, answer in zip(asked, answers, strict=True):
        bad = [row for row, name in enumerate(names) if name in BROKEN]
        if bad:
            assert [row for row in range(len(names)) if f"files[{row}] " in answer.message()] == bad
        else:
            [alone] = running.infer("m-preprocess", [{"files": server.files(*map(contents.get, names))}])
            assert np.array_equal(answer["images"], alone["images"])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    home = tmp_path_factory.mktemp("running")
    with server.Server(served(make_onnx(home / "a.onnx"), home)) as made:
        yield made


def test_the_model_needs_numpy_and_pillow_alone(tmp_path):
    repository = served(make_onnx(tmp_path / "a.onnx", preprocessing=Preprocessing(**SIZE, antialias=False)), tmp_path)
    codes = sorted((repository / "m-preprocess" / "1").iterdir())
    assert [code.name for code in codes] == ["model.py", "resize_opencv.py"]
    for code in codes:
        found = set()
        for node in ast.parse(code.read_text()).body:  # what is under TYPE_CHECKING is not run
            if isinstance(node, ast.Import):
                found |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
        assert found - set(sys.stdlib_module_names) <= {"numpy", "PIL"}


@pytest.mark.parametrize("make", [make_onnx, make_engine])
def test_the_command_and_what_it_says(tmp_path, make):
    source = make(tmp_path / ("best.onnx" if make is make_onnx else "best.plan"))
    done = run_here("export/to_triton.py", source, "--repo", tmp_path / "models", "--input", "jpeg", "--max-batch", "6")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["best", "best-jpeg", "best-preprocess"]
    for fact in ("best-jpeg: ", "input files BYTES [batch, 1]", "output embeddings float32", "--shm-size"):
        assert fact in done.stdout
    assert "Pillow" in done.stderr
    checked = server.Server(tmp_path / "models")
    preprocess, ensemble = checked.configs["best-preprocess"], checked.configs["best-jpeg"]
    assert preprocess.HasField("dynamic_batching")
    assert {each.max_batch_size for each in checked.configs.values()} == {6}
    assert not ensemble.backend
    assert not ensemble.HasField("dynamic_batching")  # its steps have it
    assert ensemble.parameters["pmm_metric"].string_value == "euclidean"
    assert not list((tmp_path / "models" / "best-jpeg" / "1").iterdir())


def test_an_older_ensemble_is_replaced_or_refused(tmp_path):
    source = make_onnx(tmp_path / "a.onnx")
    repository = served(source, tmp_path)
    before = tree(repository)
    with refuses(CannotWrite, path=repository / "m-jpeg", hint="--input jpeg"):
        write_model_repository([source], repository, name="m", overwrite=True)
    with refuses(CannotWrite, "exists"):
        served(source, tmp_path)
    assert tree(repository) == before
    served(make_onnx(tmp_path / "b.onnx", preprocessing=Preprocessing(**SIZE)), tmp_path, overwrite=True)
    checked = server.Server(repository)
    assert server.parameters(checked.configs["m-preprocess"])["height"] == 12


@pytest.mark.parametrize("due", range(1, 7))
def test_a_failure_leaves_all_three_as_they_were(tmp_path, monkeypatch, due):
    source = make_onnx(tmp_path / "a.onnx")
    repository = served(source, tmp_path)
    before, calls, real = tree(repository), [], type(repository).rename

    def failing(self, target):
        calls.append(target)
        if len(calls) == due:
            raise OSError(5, "Input/output error")
        return real(self, target)

    other = make_onnx(tmp_path / "b.onnx", preprocessing=Preprocessing(**SIZE))
    monkeypatch.setattr(type(repository), "rename", failing)
    with refuses(CannotWrite, "Input/output error"):
        served(other, tmp_path, overwrite=True)
    monkeypatch.undo()
    assert tree(repository) == before
    assert not list(tmp_path.glob(".m.*"))


def test_a_model_with_the_name_of_a_part_is_refused(tmp_path):
    sources = [make_onnx(tmp_path / "a.onnx"), make_onnx(tmp_path / "a-jpeg.onnx")]
    with refuses(ConflictingOptions, "a-jpeg", hint="--name"):
        write_model_repository(sources, tmp_path / "models", image_files=True)
    assert not (tmp_path / "models").exists()


def test_names_of_the_network_do_not_meet_those_of_the_ensemble(tmp_path):
    """An adopted file may call its tensors as it likes."""
    source = make_onnx(tmp_path / "a.onnx", beside=False)
    proto = onnx.load(source)
    for node in proto.graph.node:
        node.input[:] = ["files" if name == "images" else name for name in node.input]
        node.output[:] = ["crops" if name == "embeddings" else name for name in node.output]
    proto.graph.input[0].name, proto.graph.output[0].name = "files", "crops"
    onnx.save(proto, source)
    manifest = make_manifest()
    renamed = {
        "input": dataclasses.replace(manifest.input, name="files"),
        "embedding": dataclasses.replace(manifest.embedding, name="crops"),
    }
    write_manifest(source, dataclasses.replace(manifest, **renamed))
    repository = served(source, tmp_path, serving=Serving(max_batch=4))
    with server.Server(repository) as running:
        [answer] = running.infer("m-jpeg", [{"files": server.files(KINDS["grey"])}])
    assert answer["embeddings"].shape == (1, 5)
