"""Time the loading of crops against a bare loop of PIL; the crops are compared first.

python -m bench.lab.loading [--data DIR] [--workers N] [--out FILE.json]

A bare loop of PIL in processes, the training loader, and the threads of evaluation load the same files with as many
processes or threads, in turns. The bare loop discards its images; a loop that also copies the pixels to numpy is timed
beside it.

The time depends on the files: crops of one size that is enlarged by whole factors (Market-1501), of any size
(DukeMTMC-reID, MSMT17), or compressed without loss (CUHK03-NP).
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from bench.lab.mix_report import interval
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import Latency, median_ratio, stability_flags
from pmm.config import Config, fast_mode
from pmm.data.batches import normalize_batch
from pmm.data.crops import iter_crops
from pmm.data.loader import TrainLoader, train_batches
from pmm.data.preprocessing import Crops, preprocessing_of
from pmm.data.samples import Sample
from pmm.gallery.crop_files import images_below
from pmm.presets import preset
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import report_header
from pmm.utils.errors import UserError
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import usable_cores

SCHEMA = "pmm-loading-bench-2"
PRESETS = ("paper", "tiny")
BARE, TO_NUMPY = "bare PIL", "bare PIL, pixels in numpy"
LOADER, IMAGES, THREADS = "training loader", "training loader and normalize_batch", "iter_crops"
BATCH = 64  # crops in a batch of iter_crops, as in pmm embed
HEIGHTS, SHAPES = (110, 290), (0.33, 0.5)  # of crops of any size: pixels, and width by height
PASS = 1024  # crops, at least, in a pass: in a shorter one beginning and end count

Step = Callable[[], object]


def bench_loading(folders: Mapping[str, Path], *, workers: int, batches: int, plan: LatencyPlan) -> dict[str, Any]:
    """Load the images below each of `folders` (kind of files -> folder) in the sizes of `PRESETS`; see `SCHEMA`.

    A pass has `batches` training batches (0: `PASS` crops, or more so that all workers have equally many). A way whose
    crops differ from the bare loop's is named in `wrong`, and nothing is then timed. Times are in microseconds of wall
    time per crop; a sample is a pass.

    Raises InvalidFile if there is no image, or one that cannot be read.
    """
    files = {kind: images_below(folder) for kind, folder in folders.items()}
    return {
        **report_header(SCHEMA),
        "plan": dataclasses.asdict(plan),
        "workers": workers,
        "settings": [
            _setting(name, kind, paths, workers, batches, plan) for kind, paths in files.items() for name in PRESETS
        ],
    }


def draw_files(folder: Path, ids: int, workers: int) -> dict[str, Path]:
    """Draw synthetic crops as files of each kind, in folders below `folder`."""
    from pmm.data.synthetic.dataset import draw_dataset

    kinds = {"JPEG 128x64": folder / "people", "JPEG any size": folder / "jpeg", "PNG any size": folder / "png"}
    people, jpegs, pngs = kinds.values()
    draw_dataset(people, ids=ids, seed=0, workers=workers)
    rng = np.random.default_rng(0)
    jpegs.mkdir()
    pngs.mkdir()
    for place, file in enumerate(images_below(people)):
        height = int(rng.integers(*HEIGHTS))
        width = int(height * rng.uniform(*SHAPES))
        with Image.open(file) as image:
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
        resized.save(jpegs / f"{place}.jpg", quality=90)
        resized.save(pngs / f"{place}.png")
    return kinds


def loading_plan(rounds: int, *, fast: bool = False) -> LatencyPlan:
    """Each way loads one pass as warm-up, which starts its workers, then one in each of `rounds` rounds."""
    samples = 2 if fast else rounds
    return LatencyPlan(warmup=0.0, warmup_runs=1, samples=samples, block=1, settle=0.0, lead=0, budget=600.0)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table; ratios with 95 % intervals (from 6 rounds on)."""
    lines = [f"| {report['workers']} processes or threads | us per crop | time / {BARE} |", "|---|---:|---:|"]
    for setting in report["settings"]:
        size = f"{setting['files']} to {setting['height']}x{setting['width']}"
        for row in setting["rows"]:
            bounds = row["interval"]
            cell = f"{row['ratio']:.2f}" + (f" ({bounds[0]:.2f}-{bounds[1]:.2f})" if bounds else "")
            lines.append(f"| {size}: {row['name']} | {row['us_per_crop']:.0f} | {cell} |")
        lines += [f"| {size}: {name} | wrong crops | |" for name in setting["wrong"]]
    return "\n".join(lines)


def _setting(
    name: str, kind: str, files: Sequence[Path], workers: int, batches: int, plan: LatencyPlan
) -> dict[str, Any]:
    config = _config(name, workers)
    batches = batches or workers * math.ceil(PASS / workers / config.recipe.batch_size)
    height, width = config.data.height, config.data.width
    samples = _samples(files, batches * config.recipe.batch_size, config)
    paths, wrong = _compare_crops(samples, config)
    count = len(paths)
    times: dict[str, Latency] = {}
    if not wrong:
        with _bare(paths, height, width, workers) as bare, closing(train_batches(samples, config)[0]) as loader:
            times = measure({**bare, **_our_loaders(loader, paths, config)}, plan)
    return {
        "preset": name,
        "files": kind,
        "file_count": len(files),
        "file_bytes": int(np.median([file.stat().st_size for file in files])),
        "height": height,
        "width": width,
        "batch": config.recipe.batch_size,
        "crops": count,
        "wrong": wrong,
        "rows": [_row(way, found, times[BARE], count, plan) for way, found in times.items()],
    }


def _row(name: str, found: Latency, bare: Latency, count: int, plan: LatencyPlan) -> dict[str, Any]:
    return {
        "name": name,
        "us_per_crop": 1000 * found.p50 / count,
        "samples_ms": [round(value, 3) for value in found.samples_ms],
        **interval(median_ratio(found, bare, block=plan.block)),
        "flags": list(stability_flags(found.samples_ms, found.turns_s, block=plan.block)),
    }


def _config(name: str, workers: int) -> Config:
    base = preset(name)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, workers=workers))


def _samples(files: Sequence[Path], count: int, config: Config) -> tuple[Sample, ...]:
    """`count` samples of as many invented identities as an epoch needs; files repeat if they are too few."""
    images = config.recipe.images_per_id
    return tuple(Sample(files[index % len(files)], index // images + 1, 1) for index in range(count))


def _compare_crops(samples: tuple[Sample, ...], config: Config) -> tuple[list[Path], list[str]]:
    """The files of an epoch in its order, and the ways whose crops of them, without augmentation, differ from PIL's."""
    recipe = dataclasses.replace(config.recipe, flip=0.0, shift=0, cutout=0.0)
    loader, sampler = train_batches(samples, dataclasses.replace(config, recipe=recipe))
    paths = [samples[index].path for keys in sampler for index, _, _ in keys]
    height, width = config.data.height, config.data.width
    crops = {
        LOADER: (crop for batch in _read(loader) for crop in batch.crops.numpy()),
        THREADS: (
            crop for batch in iter_crops(paths, preprocessing_of(config), BATCH, config.data.workers) for crop in batch
        ),
    }
    with closing(loader):
        return paths, [name for name, found in crops.items() if not _equal(found, paths, height, width)]


def _equal(found: Iterator[Crops], paths: Sequence[Path], height: int, width: int) -> bool:
    pairs = zip(found, paths, strict=True)
    same = [np.array_equal(crop, np.asarray(_decoded(path, height, width))) for crop, path in pairs]
    return all(same)  # after all: a loader left early would go on during the timing


def _our_loaders(loader: TrainLoader, paths: Sequence[Path], config: Config) -> dict[str, Step]:
    import torch

    preprocessing, cpu = preprocessing_of(config), torch.device("cpu")

    def images() -> None:
        for batch in _read(loader):
            normalize_batch(batch, preprocessing, cpu)

    def threads() -> None:
        for _ in iter_crops(paths, preprocessing, BATCH, config.data.workers):
            pass

    return {LOADER: lambda: sum(1 for _ in _read(loader)), IMAGES: images, THREADS: threads}


def _read(loader: TrainLoader) -> Iterator[Any]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


@contextmanager
def _bare(paths: Sequence[Path], height: int, width: int, workers: int) -> Iterator[dict[str, Step]]:
    """Steps that are a pass of all processes over their shares of `paths`, which they receive at the start."""
    with multiprocessing.Pool(workers, _init_worker, (paths, height, width, workers)) as pool:

        def passes(name: str) -> Step:
            return lambda: _pass(pool, name, workers)

        yield {BARE: passes("_drop"), TO_NUMPY: passes("_keep")}
        pool.close()  # the processes end by themselves, not by the signal that leaving `with` would send
        pool.join()


def _pass(pool: Pool, work: str, workers: int) -> None:
    pool.map(_decode_share, [(work, share) for share in range(workers)], chunksize=1)


_TASK: dict[str, Any] = {}


def _init_worker(paths: Sequence[Path], height: int, width: int, workers: int) -> None:
    _TASK.update(shares=[paths[share::workers] for share in range(workers)], size=(height, width))


def _decode_share(task: tuple[str, int]) -> None:
    work, share = task
    for path in _TASK["shares"][share]:
        image = _decoded(path, *_TASK["size"])
        if work == "_keep":
            np.asarray(image)


def _decoded(path: Path, height: int, width: int) -> Image.Image:
    return Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


PROG = "bench.lab.loading"
WORK = Path("runs/loading-bench")


@dataclass(frozen=True, kw_only=True)
class LoadingCommand:
    """`python -m bench.lab.loading ...`"""

    data: Path | None = None
    """Folder of images to load (default: synthetic people, drawn for this run as files of three kinds)."""
    workers: Annotated[int, Arg(least=0)] = 0
    """Processes of the bare loop and of the training loader, and threads of iter_crops (0: all cores)."""
    batches: Annotated[int, Arg(least=0)] = 0
    """Training batches in a pass (0: as many as hold 1,024 crops, and for each worker the same)."""
    rounds: Annotated[int, Arg(least=1)] = 12
    """Passes of each way that are timed."""
    out: Path = WORK / "loading.json"
    """JSON file to write."""


def main(prog: str) -> int:
    """Entry point; 1 if the crops of one way are wrong."""
    command = command_line.parse(LoadingCommand, prog=prog, description=__doc__ or "")
    workers = command.workers or usable_cores()
    batches = command.batches or (workers if fast_mode() else 0)
    out = output_file(command.out)

    plan: LatencyPlan = loading_plan(command.rounds, fast=fast_mode())
    with tempfile.TemporaryDirectory() as folder:
        if command.data is None:
            folders = draw_files(Path(folder), ids=4 if fast_mode() else 24, workers=workers)
        else:
            folders = {command.data.resolve().name: command.data}
        report = bench_loading(folders, workers=workers, batches=batches, plan=plan)
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    print(f"report: {out}")
    return 1 if any(setting["wrong"] for setting in report["settings"]) else 0


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
