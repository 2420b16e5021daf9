"""A worker whose runner has a fault, chosen by the name of the artifact it opens (swapped-channels.onnx, ...).

Everything else is the bench's own: its protocol, its checks, its gates must catch the fault.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from pmm.bench import runner_factory, worker
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime import ort_session
from pmm.runtime.base import BoundRun, Embeddings, Runner
from pmm.utils import hardware
from pmm.utils.errors import UserError
from pmm.utils.hardware import Gpu

SLEEP_S = 0.004
now, sleep = time.perf_counter, time.sleep  # a test may give others


class Faulty(Runner):
    """`inner`, with something wrong before or after it."""

    def __init__(
        self,
        inner: Runner,
        before: Callable[[Crops], Crops] = lambda crops: crops,
        after: Callable[[Embeddings], Embeddings] = lambda embeddings: embeddings,
        step: Callable[[], None] | None = None,
    ) -> None:
        self.inner, self.before, self.after, self.step = inner, before, after, step
        self.info, self.preprocessing, self.embedding = inner.info, inner.preprocessing, inner.embedding

    def _embed(self, images: Crops) -> Embeddings:
        return self.after(self.inner(np.ascontiguousarray(self.before(images))))

    def _bind(self, images: Crops) -> BoundRun:
        return BoundRun(self.step) if self.step else self.inner.bind(images)


class NormalisedTwice(Faulty):
    """`inner`, which normalises its crops once more."""

    def _embed(self, images: Crops) -> Embeddings:
        once = Preprocessing.normalise

        def twice(self: Preprocessing, crops: Crops) -> Any:
            return once(self, once(self, crops).transpose(0, 2, 3, 1))  # type: ignore[arg-type]

        with patch.object(Preprocessing, "normalise", twice):
            return self.inner(images)


def wrong_row(embeddings: Embeddings) -> Embeddings:
    if len(embeddings) == 64:
        embeddings[63] = embeddings[0]
    return embeddings


def swapped_pair(embeddings: Embeddings) -> Embeddings:
    return embeddings[::-1].copy() if len(embeddings) == 2 else embeddings


def longer_if_few(embeddings: Embeddings) -> Embeddings:
    return 2 * embeddings if len(embeddings) < 3 else embeddings


def resized_twice(crops: Crops) -> Crops:
    height, width = crops.shape[1:3]
    small = [Image.fromarray(crop).resize((width // 2, height // 2), Image.Resampling.NEAREST) for crop in crops]
    return np.stack([np.asarray(crop.resize((width, height), Image.Resampling.NEAREST)) for crop in small])


def overflowing(embeddings: Embeddings) -> Embeddings:
    with np.errstate(all="ignore"):
        return (embeddings * 65504 / np.median(abs(embeddings))).astype(np.float16).astype(np.float32)


def hang_if_many(crops: Crops) -> Crops:
    if len(crops) > 1:
        time.sleep(3600)
    return crops


def refuse_forty(crops: Crops) -> Crops:
    if len(crops) == 40:
        raise UserError("no forty crops")
    return crops


def crash(_: Any = None) -> Any:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def drifting() -> Callable[[], None]:
    begin = now()
    return lambda: sleep(SLEEP_S * (1 + (now() - begin) / 10))


def noisy() -> Callable[[], None]:
    chance, state = random.Random(0), {"until": 0.0, "seconds": SLEEP_S}

    def step() -> None:
        if now() > state["until"]:  # another program comes and goes
            state["until"], state["seconds"] = now() + 0.06, SLEEP_S * chance.choice((1, 1, 1.6))
        sleep(state["seconds"])

    return step


FAULTS: dict[str, Callable[[Runner], Runner]] = {
    "wrong-row": lambda inner: Faulty(inner, after=wrong_row),
    "wrong-when-timed": lambda inner: Faulty(inner, after=swapped_pair),
    "longer-if-few": lambda inner: Faulty(inner, after=longer_if_few),
    "twice-as-long": lambda inner: Faulty(inner, after=lambda embeddings: 2 * embeddings),
    "swapped-channels": lambda inner: Faulty(inner, before=lambda crops: crops[..., ::-1]),
    "other-resize": lambda inner: Faulty(inner, before=resized_twice),
    "off-by-one-crop": lambda inner: Faulty(inner, before=lambda crops: np.roll(crops, 1, axis=2)),
    "doubled-normalisation": NormalisedTwice,
    "fp16-overflow": lambda inner: Faulty(inner, after=overflowing),
    "refuses-forty": lambda inner: Faulty(inner, before=refuse_forty),
    "hangs": lambda inner: Faulty(inner, before=hang_if_many),
    "crashes": lambda inner: Faulty(inner, after=crash),
    "crashes-when-timed": lambda inner: Faulty(inner, step=crash),
    "sleeps": lambda inner: Faulty(inner, step=lambda: sleep(SLEEP_S)),
    "drifts": lambda inner: Faulty(inner, step=drifting()),
    "noisy": lambda inner: Faulty(inner, step=noisy()),
}


def open_faulty(artifact: Path, **candidate: Any) -> Runner:
    """As `open_candidate`, with the fault that the artifact's name asks for."""
    if artifact.stem == "falls-back":
        # a GPU that the driver shows and ONNX Runtime cannot use: it takes the CPU without a word
        gpus = (Gpu("a GPU", "9.0"),)
        with (
            patch.object(ort_session, "nvidia_gpus", lambda: gpus),
            patch.object(hardware, "nvidia_gpus", lambda: gpus),
        ):
            return open_candidate(artifact, **candidate)
    return FAULTS.get(artifact.stem, lambda inner: inner)(open_candidate(artifact, **candidate))


open_candidate = runner_factory.open_candidate

if __name__ == "__main__":
    runner_factory.open_candidate = open_faulty
    worker.serve()
