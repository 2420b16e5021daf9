"""What the tests share: people on disk, a briefly trained model, and commands run as a user runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import settings

from pmm.config import Config
from pmm.data.synthetic.dataset import draw_dataset
from pmm.presets import preset
from pmm.utils import command_line
from tests.store import Shared, Store

ROOT = Path(__file__).resolve().parents[1]
IDS = 12
for tier, count in (("test", 25), ("slow", 100), ("full", 1000)):
    # what every change must pass draws the same examples each time; where there is time to look into it, new ones
    settings.register_profile(tier, max_examples=count, derandomize=tier != "full", deadline=None)
settings.load_profile("test")

LONGEST = (
    "slow/test_demo.py", "test_readme.py", "slow/test_paper.py", "export/test_aoti.py", "models/test_methods.py",
    "export/test_precisions.py", "export/test_whole.py", "training/test_train.py", "bench/test_harness.py",
    "bench/test_faults.py", "runtime/test_eager_graph.py", "artifacts/test_checkpoint_import.py", "export/test_int8.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from pmm.utils.hardware import nvidia_gpus

    first = {name: place for place, name in enumerate(LONGEST)}  # so that two processes end at about one time
    items.sort(key=lambda item: first.get(item.path.relative_to(ROOT / "tests").as_posix(), len(first)))
    if not nvidia_gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skipif(True, reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """torch parses its 500 ONNX operators anew in every export, for half of the time that one takes: here once."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # else no test collected here exports
            with contextlib.suppress(ImportError):  # the name is torch's own business
                from torch.onnx._internal.exporter._registration import ONNXRegistry

                patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    store = Store((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")
    yield store
    store.check()


@pytest.fixture(scope="session")
def people(store: Store) -> Path:
    """A small synthetic data set on disk; read only."""
    return store.get("people", lambda home: draw_dataset(home / "data", ids=IDS, seed=7, workers=1)) / "data"


@pytest.fixture(scope="session")
def small_config(people: Path) -> Config:
    """Preset tiny in fp32 on the small data set, two epochs of three batches."""
    base = preset("tiny")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, root=str(people), val_identities=0.25, workers=0),
        recipe=dataclasses.replace(base.recipe, epochs=2, batch_size=12, val_every=1, amp="off"),  # on any CPU
    )


@pytest.fixture(scope="session")
def shared(store: Store, small_config: Config) -> Shared:
    """Short runs of preset tiny, and what is exported from them, each made when it is first asked for; read only."""
    return Shared(store, small_config)


@pytest.fixture(scope="session")
def trained(shared: Shared) -> Path:
    """best.pth of a short run; read only."""
    return shared.run()


@pytest.fixture(scope="session")
def exported(shared: Shared) -> Path:
    """The fp32 ONNX file of `trained`, verified, its manifest beside it; read only."""
    return shared.onnx()


@pytest.fixture
def built_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call it with the facts that compiled kernels shall embed, or without any for kernels that are not compiled."""
    from pmm.ops import _extension
    from pmm.utils import build_info

    def pretend(**facts: object) -> None:
        library = tmp_path / "pretended.so"
        if facts:
            library.write_bytes(b"\x7fELF\0pmm kernels built " + json.dumps(facts).encode() + b"\0more")
        monkeypatch.setattr(build_info, "LIBRARY", library)
        monkeypatch.setattr(build_info, "SOURCES", tmp_path / "no sources")  # as installed from a wheel
        _extension.missing.cache_clear()

    yield pretend
    _extension.missing.cache_clear()


def examples(count: int) -> settings:
    """How many examples a property is tried on in `make test-slow`: a quarter in `make test`, tenfold in test-full."""
    return settings(max_examples=max(5, count * settings.default.max_examples // 100))


def run_python(*args: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """`python ARGS` as a user would run it from the repository root (or `cwd`)."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **env},
    )


def run_without_torch(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGS`, or `-m MODULE ARGS`, where torch cannot be imported."""
    words = list(map(str, args))
    run = f"runpy.run_module({words[1]!r}, alter_sys=True, " if words[0] == "-m" else f"runpy.run_path({words[0]!r}, "
    script = (
        "import runpy, sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision'):\n"
        "            raise ImportError('no torch here')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "sys.path.insert(0, '')\n"
        f"sys.argv = {words[words[0] == '-m' :]!r}\n"
        f"{run}run_name='__main__')"
    )
    return run_python("-c", script, cwd=cwd)


def run_here(*args: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """As `run_python`, for `-m MODULE ...` or `SCRIPT ...`, but in this process: torch is imported once."""
    words = [str(arg) for arg in args]
    module = words[0] == "-m"
    target, *rest = words[1:] if module else words
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd or ROOT)
        patch.setattr(sys, "argv", [target, *rest])
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            with _own_settings():
                if module:
                    found = importlib.import_module("pmm.__main__" if target == "pmm" else target)
                    found.main() if target == "pmm" else command_line.run(found.main, prog=found.PROG)
                else:
                    runpy.run_path(str(ROOT / target), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """What a script does about signals and threads ends with it.

    A process that this one forks later would inherit its handlers: a Pool, say, ends its workers by SIGTERM, and waits
    for ever for one that left it to Python while it waited itself. With other threads a training has other bits.
    """
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        for number, handler in before:
            signal.signal(number, handler)
        if torch:
            torch.set_num_threads(threads)


def assert_one_line_error(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """The command failed with one line on stderr (progress bars aside) that holds all of `expected`."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    assert done.stderr.strip().endswith(lines[0].strip()), done.stderr
    for text in expected:
        assert text in lines[0], lines[0]
