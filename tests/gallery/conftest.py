"""What tests of galleries share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_fsync(monkeypatch):
    """The machine goes on, so that what is written need not be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
