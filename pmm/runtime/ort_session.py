"""A session of ONNX Runtime: on which device, how it is opened, and the proof that it runs on that device.

ONNX Runtime's CUDA provider is a separate library, loaded when a session needs it; where that fails, ONNX Runtime
goes on on the CPU silently.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pmm.artifacts.manifest import Manifest
from pmm.runtime.fork import check_cuda_after_fork
from pmm.runtime.memory import reason
from pmm.utils.cuda_versions import advice
from pmm.utils.errors import BackendUnavailable, InvalidFile, UserError
from pmm.utils.extras import import_library
from pmm.utils.hardware import clashing_wheels, compute_threads, cuda_index, driver_version, gpu_at, nvidia_gpus

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
COMPUTED = {("fp16", "cpu"): "fp32", ("int8", "cuda"): "fp32"}
"""Precision of the file and device, where ONNX Runtime has no products in it: what it computes them in."""
SEARCH = "HEURISTIC"
"""How cuDNN's convolutions are chosen. ONNX Runtime's default, EXHAUSTIVE, searches long, and again whenever the batch
size changes; with HEURISTIC cuDNN chooses at once. A server has batches of changing sizes, and a bench times what is
served, so it is one setting for all runs."""
CUDA_FAILURE = re.compile(r"(?:CUDA|CUDNN|CUBLAS) failure \d|cuDNN is not available")
"""In the text of an error: CUDA, and not the file, is to blame."""
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_INTEGER_BIASES = "WeightBiasQuantization"
"""ONNX Runtime's rewriting of biases as int32."""


class CudaFailure(UserError):
    """A CUDA library refused to work for ONNX Runtime: an old driver, a cuDNN for another CUDA, a full GPU."""


def open_session(
    content: bytes,
    name: str = "graph",
    device: str = "cpu",
    threads: int = 0,
    *,
    optimise: bool = True,
    float_biases: bool = False,
    tf32: bool = False,
    cuda_graph: bool = False,
) -> Any:
    """An onnxruntime.InferenceSession on one provider, recording where each operator goes.

    Args:
        name: of the file, for messages.
        device: cpu, cuda or cuda:N.
        optimise: let ONNX Runtime rewrite the graph.
        float_biases: but not its biases, as int8 with fp16 needs it: it divides them by their scale in fp16, where the
            quotient often overflows.
        tf32, cuda_graph: as `OrtRunner` has them, on cuda.

    Raises:
        BackendUnavailable: ONNX Runtime is missing or installed twice.
        InvalidFile: ONNX Runtime refuses the graph.
        CudaFailure: CUDA refused.
    """
    ort, gpu = onnx_runtime(), cuda_index(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    options.log_severity_level = 4  # its errors are raised below
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # where 8-bit products are summed in 16 bits (see hardware.int8_overflows), exact sums: a few percent slower
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # TF32 is on by default in ONNX Runtime; fp32 must be fp32
    on_gpu = {
        "device_id": gpu,
        "use_tf32": int(tf32),
        "enable_cuda_graph": int(cuda_graph),
        "cudnn_conv_algo_search": SEARCH,
    }
    provider = (PROVIDERS["cpu"], {}) if gpu is None else (PROVIDERS["cuda"], on_gpu)
    if gpu is not None:
        _preload(ort)
    try:
        # without the fallback: it would print, go on with the CPU, and do so again in the middle of the runs
        left_out = [_INTEGER_BIASES] if float_biases else []
        return ort.InferenceSession(
            content, options, providers=[provider], enable_fallback=0, disabled_optimizers=left_out
        )
    except Exception as error:  # ORT raises its own exception types, one per kind of bad file
        problem = f"ONNX Runtime cannot load it ({reason(error)})"
        if gpu is not None and CUDA_FAILURE.search(str(error)):
            raise CudaFailure(problem, path=name, hint=cuda_hint(reason(error))) from error
        raise InvalidFile(problem, path=name) from error


def onnx_runtime() -> Any:
    """The module. Raises MissingLibrary, or BackendUnavailable where it is installed twice."""
    ort = import_library("onnxruntime")
    if clash := clashing_wheels():
        raise BackendUnavailable(clash)
    ort.disable_telemetry_events()
    return ort


def resolved_device(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU and the provider are, else "cpu". Raises BackendUnavailable for a GPU that
    cannot be used."""
    index = cuda_index(device)
    if device != "cpu":
        check_cuda_after_fork()
    providers = onnx_runtime().get_available_providers()  # what was compiled: necessary, not sufficient
    usable = bool(nvidia_gpus()) and PROVIDERS["cuda"] in providers
    if device == "auto":
        return "cuda" if usable else "cpu"
    if index is not None and not usable:
        lacking = "no NVIDIA GPU is visible" if not nvidia_gpus() else "this ONNX Runtime has no CUDA provider"
        hint = "use --backend ort-cpu or --device cpu, or install onnxruntime-gpu and a driver"
        raise BackendUnavailable(f"--device {device}: {lacking}", hint=hint)
    if index is not None:
        gpu_at(index)
    return device


def check_modes(path: str | Path, device: str, precision: str, tf32: bool, cuda_graph: bool) -> None:
    """Raises BackendUnavailable or InvalidFile where a file of this `precision` cannot run so on this device."""
    if precision == "bf16" and device == "cpu":
        hint = "use a GPU, build an engine (pmm export trt), or export another precision"
        raise BackendUnavailable("ONNX Runtime has no bf16 convolution for CPUs", path=path, hint=hint)
    if device == "cpu" and (tf32 or cuda_graph):
        raise BackendUnavailable(f"a CPU has no {'TF32' if tf32 else 'CUDA graphs'}", path=path, hint="use a GPU")
    if tf32 and precision != "fp32":
        raise InvalidFile(f"it is in {precision}", path=path, expected="a file in fp32, to run in TF32")
    if tf32 and not (gpu := gpu_at(cuda_index(device) or 0)).has_tf32:
        raise BackendUnavailable(f"{gpu.name} has no TF32", path=path, hint="run it in fp32")


def verify_provider(session: Any, device: str, name: str) -> str:
    """Which provider really runs the graph, as strongly as this version can show it.

    Raises UserError if it is not the one of `device`: ONNX Runtime falls back silently.
    """
    wanted = PROVIDERS["cpu" if device == "cpu" else "cuda"]
    if device != "cpu" and (fallback := cuda_fallback(session)):
        raise UserError(fallback.problem, path=name, expected=wanted, hint=fallback.hint)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return wanted
    nodes = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info()
             for node in part.get_nodes()]  # fmt: skip
    elsewhere = Counter(provider for provider, operator in nodes if provider != wanted and operator in _PRODUCTS)
    if elsewhere:
        where = ", ".join(f"{count} on {provider}" for provider, count in elsewhere.items())
        raise UserError(f"convolutions or matrix products run on another provider: {where}", path=name, expected=wanted)
    return f"{wanted} ({sum(provider == wanted for provider, _ in nodes)} of {len(nodes)} operators)"


def check_interface(session: Any, manifest: Manifest, name: str) -> None:
    """Raises InvalidFile if the session's inputs and outputs are not those of the manifest."""
    values = (*session.get_inputs(), *session.get_outputs())
    # a dynamic size is a name
    actual = {v.name: ["any" if isinstance(v.shape[0], str) else v.shape[0], *v.shape[1:]] for v in values if v.shape}
    batch = manifest.input.batch or "any"
    declared = {
        manifest.input.name: [batch, *manifest.input.shape(manifest.preprocessing)],
        manifest.embedding.name: [batch, manifest.embedding.dim],
    }
    if actual != declared:
        raise InvalidFile(f"its inputs and outputs are {actual}", path=name, expected=f"{declared}, by its manifest")


def cuda_fallback(session: Any) -> CudaFailure | None:
    """Why ONNX Runtime does not run on the GPU, with the reason of the system's loader; None if it does."""
    first = session.get_providers()[0]
    if first == PROVIDERS["cuda"]:
        return None
    ort, reason = onnx_runtime(), ""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    try:  # only now: loaded before ONNX Runtime does it, the library would not find its host
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        reason = str(error)
    return CudaFailure(
        f"ONNX Runtime fell back to {first}{reason and f' ({reason})'}; it is built for CUDA "
        f"{getattr(ort, 'cuda_version', '') or 'of another version'} and cuDNN 9, the driver serves CUDA "
        f"{driver_version() or 'of no version'}",
        hint=cuda_hint(reason) or 'pip install "onnxruntime-gpu[cuda,cudnn]"',
    )


def cuda_hint(reason: str) -> str:
    """What to install for an error of the loader or of ONNX Runtime: cuDNN if that is missing (some releases link it,
    others load it when it is used), else what fits the driver and torch; empty if that is not known."""
    if reason.lower().startswith(("libcudnn", "cudnn")) and " failure " not in reason:
        major = str(getattr(onnx_runtime(), "cuda_version", "") or 13).partition(".")[0]
        return f"cuDNN 9 is missing: pip install nvidia-cudnn-cu{major}"
    return advice("onnxruntime-gpu")


def _preload(ort: Any) -> None:
    """Load the CUDA libraries of the nvidia packages: the provider does not find them, and only a process that has
    imported torch has loaded them already."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; `cuda_fallback` has it
            ort.preload_dlls()
