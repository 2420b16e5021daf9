"""What only a machine with an NVIDIA GPU can prove, as a list of steps, and the file that each leaves in bench/results.

Loads the standard library only: what is missing to run the steps is theirs to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pmm.bench.ablation_rows import DEFAULT_ROWS
from pmm.bench.steps import Outcome, Step, digest, last_lines
from pmm.environment import describe_environment
from pmm.files import make_folder, write_file
from pmm.kernels import LIBRARY
from pmm.machine import Gpu
from pmm.runtime.flavors import RTX_CAPABILITIES

SCHEMA = "pmm-gpu-1"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SOURCES = ("bench", "cpp_ext", "export", "pmm", "tests")
SUFFIXES = (".py", ".j2", ".h", ".cpp", ".cu")

# What reaches every kernel without hundreds of drawn examples: under the sanitizer each call is slow.
SANITIZED = "memory_that_starts_anywhere or long_sums or planes_of_more_cells or on_many_threads"
REQUIRED = {"PMM_REQUIRE_EXT": "1", "PMM_FAST": "0"}
KERNELS = str(LIBRARY.relative_to(ROOT))
TRAINING = ("torch", "torchvision", "numpy", "PIL", "simplejpeg", "tyro", "tqdm")
EXPORT = (*TRAINING, "onnx", "onnxscript", "onnxruntime")
ABLATION_SEEDS = 5


def gpu_steps(gpu: Gpu) -> list[Step]:
    """All steps for `gpu`, in their order. None needs the network: what is trained starts from random weights."""
    return [*_kernel_steps(gpu), *_model_steps(gpu), *_ablation_steps(gpu)]


def _kernel_steps(gpu: Gpu) -> list[Step]:
    """The kernels: built, tested, watched by the sanitizer, timed."""
    out = _relative(folder_of(gpu))
    pytest = ("python", "-m", "pytest", "-m", "gpu")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "86", "--tool")
    sanitized = (*pytest, "tests/ops", "-k", SANITIZED)
    ops = ("python", "bench/ops.py", "--device", "cuda")
    sizes = ("--batches", "32,64,128", "--layouts", "nchw,channels_last")
    return [
        Step(
            name="build",
            commands=(
                ("python", "setup.py", "build_ext", "--inplace"),
                ("python", "-c", "import sys; from pmm.kernels import not_built; sys.exit(not_built('cuda'))"),
            ),
            env={"PMM_BUILD_CUDA": "1", "PMM_REQUIRE_EXT": "1", "TORCH_CUDA_ARCH_LIST": gpu.compute_capability},
            needs=("torch", "setuptools", "g++"),
            makes=(KERNELS,),
        ),
        Step(
            name="tests",
            commands=(pytest,),
            env=REQUIRED,
            needs=(*EXPORT, "pytest", "hypothesis"),
            uses=(KERNELS,),
        ),
        Step(
            name="sanitizer",
            commands=((*sanitizer, "memcheck", *sanitized), (*sanitizer, "racecheck", *sanitized)),
            # torch keeps freed memory for itself, which hides an access beyond the end of a tensor
            env={**REQUIRED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs=("compute-sanitizer", "torch", "pytest", "hypothesis"),
            optional=True,
            uses=(KERNELS,),
        ),
        *(
            Step(  # one precision each: with torch.compile all of them would take longer than a step may
                name=f"ops-{dtype}",
                commands=((*ops, *sizes, "--dtypes", dtype, "--out", f"{out}/ops-{dtype}/ops.json"),),
                env=REQUIRED,
                needs=TRAINING,
                uses=(KERNELS,),
                makes=(f"{out}/ops-{dtype}/ops.json",),
            )
            for dtype in ("float32", "float16", "bfloat16")
        ),
        *(
            Step(
                name=name,
                commands=((*ops, "--step", "--step-batch", "128", "--amp", amp, "--out", f"{out}/{name}/step.json"),),
                env=REQUIRED,
                needs=TRAINING,
                uses=(KERNELS,),
                makes=(f"{out}/{name}/step.json",),
            )
            for name, amp in (("ops-step", "off"), ("ops-step-bf16", "bf16"))
        ),
    ]


def _model_steps(gpu: Gpu) -> list[Step]:
    """The way of a model: a short training of preset paper, its exports, backends side by side, engines."""
    out = _relative(folder_of(gpu))
    best, fp32, fp16 = f"{out}/training/best.pth", f"{out}/export/fp32.onnx", f"{out}/export/fp16.onnx"
    train = ("python", "-m", "pmm.train", "--preset", "paper", "--device", "cuda", "--amp", "bf16")
    people = ("--synthetic-ids", "100", "--workers", "8")
    bench = ("python", "bench/run.py", best, "--batches", "1,8,32,128,256", "--seconds", "3", "--precisions")
    # TensorRT-RTX builds anywhere, but an engine proves itself where it was built, and runs on these only
    builder = "tensorrt|tensorrt_rtx" if gpu.compute_capability in RTX_CAPABILITIES else "tensorrt"
    return [
        Step(
            name="training",
            commands=((*train, *people, "--epochs", "40", "--out", f"{out}/training"),),
            env=REQUIRED,
            needs=(*TRAINING, "tensorboard"),
            uses=(KERNELS,),
            makes=(best, f"{out}/training/config.json", f"{out}/training/metrics.jsonl"),
        ),
        Step(
            name="export",
            commands=(
                ("python", "export/to_onnx.py", best, "-o", fp32),
                ("python", "export/to_onnx.py", best, "-o", fp16, "--precision", "fp16"),
            ),
            needs=EXPORT,
            uses=(best,),
            makes=(fp32, f"{fp32}.json", fp16, f"{fp16}.json"),
        ),
        *(
            Step(  # one backend each, beside torch in fp32: all of them would take longer than a step may
                name=f"bench-{name}",
                commands=((*bench, precisions, "--backends", name, "--out", f"{out}/bench-{name}"),),
                env={"PMM_FAST": "0"},
                needs=(*EXPORT, *needs, "jinja2", "matplotlib"),
                optional=bool(needs),
                uses=(best,),
                makes=(f"{out}/bench-{name}/report.json",),
            )
            for name, precisions, needs in (
                ("torch", "fp32,tf32,fp16,bf16", ()),
                ("torch-compile", "fp32,tf32,fp16,bf16", ()),
                ("aoti", "fp32,tf32,fp16,bf16", ()),
                ("ort-cuda", "fp32,tf32,fp16,bf16", ()),
                ("ort-cpu", "fp32,int8", ()),
                ("tensorrt", "all", ("tensorrt",)),
            )
        ),
        Step(
            name="engine",
            commands=(
                ("python", "export/to_trt.py", fp32, "-o", f"{out}/engine/fp32.plan", "--batch", "1", "8", "32"),
                ("python", "export/to_trt.py", fp16, "-o", f"{out}/engine/fp16.plan", "--batch", "1", "8", "32"),
            ),
            needs=(*EXPORT, builder),
            optional=True,
            uses=(fp32, f"{fp32}.json", fp16, f"{fp16}.json"),
            makes=(f"{out}/engine/fp32.plan.json", f"{out}/engine/fp16.plan.json"),
        ),
    ]


def _ablation_steps(gpu: Gpu) -> list[Step]:
    """The methods at full size, and preset strong beside paper: a seed per step, each report of all seeds so far."""
    out = _relative(folder_of(gpu))
    rows = ",".join([*(f"{row}:amp=bf16" for row in DEFAULT_ROWS.split(",")), "strong/pmm"])
    compare = ("python", "bench/ablation.py", "--preset", "paper", "--methods", rows)
    against = ("--against", "paper/baseline:amp=bf16")
    people = ("--synthetic-ids", "100", "--epochs", "60", "--device", "cuda", "--runs", f"{out}/ablation")
    return [
        Step(
            name=f"ablation-{seeds}",
            commands=(
                (*compare, *against, *people, "--seeds", str(seeds), "--out", f"{out}/ablation-{seeds}/ablation.json"),
            ),
            env=REQUIRED,
            needs=(*TRAINING, "tensorboard", "matplotlib"),
            uses=(KERNELS,),
            makes=(f"{out}/ablation-{seeds}/ablation.json",),
        )
        for seeds in range(1, ABLATION_SEEDS + 1)
    ]


def folder_of(gpu: Gpu) -> Path:
    """Where the logs, the stamps and what the steps make lie: runs/gpu/nvidia-h200."""
    return ROOT / "runs" / "gpu" / slug(gpu.name)


def slug(name: str) -> str:
    """A name for files: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dependencies() -> dict[str, Any]:
    """What every proof rests on: the sources (whatever the commit is called), the libraries, the driver."""
    facts = describe_environment()
    files = (path for part in SOURCES for path in sorted((ROOT / part).rglob("*")) if path.suffix in SUFFIXES)
    sources = digest(ROOT, [ROOT / "setup.py", *files])
    return {key: facts[key] for key in ("python", "versions", "driver")} | {"sources": sources}


def packages(steps: Iterable[Step]) -> str:
    """One line: what is missing on this machine, and what that costs."""
    costs: dict[str, list[str]] = {}
    for step in steps:
        for need in step.missing():
            costs.setdefault(need, []).append(step.name)
    said = [f"{need.replace('|', ' or ')} is missing: no {', '.join(names)}" for need, names in costs.items()]
    return "packages: " + ("; ".join(said) or "nothing is missing")


def write_result(outcome: Outcome, gpu: Gpu) -> Path | None:
    """What a step found, with all that is needed to do it again, as DATE-CARD-STEP.json; nothing for a failure."""
    if not outcome.fine:
        return None
    step, now = outcome.step, datetime.now(timezone.utc)
    made = [path for path in step.makes if path.endswith((".json", ".jsonl"))] if outcome.status == "passed" else []
    result = {
        "schema": SCHEMA,
        "created": now.isoformat(timespec="seconds"),
        "step": step.name,
        "status": outcome.status,
        "note": outcome.note,
        "seconds": outcome.seconds,
        "commands": step.lines(),
        "environment": describe_environment(),
        "said": last_lines(outcome.log, ROOT) if outcome.log else [],
        "files": {Path(path).name: _values(ROOT / path) for path in made},
    }
    path = make_folder(RESULTS) / f"{now:%Y-%m-%d}-{slug(gpu.name)}-{step.name}.json"
    write_file(path, json.dumps(result, indent=1) + "\n")
    return path


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per step: what became of it and how long it took."""
    wide = max(len(outcome.step.name) for outcome in outcomes)
    rows = (f"{o.step.name:<{wide}}  {o.status:<11}  {o.seconds:>6.1f} s  {o.note}" for o in outcomes)
    return "\n".join(row.rstrip() for row in rows)


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _values(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
