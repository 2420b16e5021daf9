"""What keeps embeddings of two sources from being compared is named."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from pmm.gallery.storage.source import check_comparable
from pmm.utils.errors import InvalidFile
from tests.gallery.old_index import source
from tests.refusals import refuses


def test_differences_name_what_cannot_be_compared():
    mine = source(4)
    assert not mine.differences(dataclasses.replace(mine, precision="fp16", artifact_sha256="b" * 64, artifact="x"))
    assert mine.differences(dataclasses.replace(mine, checkpoint_sha256="d" * 64))[0].startswith("checkpoint cccc")
    assert mine.differences(source(4, "cosine")) == ["normalised False, not True", "metric euclidean, not cosine"]
    size = dataclasses.replace(mine.preprocessing, height=256)
    assert mine.differences(dataclasses.replace(mine, preprocessing=size)) == ["height 128, not 256"]
    size = dataclasses.replace(mine.preprocessing, antialias=False, padding=(0, 0, 0))
    assert mine.differences(dataclasses.replace(mine, preprocessing=size)) == [
        "antialias True, not False", "padding none (stretched), not (0, 0, 0)"
    ]  # fmt: skip


def test_another_model_is_refused_and_other_rounding_told(caplog):
    mine, model = source(4), Path("model.onnx")
    with refuses(InvalidFile, "checkpoint cccccccccccc..., not dddddddddddd...", path=model, hint="embed"):
        check_comparable(mine, dataclasses.replace(mine, checkpoint_sha256="d" * 64), model)
    with caplog.at_level(logging.WARNING, "pmm"):
        check_comparable(mine, mine, model)
        assert not caplog.records
        check_comparable(mine, dataclasses.replace(mine, precision="fp16"), model)
        check_comparable(mine, dataclasses.replace(mine, artifact_sha256="b" * 64), model)
    first, second = (record.getMessage() for record in caplog.records)
    assert "fp32" in first
    assert "fp16" in first
    assert "last digits" in second
