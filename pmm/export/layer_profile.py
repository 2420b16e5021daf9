"""A profile of an engine's layers: what each takes, of which type it is, in which precision it computes.

Loads no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pmm.artifacts.artifact import Artifact
from pmm.export.engine_precision import Layer, layers_of
from pmm.runtime.trt import TrtRunner
from pmm.utils.errors import UserError
from pmm.utils.files import write_file

RUNS = 50
SHOWN = 20
"""Layers in the table; the rest is summed."""
NAME = 90
"""Characters of a layer's name in the table; a fused one names all that went into it."""


@dataclass(frozen=True)
class LayerTime:
    """A layer at one batch size."""

    name: str
    type: str
    """By the engine inspector; empty where it gives none."""
    precision: str
    """Types of its tensors, weights and kernel."""
    format: str
    """Layout and type of what it returns."""
    batch: int
    ms: float
    """Median of the runs."""
    share: float
    """Of all layers of this batch."""


def layers_path(engine: Path) -> Path:
    """`best.plan` -> `best.plan.layers.json`."""
    return engine.with_name(engine.name + ".layers.json")


def profile_layers(artifact: Artifact, device: str = "auto", runs: int = RUNS) -> list[LayerTime]:
    """Time the layers of an engine at the best batch of each of its profiles, and write them beside it as JSON.

    Raises UserError if the engine does not run here, or its library reports no times.
    """
    contract, rows = artifact.manifest.engine, []
    assert contract is not None
    with TrtRunner(artifact.path, device, cuda_graph=False, warn=False) as runner:
        for profile in contract.batch.profiles:
            layers = layers_of(runner.inspect(profile.best))
            rows += _rows(runner.layer_times(profile.best, runs), layers, profile.best)
        info = runner.info
    if not rows:
        raise UserError(f"{info.backend} {contract.version} reports no layer's time", path=artifact.path)
    profile_json = {
        "engine": artifact.path.name,
        "sha256": artifact.manifest.sha256,
        "backend": f"{info.backend} {contract.version}",
        "gpu": info.device,
        "runs": runs,
        "layers": [dataclasses.asdict(row) for row in rows],
    }
    write_file(layers_path(artifact.path), json.dumps(profile_json, indent=2) + "\n")
    return rows


def table(rows: list[LayerTime]) -> str:
    """Per batch size, the layers that take longest, and the rest as one line."""
    lines = []
    for batch in dict.fromkeys(row.batch for row in rows):
        layers = sorted((row for row in rows if row.batch == batch), key=lambda row: -row.ms)
        total = sum(row.ms for row in layers)
        lines.append(f"batch {batch}: {total:.3f} ms in {len(layers)} layers, without CUDA graph")
        lines.append(f"{'ms':>9} {'share':>7}  {'type':<20} {'precision':<12} layer")
        for row in layers[:SHOWN]:
            name = row.name if len(row.name) <= NAME else row.name[: NAME - 3] + "..."
            lines.append(f"{row.ms:>9.4f} {row.share:>7.1%}  {row.type:<20} {row.precision:<12} {name}")
        if rest := layers[SHOWN:]:
            share = sum(row.share for row in rest)
            lines.append(f"{sum(row.ms for row in rest):>9.4f} {share:>7.1%}  {len(rest)} other layers")
    return "\n".join(lines)


def _rows(times: dict[str, float], layers: dict[str, Layer], batch: int) -> list[LayerTime]:
    total, unknown = sum(times.values()) or 1.0, Layer("", "", frozenset())
    return [
        LayerTime(name, layer.type, "+".join(sorted(layer.types)), layer.format, batch, ms, ms / total)
        for name, ms in times.items()
        for layer in [layers.get(name, unknown)]
    ]
