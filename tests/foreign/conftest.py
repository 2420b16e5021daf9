"""Other toolkits, in an environment of their own where ours does not have them, and what is adopted there."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.foreign.networks import ForeignNetwork

CLIENTS = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients")
FOLDER = Path(__file__).parent
VIDEO = CLIENTS / "video/vtest.avi"


class AdoptedNetworkFiles(NamedTuple):
    """A network's file, and the weights that it was made with."""

    path: Path
    weights: Path


def run_there(network: ForeignNetwork | None, *arguments: object, timeout: float = 1200) -> str:
    """What Python prints in the environment of a network's toolkit (None: that of all toolkits)."""
    python = Path(sys.executable) if network and network.is_ours else CLIENTS / "foreign/bin/python"
    assert python.exists(), f"{python} is missing: make clients"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def adopt(network: ForeignNetwork, out: Path, *options: object) -> str:
    """Run `pmm adopt` where the toolkit is."""
    size = "--height", network.height, "--width", network.width
    return run_there(network, "-m", "pmm", "adopt", network.source, *size, "-o", out, *options)


@pytest.fixture(scope="session")
def adopted(store) -> Callable[[str, ForeignNetwork], AdoptedNetworkFiles]:
    """A network with random but calm weights, adopted once."""

    def get(name: str, network: ForeignNetwork) -> AdoptedNetworkFiles:
        def make(folder: Path) -> None:
            weights = folder / "weights.pth"
            run_there(network, FOLDER / "user_code.py", "weights", network.source, weights, *network[1:])
            adopt(network, folder / "net.pth", "--weights", weights)

        folder = store.get(f"adopted-{name}", make)
        return AdoptedNetworkFiles(folder / "net.pth", folder / "weights.pth")

    return get
