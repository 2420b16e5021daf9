"""Time the exports of a model in every precision, and int8 against fp32 on this CPU; each file is verified first.

python -m bench.lab.exporting [CKPT] [--root DIR] [--out FILE.json]

The report has the time of exports and engine builds, their parity with torch, and the speedup of int8 on this CPU.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.onnx_file import read_onnx
from pmm.bench.latency import LatencyPlan, measure
from pmm.config import Config, fast_mode
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.embedding.embed import embed_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.half_precision import emulated
from pmm.export.onnx import export_onnx
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions
from pmm.export.reference import in_memory
from pmm.export.trt import engine_from_onnx
from pmm.presets import preset
from pmm.runtime.base import Embeddings
from pmm.runtime.open import open_runner
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.build_info import describe_build
from pmm.utils.environment import report_header
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.files import existing_file, make_folder, output_file, write_file
from pmm.utils.hardware import usable_cores

SCHEMA = "pmm-export-bench-1"
RECIPES = {
    "fp32": ExportOptions(),
    "fp16": ExportOptions(precision="fp16"),
    "bf16": ExportOptions(precision="bf16"),
    "int8 tensorrt": ExportOptions(precision="int8"),
    "int8 cpu": ExportOptions(precision="int8", target="cpu"),
}
CROPS = 96
STATISTICS_CROPS, STATISTICS_BATCH = 256, 16


def bench_export(
    checkpoint: Path, config: Config, root: Path, folder: Path, *, batches: Sequence[int], plan: LatencyPlan
) -> dict[str, Any]:
    """Export `checkpoint` in every precision into `folder`, verify each file, then time it. See `SCHEMA`.

    The cosines are of embeddings minus their mean, so that they also mean something for an untrained network.

    Raises UserError as the exports do.
    """
    split = read_dataset(config.data.dataset, root)
    samples = (*split.query, *split.gallery)
    paths = [samples[index].path for index in evenly_spaced(len(samples), CROPS)]
    crops = load_crops(paths, config.data.height, config.data.width)
    with open_runner(checkpoint, device="cpu") as reference:
        expected = embed_crops(reference, crops, batch_size=16)
    rows, files = [], {}
    for name, recipe in RECIPES.items():
        out = make_folder(folder) / f"{recipe.precision}-{recipe.target}.onnx"
        artifact, seconds = _timed(partial(export_onnx, checkpoint, out, recipe, VerifyOptions(verify_root=str(root))))
        files[name] = artifact
        rows.append({"name": name, "export_s": seconds, **_facts(artifact, expected, crops), **_engine(artifact)})
    return {
        **report_header(SCHEMA, usable_cores()),
        "model": {
            "method": config.model.method,
            "backbone": config.model.backbone,
            "height": config.data.height,
            "width": config.data.width,
        },
        "exports": rows,
        "latency": [row for batch in batches for row in _latency(files, crops, batch, plan)],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    lines = [
        "| file | export s | MB | share of MACs | min cosine | engine build s | engine MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["exports"]:
        build = (f"{row['build_s']:.1f}", f"{row['engine_mb']:.1f}") if "build_s" in row else ("-", "-")
        cells = (row["name"], f"{row['export_s']:.1f}", f"{row['mb']:.1f}", f"{row['share']:.2%}",
                 f"{row['min_cosine']:.7f}", *build)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| ONNX Runtime, CPU | batch | p50 ms | speedup over fp32 |", "|---|---:|---:|---:|"]
    for row in report["latency"]:
        lines.append(f"| {row['name']} | {row['batch']} | {row['p50_ms']:.2f} | {row['speedup']:.2f}x |")
    return "\n".join(lines)


def _facts(artifact: Artifact, expected: Embeddings, crops: Crops) -> dict[str, Any]:
    manifest = artifact.manifest
    if manifest.precision in ("fp16", "bf16"):
        embed = in_memory(
            emulated(read_onnx(artifact.path).proto), manifest.input, manifest.preprocessing, optimise=False
        )
        found = np.concatenate([embed(crops[k : k + 16]) for k in range(0, len(crops), 16)])
    else:
        with open_runner(artifact.path, device="cpu") as runner:
            found = embed_crops(runner, crops, batch_size=16)
    mean = expected.mean(0)
    return {
        "mb": artifact.path.stat().st_size / 1e6,
        "share": manifest.precision_share[manifest.precision],
        "macs": manifest.macs,
        "kept_in_fp32": (manifest.quantization or {}).get("kept_in_fp32", []),
        "min_cosine": numeric_parity(expected - mean, found - mean).min_cosine,
    }


def _engine(artifact: Artifact) -> dict[str, Any]:
    """Seconds and size of an engine build; the reason if there is no builder, or the file is for CPUs."""
    file, out = read_onnx(artifact.path), artifact.path.with_suffix(".plan")
    try:
        engine, seconds = _timed(partial(engine_from_onnx, file, out, EngineOptions()))
    except UserError as error:
        return {"no_engine": str(error)}
    contract = engine.manifest.engine
    assert contract is not None
    return {
        "build_s": seconds,
        "engine_mb": out.stat().st_size / 1e6,
        "builder": f"{contract.flavor} {contract.version}",
        "engine_share": engine.manifest.precision_share[engine.manifest.precision],
    }


def _latency(files: dict[str, Artifact], crops: Crops, batch: int, plan: LatencyPlan) -> list[dict[str, Any]]:
    """Latency of the files that ONNX Runtime runs on this CPU, interleaved, and the speedup over fp32."""
    runners = {
        name: open_runner(file.path, device="cpu") for name, file in files.items() if file.manifest.precision != "bf16"
    }
    images = np.resize(crops, (batch, *crops.shape[1:]))  # again from the first, if there are fewer
    measured = measure({name: runner.bind(images) for name, runner in runners.items()}, plan, seed=batch)
    fp32 = measured["fp32"].p50
    return [
        {"name": name, "batch": batch, "p50_ms": found.p50, "speedup": fp32 / found.p50,
         "samples_ms": [round(value, 4) for value in found.samples_ms]}
        for name, found in measured.items()
    ]  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def random_checkpoint(config: Config, root: Path, out: Path) -> Path:
    """Write a checkpoint of `config` with random weights (seed 0) to `out`, to time exports without a trained one.

    Its batch-norm statistics are those of 256 training crops of the data set at `root`, averaged as in training:
    without them the activations of a deep random network vanish or explode, and no precision could be evaluated.
    Raises InvalidFile if the data set has no training crops.
    """
    import torch

    from pmm.artifacts import checkpoint
    from pmm.data.preprocessing import preprocessing_of
    from pmm.models.registry import build_model
    from pmm.training.snapshot import snapshot
    from pmm.training.state import make_train_state

    train = read_dataset(config.data.dataset, root).train
    if not train:
        raise InvalidFile("it has no training crops for batch-norm statistics", path=root)
    crops = load_crops(
        [train[index].path for index in evenly_spaced(len(train), STATISTICS_CROPS)],
        config.data.height,
        config.data.width,
    )
    model_config = dataclasses.replace(config.model, weights="none", num_classes=len({s.pid for s in train}))
    config = dataclasses.replace(config, model=model_config, data=dataclasses.replace(config.data, root=str(root)))
    torch.manual_seed(0)
    state = make_train_state(build_model(config), config, torch.device("cpu"), 1)
    size = preprocessing_of(config)
    with torch.no_grad():
        for start in range(0, len(crops), STATISTICS_BATCH):
            state.model(torch.from_numpy(size.normalise(crops[start : start + STATISTICS_BATCH])))
    checkpoint.save(out, snapshot(state, 0, -1.0))
    return out


PROG = "bench.lab.exporting"


@dataclass(frozen=True, kw_only=True)
class ExportingCommand:
    """`python -m bench.lab.exporting [CKPT]`"""

    checkpoint: Annotated[Path | None, Arg("CKPT", positional=True)] = None
    """Checkpoint (default: preset paper with random weights, its batch-norm statistics from 256 crops)."""
    root: Path = Path("runs/demo/data")
    """Data set to verify and calibrate on."""
    batches: str = "1,8"
    """Images per call to time, with commas between."""
    work: Path = Path("runs/export-bench")
    """Folder for the files that are made."""
    out: Path | None = None
    """JSON file to write (default: export.json in the work folder)."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportingCommand, prog=prog, description=__doc__ or "")
    batches = command_line.numbers(command.batches, flag="--batches")
    out = output_file(command.out or make_folder(command.work) / "export.json")

    if command.checkpoint:
        from pmm.artifacts.checkpoint import load

        checkpoint = existing_file(command.checkpoint, "a checkpoint written by pmm train")
        config = Config.from_dict(load(checkpoint)["config"])
    else:
        config = preset("paper")
        checkpoint = random_checkpoint(config, command.root, command.work / "paper.pth")
    plan = LatencyPlan(warmup=0.05, samples=10) if fast_mode() else LatencyPlan(samples=60, budget=30.0)
    report = bench_export(checkpoint, config, command.root, command.work, batches=batches, plan=plan)
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    print(f"kernels of the mix (training only): {describe_build(report['environment']['kernels'])}")
    print(f"report: {out}")


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
