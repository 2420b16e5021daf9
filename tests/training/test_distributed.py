"""Processes of their own on one CPU: two that talk through gloo and train as one would, one that a terminal ends."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from pmm import train
from pmm.artifacts.checkpoint import load
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.models.registry import build_model
from pmm.models.stages import Head
from pmm.training.distributed import PEER_ENDED, SINGLE, Processes, init_distributed
from pmm.training.state import in_train_mode, make_train_state
from pmm.training.step import train_step
from pmm.training.validation import Validation
from pmm.utils import command_line
from pmm.utils.errors import InvalidFile, InvalidValue, UserError
from tests.conftest import ROOT
from tests.forks import FORKS
from tests.refusals import refuses

CPU = torch.device("cpu")
GATHERED, APART = {"gather": True}, {"gather": False, "freeze_backbone": 1}  # which is thawed for the step


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def started(rank, port, config, out):
    """One of two processes: all that the tests below look at, in one start of torch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    with init_distributed(CPU) as (processes, device):
        found = {"exchanged": _exchanged(processes)}
        for name, recipe in (("gathered", GATHERED), ("apart", APART)):
            found[name] = _stepped(_changed(config, **recipe), processes)
        found["cam_weights"] = _cam_weights(slice(8 * rank, 8 * rank + 8), nn.SyncBatchNorm.convert_sync_batchnorm)
        torch.manual_seed(0)
        split = read_dataset("synthetic", config.data.root)
        few = dataclasses.replace(split, query=split.query[:12], gallery=split.gallery[:101])
        model = build_model(config)
        if rank:  # as after a step: each has statistics of its own, and the first one's are saved
            for buffer in model.buffers():
                buffer.add_(1)
        result = Validation(few, _preprocessing(config), processes).evaluate(model, device)
        found["mAP"] = result and result.mAP
        if rank == 0:  # the other has left
            found["alone"] = [_failure(lambda: processes.all_reduce_max(1)) for _ in range(2)]
        torch.save(found, out / f"{rank}.pt")


def _failure(action):
    try:
        action()
    except (UserError, SystemExit) as error:
        return type(error).__name__, str(error)


def _exchanged(processes):
    rows = torch.arange(4.0).view(2, 2).add(10 * processes.rank).requires_grad_()
    everything = processes.gather_rows(rows)
    (everything * (1 + processes.rank) * torch.arange(8.0).view(4, 2)).sum().backward()

    def fails():
        if processes.rank == 1:
            raise InvalidFile("it is empty", path="crops", expected="images", hint="run pmm synthetic")
        return "fine"

    refusal, exit_code = None, None
    try:
        processes.run_on_all(fails)
    except UserError as error:
        refusal = (type(error).__name__, str(error), str(error.path), error.hint)
    except SystemExit as error:
        exit_code = error.code
    return {
        "rank": processes.rank,
        "all_reduce_max": processes.all_reduce_max(3 - processes.rank),
        "gather": processes.gather({"rank": processes.rank}),
        "broadcast": processes.broadcast(f"from {processes.rank}"),
        "run_on_all": processes.run_on_all(lambda: processes.rank),
        "rows": everything.detach(),
        "gradient": rows.grad,
        "refusal": refusal,
        "exit_code": exit_code,
    }


def _cam_weights(rows, convert=lambda head: head):
    """Those of a part of one batch, in double precision."""
    torch.manual_seed(0)
    head = convert(Head(12, 6, 5, fan="fan_in").double()).train()
    pooled, pids = torch.randn(16, 12, dtype=torch.float64), torch.arange(16) % 5
    return head.cam_weights(pooled[rows], pids[rows], 32)


def _changed(config, **recipe):
    changed = dataclasses.replace(config.recipe, batch_size=16, **recipe)
    return dataclasses.replace(config, recipe=changed)


def _preprocessing(config):
    from pmm.data.preprocessing import preprocessing_of

    return preprocessing_of(config)


def _half_by_half(pids, generator=None):
    """Fixed partners, each in its own half of 8: the sample 4 further on, of another identity."""
    index = torch.arange(len(pids))
    return index // 8 * 8 + (index % 8 + 4) % 8


def _stepped(config, processes):
    """Losses and gradients of one step with frozen batch statistics and fixed partners."""
    torch.manual_seed(0)
    loader, sampler = train_batches(
        read_dataset("synthetic", config.data.root).train, config, rank=processes.rank, world=processes.world
    )
    sampler.epochs = range(1, 2)
    batch = next(iter(loader))
    state = in_train_mode(make_train_state(build_model(config), config, CPU, 10, processes), 2)
    state.model.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmm.models.pmm.sample_partners", _half_by_half)
        losses = train_step(state, batch)
    gradients = {name: value.grad.clone() for name, value in state.model.named_parameters()}
    weights = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "indices": batch.indices}


@pytest.fixture(scope="module")
def config(small_config):
    return dataclasses.replace(small_config, model=dataclasses.replace(small_config.model, num_classes=12))


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(started, (free_port(), config, out), nprocs=2, start_method="forkserver")
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def test_what_they_exchange(both):
    first, second = (found["exchanged"] for found in both)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["all_reduce_max"] == second["all_reduce_max"] == 3
    assert first["gather"] == [{"rank": 0}, {"rank": 1}]
    assert second["gather"] == []
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert (first["run_on_all"], second["run_on_all"]) == (0, 1)


def test_the_first_process_raises_the_error_of_another_with_its_kind_and_facts(both):
    first, second = (found["exchanged"] for found in both)
    line = "crops: it is empty (in process 1); expected images; run pmm synthetic"
    assert first["refusal"] == ("InvalidFile", line, "crops", "run pmm synthetic")
    assert (first["exit_code"], second["exit_code"], second["refusal"]) == (None, 1, None)


def test_a_process_that_is_left_says_so_once(both):
    assert both[0]["alone"] == [("UserError", PEER_ENDED), ("SystemExit", "1")]


def test_rows_of_all_and_their_gradients(both):
    first, second = (found["exchanged"] for found in both)
    everything = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]])
    assert torch.equal(first["rows"], everything)
    assert torch.equal(second["rows"], everything)
    slopes = 3 * torch.arange(8.0).view(4, 2)  # 1 times that of the first process and 2 times that of the second
    assert torch.equal(first["gradient"], slopes[:2])
    assert torch.equal(second["gradient"], slopes[2:])


@pytest.mark.parametrize(("way", "alone"), [("gathered", {"accumulate": 1}), ("apart", {"accumulate": 2})])
def test_two_processes_take_the_step_of_one(both, config, way, alone):
    """Triplets of all against one process's whole batch; triplets of each against one process's batch in two parts."""
    expected = _stepped(_changed(config, **alone), SINGLE)
    first, second = (found[way] for found in both)
    assert torch.equal(torch.cat([first["indices"], second["indices"]]), expected["indices"])
    for name, loss in expected["losses"].items():
        mean = (first["losses"][name] + second["losses"][name]) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-7)
    whole = torch.cat([value.flatten() for value in expected["gradients"].values()])
    for found in (first, second):
        assert all(torch.equal(value, first["weights"][name]) for name, value in found["weights"].items())
        gradient = torch.cat([value.flatten() for value in found["gradients"].values()])
        assert (gradient - whole).norm() <= 1e-5 * whole.norm()


def test_a_synchronised_batch_norm_couples_the_cam_of_all(both):
    found = torch.cat([part["cam_weights"] for part in both])
    torch.testing.assert_close(found, _cam_weights(slice(None)), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[:8], _cam_weights(slice(0, 8)), rtol=1e-3)


def test_gathering_finds_other_triplets(both):
    losses = [[found[way]["losses"]["triplet1"] for found in both] for way in ("gathered", "apart")]
    assert sum(losses[0]) > sum(losses[1])  # more candidates, harder ones


def test_held_out_people_are_shared_out(both, config):
    torch.manual_seed(0)
    split = read_dataset("synthetic", config.data.root)
    few = dataclasses.replace(split, query=split.query[:12], gallery=split.gallery[:101])
    alone = Validation(few, _preprocessing(config)).evaluate(build_model(config), CPU)
    assert both[0]["mAP"] == pytest.approx(alone.mAP, abs=1e-9)
    assert both[1]["mAP"] is None


def test_one_process_needs_no_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed(CPU) as (processes, device):
        assert (processes, device) == (Processes(), CPU)
        assert (processes.all_reduce_max(2), processes.gather("a"), processes.broadcast("b")) == (2, ["a"], "b")
        with pytest.raises(UserError, match=r"^as it was$"):
            processes.run_on_all(_fails)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses(UserError, "WORLD_SIZE", "RANK", hint="torchrun"), init_distributed(CPU):
        pass


def test_one_of_several_gpus_is_for_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in (torch.device("cuda"), torch.device("cuda", 1)):
        with init_distributed(device) as (processes, found):
            assert (processes, found) == (Processes(), device)
    assert chosen == [torch.device("cuda", 1)], "what names no GPU would use the first one"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses(InvalidValue, name="--device", value="cuda:1", expected="cuda with", hint="CUDA_VISIBLE_DEVICES"):
        init_distributed(torch.device("cuda", 1)).__enter__()


def _fails():
    raise UserError("as it was")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def torchrun(*args, processes=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", free_port()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "-m", "pmm.train", *map(str, args)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


FLAGS = ("--preset", "tiny", "--device", "cpu", "--val-identities", "0.25", "--batch-size", "16", "--workers", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, ("--gather", "--ema", "0.9", "--freeze-backbone", "3")),
        pytest.param(3, (), marks=pytest.mark.full),
        pytest.param(2, ("--compile",), marks=pytest.mark.full),
    ],
    ids=["2", "3", "2-compiled"],
)
def test_torchrun_trains_one_model_that_can_be_stopped_and_resumed(people, tmp_path, processes, more):
    flags = (*FLAGS, "--root", people, "--epochs", "6", "--batch-size", "24", *more)
    whole = torchrun(*flags, "--out", tmp_path / "whole", processes=processes)
    out, error = whole.communicate(timeout=500)
    assert whole.returncode == 0, error
    assert [out.count(f"epoch {epoch}/6  loss") for epoch in range(1, 7)] == [1] * 6
    assert out.count("finished 6 epochs") == 1
    assert f"cpu x {processes} processes" in out
    state = load(tmp_path / "whole" / "last.pth")
    assert (state["epoch"], state["progress"]) == (6, {"world": processes})
    keep = ("--save-minutes", "1e-9")
    stopped = torchrun(*flags, *keep, "--out", tmp_path / "stopped", processes=processes, start_new_session=True)
    for line in stopped.stdout:
        if line.startswith("epoch 2/"):
            time.sleep(0.1)
            os.killpg(stopped.pid, signal.SIGTERM)  # as a scheduler does: to all processes of the job
            break
    _, error = stopped.communicate(timeout=120)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM" in error
    assert f"torchrun --nproc-per-node {processes} -m pmm.train" in error
    assert error.count("continue with: ") == 1
    assert 2 <= load(tmp_path / "stopped" / "last.pth")["epoch"] < 6
    resumed = torchrun("--out", tmp_path / "stopped", "--resume", processes=processes)
    _, error = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, error
    found = load(tmp_path / "stopped" / "last.pth")
    assert same(found["model"], state["model"])
    assert (found["ema"] is None) == ("--ema" not in more)
    assert found["ema"] is None or same(found["ema"]["model"], state["ema"]["model"])
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "stopped")]
    for one, other in zip(*logs, strict=True):
        kept = [name for name in one if name.startswith(("triplet", "cross", "loss", "val"))]
        assert [other[name] for name in kept] == pytest.approx([one[name] for name in kept], rel=1e-5)


@pytest.mark.slow
def test_a_second_run_of_many_processes_is_refused_in_one_line(trained, people, tmp_path):
    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    again = torchrun(*FLAGS, "--root", people, "--out", out, "--epochs", "2")
    _, error = again.communicate(timeout=400)
    assert again.returncode != 0
    assert error.count("pmm.train: error: ") == 1
    assert all(fact in error for fact in (f"{out}: ", "--resume", "--out"))


@pytest.mark.slow
def test_what_one_process_meets_ends_all_with_one_line(people, tmp_path):
    shutil.copytree(people, tmp_path / "people")
    files = sorted((tmp_path / "people" / "bounding_box_train").iterdir())
    for path in files[::10]:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-200])  # it begins as an image, so that the run begins
    flags = (*FLAGS, "--val-identities", "0", "--root", tmp_path / "people", "--epochs", "3")
    run = torchrun(*flags, "--out", tmp_path / "run")
    _, error = run.communicate(timeout=400)
    assert run.returncode != 0
    assert error.count("pmm.train: error: ") == 1
    assert str(tmp_path / "people" / "bounding_box_train") in error
    assert "--skip-bad-images" in error
    last = load(tmp_path / "run" / "last.pth")
    assert (last["epoch"], last["progress"]["world"], "steps" in last["progress"]) == (0, 2, True)
    assert (tmp_path / "run" / "best.pth").exists()


def interrupted(out, args):
    """`python -m pmm.train ARGS`, its output in `out`, in a session of its own as a terminal's."""
    multiprocessing.set_start_method(None, force=True)  # the default again, for the loading workers
    os.setsid()
    for number, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(out / name, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [train.PROG, *map(str, args)]
    command_line.run(train.main, prog=train.PROG)


def test_ctrl_c_says_how_to_go_on(people, tmp_path):
    out, stdout = tmp_path / "run", tmp_path / "stdout"
    flags = ("--preset", "tiny", "--device", "cpu", "--root", people, "--out", out, "--epochs", "500")
    process = FORKS.Process(target=interrupted, args=(tmp_path, flags))
    process.start()
    while not stdout.exists() or "\nepoch 2/" not in stdout.read_text():
        assert process.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loading workers too
    process.join(60)
    error = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, error
    assert "Traceback" not in error
    assert f"continue with: python -m pmm.train --out {out} --device cpu --resume" in error
    assert load(out / "last.pth")["epoch"] >= 2
