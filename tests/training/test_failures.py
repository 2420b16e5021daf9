"""Errors of torch, gloo, NCCL and CUDA that end a run in one line, and GPUs that processes cannot share."""

import errno
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pmm.training.distributed import PEER_ENDED, Processes, init_distributed
from pmm.training.failures import explain_errors
from pmm.utils.errors import BackendUnavailable, CannotWrite, UserError
from pmm.utils.files import cannot_write
from tests.refusals import refuses

SHM = (
    "Error while creating shared memory segment /dev/shm/nccl-WU88OE (size 9637888), error: No space left on device "
    "(28)"
)
LEFT = "socketProgress: Connection closed by remote peer node1<41234>"


def nccl(result, last):
    """As torch 2.14 words a result of NCCL 2.30, and its last error."""
    place = "/pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94"
    text = f"NCCL error in: {place}, {result}, NCCL version 2.30.7\nnccl...Error: ...\nLast error:\n{last}"
    return dist.DistBackendError(text)


def gloo(place, text):
    return RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/{place}] {text}")


BUSY = (
    "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
    "name: EADDRINUSE, message: address already in use\nException raised from makeWithPort at ...\nframe #0: ..."
)
STORE = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
FAILURES = {
    "shared memory": (nccl("unhandled system error (run with NCCL_DEBUG=INFO for details)", SHM), SHM, "--shm-size"),
    "no known cause": (nccl("invalid usage", "Duplicate GPU detected"), "invalid usage", "Duplicate GPU"),
    "left, by NCCL": (nccl("remote process exited or there was a network error", LEFT), PEER_ENDED),
    "port": (dist.DistNetworkError(BUSY), "port: 29500", "--master-port"),
    "left, by gloo": (gloo("pair.cc:534", "Connection closed by peer [127.0.0.1]:58054"), PEER_ENDED),
    "left, by the store": (dist.DistNetworkError(STORE), PEER_ENDED),
    "left in a write": (gloo("pair.cc:420", "writev [127.0.0.1]:58054: Broken pipe"), PEER_ENDED),
    "refused": (gloo("pair.cc:144", "connect [10.0.0.2]:29500: Connection refused"), "10.0.0.2", "GLOO_SOCKET_IFNAME"),
    "slow": (gloo("unbound_buffer.cc:81", "Timed out waiting 1800000ms for recv operation to complete"), "1800000ms"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_communication_that_fails_is_told_in_its_own_words(name, tmp_path):
    error, *facts = FAILURES[name]
    with pytest.raises(UserError) as raised, explain_errors(tmp_path, 2):
        raise error
    line = str(raised.value)
    assert all(fact in line for fact in facts), line
    assert (line == PEER_ENDED) == (PEER_ENDED in facts)
    assert "makeWithPort" not in line
    with pytest.raises(type(error)) as raised, explain_errors(tmp_path, 1):
        raise error
    assert raised.value is error


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), explain_errors(tmp_path, 2):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")


def test_how_a_run_goes_on_that_could_not_be_written_is_said(tmp_path):
    def error():
        return cannot_write(tmp_path / "best.pth", OSError(errno.ENOSPC, "No space left on device"))

    with refuses(CannotWrite, path=tmp_path / "best.pth", hint="make room") as caught, explain_errors(tmp_path, 1):
        raise error()
    assert "--resume" not in str(caught.value)
    (tmp_path / "last.pth").touch()
    with refuses(CannotWrite, "make room", hint="--resume"), explain_errors(tmp_path, 1):
        raise error()


def test_a_gpu_that_torch_has_no_code_for(tmp_path):
    text = "CUDA error: no kernel image is available for execution on the device\nSearch for `cudaError..."
    with refuses(BackendUnavailable, "no code for this GPU", torch.__version__), explain_errors(tmp_path, 1):
        raise torch.AcceleratorError(text)


@pytest.fixture
def process(monkeypatch):
    """Call it with the local rank, the number of GPUs that this process sees, and the UUIDs of all processes' GPUs."""

    def pretend(local, visible, uuids):
        variables = {"RANK": local, "LOCAL_RANK": local, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 0}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[local]))
        answers = {"init_process_group": None, "destroy_process_group": None, "get_rank": local, "get_world_size": 2}
        for name, answer in answers.items():
            monkeypatch.setattr(dist, name, lambda *args, answer=answer: answer)
        gathered = lambda self, value: (uuids if isinstance(value, str) else [value]) if self.main else []  # noqa: E731
        monkeypatch.setattr(Processes, "gather", gathered)
        monkeypatch.setattr(Processes, "all_reduce_max", lambda self, number: number)
        return init_distributed(torch.device("cuda"))

    return pretend


@pytest.mark.parametrize(("local", "visible", "index"), [(0, 2, 0), (1, 2, 1), (0, 1, 0), (1, 1, 0)])
def test_a_process_takes_its_gpu_or_the_only_one_that_it_sees(process, local, visible, index):
    with process(local, visible, ["GPU-1", "GPU-2"]) as (processes, device):
        assert (processes.rank, device) == (local, torch.device("cuda", index))


def test_processes_without_gpus_of_their_own(process):
    with refuses(BackendUnavailable, "process 3", "has 2", hint="--nproc-per-node 2"):
        process(3, 2, ["GPU-1"] * 4).__enter__()
    with refuses(BackendUnavailable, "processes 0 and 1", "same GPU", hint="--nproc-per-node"):
        process(0, 1, ["GPU-1", "GPU-1"]).__enter__()
