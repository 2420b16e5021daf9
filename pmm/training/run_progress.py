"""How far a run is: what its checkpoints hold besides the state of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmm.artifacts.checkpoint import statistics_of
from pmm.config import Config
from pmm.data.crop_statistics import CropStatistics
from pmm.training.resuming import best_so_far
from pmm.training.snapshot import snapshot
from pmm.training.state import TrainState


@dataclass(kw_only=True)
class RunProgress:
    """How far a run is; in the first process, which writes the checkpoints, with what it knows of all."""

    origin: Mapping[str, str]
    """For the versions in the checkpoints: the file that the run was started from."""
    epochs_done: int = 0
    best: float = -1.0
    """Best mAP on the held-out identities."""
    in_epoch: Mapping[str, Any] = field(default_factory=dict)
    """Of the epoch that was interrupted: `Meter.state`, and the images that could not be read so far."""
    crop_statistics: CropStatistics | None = None
    """Of the training crops; in the first process."""

    @classmethod
    def of(cls, saved: dict[str, Any], out: Path, config: Config) -> RunProgress:
        """Of the run in `out`, whose last.pth is `saved`."""
        return cls(
            origin={key: saved["versions"][key] for key in ("init",) if key in saved["versions"]},
            epochs_done=saved["epoch"],
            best=best_so_far(saved, out, config),
            in_epoch=saved["progress"] or {},
            crop_statistics=statistics_of(saved),
        )

    @property
    def steps(self) -> int:
        """Steps of the epoch that was interrupted; 0 between two epochs."""
        return int(self.in_epoch.get("steps", 0))

    @property
    def skipped(self) -> dict[int, str]:
        """Index and reason of each training image that could not be read."""
        return dict(self.in_epoch.get("skipped", {}))

    def checkpoint(self, state: TrainState) -> dict[str, Any]:
        """The content of last.pth, with the tensors of `state`; see `snapshot`."""
        in_epoch = {"world": state.processes.world, **self.in_epoch}
        content = snapshot(state, self.epochs_done, self.best, in_epoch, self.crop_statistics)
        return {**content, "versions": {**content["versions"], **self.origin}}
