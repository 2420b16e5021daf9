"""What an interrupted run goes on from: the best model so far, of which last.pth may know nothing yet."""

import dataclasses

import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.config import Config
from pmm.training.resuming import best_so_far


@pytest.mark.parametrize(
    ("changed", "best"),
    [
        ({}, 0.8),
        ({"best": 0.3}, 0.5),
        ({"epoch": 1}, 0.5),  # last.pth has seen a worse one since, and knows
        ({"versions": {"init": "of another file"}}, 0.5),
        ({"seed": 7}, 0.5),
        (None, 0.5),
    ],
)
def test_a_best_model_of_this_run_counts_though_last_does_not_know_it(trained, tmp_path, changed, best):
    content = load(trained)
    config, saved = Config.from_dict(content["config"]), content | {"epoch": 1, "best": 0.5}
    if changed is None:
        (tmp_path / "best.pth").write_bytes(b"half of one")
    else:
        of_run = dataclasses.replace(config, seed=changed.pop("seed", config.seed)).to_dict()
        torch.save(content | {"epoch": 2, "best": 0.8, "config": of_run} | changed, tmp_path / "best.pth")
    assert best_so_far(saved, tmp_path, config) == best
    (tmp_path / "best.pth").unlink()
    assert best_so_far(saved, tmp_path, config) == 0.5
