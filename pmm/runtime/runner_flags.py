"""The flags of commands that run a file. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.runtime.base import Runner
from pmm.runtime.open import BACKEND_HELP, check_backend, open_runner
from pmm.utils.arguments import Arg
from pmm.utils.hardware import check_threads, cuda_index


@dataclass(frozen=True, kw_only=True)
class RunnerFlags:
    """With what and where a file is run. Raises InvalidValue for an unknown backend or device, and for threads that
    cannot be."""

    backend: Annotated[str, Arg("NAME", help=BACKEND_HELP)] = "auto"
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    threads: int = 0
    """CPU threads (default: the backend's own choice)."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_threads(self.threads)
        cuda_index(self.device)

    def open(self, artifact: Path) -> Runner:
        """The runner of a file. Raises as `open_runner`."""
        return open_runner(artifact, self.backend, device=self.device, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class BatchRunnerFlags(RunnerFlags):
    """Those of commands that run many images."""

    batch_size: Annotated[int, Arg(short="-b", least=1)] = 64
    """Images per call."""
