"""What only a machine with an NVIDIA GPU can prove, as a list of steps for `make gpu`.

Each ends well within ten minutes. Loads the standard library only.
"""

from __future__ import annotations

import dataclasses
import os

from bench.lab.gpu_table import ROOT, folder_of
from pmm.ablation.rows import DEFAULT_ROWS
from pmm.runtime.trt_variant import RTX_CAPABILITIES
from pmm.utils.build_info import LIBRARY
from pmm.utils.hardware import Gpu
from pmm.utils.task_runner import NVCC, Step

# What reaches every kernel without hundreds of drawn examples: under the sanitizer each call is slow.
SANITIZED = "memory_that_starts_anywhere or long_sums or planes_of_more_cells or on_many_threads"
REQUIRED = {"PMM_REQUIRE_EXT": "1", "PMM_FAST": "0"}
PLAIN = {"PMM_FAST": "0"}
KERNELS = str(LIBRARY.relative_to(ROOT))
TRAINING = ("torch", "torchvision", "numpy", "PIL", "simplejpeg", "tqdm")
EXPORT = (*TRAINING, "onnx", "onnxscript", "onnxruntime")
TESTS = (*EXPORT, "pytest", "hypothesis")
ABLATION_SEEDS = 5
FLAVORS = {"": "tensorrt", "-rtx": "tensorrt_rtx"}
"""How an engine step's name ends -> the library."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


def gpu_steps(gpu: Gpu, index: int | None = None) -> list[Step]:
    """All steps for `gpu`, in their order; None needs the network: what is trained starts from random weights.

    `index`: of the GPU, if there are several and it is not the first; the steps then see no other.
    """
    out = folder_of(gpu).relative_to(ROOT).as_posix()
    steps = [*_kernel_steps(gpu, out), *_training_steps(gpu, out), *_bench_steps(gpu, out), *_engine_steps(gpu, out),
             *_ablation_steps(gpu, out)]  # fmt: skip
    if index is None:
        return steps
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    only = {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
    return [dataclasses.replace(step, env={**step.env, **only}) for step in steps]


def _check(name: str, out: str, *words: str, needs: tuple[str, ...] = TRAINING, ruled_out: str = "") -> Step:
    """One of bench.lab.gpu_check's checks."""
    made = f"{out}/{name}/found.json"
    command = ("python", "-m", "bench.lab.gpu_check", *words, "--out", made)
    return Step(name=name, commands=(command,), env=PLAIN, needs=needs, ruled_out=ruled_out, takes=(KERNELS,),
                makes=(made,))  # fmt: skip


def _kernel_steps(gpu: Gpu, out: str) -> list[Step]:
    """The libraries; the kernels: built, tested, watched by the sanitizer, timed; the other tests that need a GPU."""
    pytest = ("python", "-m", "pytest", "-m", "gpu")
    ops = ("python", "-m", "bench.lab.mix_kernels", "--device", "cuda")
    sizes = ("--batches", "32,64,128", "--layouts", "nchw,channels_last")
    return [
        _check("libraries", out, "libraries"),
        Step(
            name="build",
            commands=(
                ("python", "setup.py", "build_ext", "--inplace"),
                ("python", "-c", "import sys; from pmm.utils.build_info import not_built; sys.exit(not_built('cuda'))"),
            ),
            env={"PMM_BUILD_CUDA": "1", "PMM_REQUIRE_EXT": "1", "TORCH_CUDA_ARCH_LIST": gpu.compute_capability},
            needs=("torch", "setuptools", "g++", NVCC),
            optional=True,
            makes=(KERNELS,),
        ),
        Step(name="tests-ops", commands=((*pytest, "tests/ops"),), env=REQUIRED, needs=TESTS, uses=(KERNELS,)),
        Step(name="tests", commands=((*pytest, "--ignore", "tests/ops"),), env=PLAIN, needs=TESTS, takes=(KERNELS,)),
        *(
            Step(
                name=tool,
                commands=(("compute-sanitizer", "--error-exitcode", "86", "--tool", tool, *pytest, "tests/ops", "-k",
                           SANITIZED),),
                # torch keeps freed memory for itself, which hides an access beyond the end of a tensor
                env={**REQUIRED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                needs=("compute-sanitizer", "torch", "pytest", "hypothesis"),
                optional=True,
                uses=(KERNELS,),
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(
            Step(  # one precision each: with torch.compile all of them would take longer than a step may
                name=f"ops-{dtype}",
                commands=((*ops, *sizes, "--dtypes", dtype, "--out", f"{out}/ops-{dtype}/ops.json"),),
                env=REQUIRED,
                needs=TRAINING,
                ruled_out=_too_old(gpu, dtype),
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
                ruled_out=_too_old(gpu, amp),
                uses=(KERNELS,),
                makes=(f"{out}/{name}/step.json",),
            )
            for name, amp in (("ops-step", "off"), ("ops-step-bf16", "bf16"))
        ),
    ]  # fmt: skip


def _training_steps(gpu: Gpu, out: str) -> list[Step]:
    """Training of preset paper: throughput per precision, loading, resuming, NCCL, and a short run for the exports."""
    train = ("python", "-m", "pmm.train", "--preset", "paper", "--device", "cuda", "--amp", _half(gpu))
    people = ("--synthetic-ids", "100", "--workers", "8")
    made = [f"{out}/training/{name}" for name in ("best.pth", "config.json", "metrics.jsonl")]
    needs = (*TRAINING, "tensorboard")
    return [
        *(
            _check(f"throughput-{amp}", out, "throughput", "--amp", amp, ruled_out=_too_old(gpu, amp))
            for amp in ("off", "bf16", "fp16")
        ),
        Step(
            name="loading",
            commands=(("python", "-m", "bench.lab.loading", "--out", f"{out}/loading/loading.json"),),
            env=PLAIN,
            needs=TRAINING,
            makes=(f"{out}/loading/loading.json",),
        ),
        _check("resume", out, "resume", needs=needs),
        _check("nccl", out, "distributed"),
        Step(
            name="training",
            commands=((*train, *people, "--epochs", "40", "--out", f"{out}/training"),),
            env=PLAIN,
            needs=needs,
            takes=(KERNELS,),
            makes=tuple(made),
        ),
    ]  # fmt: skip


def _bench_steps(gpu: Gpu, out: str) -> list[Step]:
    """Backends beside torch in fp32, a precision each where files are made, which are kept for the next attempt."""
    best = f"{out}/training/best.pth"
    halves = ("fp32", "tf32", "fp16", "bf16")
    kinds = [
        ("torch", (",".join(kind for kind in halves if not _too_old(gpu, kind)),), ""),
        ("torch-compile", halves, ""),
        ("aoti", halves, ""),
        ("ort-cuda", halves, ""),
        ("ort-cpu", ("fp32", "int8"), ""),
        ("tensorrt", PRECISIONS, "tensorrt"),
        ("tensorrt-rtx", PRECISIONS, "tensorrt_rtx"),
    ]
    found = []
    for backend, choices, library in kinds:
        batches = "1,8,32" if backend == "ort-cpu" else "1,8,32,128,256"
        for precisions in choices:
            name, on_gpu = f"bench-{backend}" + (f"-{precisions}" if len(choices) > 1 else ""), backend != "ort-cpu"
            words = (best, "--backends", backend, "--precisions", precisions, "--batches", batches, "--seconds", "3")
            found.append(
                Step(
                    name=name,
                    commands=(("python", "bench/run.py", *words, "--out", f"{out}/{name}"),),
                    env=PLAIN,
                    needs=(*EXPORT, "scipy", "jinja2", "matplotlib", *filter(None, [library])),
                    optional=bool(library),
                    ruled_out=_ruled_out(gpu, library) or (_too_old(gpu, precisions) if on_gpu else ""),
                    uses=(best,),
                    makes=(f"{out}/{name}/report.json",),
                    keeps=("artifacts",),
                )
            )
    return found


def _engine_steps(gpu: Gpu, out: str) -> list[Step]:
    """An engine per precision: built, proved and timed by layer as a user builds it, then opened, inspected, run from
    host and GPU, in batches of any size and by several threads, and compared with torch."""
    best, found = f"{out}/training/best.pth", []
    for suffix, library in FLAVORS.items():
        for precision in PRECISIONS:
            name = f"engine{suffix}-{precision}"
            plan = f"{out}/{name}/model.plan"
            kind = ("--precision", "fp32", "--tf32") if precision == "tf32" else ("--precision", precision)
            flavor = ("--flavor", "rtx" if suffix else "tensorrt")
            build = ("python", "export/to_trt.py", best, "-o", plan, "--batch", "1", "8", "64", *kind, *flavor)
            check = _check(name, out, "engine", plan, best)
            found.append(
                Step(
                    name=name,
                    commands=(build, ("python", "-m", "pmm", "info", plan), *check.commands),
                    env=PLAIN,
                    needs=(*EXPORT, library),
                    optional=True,
                    ruled_out=_ruled_out(gpu, library) or _too_old(gpu, precision),
                    uses=(best,),
                    makes=(f"{plan}.json", *check.makes),
                    keeps=("model.onnx", "model.onnx.json"),
                )
            )
    return found


def _ruled_out(gpu: Gpu, library: str) -> str:
    # it builds anywhere, but an engine proves itself where it was built
    ruled_out = library == "tensorrt_rtx" and gpu.compute_capability not in RTX_CAPABILITIES
    return f"TensorRT-RTX runs no engine on compute capability {gpu.compute_capability}" if ruled_out else ""


def _too_old(gpu: Gpu, kind: str) -> str:
    """Why the card does not compute in a type, or emulates it; empty if it does."""
    old = kind in ("tf32", "bf16", "bfloat16") and float(gpu.compute_capability) < 8.0
    return f"compute capability {gpu.compute_capability} has no {kind}" if old else ""


def _half(gpu: Gpu) -> str:
    """The mixed precision in which preset paper is trained."""
    return "fp16" if _too_old(gpu, "bf16") else "bf16"


def _ablation_steps(gpu: Gpu, out: str) -> list[Step]:
    """The methods at full size, and preset strong beside paper: a seed in two steps, the first of half the methods, the
    second of all, of which those are there; each report of all seeds so far."""
    half = _half(gpu)
    rows = [*(f"{row}:amp={half}" for row in DEFAULT_ROWS.split(",")), f"strong/pmm:amp={half}"]
    against = f"paper/baseline:amp={half}"
    people = ("--synthetic-ids", "100", "--epochs", "60", "--device", "cuda", "--runs", f"{out}/ablation")
    compare = ("python", "bench/ablation.py", "--preset", "paper", "--against", against)
    found = []
    for seeds in range(1, ABLATION_SEEDS + 1):
        for name, methods in ((f"ablation-{seeds}-half", rows[: len(rows) // 2]), (f"ablation-{seeds}", rows)):
            words = ("--methods", ",".join(methods), *people, "--seeds", str(seeds))
            found.append(
                Step(
                    name=name,
                    commands=((*compare, *words, "--out", f"{out}/{name}/ablation.json"),),
                    env=PLAIN,
                    needs=(*TRAINING, "scipy", "tensorboard", "matplotlib"),
                    takes=(KERNELS,),
                    makes=(f"{out}/{name}/ablation.json",),
                )
            )
    return found
