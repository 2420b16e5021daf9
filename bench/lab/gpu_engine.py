"""Checks of an engine on a GPU: its manifest, its embeddings, and its speed under the load of a service."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pmm.artifacts.dataset_location import resolve_data_root
from pmm.bench.tracker_load import TRACKER_SIZES, measure_tracker_load
from pmm.config import fast_mode
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MIN_COSINE
from pmm.runtime.base import Embeddings
from pmm.runtime.open import open_runner
from pmm.runtime.trt import TrtRunner
from pmm.utils.errors import UserError

CROPS = 64
THREADS, CALLS = 8, 25
"""Threads that call one runner at once, more than it has contexts, and the calls of each."""
ON_GPU = (1, 7, 40, 64)
"""Crops of the calls that are made from the GPU."""

ToGpu = Callable[[Crops], Any]
FromGpu = Callable[[Any], Embeddings]


def crops_and_truth(checkpoint: Path) -> tuple[Crops, Embeddings]:
    """Crops of the data set that `checkpoint` was trained on, and torch's embeddings of them, in fp32 on the CPU."""
    from pmm.artifacts.checkpoint import load
    from pmm.config import Config

    data = Config.from_dict(load(checkpoint)["config"]).data
    split = read_dataset(data.dataset, resolve_data_root(data.root, checkpoint))
    samples = (*split.query, *split.gallery)
    paths = [samples[index].path for index in evenly_spaced(len(samples), CROPS)]
    with open_runner(checkpoint, device="cpu") as truth:
        crops = load_crops(paths, data.height, data.width)
        return crops, truth(crops)


def engine_figures(
    runner: TrtRunner, crops: Crops, expected: Embeddings, *, to_gpu: ToGpu, from_gpu: FromGpu, seconds: float
) -> dict[str, Any]:
    """Figures of an open engine: its precision and how that is known, the worst cosine with `expected`, and calls of
    random sizes, from the GPU to the GPU, and from several threads.

    Args:
        to_gpu: crops [B, H, W, 3] -> the same on the engine's GPU.
        from_gpu: embeddings there -> in host memory.
        seconds: for each figure of speed.

    Raises:
        UserError: an embedding that differs too much from `expected`, or between two ways to call the engine.
    """
    contract = runner.manifest.engine
    assert contract is not None
    found = runner(crops)
    parity, least = numeric_parity(expected, found), MIN_COSINE[runner.info.precision]
    if parity.min_cosine < least:
        raise UserError(f"the worst embedding has cosine {parity.min_cosine:.6f} with torch's", expected=f">= {least}")
    images = {size: np.resize(crops, (size, *crops.shape[1:])) for size in ON_GPU}
    for size, some in images.items():
        if not np.array_equal(from_gpu(runner.embed_on_gpu(to_gpu(some))), runner(some)):
            raise UserError(f"embeddings of {size} images on the GPU differ from those of images in host memory")
    load, placed = measure_tracker_load(runner, crops, seconds), to_gpu(images[TRACKER_SIZES[1]])
    threads, least_in_threads = _from_threads(runner, crops)
    if least_in_threads < MIN_COSINE["fp32"]:
        raise UserError(f"called by {THREADS} threads at once, an embedding has cosine {least_in_threads:.6f}")
    return {
        "provider": runner.info.provider,
        "precision": runner.info.precision,
        "read from": contract.precision_read_from,
        "layers": len(json.loads(runner.inspect())["Layers"]),
        "worst cosine": parity.min_cosine,
        "random sizes": load,
        "images/s from host": _rate(lambda: runner(images[TRACKER_SIZES[1]]), TRACKER_SIZES[1], seconds),
        "images/s on GPU": _rate(lambda: runner.embed_on_gpu(placed), TRACKER_SIZES[1], seconds),
        "same bits from GPU": True,
        f"images/s from {THREADS} threads": threads,
    }


def _from_threads(runner: TrtRunner, crops: Crops) -> tuple[float, float]:
    """Images/s of several threads that call at once, and the least cosine with the same calls one after the other."""
    draw = random.Random(1)
    sizes = [[draw.randint(*TRACKER_SIZES) for _ in range(CALLS)] for _ in range(THREADS)]
    alone = {size: runner(crops[:size]) for size in {size for batch_sizes in sizes for size in batch_sizes}}
    found: list[tuple[int, Embeddings]] = []
    failed: list[Exception] = []

    def calls(batch_sizes: list[int]) -> None:
        try:
            found.extend((size, runner(crops[:size])) for size in batch_sizes)
        except Exception as error:  # of any kind: raised again in the calling thread
            failed.append(error)

    workers = [threading.Thread(target=calls, args=(batch_sizes,)) for batch_sizes in sizes]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - begin
    if failed:
        raise failed[0]
    least = min(numeric_parity(alone[size], embeddings).min_cosine for size, embeddings in found)
    return sum(map(sum, sizes)) / taken, least


def _rate(call: Callable[[], object], images: int, seconds: float) -> float:
    call()
    calls, begin = 0, time.perf_counter()
    while not calls or time.perf_counter() - begin < seconds:
        call()
        calls += 1
    return images * calls / (time.perf_counter() - begin)


def check_engine(engine: Path, checkpoint: Path, device: str) -> dict[str, Any]:
    """`engine_figures` of the files, with images that torch has on the GPU. Raises UserError as that does."""
    import torch

    where = device if device != "cuda" else "cuda:0"
    crops, expected = crops_and_truth(checkpoint)
    with TrtRunner(engine, device, eager=True) as runner:
        return engine_figures(
            runner,
            crops,
            expected,
            to_gpu=lambda images: torch.from_numpy(images).to(where),
            from_gpu=lambda array: torch.as_tensor(array, device=where).cpu().numpy(),
            seconds=0.05 if fast_mode() else 2.0,
        )
