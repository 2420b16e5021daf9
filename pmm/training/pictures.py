"""Pictures of what the mix does to a few training crops, a few times in a run."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.samples import Sample, class_indices
from pmm.training.progress import warn
from pmm.training.run_logger import RunLogger
from pmm.utils.errors import UserError, reason_of
from pmm.visualize.mixing import has_hard_mix, mix_picture

PICTURES, PICTURE_IDENTITIES = 10, 16
"""Pictures in a run, and the identities in each."""


def log_mix_picture(
    log: RunLogger,
    model: nn.Module,
    samples: tuple[Sample, ...],
    config: Config,
    epoch: int,
    skipped: Container[int],
) -> None:
    """Add a picture to `log` if it is time for one after `epoch`, without the samples that are `skipped`.

    One that cannot be drawn ends no training: a warning says why.
    """
    epochs, size = config.recipe.epochs, preprocessing_of(config)
    if not has_hard_mix(model) or epoch not in {1 + (epochs - 1) * n // PICTURES for n in range(PICTURES + 1)}:
        return
    index = class_indices(samples)
    by_identity = {sample.pid: sample for place, sample in enumerate(samples) if place not in skipped}
    chosen = sorted(by_identity.values(), key=lambda sample: sample.pid)[:PICTURE_IDENTITIES]
    try:
        crops = load_crops([sample.path for sample in chosen], size)
        labels = [index[sample.pid] for sample in chosen]
        log.add_picture("mix", mix_picture(model, crops, labels, size, rows=4, seed=epoch, height=128), epoch)
    except UserError:
        pass  # a crop that cannot be read may not have come up in training yet
    except Exception as error:
        warn(f"TensorBoard gets no picture of the mix after epoch {epoch}: {reason_of(error)}")
