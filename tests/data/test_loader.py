import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pmm.data import loader as loader_module
from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.crops import load_crop
from pmm.data.loader import TrainSet, train_batches
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices
from pmm.utils.errors import ConflictingOptions, InvalidFile, OutOfMemory, UserError
from tests.conftest import ROOT
from tests.data.plain_augmentation import PREPROCESSING, reference
from tests.refusals import refuses


@pytest.fixture(scope="module")
def batches_of(small_config, people):
    """Batches of an epoch on the small data set, loaded by so many workers."""
    samples = read_dataset("synthetic", people).train

    def batches(workers, *epochs):
        config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
        config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=8))
        loader, sampler = train_batches(samples, config)
        found = []
        for epoch in epochs:
            sampler.epochs = range(epoch, epoch + 1)
            found.append([TrainBatch(*(part.clone() for part in batch)) for batch in loader])
        return found

    return batches


def equal(batches, others):
    return all(
        torch.equal(a, b) for x, y in zip(batches, others, strict=True) for a, b in zip(x, y, strict=True)
    )  # fmt: skip


def test_batches_do_not_depend_on_the_workers(batches_of):
    alone, other = batches_of(0, 1, 2)
    for workers in (1, 2):
        found, others = batches_of(workers, 1, 2)
        assert equal(found, alone)
        assert equal(others, other)
    assert len(alone) == 6
    batch = alone[0]
    assert (batch.crops.shape, batch.crops.dtype) == ((8, 128, 64, 3), torch.uint8)
    assert (batch.mirrored.shape, batch.mirrored.dtype) == ((8,), torch.bool)
    assert (batch.cutouts.shape, batch.cutouts.dtype) == ((8, 4), torch.int64)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert not torch.equal(batch.crops, other[0].crops)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(small_config, people, batches_of, workers):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=8))  # more than slots
    loader, sampler = train_batches(read_dataset("synthetic", people).train, config)
    sampler.epochs = range(1, 3)
    expected = itertools.chain(*batches_of(0, 1, 2))
    for batch, alone in zip(loader, expected, strict=True):
        inside = loader.loader._iterator
        while inside._worker_result_queue.qsize() < inside._tasks_outstanding:  # until all is done that may be
            time.sleep(0.001)
        assert torch.equal(batch.crops, alone.crops)


def test_workers_go_on_from_epoch_to_epoch_and_end_with_the_last(small_config, people, batches_of):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=8))
    loader, sampler = train_batches(read_dataset("synthetic", people).train, config)
    sampler.epochs, sampler.first = range(2, 5), 4
    others, batches, found = set(multiprocessing.active_children()), iter(loader), []
    for steps in (2, 6, 6):
        found.append([TrainBatch(*(part.clone() for part in batch)) for batch in itertools.islice(batches, steps)])
        workers = set(multiprocessing.active_children()) - others
        assert len(workers) == 2
        if steps == 2:
            before = workers
            inside = loader.loader._iterator
            assert inside._tasks_outstanding > 0  # the next epoch's, though none of it has been asked for
    assert workers == before
    assert inside._tasks_outstanding == 0
    assert next(batches, None) is None
    (second, third, fourth) = batches_of(0, 2, 3, 4)
    assert equal(found[0], second[4:])
    assert equal(found[1], third)
    assert equal(found[2], fourth)
    loader.close()


@pytest.mark.gpu
def test_batches_are_pinned_for_a_gpu(small_config, people):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=1))
    for device in (torch.device("cpu"), torch.device("cuda")):
        loader, _ = train_batches(read_dataset("synthetic", people).train, config, device=device)
        for batch in loader:
            assert {part.is_pinned() for part in batch} == {device.type == "cuda"}
        loader.close()


def test_batches_are_those_of_the_files(small_config, people):
    """The loader's images equal the plain augmentation of what `load_crop` gives, with the run's random stream."""
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, seed=5)
    loader, sampler = train_batches(samples, config)
    sampler.epochs = range(3, 4)
    labels = class_indices(samples)
    for number, (keys, batch) in enumerate(zip(list(sampler), loader, strict=True)):
        images = normalize_batch(batch, PREPROCESSING, torch.device("cpu"))
        rng = np.random.default_rng([5, 3, 3, number])
        crops = np.stack([load_crop(samples[index].path, 128, 64) for index, _, _ in keys])
        np.testing.assert_allclose(images.numpy(), reference(crops, config.recipe, rng), rtol=0, atol=1e-6)
        assert batch.labels.tolist() == [labels[samples[index].pid] for index, _, _ in keys]
        assert batch.indices.tolist() == [index for index, _, _ in keys]


def test_a_part_of_a_batch_is_what_it_is_in_the_whole(small_config, people):
    train_set = TrainSet(read_dataset("synthetic", people).train, small_config)
    keys = [(index, 2, 3 * small_config.recipe.batch_size + index) for index in range(small_config.recipe.batch_size)]
    whole = train_set[keys]
    for part in (slice(0, 3), slice(5, None, 2), slice(7, 8)):
        for alone, in_whole in zip(train_set[keys[part]][:5], whole[:5], strict=True):
            assert np.array_equal(alone, in_whole[part])


def test_an_epoch_left_early_leaves_nothing_behind(small_config, people):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    loader, sampler = train_batches(samples, config)
    sampler.epochs = range(1, 2)
    whole = list(loader)
    for _ in range(2):
        next(iter(loader))
    assert equal(list(loader), whole)


def test_too_little_shared_memory_is_one_line(small_config, people, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    with refuses(OutOfMemory, "1 MB", "No space left on device (28)", hint="fewer --workers"):
        train_batches(read_dataset("synthetic", people).train, config)


def test_a_bad_image_comes_as_its_error_with_workers_too(small_config, people, tmp_path):
    samples = list(read_dataset("synthetic", people).train)
    (tmp_path / "0001_c1.jpg").write_bytes(b"")
    samples = tuple(s._replace(path=tmp_path / "0001_c1.jpg") for s in samples)
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=1))
    loader, _ = train_batches(samples, config)
    batch = next(iter(loader))
    assert isinstance(batch, UserError)
    assert "0001_c1.jpg: not a readable image" in str(batch)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_batches_of_one(small_config, people, world):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, recipe=dataclasses.replace(small_config.recipe, batch_size=32))
    whole = list(train_batches(samples, config)[0])
    shares = [list(train_batches(samples, config, rank=rank, world=world)[0]) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(set(part.labels.tolist())) == 8 // world for part in parts)
        for value, *pieces in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), value)
    with refuses(ConflictingOptions, "3 processes x accumulate=1"):
        train_batches(samples, config, world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_can_begin_in_its_middle(small_config, people, workers):
    samples = read_dataset("synthetic", people).train
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=workers))
    loader, sampler = train_batches(samples, config)
    sampler.epochs = range(2, 3)
    whole = [TrainBatch(*(part.clone() for part in batch)) for batch in loader]
    for first in (1, len(whole) - 1, len(whole)):
        sampler.first = first
        rest = [TrainBatch(*(part.clone() for part in batch)) for batch in loader]
        assert len(rest) == len(whole) - first
        assert equal(rest, whole[first:])


def test_a_bad_image_is_skipped_for_the_next_of_its_identity(small_config, people, tmp_path):
    samples = list(read_dataset("synthetic", people).train)
    bad = [index for index, sample in enumerate(samples) if sample.pid == samples[0].pid][:-1]
    (tmp_path / "bad.jpg").write_bytes(b"")
    for index in bad:
        samples[index] = samples[index]._replace(path=tmp_path / "bad.jpg")
    loader, _ = train_batches(tuple(samples), small_config, skip_bad=True)
    batches = list(loader)
    assert all(isinstance(batch, TrainBatch) for batch in batches)
    used = {int(index) for batch in batches for index in batch.indices if samples[index].pid == samples[0].pid}
    assert used == {bad[-1] + 1}
    assert loader.skipped
    assert set(loader.skipped) <= set(bad)
    assert all(reason.startswith(f"{tmp_path / 'bad.jpg'}: ") for reason in loader.skipped.values())
    samples[bad[-1] + 1] = samples[0]
    loader, _ = train_batches(tuple(samples), small_config, skip_bad=True)
    (error,) = [batch for batch in loader if isinstance(batch, UserError)]
    assert isinstance(error, InvalidFile)
    assert f"no image of identity {samples[0].pid} " in error.problem
    assert str(tmp_path / "bad.jpg") in error.problem


def test_closed_within_an_epoch_its_workers_end_and_the_next_epoch_has_new_ones(small_config, people):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    others = set(multiprocessing.active_children())
    loader, _ = train_batches(read_dataset("synthetic", people).train, config)
    loader.close()  # before there are any
    begun = iter(loader)
    next(begun)
    assert len(set(multiprocessing.active_children()) - others) == 2
    loader.close()
    assert not set(multiprocessing.active_children()) - others
    assert len(list(loader)) == len(loader) > 1
    loader.close()


@pytest.mark.slow
def test_workers_outlive_a_sigterm_but_not_the_process_that_uses_them(people):
    script = (
        "import dataclasses, multiprocessing, os, signal, sys, time; from pmm.presets import preset\n"
        "from pmm.data.loader import train_batches; from pmm.data.readers import read_dataset\n"
        "config = preset('tiny'); recipe = dataclasses.replace(config.recipe, batch_size=8)\n"
        "loader, _ = train_batches(read_dataset('synthetic', sys.argv[1]).train, "
        "dataclasses.replace(config, recipe=recipe))\n"
        "batches = iter(loader); next(batches)\n"
        "for worker in multiprocessing.active_children(): os.kill(worker.pid, signal.SIGTERM)\n"
        "time.sleep(0.1); print(len(list(batches)), len(multiprocessing.active_children()))\n"
        "raise RuntimeError('the end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(people)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.split() == ["5", "1"]
    assert done.stderr.strip().endswith("RuntimeError: the end")


@pytest.mark.parametrize(
    ("device", "world", "default", "served"),
    [("cpu", 1, "fork", False), ("cuda", 1, "fork", False), ("cpu", 2, "fork", False), ("cuda", 2, "fork", True),
     ("cpu", 1, "forkserver", True)],
)  # fmt: skip
def test_which_workers_are_forks_of_this_process(monkeypatch, device, world, default, served):
    met = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: default)
    monkeypatch.setattr(loader_module.forkserver, "set_forkserver_preload", lambda names: None)
    started = lambda: met.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(loader_module.forkserver, "ensure_running", started)
    before = signal.getsignal(signal.SIGTERM)
    method = loader_module._start_method(torch.device(device), world)
    assert (method, met) == (("forkserver", [signal.SIG_IGN]) if served else (None, []))
    assert signal.getsignal(signal.SIGTERM) is before


FROM_A_SERVER = """
import dataclasses, os, signal, sys, time, torch
from multiprocessing import forkserver
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.presets import preset

def first_of_two(device):
    config = preset("tiny")
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=16))
    loader, sampler = train_batches(samples, config, device=torch.device(device), rank=0, world=2)
    loader.pinned = False
    for epoch in (1, 2):
        sampler.epochs = range(epoch, epoch + 1)
        for batch in loader:
            yield [part.clone() for part in batch]
        if device == "cuda" and epoch == 1:
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGTERM)
            time.sleep(6)  # workers look every 5 s for the process that they come from
    loader.close()

if __name__ == "__main__":
    samples = read_dataset("synthetic", sys.argv[1]).train
    forks, others = list(first_of_two("cpu")), list(first_of_two("cuda"))
    same = [torch.equal(a, b) for x, y in zip(forks, others, strict=True) for a, b in zip(x, y, strict=True)]
    print(len(same), all(same), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.mark.slow
def test_workers_beside_nccl_are_no_forks_of_this_process_and_outlive_a_sigterm(people, tmp_path):
    (tmp_path / "load.py").write_text(FROM_A_SERVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "load.py", people],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["30 True True"]
