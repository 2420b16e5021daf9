import dataclasses
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import pmm.data.loader
from pmm.artifacts import checkpoint
from pmm.artifacts.checkpoint import load
from pmm.config import Config
from pmm.data.bad_images import BadImageOptions
from pmm.data.loader import TrainLoader
from pmm.ops._extension import missing
from pmm.presets import preset
from pmm.training.announce import describe_kernels
from pmm.training.flags import TrainOptions, parse, resume_command
from pmm.training.launch import train
from pmm.training.run_logger import RunLogger
from pmm.training.state import learning_rate
from pmm.training.step import collapsed
from pmm.utils.errors import (
    CannotWrite,
    InvalidFile,
    InvalidValue,
    OutOfMemory,
    TrainingInterrupted,
    UsageError,
    UserError,
)
from pmm.utils.files import claimed
from tests.conftest import ROOT, assert_one_line_error, run_here, run_python
from tests.refusals import refuses

ON_CPU, RESUMED = TrainOptions(device="cpu"), TrainOptions(device="cpu", resume=True)
TIMES = ("seconds", "data_seconds", "step_seconds", "images_per_s", "memory_gb")
CPU_BUILD = {"compiler": "g++ 12.2.0", "cuda": None, "architectures": [], "sources": "0123456789ab"}


def weights(path):
    return load(path)["model"]


def halve(image):
    """A file that begins as one and cannot be read."""
    image.chmod(0o644)
    image.write_bytes(image.read_bytes()[:-200])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_another_seed_gives_other_bits(small_config, trained, tmp_path):
    """That the same gives the same, the runs below show that are stopped and resumed."""
    other = train(dataclasses.replace(small_config, seed=1), tmp_path / "other", ON_CPU)
    assert not same(weights(other), weights(trained))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    small_config, trained, tmp_path, monkeypatch, number
):
    """Stopped in the middle of an epoch, and resumed with as many workers as it likes."""
    import pmm.training.trainer

    calls = []
    original = pmm.training.trainer.train_step

    def told_to_stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the first of the second epoch
            signal.raise_signal(number)
        return original(*args, **kwargs)

    out, started, iterate = tmp_path / "run", [], TrainLoader.__iter__
    monkeypatch.setattr(TrainLoader, "__iter__", lambda self: started.append(len(self)) or iterate(self))
    monkeypatch.setattr(pmm.training.trainer, "train_step", told_to_stop)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(TrainingInterrupted, match=r"epoch 2/2, after step 1 of 3") as stop:
            train(small_config, out, ON_CPU)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert stop.value.number == number
    assert signal.getsignal(signal.SIGTERM) == before[1]
    state = load(out / "last.pth")
    assert (state["epoch"], state["progress"]["steps"], len(calls)) == (1, 1, 4)
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + '{"epoch": 2, "unfinished": true}\n')
    config = dataclasses.replace(load_config(out), data=dataclasses.replace(small_config.data, workers=1))
    train(config, out, RESUMED)
    assert len(calls) == 6
    assert started == [3, 3]  # in each run once, not in each epoch
    for name in ("best.pth", "last.pth"):
        assert same(weights(out / name), weights(trained.with_name(name)))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    uninterrupted = [json.loads(line) for line in trained.with_name("metrics.jsonl").read_text().splitlines()]
    assert [{**r, **dict.fromkeys(TIMES)} for r in records] == [{**r, **dict.fromkeys(TIMES)} for r in uninterrupted]


def test_a_run_resumes_only_on_its_own_data(trained, people, tmp_path):
    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    root = shutil.copytree(people, tmp_path / "people")
    for path in (root / "bounding_box_train").glob("0003_*"):
        path.unlink()
    config = load_config(out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    with refuses(InvalidValue, root, name="--num-classes", value=9, expected="8"):
        train(config, out, RESUMED)


def test_a_kill_between_the_files_loses_nothing(small_config, trained, tmp_path, monkeypatch):
    """The log comes first, then best.pth, last.pth last: what it does not know of is repeated to the same bits."""
    original, out, saved = checkpoint.save, tmp_path / "run", []

    def killed(path, state):
        log = out / "metrics.jsonl"
        saved.append((path.name, state["epoch"], len(log.read_text().splitlines()) if log.exists() else 0))
        if path.name == "last.pth" and state["epoch"] == 2:
            raise KeyboardInterrupt
        original(path, state)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(small_config, out, ON_CPU)
    best = load(trained)["epoch"]
    assert saved[:2] == [("last.pth", 0, 0), ("best.pth", 1, 1)]
    assert saved[2:] == [("best.pth", 2, 2)] * (best == 2) + [("last.pth", 2, 2)]
    assert load(out / "best.pth")["epoch"] == best > load(out / "last.pth")["epoch"] == 0
    monkeypatch.setattr(checkpoint, "save", original)
    train(load_config(out), out, RESUMED)
    for name in ("best.pth", "last.pth"):
        assert same(weights(out / name), weights(trained.with_name(name)))
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").open()] == [1, 2]


@pytest.mark.parametrize("known_to", ["last.pth", "best.pth"])
def test_what_was_best_before_an_interruption_stays_the_best(trained, tmp_path, known_to):
    """Also what was written after last.pth by a run that was killed."""
    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    measured = {"mean": [1.0, 2.0, 3.0], "std": [0.0, 0.0, 0.0], "crops": 9}
    torch.save({**load(out / "last.pth"), "epoch": 1, "best": 0.0, "crop_statistics": measured}, out / "last.pth")
    torch.save({**load(out / "best.pth"), "epoch": 2}, out / "best.pth")
    torch.save({**load(out / known_to), "best": 2.0}, out / known_to)  # no later epoch is as good
    before = (out / "best.pth").read_bytes()
    train(load_config(out), out, RESUMED)
    assert load(out / "last.pth")["epoch"] == 2
    assert load(out / "last.pth")["best"] == 2.0
    assert load(out / "last.pth")["crop_statistics"]["crops"] == 9
    assert (out / "best.pth").read_bytes() == before


def test_best_is_no_state_to_resume_from(small_config, trained, tmp_path, monkeypatch):
    undone = []
    monkeypatch.setattr("pmm.training.step.set_deterministic", lambda device, flag: lambda: undone.append(flag))
    out = tmp_path / "run"
    out.mkdir()
    state = load(trained)
    state["epoch"] = 1
    torch.save(state, out / "last.pth")
    with refuses(InvalidFile, "best.pth", path=out / "last.pth", hint="start a new run"):
        train(Config.from_dict(state["config"]), out, RESUMED)
    assert undone == [small_config.recipe.deterministic]


def test_two_runs_may_want_the_same_people(tmp_path):
    """The second waits for the first's drawing, and uses it."""
    script = (
        "import dataclasses, pmm.presets, pmm.training.data_setup\n"
        "config = pmm.presets.preset('tiny')\n"
        "data = dataclasses.replace(config.data, dataset='synthetic', root='people', synthetic_ids=8)\n"
        "config, split = pmm.training.data_setup.training_data(dataclasses.replace(config, data=data))\n"
        "print(config.data.synthetic_ids, config.model.num_classes, len(split.train))\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PMM_FAST": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in "ab"
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum("8 + 8 synthetic identities" in out for out, _ in outputs) == 1
    assert [out.splitlines()[-1] for out, _ in outputs] == ["8 7 84"] * 2


def load_config(out):
    return Config.from_dict(json.loads((out / "config.json").read_text()))


def test_what_a_run_leaves(trained):
    out = trained.parent
    assert {p.name for p in out.iterdir()} == {
        "best.pth", "last.pth", "config.json", "metrics.jsonl", "tensorboard", ".lock"
    }  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    for record in records:
        parts = [record[f"{kind}{stage}"] for kind in ("triplet", "cross_entropy") for stage in (1, 2, 3)]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 <= record["val_mAP"] <= 1
        assert record["images_per_s"] > 0
        assert 0 < record["data_seconds"] < record["seconds"]
        assert record["data_seconds"] + record["step_seconds"] == pytest.approx(record["seconds"])
    best = load(trained)
    assert best["best"] == max(r["val_mAP"] for r in records)
    assert records[best["epoch"] - 1]["val_mAP"] == best["best"]
    assert best["config"]["data"]["synthetic_ids"] == 12  # as they were drawn, which nothing asked for
    assert list((out / "tensorboard").iterdir())


def test_without_validation_best_is_last_and_a_bad_image_costs_no_step(small_config, tmp_path, monkeypatch):
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, val_identities=0.0))
    out, read, load_crop = tmp_path / "run", [], pmm.data.loader.load_crop

    def damaged(path, *size):
        read.append(path)
        if len(read) > 5 * 12:
            raise InvalidFile("damaged", path=path)
        return load_crop(path, *size)

    with monkeypatch.context() as patch:
        patch.setattr(pmm.data.loader, "load_crop", damaged)
        with refuses(InvalidFile, "damaged", hint="--skip-bad-images"):
            train(config, out, ON_CPU)
    last = load(out / "last.pth")
    assert (last["epoch"], last["progress"]["steps"]) == (1, 1)  # of four
    assert same(weights(out / "best.pth"), last["model"])
    best = train(load_config(out), out, RESUMED)
    assert same(weights(best), weights(best.with_name("last.pth")))
    assert load(best)["epoch"] == 2


def test_a_person_without_readable_images_is_not_answered_with_the_flag_that_was_given(
    small_config, tmp_path, monkeypatch
):
    def damaged(path, *size):
        raise InvalidFile("damaged", path=path)

    monkeypatch.setattr(pmm.data.loader, "load_crop", damaged)
    with refuses(InvalidFile, "no image of identity", hint="pmm check") as caught:
        train(
            small_config,
            tmp_path / "run",
            dataclasses.replace(ON_CPU, bad_images=BadImageOptions(skip_bad_images=True)),
        )
    assert "--skip-bad-images" not in caught.value.hint


def test_a_run_is_not_overwritten_and_a_finished_one_says_so(trained, people, tmp_path):
    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    before = weights(trained)
    again = run_here("-m", "pmm.train", "--preset", "tiny", "--root", people, "--out", out)
    assert_one_line_error(again, f"{out}: ", "--resume", "--out")
    done = run_here("-m", "pmm.train", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "the run is finished (2 epochs)" in done.stdout
    assert all(fact in done.stdout for fact in ("--extend", "--epochs N above 2"))
    changed = run_here("-m", "pmm.train", "--out", out, "--resume", "--epochs", "9")
    assert_one_line_error(changed, "recipe.epochs: 2 -> 9")
    changed = run_here("-m", "pmm.train", "--out", out, "--resume", "--preset", "paper")
    assert_one_line_error(changed, "preset: tiny -> paper")
    assert same(weights(out / "best.pth"), before)


def test_bad_input_is_one_line(people, tmp_path):
    def refused(*args, expected):
        done = run_here("-m", "pmm.train", "--preset", "tiny", "--out", tmp_path / "run", *args)
        assert_one_line_error(done, *map(str, expected))

    refused("--dataset", "market1501", expected=["--dataset market1501", "--root DIR"])
    refused("--dataset", "market1501", "--root", tmp_path / "none", expected=[f"{tmp_path / 'none'}: ", "market1501"])
    refused("--dataset", "cuhk", "--root", people, expected=["--dataset", "'cuhk'", "cuhk03-np-labeled"])
    refused("--root", people, "--batch-size", "64", expected=["--batch-size is 64", "44 or less", "11 "])
    refused("--root", people, "--batch-size", "30", expected=["--batch-size is 30", "--images-per-id 4"])
    refused("--root", people, "--weights", "imagenet", expected=["resnet10 backbone has no such weights"])
    refused("--root", people, "--k", "40", expected=["--k is 40", "32 at most", "128x64"])
    refused("--root", people, "--preset", "huge", expected=["--preset is 'huge'", "paper, tiny"])
    refused("--root", people, "--method", "pmn", expected=["--method is 'pmn'", "pmm, baseline, bdb, "])
    refused("--root", people, "--method", "bdb", "--k", "2", expected=["--k ", "--method bdb", "--method pmm or "])
    refused("--root", people, "--direction", "paste", expected=["--direction ", "--method pmm", "--method a-cutmix"])
    refused("--root", people, "--method", "a-cutmix", "--k=33", expected=["--k is 33", "32 at most"])
    refused(
        "--root",
        people,
        "--method",
        "a-cutmix",
        "--direction",
        "up",
        expected=["--direction is 'up'", "replace or paste"],
    )
    refused("--root", people, "--seed", "-1", expected=["--seed is -1", "0"])
    refused("--root", people, "--num-classes", "777", expected=["--num-classes is 777", "11, ", people])
    refused("--root", people, "--seed", str(1 << 64), expected=["--seed is 18446744073709551616", "2**64"])
    refused("--root", people, "--synthetic-ids", "50", expected=["--synthetic-ids is 50", "12", people, "--root"])
    refused("--root", people, "--synthetic-ids", "200", expected=["--synthetic-ids is 200", "12", people, "--root"])
    refused("--root", people, "--synthetic-seed", "0", expected=["--synthetic-seed is 0", "7", people, "--root"])
    refused(
        "--preset", "paper", "--warmup", "0.4", expected=["--warmup would change nothing", "--schedule flat-cosine"]
    )
    assert not list((tmp_path / "run").glob("[!.]*"))
    refused("--resume", expected=[tmp_path / "run", "config.json", "without --resume"])
    (tmp_path / "file").write_text("")
    done = run_here("-m", "pmm.train", "--preset", "tiny", "--root", people, "--out", tmp_path / "file")
    assert_one_line_error(done, f"{tmp_path / 'file'}: ", "folder to write to")
    if not torch.cuda.is_available():
        refused("--root", people, "--device", "cuda", expected=["no usable CUDA GPU"])


@pytest.mark.parametrize(
    ("device", "facts", "said"),
    [
        ("cpu", {}, "the kernels are not compiled; run pip install"),
        ("cuda", {}, "the kernels are not compiled; run pip install"),
        ("cuda", CPU_BUILD, "the kernels were built without CUDA; rebuild with PMM_BUILD_CUDA=1"),
    ],
)
def test_kernels_are_required_before_any_work(tmp_path, monkeypatch, built_with, device, facts, said):
    built_with(**facts)
    monkeypatch.setattr("pmm.runtime.eager.torch_device", lambda name: torch.device(device))
    done = run_here(
        "-m", "pmm.train", "--preset", "tiny", "--root", tmp_path / "people", "--out", tmp_path / "run",
        PMM_REQUIRE_EXT="1",
    )  # fmt: skip
    assert_one_line_error(done, f"PMM_REQUIRE_EXT=1, but {said}")
    assert not done.stdout
    assert not (tmp_path / "people").exists()
    assert not (tmp_path / "run").exists()


def test_a_library_that_does_not_load_is_missing_too(tmp_path, monkeypatch, built_with):
    built_with(**CPU_BUILD)
    (tmp_path / "other.so").write_bytes(b"built for another torch")
    monkeypatch.setattr("pmm.ops._extension.LIBRARY", tmp_path / "other.so")
    with pytest.warns(UserWarning, match="do not load with torch .*; going on with plain torch"):
        assert describe_kernels(torch.device("cpu")).startswith("plain torch on cpu: the kernels do not load with")
    missing.cache_clear()
    done = run_here("-m", "pmm.train", "--root", tmp_path / "people", "--device", "cpu", PMM_REQUIRE_EXT="1")
    assert_one_line_error(done, "PMM_REQUIRE_EXT=1, but the kernels do not load with torch")
    assert not (tmp_path / "people").exists()


def test_a_run_says_what_the_mix_runs_on(people, tmp_path, built_with):
    flags = ["--preset", "tiny", "--root", people, "--device", "cpu", "--epochs", "1", "--val-identities", "0.25"]
    built_with()
    done = run_here("-m", "pmm.train", *flags, "--batch-size", "12", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("kernels of the mix: ")]
    assert "plain torch on cpu: the kernels are not compiled; run pip install" in line
    assert load(tmp_path / "run" / "best.pth")["versions"]["pmm kernels"] == "none"


def test_kernels_are_described_for_the_device(built_with):
    built_with(**CPU_BUILD)
    assert describe_kernels(torch.device("cuda")) == (
        "plain torch on cuda: the kernels were built without CUDA; rebuild with PMM_BUILD_CUDA=1"
    )


def test_bad_images_are_all_named(people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    files = sorted((root / "bounding_box_train").iterdir())
    for path in files[::3]:
        halve(path)
    done = run_here(
        "-m", "pmm.train", "--preset", "tiny", "--root", root, "--out", tmp_path / "run", "--val-identities", "0"
    )
    assert_one_line_error(done, "bounding_box_train", "not a readable image", f"{len(files[::3])} images", "--resume")
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 0


def test_what_is_bad_at_sight_is_named_before_a_run_begins(people, small_config, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    files = sorted((root / "bounding_box_train").iterdir())
    files[5].chmod(0o644)
    files[5].write_bytes(b"")
    halve(files[9])
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, root=str(root)))
    with refuses(InvalidFile, "2 images", files[5].name, files[9].name, path=root, hint="--skip-bad-images"):
        train(config, tmp_path / "run", ON_CPU)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_last_checkpoint(people, tmp_path, monkeypatch):
    """The system itself refuses: no file may grow beyond 2 MB while the third checkpoint is written beside a step."""
    out, saves, original = tmp_path / "run", [], checkpoint.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(path, state):
        saves.append((path.name, threading.current_thread() is threading.main_thread()))
        try:
            if len(saves) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
            original(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoint, "save", save)
    flags = ("--preset", "tiny", "--root", people, "--out", out, "--epochs", "9", "--save-minutes", "1e-9")
    done = run_here("-m", "pmm.train", *flags, "--val-identities", "0.25", "--device", "cpu")
    assert_one_line_error(done, "cannot write", "File too large", "last.pth", "ulimit", "unchanged", "--resume")
    assert saves == [("last.pth", True), ("last.pth", False), ("last.pth", False)]
    assert load(out / "last.pth")["epoch"] == 0
    assert not list(out.glob(".*.pth*"))


def test_defaults_follow_preset_and_data(monkeypatch):
    monkeypatch.delenv("PMM_FAST", raising=False)
    import pmm.utils.hardware

    monkeypatch.setattr(pmm.utils.hardware, "nvidia_gpus", tuple)
    config = parse([]).config
    assert (config.preset, config.data.dataset, config.recipe.epochs) == ("tiny", "synthetic", 60)
    monkeypatch.setattr(pmm.utils.hardware, "nvidia_gpus", lambda: ("a GPU",))
    config = parse([]).config
    assert (config.preset, config.recipe.epochs) == ("paper", 60)
    assert parse(["--device", "cpu"]).config.preset == "tiny"
    config = parse(["--preset", "paper", "--dataset", "market1501", "--root", "/data"]).config
    assert (config.recipe.epochs, config.data.root, config.recipe.batch_size) == (400, "/data", 128)
    assert parse(["--epochs", "7", "--block", "2", "1"]).config.model.block == (2, 1)
    monkeypatch.setenv("PMM_FAST", "1")
    assert parse([]).config.recipe.epochs == 3


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(1, 1e-4), (4, 1e-4), (5, 2e-4), (49, 1e-3), (50, 1e-3), (199, 1e-3), (200, 1e-4), (299, 1e-4), (300, 1e-5)],
)
def test_the_papers_learning_rate(epoch, lr):
    recipe = preset("paper").recipe
    for step in ((epoch - 1) * 23, epoch * 23 - 1):
        assert learning_rate(recipe, step, 23) == pytest.approx(lr)
    stretched = dataclasses.replace(recipe, epochs=800)
    assert learning_rate(stretched, (2 * epoch - 1) * 23, 23) == pytest.approx(lr)


def test_the_flat_cosine_learning_rate():
    recipe = dataclasses.replace(preset("tiny").recipe, epochs=10, lr=1.0, warmup=0.2, flat=0.5)
    rates = [learning_rate(recipe, step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[19] == rates[49] == 1.0
    assert rates[74] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.0)
    assert rates[19:] == sorted(rates[19:], reverse=True)


def test_collapse_is_noticed():
    dead = {"triplet1": 0.6931, "cross_entropy1": 6.6, "triplet2": 0.6932, "cross_entropy2": 6.62}
    assert collapsed(dead, 751)
    assert collapsed({**dead, "triplet2": 0.739}, 751)  # seen in a run that no longer learned
    assert not collapsed({**dead, "triplet2": 2.7}, 751)  # a run that has only begun
    assert not collapsed({**dead, "triplet1": 0.5}, 751)
    assert not collapsed({**dead, "cross_entropy2": 3.0}, 751)


def test_a_loss_that_is_not_finite_stops(small_config, tmp_path):
    config = dataclasses.replace(small_config, recipe=dataclasses.replace(small_config.recipe, lr=1e30, warmup=0.0))
    with refuses(
        UserError, "epoch 1/2, step ", "the loss is ", tmp_path / "run" / "bad-batch.json", hint="--lr"
    ) as raised:
        train(config, tmp_path / "run", ON_CPU)
    report = json.loads((tmp_path / "run" / "bad-batch.json").read_text())
    assert f"step {report['step']}:" in str(raised.value)
    assert len(set(report["files"])) == 12
    assert all(Path(file).is_file() for file in report["files"])
    assert not math.isfinite(float(report["losses"]["loss"]))
    assert report["losses"]["loss"] in ("nan", "inf")  # JSON has no number for it
    assert not (tmp_path / "run" / "best.pth").exists()
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "last.pth").values())


def test_bad_images_are_skipped_counted_and_named(people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    files = sorted((root / "bounding_box_train").iterdir())
    last = {file.name[:4]: file for file in files}
    for file in {*last.values(), *files[::5]}:  # of all identities, of those that are held out too
        halve(file)
    flags = ("--preset", "tiny", "--root", root, "--out", tmp_path / "run", "--val-identities", "0.25")
    keep = ("--device", "cpu", "--skip-bad-images", "--save-minutes", "1e-9")
    done = run_here("-m", "pmm.train", *flags, *keep, "--epochs", "3", "--batch-size", "12", "--val-every", "1")
    assert done.returncode == 0, done.stderr
    assert "held-out images skipped; " in done.stderr
    assert "images skipped so far; " in done.stderr
    assert str(root / "bounding_box_train") in done.stderr
    counts = [json.loads(line)["skipped_images"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert counts == sorted(counts)
    state = load(tmp_path / "run" / "last.pth")
    assert len(state["progress"]["skipped"]) == counts[-1] > 1
    # what was skipped before an interruption stays skipped
    state["epoch"] = 2
    torch.save(state, tmp_path / "run" / "last.pth")
    again = run_here("-m", "pmm.train", "--out", tmp_path / "run", "--resume", *keep)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["skipped_images"] >= counts[-1]


def test_a_surplus_argument_is_refused_before_a_run_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(UsageError, "unexpected argument 'yes'", hint="pmm train --help"):
        parse(["--resume", "yes"])
    with refuses(InvalidFile, "last.pth", hint="--out"):
        parse(["--resume"])


def test_a_saved_configuration_that_cannot_be_used_is_refused_with_its_path(tmp_path):
    saved = tmp_path / "config.json"
    for recipe, fact in (({"lr": -1}, "config.recipe.lr is -1.0"), ({"epoks": 1}, "config.recipe.epoks")):
        saved.write_text(json.dumps({"recipe": recipe}))
        with refuses(InvalidFile, fact, path=saved):
            parse(["--resume", "--out", str(tmp_path)])


def test_what_going_on_needs_is_said(people, monkeypatch):
    flags = ["--root", str(people), "--out", "a run", "--device", "cpu", "--save-minutes", "2", "--skip-bad-images"]
    command = parse(["--preset", "tiny", *flags])
    line = resume_command(command, command.files.out)
    assert line == "python -m pmm.train --out 'a run' --device cpu --save-minutes 2 --skip-bad-images"
    assert resume_command(parse(["--preset", "tiny"]), Path("run")) == "python -m pmm.train --out run"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "on each machine, as before) torchrun --nnodes 2 ... --nproc-per-node 8 -m" in resume_command(
        command, command.files.out
    )


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(0, 0, True), (3, 3, False), (8, 0, True), (9, 1, False)])
def test_the_first_process_of_each_machine_says_what_is_wrong(tmp_path, rank, local_rank, speaks):
    """Only there may it be: a folder that another machine does not see."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    done = run_python("-m", "pmm.train", "--resume", "--out", tmp_path / "elsewhere", **place)
    assert done.returncode == 1
    assert ("holds no run to resume" in done.stderr) is speaks


def test_people_are_not_drawn_into_the_current_folder(tmp_path):
    """It could not be put in place at once."""
    done = run_here("-m", "pmm.train", "--preset", "tiny", "--root", ".", "--out", tmp_path / "run", cwd=tmp_path)
    assert_one_line_error(done, "--root is '.'", "the current one")


def test_a_worker_that_dies_is_one_line(small_config, tmp_path, monkeypatch):
    import pmm.training.trainer

    original = pmm.training.trainer.train_step

    def kills_a_worker(*args, **kwargs):
        os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        time.sleep(1)  # torch says it here, wherever the process happens to be
        return original(*args, **kwargs)

    monkeypatch.setattr(pmm.training.trainer, "train_step", kills_a_worker)
    others = set(multiprocessing.active_children())
    config = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, workers=2))
    with refuses(UserError, "DataLoader worker", hint="--workers"):
        train(config, tmp_path / "run", ON_CPU)
    assert not set(multiprocessing.active_children()) - others  # the other worker has ended too
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 0


def test_a_gpu_that_is_full_is_one_line(small_config, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr("pmm.training.trainer.train_step", full)
    with refuses(OutOfMemory, "Tried to allocate 20 GiB", "--accumulate 2", "--amp bf16", hint="--resume"):
        train(small_config, tmp_path / "run", ON_CPU)
    with monkeypatch.context() as patch:
        patch.setattr("pmm.training.trainer.make_train_state", full)
        with refuses(OutOfMemory, "Tried to allocate 20 GiB", hint="start again") as never_begun:
            train(small_config, tmp_path / "never begun", ON_CPU)
    assert "--resume" not in str(never_begun.value)

    def broken(*args, **kwargs):
        raise RuntimeError("the size of tensor a")

    monkeypatch.setattr("pmm.training.trainer.train_step", broken)
    with pytest.raises(RuntimeError, match="tensor a"):  # a bug stays one
        train(small_config, tmp_path / "other", ON_CPU)


def test_a_log_on_a_full_disk_is_named(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    log = RunLogger(tmp_path / "metrics.jsonl", Full(), None)
    with refuses(CannotWrite, "No space left on device", path=tmp_path / "metrics.jsonl"):
        log.write({"epoch": 1})


def test_a_run_says_where_its_time_goes_and_warns_once(small_config, tmp_path, monkeypatch, capsys, caplog):
    import pmm.training.trainer

    class Starved(pmm.training.trainer.Meter):
        def record(self):
            return {**super().record(), "seconds": 1.5, "data_seconds": 0.6, "step_seconds": 0.9}

    monkeypatch.setattr(pmm.training.trainer, "Meter", Starved)
    recipe = dataclasses.replace(small_config.recipe, epochs=3)
    data = dataclasses.replace(small_config.data, val_identities=0.0)  # four batches, not three
    train(dataclasses.replace(small_config, recipe=recipe, data=data), tmp_path / "run", ON_CPU)
    done = capsys.readouterr()
    assert done.out.count("  data 150 ms  step 225 ms  ") == 3
    assert caplog.text.count("40% of the epoch was spent waiting for images") == 1
    assert done.out.count("config: recipe: epochs=3, sampler=pk, batch_size=12,") == 1


def test_a_run_in_use_is_refused(small_config, tmp_path):
    with claimed(tmp_path / "run"), refuses(CannotWrite, "another process", path=tmp_path / "run"):
        train(small_config, tmp_path / "run", ON_CPU)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_half_written_files_of_a_killed_run_are_swept(small_config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in (".last.pth.abc.pth", ".metrics.jsonl.x.jsonl"):
        (out / name).write_bytes(b"half")
    (out / "mine.txt").write_text("kept")
    recipe = dataclasses.replace(small_config.recipe, epochs=1)
    train(dataclasses.replace(small_config, recipe=recipe), out, TrainOptions())
    assert {path.name for path in out.glob(".*")} == {".lock"}
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(small_config, tmp_path):
    """Other partners, losses or gradients would show, in any of the six steps.

    At the preset's rate they would not: there, two threads instead of one turn the gradients of the third step around.
    """
    ends = []
    for name, compiled in ("eager", False), ("compiled", True):
        recipe = dataclasses.replace(small_config.recipe, lr=1e-5, compile=compiled)
        best = train(dataclasses.replace(small_config, recipe=recipe), tmp_path / name, ON_CPU)
        lines = best.with_name("metrics.jsonl").read_text().splitlines()
        ends.append(([json.loads(line) for line in lines], load(best.with_name("last.pth"))))
    (records, eager), (compiled_records, compiled) = ends
    for ours, theirs in zip(compiled_records, records, strict=True):
        losses = {key: value for key, value in theirs.items() if key.startswith(("loss", "triplet", "cross_entropy"))}
        assert len(losses) == 7
        assert {key: ours[key] for key in losses} == pytest.approx(losses, rel=1e-4)
    moments, compiled_moments = (end["optimizer"]["state"] for end in (eager, compiled))
    assert moments.keys() == compiled_moments.keys()
    for key, state in moments.items():
        gradient = state["exp_avg"]
        if gradient.ndim > 1:  # a bias before a norm has rounding alone
            assert (compiled_moments[key]["exp_avg"] - gradient).norm() < 0.01 * gradient.norm(), key
    assert eager["model"].keys() == compiled["model"].keys()


def test_a_model_without_its_last_checkpoint_is_not_overwritten(people, tmp_path):
    (tmp_path / "best.pth").write_bytes(b"mine")
    done = run_here("-m", "pmm.train", "--preset", "tiny", "--root", people, "--out", tmp_path)
    assert_one_line_error(done, f"{tmp_path}: ", "best.pth", "last.pth", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]
