"""Galleries in other engines: what tests/gallery/exports proves, where the clients of all of them are installed."""

import os
import subprocess

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.full


def test_exported_galleries_are_read_by_the_engines_own_clients():
    python = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / "engines/bin/python"
    assert python.exists(), f"{python} is missing: make clients"
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/gallery/exports"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, "a client is not installed there"
