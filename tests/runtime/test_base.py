"""What holds for every runner: which images it takes, and that it is refused once it was closed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.crops import load_crops
from pmm.data.frames import crop_boxes
from pmm.data.preprocessing import Preprocessing
from pmm.runtime.base import BoundRun, Runner, RunnerInfo
from pmm.runtime.gpu_array import GpuArray
from pmm.runtime.open import open_runner
from pmm.utils.errors import InvalidInput, UserError
from tests.conftest import examples
from tests.refusals import refuses

SIZE = Preprocessing(height=8, width=4, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))


class Echo(Runner):
    """The images themselves as embeddings; remembers what it was given."""

    info = RunnerInfo(backend="echo", device="cpu", precision="fp32", provider="")
    preprocessing, embedding = SIZE, EmbeddingContract(dim=96)
    seen = None

    def _embed(self, images):
        self.seen = images
        return images.reshape(len(images), 96).astype(np.float32)

    def _bind(self, images):
        return BoundRun(lambda: None)


@pytest.fixture(params=["torch", "ort-cpu", "openvino"])
def runner(request, trained, exported):
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
    with open_runner(trained if request.param == "torch" else exported, request.param, device="cpu") as runner:
        yield runner


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_crops_of_the_models_size_are_passed_on_as_they_are():
    runner = Echo()
    for images in (noise((2, 8, 4, 3)), noise((4, 8, 4, 3))[::2], noise((0, 8, 4, 3))):
        assert runner(images).shape == (len(images), 96)
        assert runner.seen is images


def test_the_pixels_of_files_give_the_embeddings_of_files(runner, tmp_path):
    frame = noise((200, 300, 3))
    boxes = [[10, 20, 60, 140], [5, 0, 69, 128], [200, 100, 240, 190], [1, 1, 2, 2], [100, 30, 164, 158]] * 2
    crops = crop_boxes(frame, boxes, colour="bgr")
    crops[3], crops[4] = crops[3][..., 0], np.dstack([crops[4], noise(crops[4].shape[:2])])
    for number, crop in enumerate(crops):
        Image.fromarray(crop).save(tmp_path / f"{number}.png")
    files = load_crops([tmp_path / f"{number}.png" for number in range(len(crops))], runner.preprocessing)
    expected = runner(files)
    assert np.array_equal(runner(crops), expected)
    assert np.array_equal(runner(tuple(crops)), expected)
    assert np.array_equal(runner(load_crops(crops, 128, 64)), expected)
    assert len(np.unique(expected.round(4), axis=0)) == 6  # alpha changes nothing, grey does


@examples(60)
@given(shapes=st.lists(st.tuples(*2 * [st.integers(1, 40)], st.sampled_from([1, 3, 4])), min_size=1, max_size=9))
def test_crops_of_any_size_are_what_load_crops_makes_of_them(shapes):
    crops = [np.asfortranarray(noise(shape, seed)) for seed, shape in enumerate(shapes)]
    runner = Echo()
    assert np.array_equal(runner(crops), load_crops(crops, SIZE).reshape(len(crops), -1))
    assert runner.seen.flags.c_contiguous


@pytest.mark.parametrize(
    ("crops", "index", "facts"),
    [
        ([], None, ["no crops"]),
        ((), None, ["no crops"]),
        ([noise((5, 5, 3)), "a.jpg"], 1, ["path", "pmm.load_crops"]),
        ([noise((5, 5, 3)), noise((5, 5, 2))], 1, ["[5, 5, 2]"]),
        ([noise((5, 5, 3)), noise((5, 5, 3)), noise((5, 0, 3))], 2, ["no pixels"]),
        ([np.zeros((5, 5, 3), np.float32)], 0, ["float32", "float_range"]),
        ([None], 0, ["None"]),
        (noise((2, 8, 4, 3)).tolist(), 0, ["int64"]),
        (None, None, ["NoneType", "[B, 8, 4, 3]"]),
        ("a.jpg", None, ["str", "pmm.load_crops"]),
        (noise((8, 4, 3)), None, ["[8, 4, 3]", "[B, 8, 4, 3]", "a list"]),
        (noise((2, 4, 8, 3)), None, ["[2, 4, 8, 3]", "a list"]),
        (np.zeros((2, 8, 4, 3), np.float32), None, ["float32", "uint8"]),
    ],
)
def test_other_images_are_refused(crops, index, facts):
    runner = Echo()
    with refuses(InvalidInput, *facts, index=index):
        runner(crops)
    assert runner.seen is None


def test_arrays_on_a_gpu_are_refused_where_they_cannot_be_used():
    images, runner = GpuArray(0, (1, 8, 4, 3), np.dtype(np.uint8), 0, None), Echo()
    for use in (runner, runner.check, runner.bind):
        with refuses(InvalidInput, "GPU", "host memory", hint="copy them"):
            use(images)
    runner.accepts_gpu_arrays = True
    runner.check(images)
    with refuses(InvalidInput, "GPU", "bind", hint="copy them"):
        runner.bind(images)


def test_one_file_of_any_size_is_one_line(runner, tmp_path):
    Image.fromarray(noise((90, 40, 3))).save(tmp_path / "file.jpg")
    expected = runner(load_crops(tmp_path / "file.jpg", runner.preprocessing))
    assert np.array_equal(runner(load_crops(tmp_path / "file.jpg")), expected)


def test_every_use_of_a_closed_runner_is_refused(runner):
    size = runner.preprocessing
    images = np.zeros((1, size.height, size.width, 3), np.uint8)
    bound = runner.bind(images)
    bound()
    uses = [lambda: runner(images), lambda: runner([images[0]]), lambda: runner.bind(images)]
    uses += [lambda: bound(), lambda: bound.enqueue(), lambda: bound.wait(), lambda: bound.device_ms()]
    for use in uses:
        use()
    runner.close()
    runner.close()
    for use in uses:
        with refuses(UserError, "closed", path=runner._path, hint="open it again"):
            use()
    assert runner._path.is_file()


def test_no_images_cannot_be_bound_and_no_gpu_keeps_embeddings():
    runner = Echo()
    with refuses(InvalidInput, "0 images", "1 or more"):
        runner.bind(noise((0, 8, 4, 3)))
    with refuses(UserError, "echo", "GPU"):
        runner.embed_on_gpu(noise((1, 8, 4, 3)))
