"""The parent's side of a worker, against small programs that misbehave."""

import os
import signal
import sys
import textwrap
import time
from unittest.mock import Mock

import pytest

from pmm.bench import workers
from pmm.bench.worker import WorkerSession
from pmm.bench.workers import CannotRun, WorkerFailed, WorkerPool, WorkerProcess
from pmm.utils.errors import BackendUnavailable, UserError
from tests.refusals import refuses
from tests.utils.test_task_runner import alive

SKELETON = """
import json, os, signal, sys, time
def say(**message):
    print(json.dumps(message), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    method, arguments = request["method"], request["arguments"]
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker that runs SKELETON with a body of its own."""
    started = []

    def start(body, timeout=5.0):
        script = tmp_path / "worker.py"
        script.write_text(SKELETON + textwrap.indent(textwrap.dedent(body), "    "))
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(script)))
        started.append(WorkerProcess("w", tmp_path / "logs" / "w.log", threads=3, timeout=timeout))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_answers_and_progress(worker):
    process = worker(
        "say(progress=0.5); say(progress=1.0); say(answer=[method, arguments, os.environ['OMP_NUM_THREADS']])"
    )
    seen = []
    assert process.call("embed", progress=seen.append, a=1) == ["embed", {"a": 1}, "3"]
    assert seen == [0.5, 1.0]
    assert process.call("again") == ["again", {}, "3"]
    assert process.alive


def test_errors_are_answers_and_the_worker_lives_on(worker):
    process = worker("say(error='no GPU', kind='unavailable') if method == 'open' else say(error='bad', kind='failed')")
    with refuses(CannotRun, "no GPU"):
        process.call("open")
    with refuses(WorkerFailed, "bad"):
        process.call("embed")
    assert process.alive


def test_what_goes_wrong_in_a_session_is_an_answer_in_one_line(monkeypatch, capsys):
    def raising(error):
        monkeypatch.setattr(WorkerSession, "memory", Mock(side_effect=error))
        return WorkerSession(print).answer("memory", {})

    assert raising(BackendUnavailable("no GPU")) == {"error": "no GPU", "kind": "unavailable"}
    assert raising(UserError("bad\nand more")) == {"error": r"bad\nand more", "kind": "failed"}
    assert raising(KeyError("key")) == {"error": "KeyError: 'key'", "kind": "failed"}
    assert "Traceback" in capsys.readouterr().err, "for the log"


def test_a_worker_that_hangs_is_ended_with_what_it_started(worker):
    process = worker(
        """
        if method == 'open':
            import subprocess
            child = subprocess.Popen(['sleep', '600'])
            say(answer=child.pid)
        else:
            time.sleep(600)
        """
    )
    child = process.call("open")
    process.timeout = 0.3
    with refuses(WorkerFailed, "no response", "'compare_batch_sizes'", "0.3 s", hint="--timeout"):
        process.call("compare_batch_sizes")
    assert not process.alive
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child), "its child goes on"


def test_patience_is_a_multiple_of_the_timeout(worker):
    process = worker("method == 'make' and time.sleep(0.4); say(answer=method)")
    process.call("open")
    process.timeout = 0.1
    assert process.call("make", patience=50.0) == "make"
    with refuses(WorkerFailed, "no response", "'make'", "0.2 s"):
        process.call("make", patience=2.0)


def test_progress_counts_as_a_response(worker):
    body = "[(time.sleep(0.2), say(progress=k)) for k in range(5 * (method == 'embed'))]; say(answer='done')"
    process = worker(body)
    process.call("open")
    process.timeout = 0.8
    assert process.call("embed") == "done"


def test_a_crash_names_the_signal_the_last_output_and_the_log(worker):
    process = worker("print('first', file=sys.stderr); print('last words\\n', file=sys.stderr); "
                     "sys.stderr.flush(); os.kill(os.getpid(), signal.SIGSEGV)")  # fmt: skip
    with refuses(WorkerFailed, "SIGSEGV", "'open'", "last words", hint=str(process.log)):
        process.call("open")
    assert not process.alive
    with refuses(WorkerFailed, "SIGSEGV"):
        process.call("embed")


def test_a_worker_that_just_ends_is_reported(worker):
    process = worker("sys.exit(3)")
    with refuses(WorkerFailed, "exit code 3", "'open'") as caught:
        process.call("open")
    assert "output" not in str(caught.value)


def test_closing_ends_it_even_if_it_does_not_listen(worker):
    process = worker("signal.signal(signal.SIGTERM, signal.SIG_IGN); say(answer=1); time.sleep(600)")
    process.call("open")
    begin = time.monotonic()
    process.close(at_once=True)
    assert time.monotonic() - begin < 3
    with pytest.raises(ProcessLookupError):
        os.kill(process._process.pid, 0)


def test_the_pool_starts_workers_when_they_are_needed(worker, tmp_path):
    worker("say(answer=os.getpid())").close()
    with WorkerPool(tmp_path / "pool", threads=1, timeout=5.0) as pool:
        assert "a" not in pool
        first = pool["a"].call("open")
        assert "a" in pool
        assert pool["a"].call("open") == first
        assert pool["b"].call("open") != first
        os.kill(first, signal.SIGKILL)
        pool["b"].call("open")
        time.sleep(0.2)
        assert "a" not in pool
        assert pool["a"].call("open") != first  # a new one
        pool.end("a")
        assert "a" not in pool
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == ["a.log", "b.log"]
