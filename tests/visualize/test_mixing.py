"""Hard-Mix before and after: the mixes are the model's own, and the pictures show them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pmm.data.preprocessing import preprocessing_of
from pmm.models.pmm import PMM
from pmm.models.registry import build_model
from pmm.ops import hard_mix
from pmm.presets import preset
from pmm.utils.errors import InvalidInput
from pmm.visualize import mixing
from pmm.visualize.cam import to_model
from pmm.visualize.heat import heated, resized
from pmm.visualize.mixing import MIN_BLOCK, Drawn, has_hard_mix, mix_picture, mixes_of
from tests.refusals import refuses
from tests.visualize.untouched import untouched

LABELS = [3, 3, 0, 0, 1, 4]
WHITE = (255, 255, 255)


def config_of(size=(128, 64), **model):
    base = preset("tiny")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, height=size[0], width=size[1]),
        model=dataclasses.replace(base.model, num_classes=5, **model),
    )


def case(size=(128, 64), **options):
    torch.manual_seed(0)
    config = config_of(size, **options)
    crops = np.random.default_rng(1).integers(0, 256, (len(LABELS), *size, 3), np.uint8)
    return build_model(config), crops, preprocessing_of(config)


def grad_cam(maps, pool, head, pids):
    leaf = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(pool(leaf))[1].gather(1, pids[:, None]).sum(), leaf)
    return (gradient.mean((2, 3))[:, :, None, None] * maps).sum(1).relu()


def test_mixes_are_guided_by_grad_cam_of_the_true_identity_at_test_time():
    model, crops, size = case(block=(2, 2), k=2)
    model.double()
    for module in model.modules():  # running statistics that are not the batch's
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
    second, third = mixes_of(model, crops, LABELS, size, seed=3)
    model.eval()
    pids = torch.tensor(LABELS)
    with torch.no_grad():
        f1 = model.backbone(to_model(model, crops, size))
        x = model.bottleneck(f1)
    cam1 = grad_cam(f1, lambda a: a.mean((2, 3)), model.stages[0], pids)
    torch.testing.assert_close(second.cam, cam1)
    x2, replaced = hard_mix(x, cam1, second.partner, (2, 2), 2, on_empty="first")
    assert torch.equal(second.replaced, replaced)
    assert torch.equal(second.pooled, x2.amax((2, 3)))
    cam2 = grad_cam(x2, lambda a: F.adaptive_max_pool2d(a, 1).flatten(1), model.stages[1], pids)
    torch.testing.assert_close(third.cam, cam2)
    x3, replaced = hard_mix(x, cam2, third.partner, (2, 2), 2, on_empty="first")
    assert torch.equal(third.replaced, replaced)
    assert torch.equal(third.pooled, x3.amax((2, 3)))
    for mix in (second, third):
        assert (pids[mix.partner] != pids).all()
    assert not torch.equal(second.partner, third.partner)


@pytest.mark.parametrize("size", [(128, 64), (101, 37)])
@pytest.mark.parametrize("block", [(1, 1), (3, 2)])
def test_the_partners_pixels_lie_above_the_replaced_cells(size, block):
    model, crops, preprocessing = case(size, block=block, k=2)
    mix = mixes_of(model, crops, LABELS, preprocessing)[1]
    drawn = Drawn.of(mix, model)
    for row in range(len(crops)):
        pasted = drawn.pasted(crops, row)
        for y in range(0, size[0], 5):
            for x in range(0, size[1], 5):
                source = mix.partner[row] if mix.replaced[row, y // 16, x // 16] else row
                assert (pasted[y, x] == crops[source, y, x]).all()
    assert drawn.replaced.any()


@pytest.mark.parametrize("block", [(1, 1), (3, 2), (9, 9)])
def test_ranks_and_frames_are_those_of_the_blocks_that_were_replaced(block):
    model, crops, preprocessing = case(block=block, k=1)
    mix = mixes_of(model, crops, LABELS, preprocessing)[0]
    drawn = Drawn.of(mix, model)
    for row in range(len(crops)):
        scores = np.array([[mix.cam[row, a:b, c:d].sum() for c, d in drawn.columns] for a, b in drawn.rows], np.float64)
        order = np.sort(scores.ravel())[::-1]
        for i, j in np.ndindex(scores.shape):
            assert scores[i, j] == pytest.approx(order[drawn.ranks[row, i, j]], rel=1e-5)
        plain = Image.new("RGB", (128, 256), (0, 90, 0))
        framed = np.asarray(drawn.marked(plain.copy(), crops, row, numbers=False))
        ranked = np.asarray(drawn.marked(plain.copy(), crops, row, numbers=True))
        for i, (top, bottom) in enumerate(drawn.rows):
            for j, (left, right) in enumerate(drawn.columns):
                inside = (slice(32 * top, 32 * bottom), slice(32 * left, 32 * right))
                chosen = bool(mix.replaced[row, top, left])
                assert chosen == (drawn.ranks[row, i, j] < 1)
                assert (framed[inside][:2] == WHITE).all() == chosen
                assert (framed[inside] == (0, 90, 0)).all() != chosen
                # the number stands in the middle, where a frame alone leaves the crop as it is
                middle = (slice(32 * top + 8, 32 * bottom - 8), slice(32 * left + 8, 32 * right - 8))
                assert (framed[middle] == (0, 90, 0)).all()
                assert (ranked[middle] == WHITE).all(axis=2).any() == chosen
        assert (ranked != framed).any()


def test_each_column_shows_what_its_head_says(monkeypatch):
    shown, numbers = [], []
    write = mixing._write_rank
    monkeypatch.setattr(mixing, "sheet", lambda groups, lines, **_: shown.extend(lines) or Image.new("RGB", (1, 1)))
    monkeypatch.setattr(mixing, "_write_rank", lambda pen, box, rank: numbers.append(rank) or write(pen, box, rank))
    model, crops, size = case(k=3)
    names = [f"number {n}" for n in range(6)]
    mix_picture(model, crops, LABELS, size, rows=2, height=256, names=names)
    assert sorted(numbers) == sorted([1, 2, 3] * 4)
    first, second = (Drawn.of(mix, model) for mix in mixes_of(model, crops, LABELS, size))
    for row, line in enumerate(shown):
        # the second map is of what the first mix made, the second mix of the crop as it was
        expected = [
            first.marked(heated(crops[row], first.cam[row], 16, (128, 256), smooth=False), crops, row, numbers=True),
            resized(crops[first.partner[row]], (128, 256)),
            first.marked(resized(first.pasted(crops, row), (128, 256)), crops, row, numbers=False),
            second.marked(
                heated(first.pasted(crops, row), second.cam[row], 16, (128, 256), smooth=False),
                crops,
                row,
                numbers=True,
            ),
            resized(crops[second.partner[row]], (128, 256)),
            second.marked(resized(second.pasted(crops, row), (128, 256)), crops, row, numbers=False),
        ]
        assert [panel.image.tobytes() for panel in line[1:]] == [image.tobytes() for image in expected]
        assert [line[place].below for place in (0, 2, 5)] == [
            names[place] for place in (row, first.partner[row], second.partner[row])
        ]


def test_the_model_is_left_as_it_was_and_a_seed_gives_one_picture():
    model, crops, size = case()
    with untouched(model):
        first = mix_picture(model, crops, LABELS, size, seed=1)
    again, other = (mix_picture(model, crops, np.array(LABELS), size, seed=seed) for seed in (1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_rows_names_and_height():
    model, crops, size = case()
    tall, short = (mix_picture(model, crops, LABELS, size, rows=rows, height=192) for rows in (3, 1))
    assert 2 * 192 < tall.height - short.height < 2 * 260
    assert (
        mix_picture(model, crops, LABELS, size, rows=99).height
        == mix_picture(model, crops, LABELS, size, rows=6).height
    )
    named = mix_picture(model, crops, LABELS, size, rows=1, height=192, names=["another"] * 6)
    assert named.tobytes() != short.tobytes()
    # 8 rows of blocks, of which each is high enough for a number
    small = mix_picture(model, crops, LABELS, size, rows=1, height=64)
    assert small.height > 8 * MIN_BLOCK


@pytest.mark.parametrize(("size", "block"), [((33, 17), (1, 1)), ((17, 33), (3, 2)), ((200, 1), (3, 2))])
@pytest.mark.parametrize("height", [32, 128])
def test_blocks_at_the_edge_that_are_too_small_for_a_frame_have_none(size, block, height):
    model, crops, preprocessing = case(size, block=block, k=1)
    model.eval()
    drawn = Drawn.of(mixes_of(model, crops, LABELS, preprocessing)[0], model)
    rows, columns = (len(drawn.rows), len(drawn.columns))
    ranked = np.arange(rows * columns).reshape(rows, columns)
    drawn = drawn._replace(ranks=np.stack([ranked] * len(crops)), replaced=np.ones_like(drawn.replaced))
    plain = Image.new("RGB", (max(1, height * size[1] // size[0]), height), "green")
    drawn.marked(plain, crops, 0, numbers=True)
    assert mix_picture(model, crops, LABELS, preprocessing, height=height).mode == "RGB"


def test_without_blocks_to_replace_nothing_is_framed():
    model, crops, size = case(k=0)
    drawn = Drawn.of(mixes_of(model, crops, LABELS, size)[0], model)
    plain = Image.new("RGB", (64, 128), "green")
    assert drawn.marked(plain.copy(), crops, 0, numbers=False).tobytes() == plain.tobytes()
    assert np.array_equal(drawn.pasted(crops, 0), crops[0])
    mix_picture(model, crops, LABELS, size)


def test_bad_input():
    model, crops, size = case()
    with pytest.raises(ValueError, match="5, 6, 6"):
        mix_picture(model, crops, LABELS[:5], size, names=["a"] * 6)
    with pytest.raises(ValueError, match="as many labels and names"):
        mix_picture(model, crops[:0], [], size)
    bdb = build_model(dataclasses.replace(config_of(), model=dataclasses.replace(config_of().model, method="bdb")))
    assert has_hard_mix(model)
    assert not has_hard_mix(bdb)
    with refuses(InvalidInput, "BDB", "Hard-Mix", expected="PMM"):
        mix_picture(bdb, crops, LABELS, size)

    class Other(PMM):
        """Another mix on the same three stages."""

    other = Other(config_of().model)
    with refuses(InvalidInput, "Other", "Hard-Mix", expected="PMM"):
        mix_picture(other, crops, LABELS, size)


@pytest.mark.gpu
def test_on_a_gpu_the_picture_is_drawn_too():
    model, crops, size = case()
    model.cuda()
    generator = torch.cuda.get_rng_state()
    assert mix_picture(model, crops, LABELS, size).mode == "RGB"
    assert torch.equal(torch.cuda.get_rng_state(), generator)
