"""What is settled of threads before torch is loaded."""

import ctypes
import os
import subprocess
import sys

import pytest

from pmm.utils import scheduling
from tests.conftest import run_python


@pytest.mark.parametrize(
    ("threads", "cores", "given", "settled"),
    [
        (8, 8, {}, {"GOMP_SPINCOUNT": scheduling.SPINS}),
        (4, 4, {}, {"GOMP_SPINCOUNT": scheduling.SPINS}),
        (2, 8, {}, {"GOMP_SPINCOUNT": scheduling.SPINS, "OMP_NUM_THREADS": "2"}),
        (2, 8, {"OMP_NUM_THREADS": "5"}, {"GOMP_SPINCOUNT": scheduling.SPINS, "OMP_NUM_THREADS": "5"}),
        (8, 8, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (8, 8, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_is_said_of_threads_in_the_environment(monkeypatch, threads, cores, given, settled):
    monkeypatch.setattr(scheduling, "physical_cores", lambda: cores)
    monkeypatch.setattr(scheduling, "compute_threads", lambda: threads)
    scheduling.configure_threads(given)
    assert given == settled


def test_a_command_says_it_before_torch_is_loaded(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "import os, sys\n"
        "from pmm.utils import command_line\n"
        "def main(prog):\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(os.environ['GOMP_SPINCOUNT'], os.environ.get('OMP_NUM_THREADS'))\n"
        "command_line.run(main, prog='prog')"
    )
    assert run_python("-c", script).stdout.split()[0] == scheduling.SPINS
    assert run_python("-c", script, GOMP_SPINCOUNT="5", OMP_NUM_THREADS="3").stdout.split() == ["5", "3"]


def slice_of(pid):
    """Of a process: policy, niceness, and the time in one go in ns (sched_getattr(2))."""
    found, number = scheduling._Attributes(), {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    if ctypes.CDLL(None).syscall(number, pid, ctypes.byref(found), ctypes.sizeof(found), 0) != 0:
        pytest.skip("the system does not tell")
    return found.policy, found.nice, found.runtime


@pytest.mark.skipif(sys.platform != "linux", reason="another scheduler")
@pytest.mark.parametrize("nice", [0, 7])
def test_a_command_and_what_it_starts_run_in_short_turns(nice):
    script = (
        "import os, subprocess, sys\n"
        "from pmm.utils import command_line\n"
        "def main(prog):\n"
        "    held = subprocess.Popen(['sleep', '60'])\n"
        "    print(held.pid, flush=True)\n"
        "    sys.stdin.readline()\n"
        "    held.kill()\n"
        f"os.nice({nice})\n"
        "command_line.run(main, prog='prog')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    before = slice_of(0)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as command:
        child = int(command.stdout.readline())
        found = [slice_of(command.pid), slice_of(child)]
        command.stdin.write("\n")
        command.stdin.flush()
    for policy, niceness, taken in found:
        assert (policy, niceness) == (before[0], before[1] + nice)
        assert taken == scheduling.SLICE_NS or taken == before[2] == 0  # Linux before 6.12 keeps no such number
    assert slice_of(0) == before


@pytest.mark.parametrize("missing", ["machine", "call", "policy"])
def test_a_system_that_does_not_know_it(monkeypatch, missing):
    if missing == "machine":
        monkeypatch.setattr(scheduling.platform, "machine", lambda: "riscv64")
    elif missing == "policy":
        monkeypatch.setattr(scheduling.os, "sched_getscheduler", lambda pid: os.SCHED_BATCH)
    else:
        monkeypatch.setattr(scheduling.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert not scheduling.use_short_time_slices()
