"""What many tests need, made once per run by the first process that asks, shared by all of them, and read only."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pmm.config import Config
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions


class Store:
    """Folders by name, each filled once, behind a lock; `check` finds what a test has changed in one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._used: set[str] = set()

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, which `make` has filled; other processes wait until it has."""
        home, contents = self._folder / name, self._folder / f"{name}.json"
        with FileLock(self._folder / f"{name}.lock"):
            if not contents.exists():
                shutil.rmtree(home, ignore_errors=True)  # what a failed attempt left
                home.mkdir()
                make(home)
                for path in _files(home):  # does not stop root: `check` does
                    path.chmod(0o444)
                contents.write_text(json.dumps(_state(home)))
        self._used.add(name)
        return home

    def check(self) -> None:
        """Raises AssertionError if a file that this process has used was changed, added or removed."""
        for name in sorted(self._used):
            before, now = json.loads((self._folder / f"{name}.json").read_text()), _state(self._folder / name)
            changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
            assert not changed, f"a test changed what all tests share: {name}: {', '.join(changed)}"


def _files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def _state(home: Path) -> dict[str, list[int]]:
    stats = {str(path.relative_to(home)): path.stat() for path in _files(home)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class Shared:
    """A short run of each method, and what is exported from it; every path is read only."""

    def __init__(self, store: Store, config: Config) -> None:
        """`config` is that of the runs, but for the method."""
        self._store, self._config = store, config

    def run(self, method: str = "pmm") -> Path:
        """best.pth of a short run, with all that a run leaves beside it."""
        from pmm.presets import with_method
        from pmm.training.flags import TrainOptions
        from pmm.training.launch import train

        config = with_method(self._config, method)
        on_cpu = TrainOptions(device="cpu")
        return self._store.get(f"run-{method}", lambda home: train(config, home, on_cpu)) / "best.pth"

    def onnx(self, recipe: ExportOptions | None = None, *, method: str = "pmm", verify: bool = True) -> Path:
        """The ONNX file (model.onnx) of that run's best.pth, with its manifest beside it."""
        from pmm.export.onnx import export_onnx

        recipe, checkpoint = recipe or ExportOptions(), self.run(method)
        verification = VerifyOptions(no_verify=not verify)
        name = f"onnx-{method}{_options(recipe)}{'' if verify else '-unverified'}"
        make = lambda home: export_onnx(checkpoint, home / "model.onnx", recipe, verification)  # noqa: E731
        return self._store.get(name, make) / "model.onnx"

    def package(self, precision: str = "fp32") -> Path:
        """An AOTInductor package (model.pt2) for CPUs of the run's best.pth."""
        from pmm.export.aoti import export_aoti

        checkpoint = self.run()
        make = lambda home: export_aoti(checkpoint, home / "model.pt2", precision, "cpu")  # noqa: E731
        return self._store.get(f"package-{precision}", make) / "model.pt2"

    def engine(self, recipe: ExportOptions | None = None) -> Path:
        """A TensorRT-RTX engine (model.plan) of the run's best.pth, built and not run."""
        from pmm.artifacts.onnx_file import read_onnx
        from pmm.export.trt import engine_from_onnx

        source = self.onnx(recipe)
        make = lambda home: engine_from_onnx(read_onnx(source), home / "model.plan", EngineOptions(flavor="rtx"))  # noqa: E731
        return self._store.get(f"engine{_options(recipe or ExportOptions())}", make) / "model.plan"


def _options(recipe: ExportOptions) -> str:
    """What of `recipe` is no default, for a name."""
    given = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    plain = dataclasses.asdict(ExportOptions())
    return "".join(f"-{name}={value}".replace(os.sep, "_") for name, value in given.items() if value != plain[name])
