"""The runner of tasks: goes on where it stopped, runs again what changed, and leaves nothing running."""

import json
import os
import time
from pathlib import Path

import pytest

from pmm.utils import task_runner
from pmm.utils.task_runner import Task, last_lines, run_tasks


@pytest.fixture
def run(tmp_path):
    """Runs tasks in tmp_path; returns name -> outcome, and the tasks that were started in `.started`."""

    def run(*tasks, depends="these sources", again=()):
        run.started, run.finished = [], []
        outcomes = run_tasks(
            tasks,
            tmp_path / "runs" / "card",
            root=tmp_path,
            depends=depends,
            again=again,
            started=lambda task: run.started.append(task.name),
            finished=lambda outcome: run.finished.append((outcome.task.name, outcome.status)),
        )
        return {outcome.task.name: outcome for outcome in outcomes}

    return run


def python(name, code, **fields):
    return Task(name=name, commands=(("python", "-c", code),), **fields)


WRITES = python("writes", "open('made', 'a').write('x')", outputs=("made",))
READS = python("reads", "print(open('made').read())", inputs=("made",))


def test_what_passed_is_kept_until_something_it_depends_on_changes(run, tmp_path):
    assert [outcome.status for outcome in run(WRITES, READS).values()] == ["passed", "passed"]
    assert (run.started, run.finished) == (["writes", "reads"], [("writes", "passed"), ("reads", "passed")])
    assert [outcome.status for outcome in run(WRITES, READS).values()] == ["passed", "passed"]
    assert (run.started, run.finished) == ([], [])
    run(WRITES, READS, depends="other sources")
    assert run.started == ["writes", "reads"]
    run(WRITES, python("reads", "print(2)", inputs=("made",)), depends="other sources")
    assert run.started == ["reads"], "another command line"
    run(WRITES, READS, depends="other sources", again=["writes"])
    assert run.started == ["writes", "reads"], "it is made anew, and is another file: what uses it runs again"
    (tmp_path / "made").unlink()
    run(WRITES, READS, depends="other sources")
    assert run.started == ["writes", "reads"], "what was made is lost"


def test_after_a_failure_what_does_not_need_it_runs_and_the_next_call_does_the_rest(run, tmp_path):
    (tmp_path / "promised").touch()  # of an earlier run: not what the failed task made
    code = "print('why it failed'); open('attempts', 'a').write('x'); open('mended'); open('promised', 'w')"
    fails, after = python("fails", code, outputs=("promised",)), python("after", "print(1)", inputs=("promised",))
    found = run(WRITES, fails, after, READS)
    assert [outcome.status for outcome in found.values()] == ["passed", "failed", "not run", "passed"]
    assert not found["fails"].ok
    assert not found["after"].ok
    assert found["after"].note == "without fails"
    assert "exit code 1: python -c" in found["fails"].note
    assert "why it failed" in last_lines(found["fails"].log, tmp_path)
    (tmp_path / "mended").touch()
    assert [outcome.status for outcome in run(WRITES, fails, after, READS).values()] == ["passed"] * 4
    assert run.started == ["fails", "after"]
    assert (tmp_path / "attempts").read_text() == "xx"


def test_the_second_command_does_not_run_after_the_first_failed(run, tmp_path):
    task = Task(name="two", commands=(("python", "-c", "1/0"), ("python", "-c", "open('second', 'w')")))
    assert run(task)["two"].status == "failed"
    assert not (tmp_path / "second").exists()


def alive(pid):
    try:  # one that has ended but was not waited for is none
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(run, tmp_path):
    sleeps = Task(
        name="sleeps", commands=(("sh", "-c", "sleep 60 & echo $! > child; wait"),), limit_s=1, outputs=("it",)
    )  # a shell has started its child by then wherever it may run
    begin = time.monotonic()
    found = run(sleeps, python("after", "print(1)", inputs=("it",)))
    assert time.monotonic() - begin < 30
    assert (found["sleeps"].status, found["after"].status) == ("timed out", "not run")
    assert "stopped after 1 s" in found["sleeps"].note
    pid = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def test_an_interrupt_ends_the_step_under_way(run, tmp_path, monkeypatch):
    import subprocess

    def interrupted(process, timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    task = python("sleeps", "import os, time; open('own', 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        run(task)
    assert not (tmp_path / "own").exists() or not alive(int((tmp_path / "own").read_text()))
    assert not list((tmp_path / "runs" / "card").glob("*.json"))


def test_what_is_not_there_did_not_pass(run):
    absent = python("absent", "print(1)", requires=("no-such-program",))
    optional = python("optional", "print(1)", requires=("json", "no_such_package|no-such-program"), optional=True)
    either = python("either", "print(1)", requires=("no_such_package|json",))
    waits = python("waits", "print(1)", inputs=("never-made",))
    found = run(absent, optional, either, waits)
    assert [outcome.status for outcome in found.values()] == ["not proved", "not proved", "passed", "not run"]
    assert [outcome.ok for outcome in found.values()] == [False, True, True, False]
    assert found["absent"].note == "without no-such-program"
    assert found["optional"].note == "without no_such_package|no-such-program"
    assert found["waits"].note == "never-made was not made"
    assert run.started == ["either"]
    assert run.finished == [("absent", "not proved"), ("optional", "not proved"), ("either", "passed")]


def test_what_a_machine_rules_out_is_not_proved_nor_is_what_needs_it(run, tmp_path):
    (tmp_path / "library").touch()  # of another build
    unsupported = python("ruled-out", "print(1)", unsupported="this card has no such thing", outputs=("it",))
    builds = python("builds", "print(1)", requires=("no-such-program",), optional=True, outputs=("library",))
    uses, takes = (
        python("uses", "print(1)", inputs=("library",)),
        python("takes", "print(1)", optional_inputs=("library",)),
    )
    after = python("after", "print(1)", inputs=("it",))
    found = run(unsupported, builds, uses, takes, after)
    assert [outcome.status for outcome in found.values()] == ["not proved"] * 3 + ["passed", "not proved"]
    assert all(outcome.ok for outcome in found.values())
    assert found["ruled-out"].note == "this card has no such thing"
    assert found["uses"].note == "without builds (without no-such-program)"
    assert found["after"].note == "without ruled-out (this card has no such thing)"
    assert run.started == ["takes"]


def test_what_a_step_takes_counts_where_it_is(run, tmp_path):
    task = python("takes", "print(1)", optional_inputs=("library",))
    for content in (None, "1", "2"):
        if content:
            (tmp_path / "library").write_text(content)
        run(task)
        assert run.started == ["takes"]
        run(task)
        assert run.started == []


def test_what_a_step_keeps_is_there_in_the_next_attempt_of_the_same_step_alone(run, tmp_path):
    code = "import os; os.mkdir('runs/card/slow/other'); os.makedirs('runs/card/slow/artifacts/x'); open('mended')"

    def slow(code, **fields):
        return python("slow", code, kept_files=("artifacts",), **fields)

    assert run(slow(code))["slow"].status == "failed"
    assert (tmp_path / "runs/card/slow/artifacts/x").is_dir()
    (tmp_path / "mended").touch()
    found = run(slow(code))["slow"]
    assert (found.status, "FileExistsError" in found.log.read_text()) == ("failed", True)
    assert (tmp_path / "runs/card/slow/other").is_dir(), "made by this attempt: the first one's was in the way of none"
    assert run(slow(code + "#"))["slow"].status == "passed", "of other command lines nothing is kept"
    assert run(slow(code + "#"), depends="other sources")["slow"].status == "passed", "nor of other sources"


@pytest.mark.parametrize("there", [True, False])
def test_nvcc_is_looked_for_where_the_build_looks(tmp_path, monkeypatch, there):
    monkeypatch.setattr(task_runner, "find_toolkit", lambda: tmp_path if there else None)
    assert (Task(name="x", commands=(), requires=("nvcc",)).missing() == []) == there


def test_a_step_that_makes_nothing_failed(run):
    found = run(python("lazy", "print(1)", outputs=("promised",)))
    assert (found["lazy"].status, found["lazy"].note) == ("failed", "promised was not made")


def test_an_attempt_starts_in_an_empty_folder_of_its_own(run, tmp_path):
    task = python("once", "import os; os.mkdir('runs/card/once/people'); open('mended')")
    assert run(task)["once"].status == "failed"
    (tmp_path / "mended").touch()
    assert run(task)["once"].status == "passed"


def test_a_step_whose_result_could_not_be_written_runs_again(tmp_path):
    def run(finished):
        started = []
        arguments = {"root": tmp_path, "depends": 1, "started": started.append, "finished": finished}
        list(run_tasks([WRITES], tmp_path / "runs", **arguments))
        return started

    def full_disk(outcome):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        run(full_disk)
    assert run(lambda outcome: None) == [WRITES]
    assert run(lambda outcome: None) == []


@pytest.mark.parametrize("stamp", ["", "{", "[]", "{}", '{"key": 1}'])
def test_a_damaged_stamp_counts_for_nothing(run, tmp_path, stamp):
    run(WRITES)
    (tmp_path / "runs" / "card" / "writes.json").write_text(stamp)
    run(WRITES)
    assert run.started == ["writes"]


def test_command_lines_are_as_one_would_type_them_and_see_the_repository(run, tmp_path):
    task = python("says", "import os; print(os.environ['A'], os.environ['PYTHONPATH'], os.getcwd())", env={"A": "b c"})
    log = run(task)["says"].log.read_text()
    assert log.startswith("$ A='b c' python -c ")
    assert f"b c {tmp_path}" in log
    assert log.split()[-1] == str(tmp_path)


def test_the_end_of_a_log_names_no_folder_of_this_machine(tmp_path):
    home = Path.home()
    (tmp_path / "log").write_text(
        "first\n" + "line\n" * 30 + f"10%\r100% of {tmp_path}/runs/x\n\n{home}/elsewhere\n", newline=""
    )
    lines = last_lines(tmp_path / "log", tmp_path)
    assert len(lines) == 20
    assert lines[-3:] == ["10%", "100% of runs/x", "~/elsewhere"]
    assert json.dumps(lines)
    assert os.fspath(tmp_path) not in "".join(lines)
