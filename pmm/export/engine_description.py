"""What `pmm export trt` prints of an engine that it built. Loads no torch."""

from __future__ import annotations

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.batch_profiles import BatchProfiles
from pmm.runtime.trt_variant import TF32_ON, gpu_for


def describe_engine(artifact: Artifact, device: str = "auto") -> str:
    """One line: builder, batch, precision and how it is known, size, GPU, parity. `device`: that of its options."""
    manifest, engine = artifact.manifest, artifact.manifest.engine
    assert engine is not None
    share, here = manifest.precision_share[manifest.precision_found], gpu_for(engine.flavor, device)
    unconfirmed = here and engine.precision_read_from == "parsed network"
    silent = "; the engine inspector does not show it" if unconfirmed else ""
    precision = manifest.precision_found + (" with TF32" if TF32_ON in engine.flags else "")
    line = (
        f"{artifact.path}: {engine.flavor} {engine.version} engine, {_sizes(engine.batch)}, {precision} ({share:.2%} "
        f"of its MACs, read from the {engine.precision_read_from}{silent}), "
        f"{artifact.path.stat().st_size / 1e6:.1f} MB, built on {engine.gpu or 'a machine without a GPU'}, "
    )
    if manifest.parity is None:
        return line + ("opened here, but " if here else "NOT run here: ") + "its embeddings are not verified"
    return line + f"parity on {manifest.parity['rows']} crops: min cosine {manifest.parity['min_cosine']:.7f}"


def _sizes(batch: BatchProfiles) -> str:
    if len(batch.profiles) > 1:
        return f"batch profiles {batch} (least, best, most)"
    return f"batch {batch.least} to {batch.most} (best {batch.best})"
