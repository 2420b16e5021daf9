"""How many threads training gets: as asked for, or as many as a quota of CPU time allows."""

import pytest
import torch

import pmm.training.trainer
from pmm.runtime import torch_runner
from pmm.training.flags import TrainOptions, parse, resume_command
from pmm.training.launch import train
from pmm.utils.errors import UsageError
from tests.refusals import refuses


@pytest.fixture
def one_core(monkeypatch):
    """A quota of one core."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch_runner, "quota_cores", lambda: 1)


@pytest.fixture
def trained_with(small_config, tmp_path, monkeypatch):
    """Call it with options of `train`: the threads that torch has when the model is made."""
    found = []

    class Ended(Exception):
        pass

    def stop(*_, **__):
        found.append(torch.get_num_threads())
        raise Ended

    def start(**options):
        with pytest.raises(Ended):
            train(small_config, tmp_path / "run", TrainOptions(device="cpu", **options))
        return found.pop()

    monkeypatch.setattr(pmm.training.trainer, "Trainer", stop)
    return start


def test_training_has_the_threads_asked_for(trained_with, tmp_path):
    before = torch.get_num_threads()
    assert trained_with() == before
    assert trained_with(threads=before + 1) == before + 1
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "last.pth").touch()
    assert trained_with(threads=before + 2, resume=True) == before + 2
    assert torch.get_num_threads() == before


def test_training_keeps_to_the_quota(trained_with, one_core, monkeypatch):
    before = torch.get_num_threads()
    assert trained_with() == 1
    assert trained_with(threads=before + 1) == before + 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    assert trained_with() == before
    assert torch.get_num_threads() == before


def test_the_flag_of_training():
    command = parse(["--preset", "tiny", "--out", "run", "--threads", "3"])
    assert command.options.threads == 3
    assert parse(["--preset", "tiny"]).options.threads == 0
    assert resume_command(command, command.files.out) == "python -m pmm.train --out run --threads 3"
    for bad in ("-1", "100000"):
        with refuses(UsageError, f"--threads is {bad}", hint="pmm train --help"):
            parse(["--preset", "tiny", "--threads", bad])
