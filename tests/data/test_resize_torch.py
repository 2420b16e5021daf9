"""torch enlarges as PIL does, to the bit: for every pair of neighbours, and for noise of any size."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmm.data import resize_torch
from pmm.data.crops import load_crop
from pmm.data.resize_torch import FACTORS, PROVED, can_enlarge, enlarge
from tests.conftest import ROOT, examples

FAST = torch.backends.cpu.get_cpu_capability() in PROVED
needs_fast = pytest.mark.skipif(not FAST, reason=f"torch has none of {PROVED} here, and PIL resizes everything")


def by_pil(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


@needs_fast
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_pair_of_neighbours(factor, count):
    """A row of `count` pixels for each pair of values: all that lies between two pixels, and at the borders."""
    first, second = np.meshgrid(*2 * [np.arange(256, dtype=np.uint8)])
    columns = [(first if place % 2 else second).ravel() for place in range(count)]
    rows = np.repeat(np.stack(columns, 1)[..., None], 3, 2)
    assert np.array_equal(enlarge(rows, len(rows), factor * count), by_pil(rows, len(rows), factor * count))
    rows = np.ascontiguousarray(rows.swapaxes(0, 1))
    assert np.array_equal(enlarge(rows, factor * count, 256**2), by_pil(rows, factor * count, 256**2))


@needs_fast
@examples(300)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    factors=st.tuples(st.sampled_from(FACTORS), st.sampled_from(FACTORS)),
    levels=st.sampled_from([2, 3, 256]),
    seed=st.integers(0, 2**32),
)
def test_noise_of_any_size(size, factors, levels, seed):
    values = np.linspace(0, 255, levels).astype(np.uint8)
    pixels = np.random.default_rng(seed).choice(values, (*size, 3))
    height, width = size[0] * factors[0], size[1] * factors[1]
    found = enlarge(pixels, height, width)
    assert np.array_equal(found, by_pil(pixels, height, width))
    assert size == (height, width) or found.flags.c_contiguous  # planes would take longer to copy than to make


def test_only_what_is_proved_is_left_to_torch(monkeypatch):
    assert can_enlarge((64, 128), (128, 384)) == FAST
    assert can_enlarge((64, 128), (256, 128)) == FAST
    for target in ((128, 383), (127, 384), (320, 384), (32, 128), (64, 64), (96, 128)):
        assert not can_enlarge((64, 128), target)
    zeros = lambda pixels, height, width: np.zeros((height, width, 3), np.uint8)  # noqa: E731
    for place, name, other in (
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (resize_torch, "enlarge", zeros),
    ):
        resize_torch._equals_pil.cache_clear()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, other)
                assert not can_enlarge((64, 128), (128, 384))
        finally:
            resize_torch._equals_pil.cache_clear()


def test_most_other_factors_differ():
    """Why there are FACTORS at all. If torch has learnt better, they may go."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not np.array_equal(enlarge(pixels, 100, 100), by_pil(pixels, 100, 100))


SCRIPT = """
import sys
if sys.argv[2] == "without":
    sys.modules["torch"] = None
elif sys.argv[2] == "loaded":
    import torch
import numpy as np
from PIL import Image
from pmm.data import resize_torch
from pmm.data.crops import load_crop
expected = Image.open(sys.argv[1]).resize((30, 24), Image.Resampling.BILINEAR)
assert np.array_equal(load_crop(sys.argv[1], 24, 30), np.asarray(expected))
print("torch" in sys.modules, resize_torch.can_enlarge((10, 8), (30, 24)))
"""


@pytest.mark.parametrize(
    ("torch_is", "capability", "expected"),
    [
        ("without", "", "True False"),
        ("unused", "", "False False"),
        pytest.param("loaded", "default", "True False", marks=pytest.mark.slow),
        *[pytest.param("loaded", "avx2", "True True", marks=pytest.mark.slow)] * FAST,
    ],
)
def test_a_crop_is_the_same_with_and_without_torch(tmp_path, torch_is, capability, expected):
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability} if capability else dict(os.environ)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.png"), torch_is]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == expected, done.stderr


@needs_fast
def test_crops_are_enlarged_by_torch(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    asked = []
    monkeypatch.setattr(resize_torch, "enlarge", lambda *given: asked.append(given[1:]) or enlarge(*given))
    load_crop(tmp_path / "a.png", 24, 30)
    assert asked[-1] == (24, 30)
