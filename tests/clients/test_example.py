"""The example in Python, which the tests of foreign programs run in their environments, here in ours."""

import runpy
import sys

import pytest

from pmm.selftest.run import judge_embeddings, open_selftest, write_images
from tests.clients.readers import EXAMPLES


def test_the_example_passes_the_selftest(exported, tmp_path, monkeypatch):
    images = write_images(open_selftest(exported), tmp_path / "crops")
    out = tmp_path / "theirs.csv"
    monkeypatch.setattr(sys, "argv", ["client.py", "onnxruntime", str(exported), str(out), *map(str, images)])
    runpy.run_path(str(EXAMPLES / "client.py"), run_name="__main__")
    assert judge_embeddings(exported, out).passed


@pytest.mark.parametrize(("key", "value"), [("padding", [0, 0, 0]), ("antialias", False), ("interpolation", "bicubic")])
def test_the_example_says_that_it_does_not_know_a_resize(tmp_path, key, value):
    known = {"interpolation": "bilinear", "antialias": True, "padding": None, "height": 8, "width": 4}
    read_crop = runpy.run_path(str(EXAMPLES / "client.py"))["read_crop"]
    with pytest.raises(SystemExit, match="this example"):
        read_crop(tmp_path / "none.png", {"preprocessing": {**known, key: value}, "input": {}})
