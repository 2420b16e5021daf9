"""What tests of galleries share."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture
def no_fsync(monkeypatch):
    """The machine goes on, so that what is written need not be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def crops(people, tmp_path):
    """A few crops in a folder that may be changed."""
    folder = tmp_path / "crops"
    folder.mkdir()
    for path in sorted((people / "bounding_box_test").glob("*.jpg"))[:9]:
        shutil.copy(path, folder)
    return folder
