"""The table of occlusions: what a window costs a model, and how the table comes about."""

import dataclasses
import shutil
import signal

import numpy as np
import pytest
import torch
from torch import nn

from pmm.artifacts import checkpoint
from pmm.data.occlusion import Windows, image_names, inverted, read_table, write_table
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.models.backbone import Backbone
from pmm.models.registry import build_model
from pmm.presets import preset, with_method
from pmm.training import occlusion_table as module
from pmm.training.distributed import SINGLE
from pmm.training.occlusion_table import FIRST, SHARDS, TABLE, OccludedModel, keep_model, make_occluder
from pmm.training.snapshot import snapshot
from pmm.training.state import make_train_state
from pmm.utils.errors import InvalidFile, TrainingInterrupted
from tests.refusals import refuses

CPU = torch.device("cpu")
WINDOWS = Windows(height=128, width=64, step=10)
RECTANGLE = (40, 12, 60, 30)
"""Top, left, bottom, right of what a stub looks at."""


class Stub(Backbone):
    """Sees the mean of a rectangle alone; of none, nothing."""

    channels, stride = 1, 16

    def __init__(self, rectangle=None):
        super().__init__()
        self.rectangle = rectangle

    def forward(self, images):
        top, left, bottom, right = self.rectangle or (0, 0, 0, 0)
        seen = images[:, :1, top:bottom, left:right].flatten(1)
        return (seen.sum(1) / max(seen.shape[1], 1))[:, None, None, None]


def occluded_model(rectangle, slope=1.0):
    """Of two classes; what it is certain of grows with what it sees."""
    base = preset("tiny", "aos")
    model = build_model(dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=2, neck="none")))
    model.backbone, model.classifier = Stub(rectangle), nn.Linear(1, 2)
    model.classifier.weight = nn.Parameter(torch.tensor([[slope], [0.0]]))
    nn.init.zeros_(model.classifier.bias)
    return OccludedModel(model.eval(), preprocessing_of(base), WINDOWS, CPU)


def drops(certainty):
    """[B, 2, W]"""
    return np.maximum(np.expm1(certainty[..., :1].astype(float)) - np.expm1(certainty[..., 1:].astype(float)), 0)


def crops_of(count, seed=0):
    return np.random.default_rng(seed).integers(200, 256, (count, 128, 64, 3), dtype=np.uint8)


def test_only_windows_that_cover_what_the_model_sees_hurt_it_and_only_they_are_drawn():
    found = drops(occluded_model(RECTANGLE).certainty(crops_of(3), [0, 0, 0]))
    top, left, bottom, right = RECTANGLE
    windows = WINDOWS.rectangles()
    hit = (windows[:, 0] < bottom) & (windows[:, 2] > top) & (windows[:, 1] < right) & (windows[:, 3] > left)
    assert 0 < hit.sum() < len(windows)
    assert (found[..., ~hit] == 0).all()  # to the bit
    assert (found[..., hit] > 0).all()
    for drop in found.reshape(-1, len(windows)):
        draws = inverted(np.tile(drop, (10_000, 1)), np.random.default_rng(0).random(10_000))
        counts, expected = np.bincount(draws, minlength=len(windows)), 10_000 * drop / drop.sum()
        assert not counts[~hit].any()
        free = hit.sum() - 1
        assert (((counts - expected) ** 2)[hit] / expected[hit]).sum() < free + 4 * np.sqrt(2 * free)


@pytest.mark.parametrize("label", [0, 1])
def test_a_model_that_ignores_the_image_is_hurt_by_nothing(label):
    assert not drops(occluded_model(None).certainty(crops_of(2), [label] * 2)).any()


@pytest.mark.parametrize("slope", [15.0, 1e4])
def test_a_model_that_is_certain_is_no_nan(slope):
    """With 15, 1 - p is 3e-14 to float64, and 0 to float32; with 10,000 it is 0 to both."""
    certainty = occluded_model(RECTANGLE, slope).certainty(crops_of(2), [0, 0])
    assert np.isfinite(certainty).all()
    assert (certainty <= 0).all()
    assert (certainty[..., 0] < 0).all() == (slope < 100)
    assert drops(certainty).any()


@pytest.fixture(scope="module")
def config(small_config):
    """With small crops, for speed, and the number of identities of the small data set."""
    config = with_method(small_config, "aos")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, height=64, width=32),
        model=dataclasses.replace(config.model, num_classes=12),
    )


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    """A run's folder after its first training, with batch statistics that are not those of the beginning."""
    torch.manual_seed(0)
    model = build_model(config)
    model(torch.randn(32, 3, 64, 32), torch.zeros(32, dtype=torch.int64))
    model.classifier.weight.data.mul_(300)
    out = tmp_path_factory.mktemp("first")
    keep_model(out, snapshot(make_train_state(model, config, CPU, 1), 1, -1.0))
    return out


@pytest.fixture
def out(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


@pytest.fixture(scope="module")
def samples(people):
    return read_dataset("synthetic", people).train


@pytest.fixture
def make(out, config, samples):
    """Makes, or reads, the table of the run in `out`."""

    def made(samples=samples, config=config, **more):
        return make_occluder(out, samples, config, CPU, SINGLE, **more)

    return made


@pytest.fixture(scope="module")
def whole(first, config, samples, tmp_path_factory):
    """The table that was made without an interruption."""
    out = shutil.copytree(first, tmp_path_factory.mktemp("whole") / "run")
    make_occluder(out, samples, config, CPU, SINGLE)
    assert {path.name for path in out.iterdir()} == {FIRST, TABLE}
    return out / TABLE


def test_it_has_every_image_as_it_is_and_mirrored(whole, first, config, samples, people):
    """Against the plainest way: one crop and one window at a time."""
    from pmm.data.crops import load_crop

    table = read_table(whole)
    assert table.facts.images == image_names(samples, people)
    assert table.behind.shape == (len(samples), 2, 5, 2)
    model, _ = checkpoint.restore_model(checkpoint.load(first / FIRST), first)
    classes = sorted({sample.pid for sample in samples})
    worst = 0.0
    for row in (0, 70, len(samples) - 1):
        sample = samples[row]
        crop = load_crop(sample.path, 64, 32)
        for mirrored in (False, True):
            image = preprocessing_of(config).normalise((crop[:, ::-1] if mirrored else crop)[None])
            found = []
            for top, left, bottom, right in [(0, 0, 0, 0), *table.windows.rectangles().tolist()]:
                hidden = torch.from_numpy(image).clone()
                hidden[..., top:bottom, left:right] = 0
                with torch.no_grad():
                    logits = model.classifier(model.average(model.backbone(hidden))).double()
                found.append(logits.log_softmax(1)[0, classes.index(sample.pid)].item())
            kept = [table.whole[row, int(mirrored)], *table.behind[row, int(mirrored)].ravel()]
            assert kept == pytest.approx(found, rel=1e-3, abs=1e-5)
            worst = max(worst, max(found) - min(found))
    assert worst > 0.1


def test_the_mirrored_table_is_not_the_table_mirrored(whole):
    """The windows at 0, 10 of 32 columns do not lie as those of a mirrored crop, at 8, 18."""
    behind = read_table(whole).behind
    assert not np.allclose(behind[:, 1], behind[:, 0, :, ::-1], atol=1e-3)
    assert not np.allclose(behind[:, 1], behind[:, 0], atol=1e-3)


def test_a_run_that_is_killed_and_goes_on_makes_the_same_bytes(whole, out, make, samples, people, monkeypatch):
    """It tries only what is missing, or damaged, or of another checkpoint."""

    class Killed(BaseException):
        pass

    original, tried = module.write_table, []

    def killed(path, table):
        if path.name != TABLE and len(list((out / SHARDS).glob("*.npz"))) == 2:
            path.with_name(f".{path.name}.x.npz").write_bytes(b"half")
            raise Killed
        original(path, table)

    monkeypatch.setattr(module, "SHARD", 32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_table", killed)
        with pytest.raises(Killed):
            make()
    assert not (out / TABLE).exists()
    damaged, *_ = sorted((out / SHARDS).glob("[!.]*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    stale = out / SHARDS / f"{96:07}.npz"
    shard = read_table(sorted((out / SHARDS).glob("[!.]*.npz"))[1])
    facts = dataclasses.replace(shard.facts, checkpoint="ab", images=image_names(samples, people)[96:128])
    write_table(stale, dataclasses.replace(shard, facts=facts))
    certainty = OccludedModel.certainty
    monkeypatch.setattr(
        OccludedModel,
        "certainty",
        lambda self, crops, labels: tried.append(len(crops)) or certainty(self, crops, labels),
    )
    make()
    assert sum(tried) == len(samples) - 32
    assert (out / TABLE).read_bytes() == whole.read_bytes()
    assert {path.name for path in out.iterdir()} == {FIRST, TABLE}
    make()
    assert sum(tried) == len(samples) - 32  # it is read


def test_a_signal_ends_it_at_once_and_shards_that_are_done_stay(out, make, monkeypatch):
    calls = []

    def pending_signal():
        calls.append(1)
        return signal.SIGINT if len(calls) > 40 else 0

    monkeypatch.setattr(module, "SHARD", 16)
    monkeypatch.setitem(module.CROPS, "cpu", 44)  # two images
    with pytest.raises(TrainingInterrupted) as stop:
        make(pending_signal=pending_signal)
    assert stop.value.number == signal.SIGINT
    assert len(calls) == 41 + 1  # in the middle of the fifth shard
    assert len(list((out / SHARDS).iterdir())) == 4
    assert not (out / TABLE).exists()


def test_an_image_that_cannot_be_read_is_left_out_where_that_is_asked(out, make, samples, people, whole, caplog):
    gone = (*samples[:3], samples[3]._replace(path=people / "gone.jpg"), *samples[4:])
    with refuses(InvalidFile, path=people / "gone.jpg", hint="--skip-bad-images"):
        make(samples=gone)
    assert not (out / TABLE).exists()
    make(samples=gone, skip_bad=True)
    found, expected = read_table(out / TABLE), read_table(whole)
    assert found.facts.left_out == ("gone.jpg",)
    assert not found.drops("gone.jpg", True).any()
    others = [row for row in range(len(samples)) if row != 3]
    assert np.allclose(found.behind[others], expected.behind[others], atol=1e-5)
    assert "gone.jpg" in caplog.text


@pytest.mark.parametrize("recipe", [{"aos_share": 0.0}, {"aos_pick": "random"}])
def test_without_need_there_is_no_table(out, make, config, recipe):
    make(config=dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **recipe)))
    assert {path.name for path in out.iterdir()} == {FIRST}


def test_a_table_of_something_else_is_refused_and_stays(out, make, config, samples, whole):
    shutil.copyfile(whole, out / TABLE)
    make()
    facts = {"path": out / TABLE, "hint": "--resume"}

    def changed(section, **values):
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})

    with refuses(InvalidFile, "every 10", "every 7", **facts):
        make(config=changed("recipe", aos_step=7))
    with refuses(InvalidFile, "64x32", "96x32", **facts):
        make(config=changed("data", height=96))
    with refuses(InvalidFile, "other.jpg", problem="another data set", **facts):
        make(samples=(*samples, samples[0]._replace(path=samples[0].path.with_name("other.jpg"))))
    before = checkpoint.load(out / FIRST)
    weights = {key: value + 1 if "classifier" in key else value for key, value in before["model"].items()}
    checkpoint.save(out / FIRST, {**before, "model": weights})
    with refuses(InvalidFile, problem="another checkpoint", **facts):
        make()
    (out / TABLE).write_bytes(whole.read_bytes()[:2000])
    with refuses(InvalidFile, problem="truncated", **facts):
        make()
    assert {path.name for path in out.iterdir()} == {FIRST, TABLE}
    (out / FIRST).unlink()
    with refuses(InvalidFile, path=out / FIRST):
        make()


def test_a_model_of_another_run_is_not_asked(out, make, config):
    model = dataclasses.replace(config.model, num_classes=7)
    with refuses(InvalidFile, "model.num_classes: 12 -> 7", path=out / FIRST):
        make(config=dataclasses.replace(config, model=model))


def test_the_model_is_written_once(out):
    """The same weights in other bytes would make another SHA-256."""
    state = checkpoint.load(out / FIRST)
    before = (out / FIRST).read_bytes()
    keep_model(out, {**state, "epoch": 7})
    assert (out / FIRST).read_bytes() == before
    keep_model(out, {**state, "model": {key: value + 1 for key, value in state["model"].items()}})
    assert (out / FIRST).read_bytes() != before
    (out / FIRST).write_bytes(before[:500])
    keep_model(out, state)
    assert checkpoint.load(out / FIRST)["epoch"] == state["epoch"]
