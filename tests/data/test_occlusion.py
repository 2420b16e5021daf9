"""The windows over a crop, the table of what they cost, and the draw by it."""

import dataclasses
import itertools
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.loader import train_batches
from pmm.data.occlusion import (
    FORMAT,
    Occluder,
    OcclusionTable,
    TableFacts,
    Windows,
    blurred,
    check_table,
    image_names,
    inverted,
    read_table,
    write_table,
)
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import Sample
from pmm.presets import preset, with_method
from pmm.utils.errors import InvalidFile, InvalidValue
from tests.refusals import refuses

RECIPE = preset("tiny", "aos").recipe
WINDOWS = Windows(height=128, width=64, step=10)
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def table_of(images=("a.jpg", "b.jpg"), windows=WINDOWS, seed=0, **facts):
    rng = np.random.default_rng(seed)
    shape = len(images), 2, len(windows.tops), len(windows.lefts)
    return OcclusionTable(
        facts=TableFacts(format=FORMAT, checkpoint="12ab", windows=windows, images=tuple(images), **facts),
        whole=-rng.exponential(0.1, shape[:2]).astype(np.float32),
        behind=-rng.exponential(0.5, shape).astype(np.float32),
    )


def occluder_of(table, **recipe):
    return Occluder(table.windows, table, table.facts.images, dataclasses.replace(RECIPE, **recipe))


def chi_square(counts, weights):
    """In standard deviations above what is expected of draws by these weights."""
    expected = counts.sum() * weights / weights.sum()
    assert not counts[expected == 0].any()
    free = np.count_nonzero(expected) - 1
    found = ((counts - expected) ** 2)[expected > 0] / expected[expected > 0]
    return (found.sum() - free) / np.sqrt(2 * free)


def test_the_grid_of_the_authors():
    windows = Windows(height=256, width=128, step=10)
    assert (windows.side, len(windows.tops), len(windows.lefts), len(windows)) == (57, 20, 8, 160)
    assert (windows.tops[-1], windows.lefts[-1]) == (190, 70)
    rectangles = windows.rectangles()
    assert rectangles[0].tolist() == [0, 0, 57, 57]
    assert rectangles[1].tolist() == [0, 10, 57, 67]
    assert rectangles[-1].tolist() == [190, 70, 247, 127]  # 9 rows and a column are never hidden
    sizes = {
        step: (len(w.tops), len(w.lefts)) for step in (5, 10, 16) for w in [Windows(height=128, width=64, step=step)]
    }
    assert sizes == {5: (20, 8), 10: (10, 4), 16: (7, 3)}


@given(height=st.integers(16, 400), width=st.integers(16, 400), step=st.integers(1, 50))
def test_windows_lie_within_the_crop_but_not_at_its_end(height, width, step):
    windows = Windows(height=height, width=width, step=step)
    assert windows.side**2 <= height * width / 10 < (windows.side + 1) ** 2
    rectangles = windows.rectangles()
    assert len(rectangles) == len(windows)
    assert (rectangles[:, 2:] - rectangles[:, :2] == windows.side).all()
    assert (rectangles[:, :2] % step == 0).all()
    assert (rectangles[:, 2] < height).all()
    assert (rectangles[:, 3] < width).all()
    if len(windows) > 1:
        windows.check()
    else:
        with pytest.raises(InvalidValue):
            windows.check()


@given(size=SIZES, seed=st.integers(0, 99))
def test_blurring_is_the_mean_of_nine_cells_with_reflected_borders(size, seed):
    grids = np.random.default_rng(seed).random((2, *size))
    reflected = [[min(max(k, -k), 2 * (n - 1) - k) if n > 1 else 0 for k in range(-1, n + 1)] for n in size]
    for grid, found in zip(grids, blurred(grids), strict=True):
        for row, column in itertools.product(*map(range, size)):
            cells = [grid[reflected[0][row + i], reflected[1][column + j]] for i in range(3) for j in range(3)]
            assert found[row, column] == pytest.approx(sum(cells) / 9)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-300, 1e-9, 0.3, 1.0, 7.5]), min_size=1, max_size=9),
    chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
)
def test_a_draw_is_the_cumulative_sum_inverted(weights, chances):
    found = inverted(np.array([weights] * len(chances)), np.array(chances))
    usable = weights if any(weights) else [1.0] * len(weights)
    for place, chance in zip(found, chances, strict=True):
        assert usable[place] > 0
        before, ends = np.cumsum(usable)[place] - usable[place], np.cumsum(usable)[place]
        slack = 1e-12 * sum(usable)
        assert before - slack <= chance * sum(usable) <= ends + slack


@pytest.mark.parametrize("pick", ["sampling", "hard-1", "no-adversary"])
def test_ten_thousand_draws_follow_the_table(pick):
    table = table_of()
    occluder, rng = occluder_of(table, aos_pick=pick, aos_share=1.0), np.random.default_rng(3)
    place = {tuple(rectangle): k for k, rectangle in enumerate(table.windows.rectangles().tolist())}
    for index, mirrored in itertools.product((0, 1), (False, True)):
        cutouts = occluder.cutouts(np.full(10_000, index), np.full(10_000, mirrored), rng.random(10_000))
        counts = np.bincount([place[tuple(each)] for each in cutouts.tolist()], minlength=len(place))
        weights = blurred(table.drops(table.facts.images[index], mirrored)[None]).ravel()
        if pick == "sampling":
            assert chi_square(counts, weights) < 4
        else:
            losses = blurred(table.losses([index], [mirrored]))
            assert counts[losses.argmax() if pick == "hard-1" else losses.argmin()] == 10_000


def test_random_squares_are_anywhere():
    windows = Windows(height=34, width=22, step=10)
    occluder = Occluder(windows, None, ("a.jpg",), dataclasses.replace(RECIPE, aos_pick="random", aos_share=1.0))
    count, places = 30_000, (34 - windows.side + 1, 22 - windows.side + 1)
    chances = np.random.default_rng(0).random(count)
    cutouts = occluder.cutouts(np.zeros(count, np.int64), np.zeros(count, bool), chances)
    assert (cutouts[:, 2:] - cutouts[:, :2] == windows.side).all()
    counts = np.zeros(places)
    np.add.at(counts, (cutouts[:, 0], cutouts[:, 1]), 1)  # of no other place
    assert chi_square(counts.ravel(), np.ones(counts.size)) < 4


@pytest.mark.parametrize("pick", ["sampling", "hard-1", "no-adversary"])
@pytest.mark.parametrize("certainty", [0.0, -1e-9, -3.0])
def test_where_nothing_hurts_any_window_may_come(pick, certainty):
    """Where p rounds to 1, too: a table of zeros is no NaN."""
    plain = table_of()
    table = dataclasses.replace(
        plain, whole=np.full_like(plain.whole, certainty), behind=np.full_like(plain.behind, certainty)
    )
    assert not table.drops("a.jpg", True).any()
    occluder, chances = occluder_of(table, aos_pick=pick, aos_share=1.0), np.arange(0.5, 4000) / 4000
    cutouts = occluder.cutouts(np.zeros(4000, np.int64), np.zeros(4000, bool), chances)
    found, counts = np.unique(cutouts, axis=0, return_counts=True)
    assert len(found) == len(WINDOWS) == 40
    assert (counts == 100).all()


def test_what_hurts_is_known_where_the_model_is_certain():
    """1 - p of 1e-9 and 5e-9, which float32 has no p for."""
    plain = table_of()
    table = dataclasses.replace(plain, whole=np.full_like(plain.whole, -1e-9), behind=np.full_like(plain.behind, -5e-9))
    assert table.drops("a.jpg", False) == pytest.approx(np.full((10, 4), 4e-9), rel=1e-6)
    assert (table.probabilities("a.jpg", False) < 1).all()


def test_half_of_the_crops_are_occluded_by_one_number_each():
    occluder, rng = occluder_of(table_of()), np.random.default_rng(0)
    count = 10_000
    indices, mirrored, chances = rng.integers(0, 2, count), rng.random(count) < 0.5, rng.random(count)
    cutouts = occluder.cutouts(indices, mirrored, chances)
    hidden = cutouts.any(1)
    assert abs(hidden.mean() - 0.5) < 3 * 0.5 / count**0.5
    order = rng.permutation(count)
    assert (occluder.cutouts(indices[order], mirrored[order], chances[order]) == cutouts[order]).all()
    assert not occluder_of(table_of(), aos_share=0.0).cutouts(indices, mirrored, chances).any()
    assert occluder_of(table_of(), aos_share=1.0).cutouts(indices, mirrored, chances).any(1).all()


def test_the_table_read_is_that_of_the_image_and_the_flip_just_drawn():
    """Each image and flip hurts at one window of its own."""
    plain = table_of()
    whole, behind = np.zeros_like(plain.whole), np.zeros_like(plain.behind)
    places = {(0, 0): (1, 1), (0, 1): (3, 2), (1, 0): (5, 1), (1, 1): (8, 2)}
    for (row, mirrored), (down, right) in places.items():
        behind[row, mirrored, down, right] = -2
    table = dataclasses.replace(plain, whole=whole, behind=behind)
    occluder = Occluder(
        WINDOWS, table, ("b.jpg", "a.jpg"), dataclasses.replace(RECIPE, aos_pick="hard-1", aos_share=1.0)
    )
    for (row, mirrored), (down, right) in places.items():
        args = np.full(50, 1 - row), np.full(50, bool(mirrored)), np.random.default_rng(0).random(50)
        tops, lefts = np.divmod(occluder.cutouts(*args)[:, :2], 10)[0].T
        assert (abs(tops - down) <= 1).all(), "the blur makes its neighbours as bad"
        assert (abs(lefts - right) <= 1).all()


def test_images_are_named_by_their_paths_in_the_data_set(tmp_path):
    samples = [Sample(tmp_path / "train" / "0001_c1.jpg", 1, 1), Sample(tmp_path.parent / "x.jpg", 2, 1)]
    assert image_names(samples, tmp_path) == ("train/0001_c1.jpg", (tmp_path.parent / "x.jpg").as_posix())


@given(seed=st.integers(0, 99), names=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_a_table_comes_back_as_it_was_written(seed, names, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.npz"
    table = table_of((*names, "\udcff.jpg"), seed=seed, left_out=(names[0],))
    write_table(path, table)
    found = read_table(path)
    assert found.facts == table.facts
    assert (found.whole == table.whole).all()
    assert (found.behind == table.behind).all()
    before = path.read_bytes()
    write_table(path, found)
    assert path.read_bytes() == before


def test_a_damaged_table_is_one_line(tmp_path):
    path, small = tmp_path / "t.npz", Windows(height=64, width=32, step=20)
    write_table(path, table_of(windows=small))
    whole = path.read_bytes()
    facts = {"path": path, "hint": "--resume"}
    for content in (b"", b"PK", b"no archive", *(whole[:length] for length in range(1, len(whole), 97))):
        path.write_bytes(content)
        with refuses(InvalidFile, **facts):
            read_table(path)
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(InvalidFile):  # or a byte that says nothing, such as a time of the day
            assert read_table(path).facts == table_of(windows=small).facts
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none"):
        read_table(tmp_path / "none")


@pytest.mark.parametrize(
    "changed",
    [
        {"whole": np.zeros((3, 2), np.float32)},
        {"whole": np.zeros((2, 2))},
        {"whole": np.full((2, 2), np.nan, np.float32)},
        {"whole": np.full((2, 2), 0.1, np.float32)},
        {"behind": np.zeros((2, 2, 4, 10), np.float32)},
        {"facts": dataclasses.replace(table_of().facts, format="pmm-occlusions-0")},
        {"facts": dataclasses.replace(table_of().facts, windows=Windows(height=128, width=64, step=0))},
    ],
)
def test_a_table_that_says_what_cannot_be_is_refused(tmp_path, changed):
    write_table(tmp_path / "t.npz", dataclasses.replace(table_of(), **changed))
    with refuses(InvalidFile, path=tmp_path / "t.npz"):
        read_table(tmp_path / "t.npz")


def test_a_table_of_something_else_is_refused(tmp_path):
    table, path = table_of(), tmp_path / "t.npz"
    right = {"checkpoint": "12ab", "windows": WINDOWS, "images": ("b.jpg", "a.jpg")}
    check_table(table, path, **right)
    facts = {"path": path, "hint": "--resume"}
    with refuses(InvalidFile, "12ab", "34cd", problem="another checkpoint", **facts):
        check_table(table, path, **{**right, "checkpoint": "34cd"})
    with refuses(InvalidFile, "c.jpg", problem="another data set", **facts):
        check_table(table, path, **{**right, "images": ("a.jpg", "c.jpg")})
    for windows in (Windows(height=128, width=64, step=16), Windows(height=160, width=64, step=10)):
        with refuses(
            InvalidFile, "every 10 pixels on 128x64", f"{windows.step} pixels on {windows.height}x64", **facts
        ):
            check_table(table, path, **{**right, "windows": windows})


@pytest.fixture(scope="module")
def loaded(small_config, people):
    """Batches of an epoch on the small data set, with the table of the small data set, by so many workers."""
    config = with_method(small_config, "aos")
    samples = read_dataset("synthetic", people).train
    table = table_of(image_names(samples, people))

    def batches(workers=0, *, occluded=True, first=0, rank=0, world=1, skip_bad=False, samples=samples):
        data = dataclasses.replace(config.data, workers=workers)
        changed = dataclasses.replace(config, data=data, recipe=dataclasses.replace(config.recipe, batch_size=16))
        occluder = Occluder(WINDOWS, table, table.facts.images, changed.recipe) if occluded else None
        loader, sampler = train_batches(samples, changed, rank=rank, world=world, skip_bad=skip_bad, occluder=occluder)
        sampler.epochs, sampler.first = range(3, 5), first
        found = [TrainBatch(*(part.clone() for part in batch)) for batch in loader]
        loader.close()
        return found

    return batches


def same(found, expected):
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_draws_depend_neither_on_workers_nor_on_a_resume_nor_on_processes(loaded):
    whole = loaded()
    assert same(loaded(4), whole)
    assert same(loaded(first=2), whole[2:])
    halves = zip(loaded(rank=0, world=2), loaded(rank=1, world=2), strict=True)
    assert same([tuple(map(torch.cat, zip(*both, strict=True))) for both in halves], whole)
    hidden = torch.cat([batch.cutouts.any(1) for batch in whole]).double()
    assert abs(hidden.mean() - 0.5) < 3 * 0.5 / len(hidden) ** 0.5


def test_the_network_sees_zeros_there_and_all_else_as_it_was(loaded, small_config):
    size, cpu = preprocessing_of(small_config), torch.device("cpu")
    tried = {tuple(rectangle) for rectangle in WINDOWS.rectangles().tolist()}
    for batch, plain in zip(loaded(), loaded(occluded=False), strict=True):
        assert not plain.cutouts.any()
        assert same([batch[:2], batch[3:]], [plain[:2], plain[3:]])
        images, expected = (normalize_batch(each, size, cpu) for each in (batch, plain))
        for image, before, (top, left, bottom, right) in zip(images, expected, batch.cutouts.tolist(), strict=True):
            if bottom:
                assert (top, left, bottom, right) in tried
                assert not image[:, top:bottom, left:right].any()
                before[:, top:bottom, left:right] = 0
            assert torch.equal(image, before)


def test_a_stand_in_of_an_image_that_is_left_out_uses_its_own_table(loaded, people, monkeypatch):
    samples, whole = read_dataset("synthetic", people).train, loaded()
    bad = int(whole[0].indices[whole[0].cutouts.any(1)][0])
    original = Occluder.cutouts
    asked = []

    def noted(self, indices, mirrored, chances):
        asked.append(indices.copy())
        return original(self, indices, mirrored, chances)

    monkeypatch.setattr(Occluder, "cutouts", noted)
    gone = samples[bad]._replace(path=people / "gone.jpg")
    found = loaded(skip_bad=True, samples=(*samples[:bad], gone, *samples[bad + 1 :]))
    assert all(bad not in indices for indices in asked)
    assert [indices.tolist() for indices in asked] == [batch.indices.tolist() for batch in found]
