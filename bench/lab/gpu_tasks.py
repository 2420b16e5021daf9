"""The tasks of `make gpu`: tests and measurements that need an NVIDIA GPU.

Each ends well within ten minutes. Loads the standard library only.
"""

from __future__ import annotations

import dataclasses
import os

from bench.lab.gpu_table import ROOT, folder_of
from pmm.ablation.rows import DEFAULT_ROWS
from pmm.utils.build_info import LIBRARY
from pmm.utils.hardware import RTX_CAPABILITIES, Gpu
from pmm.utils.task_runner import NVCC, Task

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
"""How an engine task's name ends -> the library."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


def gpu_tasks(gpu: Gpu, index: int | None = None) -> list[Task]:
    """All tasks for `gpu`, in order. None needs the network: training starts from random weights.

    `index` is that of the GPU if it is not the first; the tasks then see no other GPU.
    """
    out = folder_of(gpu).relative_to(ROOT).as_posix()
    tasks = [*_kernel_tasks(gpu, out), *_training_tasks(gpu, out), *_bench_tasks(gpu, out), *_engine_tasks(gpu, out),
             *_ablation_tasks(gpu, out)]  # fmt: skip
    if index is None:
        return tasks
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    only = {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
    return [dataclasses.replace(task, env={**task.env, **only}) for task in tasks]


def _check(name: str, out: str, *words: str, requires: tuple[str, ...] = TRAINING, unsupported: str = "") -> Task:
    """One of bench.lab.gpu_check's checks."""
    made = f"{out}/{name}/found.json"
    command = ("python", "-m", "bench.lab.gpu_check", *words, "--out", made)
    return Task(name=name, commands=(command,), env=PLAIN, requires=requires, unsupported=unsupported,
                optional_inputs=(KERNELS,), outputs=(made,))  # fmt: skip


def _kernel_tasks(gpu: Gpu, out: str) -> list[Task]:
    """The libraries; the kernels: built, tested, watched by the sanitizer, timed; the other tests that need a GPU."""
    pytest = ("python", "-m", "pytest", "-m", "gpu")
    ops = ("python", "-m", "bench.lab.mix_kernels", "--device", "cuda")
    sizes = ("--batches", "32,64,128", "--layouts", "nchw,channels_last")
    return [
        _check("libraries", out, "libraries"),
        Task(
            name="build",
            commands=(
                ("python", "setup.py", "build_ext", "--inplace"),
                ("python", "-c", "import sys; from pmm.utils.build_info import not_built; sys.exit(not_built('cuda'))"),
            ),
            env={"PMM_BUILD_CUDA": "1", "PMM_REQUIRE_EXT": "1"},
            requires=("torch", "setuptools", "g++", NVCC),
            optional=True,
            outputs=(KERNELS,),
        ),
        Task(name="tests-ops", commands=((*pytest, "tests/ops"),), env=REQUIRED, requires=TESTS, inputs=(KERNELS,)),
        Task(name="tests", commands=((*pytest, "--ignore", "tests/ops"),), env=PLAIN, requires=TESTS,
             optional_inputs=(KERNELS,)),
        *(
            Task(
                name=tool,
                commands=(("compute-sanitizer", "--error-exitcode", "86", "--tool", tool, *pytest, "tests/ops", "-k",
                           SANITIZED),),
                # torch keeps freed memory for itself, which hides an access beyond the end of a tensor
                env={**REQUIRED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                requires=("compute-sanitizer", "torch", "pytest", "hypothesis"),
                optional=True,
                inputs=(KERNELS,),
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(
            Task(  # one precision each: with torch.compile all of them would take longer than a task may
                name=f"ops-{dtype}",
                commands=((*ops, *sizes, "--dtypes", dtype, "--out", f"{out}/ops-{dtype}/ops.json"),),
                env=REQUIRED,
                requires=TRAINING,
                unsupported=_too_old(gpu, dtype),
                inputs=(KERNELS,),
                outputs=(f"{out}/ops-{dtype}/ops.json",),
            )
            for dtype in ("float32", "float16", "bfloat16")
        ),
        *(
            Task(
                name=name,
                commands=((*ops, "--step", "--step-batch", "128", "--amp", amp, *limits, "--out",
                           f"{out}/{name}/step.json"),),
                env=REQUIRED,
                requires=TRAINING,
                unsupported=_too_old(gpu, amp),
                inputs=(KERNELS,),
                outputs=(f"{out}/{name}/step.json",),
            )
            for name, amp, limits in (("ops-step", "off", ()), ("ops-step-bf16", "bf16", ("--limits",)))
        ),
    ]  # fmt: skip


def _training_tasks(gpu: Gpu, out: str) -> list[Task]:
    """Training of preset paper: throughput per precision, of steps and of a whole run; loading, resuming, NCCL, and a
    short run for the exports."""
    train = ("python", "-m", "pmm.train", "--preset", "paper", "--device", "cuda", "--amp", _half(gpu))
    people = ("--synthetic-ids", "100", "--workers", "8")
    made = [f"{out}/training/{name}" for name in ("best.pth", "config.json", "metrics.jsonl")]
    needs = (*TRAINING, "tensorboard")
    return [
        *(
            _check(f"throughput-{amp}", out, "throughput", "--amp", amp, unsupported=_too_old(gpu, amp))
            for amp in ("off", "bf16", "fp16")
        ),
        Task(
            name="loading",
            commands=(("python", "-m", "bench.lab.loading", "--out", f"{out}/loading/loading.json"),),
            env=PLAIN,
            requires=TRAINING,
            outputs=(f"{out}/loading/loading.json",),
        ),
        _check(f"epochs-{_half(gpu)}", out, "epochs", "--amp", _half(gpu), requires=needs),
        _check("resume", out, "resume", requires=needs),
        _check("nccl", out, "distributed"),
        Task(
            name="training",
            commands=((*train, *people, "--epochs", "40", "--out", f"{out}/training"),),
            env=PLAIN,
            requires=needs,
            optional_inputs=(KERNELS,),
            outputs=tuple(made),
        ),
    ]  # fmt: skip


def _bench_tasks(gpu: Gpu, out: str) -> list[Task]:
    """Backends beside torch in fp32; a task per precision if it exports files, which the next attempt can use."""
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
                Task(
                    name=name,
                    commands=(("python", "bench/run.py", *words, "--out", f"{out}/{name}"),),
                    env=PLAIN,
                    requires=(*EXPORT, "scipy", "jinja2", "matplotlib", *filter(None, [library])),
                    optional=bool(library),
                    unsupported=_ruled_out(gpu, library) or (_too_old(gpu, precisions) if on_gpu else ""),
                    inputs=(best,),
                    outputs=(f"{out}/{name}/report.json",),
                    kept_files=("artifacts",),
                )
            )
    return found


def _engine_tasks(gpu: Gpu, out: str) -> list[Task]:
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
                Task(
                    name=name,
                    commands=(build, ("python", "-m", "pmm", "info", plan), *check.commands),
                    env=PLAIN,
                    requires=(*EXPORT, library),
                    optional=True,
                    unsupported=_ruled_out(gpu, library) or _too_old(gpu, precision),
                    inputs=(best,),
                    outputs=(f"{plan}.json", *check.outputs),
                    kept_files=("model.onnx", "model.onnx.json"),
                )
            )
    return found


def _ruled_out(gpu: Gpu, library: str) -> str:
    # it builds anywhere, but an engine proves itself where it was built
    unsupported = library == "tensorrt_rtx" and gpu.compute_capability not in RTX_CAPABILITIES
    return f"TensorRT-RTX runs no engine on compute capability {gpu.compute_capability}" if unsupported else ""


def _too_old(gpu: Gpu, kind: str) -> str:
    """Why the card does not compute in a type, or emulates it; empty if it does."""
    old = kind in ("tf32", "bf16", "bfloat16") and float(gpu.compute_capability) < 8.0
    return f"compute capability {gpu.compute_capability} has no {kind}" if old else ""


def _half(gpu: Gpu) -> str:
    """The mixed precision in which preset paper is trained."""
    return "fp16" if _too_old(gpu, "bf16") else "bf16"


def _ablation_tasks(gpu: Gpu, out: str) -> list[Task]:
    """The methods at full size, and preset strong beside paper: a seed in two tasks, the first of half the methods, the
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
                Task(
                    name=name,
                    commands=((*compare, *words, "--out", f"{out}/{name}/ablation.json"),),
                    env=PLAIN,
                    requires=(*TRAINING, "scipy", "tensorboard", "matplotlib"),
                    optional_inputs=(KERNELS,),
                    outputs=(f"{out}/{name}/ablation.json",),
                )
            )
    return found
