import dataclasses
import logging
import signal

import pytest

from pmm.utils import command_line
from pmm.utils.errors import ConflictingOptions, InvalidValue, UsageError, UserError
from tests.conftest import assert_one_line_error
from tests.refusals import refuses
from tests.without_torch import run_all_without_torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    epochs: int = 3


def parse(*args, **options):
    return command_line.parse_args(Outer, list(args), prog="prog", description="", **options)


def test_flags_are_flat_and_typed():
    assert parse("--epochs", "5", "--learning-rate", "0.5") == Outer(epochs=5, inner=Inner(learning_rate=0.5))


def test_defaults_come_from_the_given_value():
    assert parse("--epochs", "5", default=Outer(inner=Inner(learning_rate=7.0))).inner.learning_rate == 7.0


def test_partial_ignores_other_flags():
    assert parse("--epochs", "5", "--other", "1", partial=True).epochs == 5


@pytest.mark.parametrize(
    ("args", "text"),
    [(["--epoks", "5"], "--epochs?"), (["--epochs", "many"], "--epochs is 'many'"), (["--epochs"], "--epochs takes")],
)
def test_a_wrong_command_line_is_one_line_and_code_2(capsys, args, text):
    with refuses(UsageError, text, hint="prog --help"):
        parse(*args)
    with pytest.raises(SystemExit) as stop:
        command_line.run(lambda prog: parse(*args), prog="prog")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prog: error: {text}" if args[0] == "--epochs" else "prog: error: unknown flag --epoks")


@dataclasses.dataclass(frozen=True)
class Bounded:
    block: tuple[int, int] = (1, 1)
    batch_size: int = 4
    rise: float = 0.1
    fall: float = 0.5

    def __post_init__(self):
        if min(self.block) < 1:
            raise InvalidValue("block", self.block, "two positive numbers")
        if self.batch_size < 1:
            raise InvalidValue("batch_size", self.batch_size, "1 or more", hint="try 8")
        if self.rise > self.fall:
            problem = f"a {{rise}} of {self.rise} is above {{fall}} {self.fall}"
            raise ConflictingOptions(problem, "rise", "fall", hint="lower {rise}")


@dataclasses.dataclass(frozen=True)
class Command:
    bounded: Bounded = dataclasses.field(default_factory=Bounded)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        (["--block", "0", "2"], InvalidValue, "--block is '0 2'; expected two positive numbers"),
        (["--batch-size", "0"], InvalidValue, "--batch-size is 0; expected 1 or more; try 8"),
        (["--rise", "0.6"], ConflictingOptions, "a --rise of 0.6 is above --fall 0.5; lower --rise"),
    ],
)
def test_a_value_that_the_command_refuses_is_named_by_its_flag(args, kind, text):
    with refuses(UsageError, text, hint="prog --help") as refused:
        command_line.parse_args(Command, args, prog="prog", description="")
    assert type(refused.value.__cause__) is kind


def test_numbers_and_names():
    assert command_line.numbers("8,1,8", flag="--batches") == [1, 8]
    assert command_line.names("torch, ort-cpu", flag="--backends") == ["torch", "ort-cpu"]
    for bad in ("", ",", "0", "1,x", "-3", "1.5"):
        with refuses(InvalidValue, "--batches", value=bad):
            command_line.numbers(bad, flag="--batches")
    with refuses(InvalidValue, "--backends", value=" , "):
        command_line.names(" , ", flag="--backends")


def test_sizes():
    sizes = {"500MB": 500_000_000, "2GB": 2_000_000_000, "1.5 kb": 1500, "7B": 7, "1tb": 10**12}
    assert {text: command_line.size(text, flag="--memory-limit") for text in sizes} == sizes
    for bad in ("", "2", "GB", "-1MB", "2GiB", "1e3MB", "nanB"):
        with refuses(InvalidValue, "--memory-limit", value=bad):
            command_line.size(bad, flag="--memory-limit")


def test_run_turns_errors_into_one_line_and_a_code(capsys):
    def fails(prog):
        raise UserError("the folder is missing")

    def interrupted(prog):
        raise KeyboardInterrupt

    def noticed_late(prog):
        raise InvalidValue("--backends", "foo", choices=["torch"])

    def noticed_by_the_library(prog):
        raise InvalidValue("backends", "foo", choices=["torch"])

    def conflict(prog):
        raise ConflictingOptions("{k1} needs {rerank}", "k1", "rerank")

    for main, code, text in (
        (fails, 1, "prog: error: the folder is missing\n"),
        (interrupted, 130, "interrupted"),
        (noticed_late, 2, "--backends is 'foo'"),
        (noticed_by_the_library, 2, "backends is 'foo'"),
        (conflict, 2, "k1 needs rerank"),
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.run(main, prog="prog")
        assert stop.value.code == code
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command_line.run(lambda prog: None, prog="prog")
    assert stop.value.code == 0


def test_what_the_package_warns_of_is_a_line_of_the_command(capsys):
    def warns(prog):
        logging.getLogger("pmm").warning("%s is odd", "a \x1b[31mfile\n")

    for prog in ("pmm embed", "to_trt.py"):
        with pytest.raises(SystemExit):
            command_line.run(warns, prog=prog)
        assert capsys.readouterr().err == f"{prog}: warning: a \\x1b[31mfile\\n is odd\n"


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a test run in the background inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with command_line.deferred_interrupt() as pause:
        signal.raise_signal(signal.SIGINT)
        pause()


def test_an_interrupt_is_held_back_until_it_can_be_taken(interruptible):
    log = []

    def work():
        with command_line.deferred_interrupt() as pause:
            pause()
            signal.raise_signal(signal.SIGINT)
            log.append("the step ends")
            pause()
            log.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert log == ["the step ends"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as before again

    def last_step():
        with command_line.deferred_interrupt():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        last_step()

    def impatient():
        with command_line.deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            log.append("never")

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert log == ["the step ends"]


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda prog: 1 // 0, prog="prog")


COMMANDS = (
    ["-m", "pmm.train"],
    ["-m", "pmm", "evaluate"],
    ["-m", "pmm", "synthetic"],
    ["export/to_onnx.py"],
    ["export/to_trt.py"],
    ["bench/run.py"],
)


@pytest.fixture(scope="module")
def answers():
    """What each command says to --help and to a flag that it does not have, where importing torch is an error.

    It takes seconds: help and a typo must not pay for it.
    """
    asked = [(*command, flag) for command in COMMANDS for flag in ("--help", "--no-such-flag")]
    found = run_all_without_torch(*asked, kind=RuntimeError)
    return {command[-1]: found[2 * place : 2 * place + 2] for place, command in enumerate(COMMANDS)}


@pytest.mark.parametrize("command", [command[-1] for command in COMMANDS])
def test_every_command_explains_itself_and_refuses_unknown_flags(answers, command):
    shown, refused = answers[command]
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout
    assert_one_line_error(refused, "unknown flag --no-such-flag", "--help")
