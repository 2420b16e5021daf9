import logging
from types import SimpleNamespace

import numpy as np

from pmm.data.samples import Sample
from pmm.models.pmm import PMM
from pmm.presets import preset
from pmm.training import pictures
from pmm.utils.errors import InvalidFile


def test_a_picture_that_cannot_be_drawn_ends_no_training(monkeypatch, caplog, tmp_path):
    config, model = preset("tiny"), PMM.__new__(PMM)
    samples = tuple(Sample(tmp_path / f"{pid}.png", pid, 0) for pid in range(3))
    logged, crops = [], np.zeros((3, 8, 4, 3), np.uint8)

    def log(error):
        def draw(*args, **options):
            if error:
                raise error
            return "picture"

        monkeypatch.setattr(pictures, "load_crops", lambda paths, size: crops)
        monkeypatch.setattr(pictures, "mix_picture", draw)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pmm"):
            board = SimpleNamespace(add_picture=lambda *args: logged.append(args))
            pictures.log_mix_picture(board, model, samples, config, 1, ())
        return [record.message for record in caplog.records]

    (line,) = log(ValueError("y1 must be >= y0\nand more"))
    assert "epoch 1" in line
    assert line.endswith("y1 must be >= y0")
    assert not log(InvalidFile("damaged", path=samples[0].path))  # if training meets it too, that one says so
    assert not logged
    assert not log(None)
    assert logged == [("mix", "picture", 1)]
