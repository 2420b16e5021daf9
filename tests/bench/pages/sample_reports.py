"""Bench reports with figures as they come out, for tests and for looking at the page: no backend runs here."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmm.bench.result_schema import (
    CameraResult,
    Estimate,
    LostQuery,
    OperatingPoint,
    Result,
    Thresholds,
    Timing,
    Tracker,
)
from pmm.bench.schema import (
    SCHEMA,
    BenchReport,
    CheckpointFacts,
    DatasetFacts,
    GateFailure,
    Gates,
    PreprocessingCost,
    TimingFacts,
    WrongPreprocessing,
)

HOSTILE = "no <script>alert(1)</script> | engine & \x1b[31m`driver`\nsecond line"
REFERENCE = "torch fp32"
GATES = Gates(
    max_map_drop=0.005,
    max_rank1_flips=0.02,
    min_cosine={"fp32": 0.9999, "fp16": 0.999, "int8": 0.97},
    max_p95_ms=None,
    max_norm_error={"fp32": 1e-4, "fp16": 2e-3, "int8": 0.1},
)
VERSIONS = {"torch": "2.14.1", "numpy": "2.2.0", "onnx": "1.22.0", "onnxruntime-gpu": "1.22.1", "tensorrt": "10.9.0"}


def timing(batch: int, p50: float, *, reference: float | None = None, samples: int = 400, cuda: bool = False,
           flags: tuple[str, ...] = (), seed: int = 0, profile: int | None = None) -> Timing:  # fmt: skip
    """One batch size: `p50` is that of the call, `reference` the p50 of the reference."""
    generator = np.random.default_rng(seed + batch)
    taken = p50 * (0.985 + generator.gamma(1.5, 0.012, samples))
    taken[generator.integers(0, samples, samples // 40)] *= 1.25
    at = [float(np.quantile(taken, share, method="inverted_cdf")) for share in (0.5, 0.9, 0.95, 0.99)]
    many = samples >= 100

    def near(value: float, by: float) -> tuple[float, float]:
        return value * (1 - by), value * (1 + by)

    return Timing(
        batch=batch,
        samples_ms=tuple(round(float(v), 4) for v in taken),
        block=10,
        turns_s=tuple(0.5 * i for i in range(samples // 10)),
        warmup_s=0.61,
        steady="steady" not in " ".join(flags),
        p50_ms=at[0],
        p50_interval_ms=near(at[0], 0.006) if many else None,
        p90_ms=at[1] if many else None,
        p90_interval_ms=near(at[1], 0.02) if many else None,
        p95_ms=at[2] if many else None,
        p95_interval_ms=near(at[2], 0.04) if many else None,
        p99_ms=at[3] if samples >= 368 else None,
        p99_interval_ms=near(at[3], 0.08) if samples >= 368 else None,
        speedup=Estimate(value=reference / p50, interval=near(reference / p50, 0.012) if many else None)
        if reference
        else None,
        images_per_s=1000 * batch / at[0] * (1.18 if cuda else 1.01),
        in_flight=4 if cuda else 1,
        device_ms=0.93 * at[0] if cuda else None,
        upload_ms=0.012 * batch + 0.01 if cuda else None,
        download_ms=0.004 * batch + 0.008 if cuda else None,
        end_to_end_ms=at[0] + 2.1 * batch,
        decode_ms=2.0 * batch,
        flags=flags,
        profile=profile,
    )


def ran(name: str, p50: float = 10.0, *, device: str = "cpu", batches: Sequence[int] = (1, 8), loss: float = 0.0,
        reference: float | None = 18.0, flags: dict[int, tuple[str, ...]] | None = None, samples: int = 400,
        **changes: Any) -> Result:  # fmt: skip
    """A backend that ran: mAP 71.2 % less `loss`, timed at `batches`; `reference` is the reference's p50 at batch 1."""
    backend, precision, *rest = name.split(" ")
    seed = zlib.crc32(name.encode()) % 1000
    own, cuda = name == REFERENCE, device == "cuda"
    moved = {"fp32": 3e-8, "tf32": 4e-7, "fp16": 3e-6, "bf16": 2e-4, "int8": 3e-3}.get(precision, 1e-3)
    grows = 0.55 if cuda else 0.93
    timed = tuple(
        timing(b, p50 * b**grows, reference=None if own or reference is None else reference * b**grows, cuda=cuda,
               flags=(flags or {}).get(b, ()), seed=seed, samples=samples,
               profile=b if backend == "tensorrt" else None)
        for b in batches
    )  # fmt: skip
    spread = {"fp32": 1e-4, "tf32": 2e-4, "fp16": 4e-4, "bf16": 0.0015}.get(precision, 0.0035)
    delta = None if own else -loss + spread * (0.3 - seed % 7 / 10)
    values: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "device": device,
        "precision": precision,
        "gpu": "NVIDIA H200" if cuda else "",
        "tracker": Tracker(
            least=1,
            most=40,
            calls=200,
            mean_ms=2.5 * p50,
            p99_ms=4.1 * p50,
            images_per_s=8200 / p50,
            in_order_images_per_s=8321 / p50,
        ),
        "cuda_graph": "graph" in rest if cuda else None,
        "status": "ok",
        "reason": "",
        "provider": f"{backend} 2.14.1, {'NVIDIA H200' if cuda else '2 threads'}",
        "artifact": f"runs/demo/report/artifacts/{name.replace(' ', '-')}.onnx",
        "artifact_sha256": f"{seed:03x}" * 21 + "a",
        "artifact_bytes": 94_300_000 if precision == "fp32" else 47_300_000,
        "build_s": None if own else 12.3 + seed / 10,
        "load_s": 0.25,
        "first_inference_s": 0.034,
        "peak_memory": 812_000_000 + seed * 1_000_000,
        "gpu_memory": 1_310_000_000 if cuda else None,
        "mAP": 0.712 + (delta or 0.0),
        "rank1": 0.893 - (loss and loss / 2),
        "mINP": 0.401 - loss,
        "skipped_queries": 0,
        "map_delta": 0.0 if own else delta,
        "map_delta_interval": None if own else ((delta or 0) - spread, (delta or 0) + spread),
        "rank1_delta": 0.0 if own else -(loss and loss / 2),
        "rank1_delta_interval": None if own else (-spread - loss / 2, spread - loss / 2),
        "minp_delta": 0.0 if own else -loss,
        "minp_delta_interval": None if own else (-spread - loss, spread - loss),
        "min_cosine": 1.0 if own else 1 - 20 * moved,
        "p1_cosine": 1.0 if own else 1 - 8 * moved,
        "median_cosine": 1.0 if own else 1 - moved,
        "worst_crop": "runs/demo/data/bounding_box_test/0012_c1s1_000007_00.jpg",
        "max_abs": 0.0 if own else 40 * moved,
        "max_norm_error": 0.0 if own else 12 * moved,
        "batch_min_cosine": 1 - 2e-8,
        "rank1_lost": 0 if own else round(400 * loss + 900 * moved),
        "rank1_gained": 0 if own else round(100 * loss + 600 * moved),
        "top1_changed": 0 if own else round(800 * loss + 3000 * moved),
        "top10_overlap": 1 - loss - min(0.1, 12 * moved),
        "kendall_tau": 1 - 3 * loss - min(0.1, 20 * moved),
        "cameras": tuple(
            CameraResult(camid=c, queries=50, mAP=0.70 + 0.01 * c - loss, map_delta=-loss * (0.5 + c / 6))
            for c in range(1, 7)
        ),
        "worst_queries": (),
        "thresholds": thresholds(delta=loss + moved, own=own),
        "batches": timed,
    }
    return Result(**{**values, **changes})


def thresholds(*, delta: float, own: bool) -> Thresholds:
    rates = ((1e-2, 0.951, 0.912), (1e-3, 0.874, 0.841), (1e-4, 0.742, 0.771))
    return Thresholds(
        genuine=4_812,
        impostor=446_300,
        eer=0.0231 + delta / 3,
        eer_threshold=0.9433 + delta,
        points=tuple(
            OperatingPoint(
                fmr=fmr,
                threshold=cut + delta,
                tpr=tpr - delta,
                flips=0 if own else round(5e4 * delta * fmr**0.2) + round(4e4 * delta * fmr**0.2),
                newly_accepted=0 if own else round(5e4 * delta * fmr**0.2),
                newly_rejected=0 if own else round(4e4 * delta * fmr**0.2),
            )
            for fmr, tpr, cut in rates
        ),
    )


def absent(name: str, status: str = "unavailable", reason: str = "no NVIDIA GPU here", **changes: Any) -> Result:
    """A backend that did not run: no figure at all."""
    backend, precision, *_ = name.split(" ")
    values: dict[str, Any] = {"name": name, "backend": backend, "device": "cuda", "precision": precision,
                              "cuda_graph": None, "status": status, "reason": reason}  # fmt: skip
    return Result(**{**values, **changes})


def lost(paths: Sequence[str], count: int = 3) -> tuple[LostQuery, ...]:
    """Queries that lost, with crops from `paths`."""
    return tuple(
        LostQuery(
            path=paths[i % len(paths)],
            pid=17 + i,
            camid=1 + i % 6,
            ap_reference=0.92 - 0.07 * i,
            ap=0.41 - 0.05 * i,
            first_reference=tuple(paths[(i + 1 + k) % len(paths)] for k in range(5)),
            first=tuple(paths[(3 * i + 7 + k) % len(paths)] for k in range(5)),
            right_reference=(True, True, False, True, True),
            right=(False, True, False, False, True),
        )
        for i in range(count)
    )


def dropped(result: Result) -> GateFailure:
    said = f"mAP fell by {-100 * (result.map_delta or 0):.2f} points; at most 0.5 is allowed"
    return GateFailure(result=result.name, gate="--max-map-drop", message=said)


def report_of(*results: Result, gates: Gates = GATES, gpus: Sequence[str] = (), **changes: Any) -> BenchReport:
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": 431.0,
        "checkpoint": CheckpointFacts(path="runs/demo/best.pth", sha256="ab" * 32, method="pmm", epoch=12,
                                      embedding_dim=384, parameters_m=1.234, height=128, width=64),
        "dataset": DatasetFacts(name="synthetic", root="runs/demo/data", queries=300, gallery=1500, distractors=225,
                                identities=100, cameras=6, digest="0123456789abcdef"),
        "environment": {"pmm": "0.1.0", "commit": None, "cpu": "Some CPU @ 2.10GHz", "cores": 2, "threads": 2,
                        "gpus": list(gpus), "compute_capabilities": ["9.0"] * len(gpus),
                        "driver": "580.65.06" if gpus else "", "driver_cuda": "13.0" if gpus else None,
                        "os": "Linux-6.1-x86_64", "python": "3.11.9", "versions": dict(VERSIONS), "problems": [],
                        "kernels": {"compiled": True, "compiler": "g++ 12.2.0", "cuda": None, "architectures": [],
                                    "sources": "0123456789ab"}},
        "timing": TimingFacts(samples=400, seconds=20.0, block=10, threads=2,
                         matrix_tflops={"fp32": 49.1, "tf32": 341.0, "fp16": 688.0, "bf16": 702.0} if gpus else {},
                         gflop_per_image=6.94 if gpus else 0.31),
        "reference": REFERENCE,
        "results": tuple(results),
        "gates": gates,
    }  # fmt: skip
    return BenchReport(**{**values, **changes})


def cpu_machine() -> BenchReport:
    """Seven ran, nothing lost, the rest needs a GPU."""
    batches = (1, 8, 32)
    times = {
        "torch fp32": 18.0, "torch bf16": 41.0, "torch-compile fp32": 14.1, "aoti fp32": 13.6, "ort-cpu fp32": 9.8,
        "openvino fp32": 8.9, "openvino int8": 4.1,
    }  # fmt: skip
    flags = {8: ("drifts: 9 % slower at the end than at the start",)}
    results = [
        ran(name, p50, batches=batches, loss=0.0023 if "int8" in name else 0.0, flags=flags if "aoti" in name else None)
        for name, p50 in times.items()
    ]
    gone = ("tensorrt fp32", "tensorrt fp16", "ort-cuda fp32", "ort-cuda fp16")
    rtx = absent("tensorrt-rtx fp16", reason="engine built, but there is no NVIDIA GPU here to run it on",
                 artifact="runs/demo/report/artifacts/rtx-fp16.plan", artifact_bytes=2_300_000)  # fmt: skip
    return report_of(*results, *map(absent, gone), rtx)


def gpu_machine(paths: Sequence[str] = ()) -> BenchReport:
    """Twenty ran on a GPU machine; int8 moved, and one latency is noisy."""
    times = {
        "torch fp32": 4.4, "torch tf32": 3.9, "torch fp16": 3.8, "torch bf16": 3.85, "torch-compile fp32": 2.9,
        "torch-compile tf32": 2.1, "torch-compile fp16": 1.52, "torch-compile bf16": 1.55, "aoti fp32": 2.8,
        "aoti fp16": 1.41, "ort-cpu fp32": 61.0, "ort-cpu int8": 29.0, "ort-cuda fp32": 3.1, "ort-cuda fp16": 1.9,
        "tensorrt fp32": 2.2, "tensorrt tf32": 1.44, "tensorrt fp16": 0.88, "tensorrt fp16 graph": 0.74,
        "tensorrt int8": 0.69, "tensorrt int8 graph": 0.61,
    }  # fmt: skip
    noisy = {
        1: ("noisy: the middle half of the samples ranges from 1.31 to 1.76 ms",),
        8: ("not steady: still changing after 5.0 s of warm-up",),
    }
    results = []
    for name, p50 in times.items():
        int8 = "int8" in name
        results.append(
            ran(name, p50, device="cpu" if "cpu" in name else "cuda", batches=(1, 8, 32), reference=4.4,
                loss=0.0151 if int8 else 0.0006 if "bf16" in name else 0.0,
                worst_queries=lost(paths, 5) if int8 and paths else (),
                flags=noisy if name == "torch-compile fp16" else None)
        )  # fmt: skip
    failures = [dropped(r) for r in results if "int8" in r.name]
    failures.append(
        GateFailure(result="ort-cpu int8", gate="--min-cosine", message="cosine 0.940000; at least 0.97 is required")
    )
    gone = absent("tensorrt-rtx fp16", reason="TensorRT-RTX does not run on compute capability 9.0")
    broken = absent("openvino fp32", "failed", "RuntimeError: out of memory", device="cpu")
    gates = Gates(**{**vars(GATES), "failures": tuple(failures)})
    return report_of(*results, gone, broken, gates=gates, gpus=("NVIDIA H200",))


def int8_lost(paths: Sequence[str] = ()) -> BenchReport:
    """int8 lost accuracy, and its gates say so."""
    bad = ran("ort-cpu int8", 4.6, loss=0.012, map_delta=-0.012, mAP=0.7, worst_queries=lost(paths) if paths else ())
    said = (
        dropped(bad),
        GateFailure(
            result=bad.name,
            gate="--min-cosine",
            message="cosine 0.940000 with the reference's; at least 0.97 is required",
        ),
    )
    gates = Gates(**{**vars(GATES), "failures": said})
    return report_of(ran(REFERENCE, 18.0), ran("ort-cpu fp32", 9.8), bad, gates=gates)


def adopted() -> BenchReport:
    """An adopted ONNX file, which is its own reference; what wrong preprocessing costs was measured on a sample."""
    own = ran("ort-cpu fp32", 9.8, map_delta=0.0, map_delta_interval=(0.0, 0.0))
    costs = (
        PreprocessingCost(
            mistake="BGR, not RGB", mAP=0.59, rank1=0.7, map_delta=-0.1234, map_delta_interval=(-0.15, -0.1),
            rank1_delta=-0.193, rank1_delta_interval=(-0.25, -0.14),
        ),
        PreprocessingCost(
            mistake="OpenCV's bilinear, not PIL's bilinear", mAP=0.7134, rank1=0.89, map_delta=0.0,
            map_delta_interval=(-0.002, 0.002), rank1_delta=-0.003, rank1_delta_interval=(-0.01, 0.003),
        ),
        PreprocessingCost(mistake="pixels in 0..1, not normalised", reason="the file normalises its pixels itself"),
    )  # fmt: skip
    wrong = WrongPreprocessing(
        sample=True, identities=77, queries=123, gallery=1877, mAP=0.7134, rank1=0.893, costs=costs
    )
    base = report_of(own, ran("openvino int8", 4.1, loss=0.0023))
    facts = {
        **vars(base.checkpoint), "path": "model.onnx", "kind": "onnx", "method": "adopted", "epoch": None,
        "source": {"SHA-256": "cd" * 32, "written by": "pytorch 2.4.0"}, "preprocessing": "128x64, PIL's bilinear",
    }  # fmt: skip
    return BenchReport(
        **{
            **vars(base),
            "checkpoint": CheckpointFacts(**facts),
            "reference": "ort-cpu fp32",
            "wrong_preprocessing": wrong,
        }
    )


def crashed() -> BenchReport:
    """One backend died, and left what it said."""
    died = absent("openvino fp32", "failed", "the process died (signal 11)", device="cpu")
    said = GateFailure(
        result=died.name, gate="--backends", message=f"failed: {died.reason}; none of its figures could be measured"
    )
    gates = Gates(**{**vars(GATES), "failures": (said,)})
    return report_of(ran(REFERENCE, 18.0), ran("ort-cpu fp32", 9.8), died, gates=gates)


def single_batch() -> BenchReport:
    """A short run: ten samples at one batch size, nothing with an interval."""
    few: dict[str, Any] = {"batches": (4,), "samples": 10, "map_delta_interval": None}
    return report_of(ran(REFERENCE, 18.0, **few), ran("ort-cpu fp32", 9.8, **few))


def hostile() -> BenchReport:
    """Names and reasons that would break a page, a table or a terminal if they were obeyed."""
    odd = ran("odd|$name$</th><b> fp32 </script>", 3.0, provider="`<i>`", artifact="a\udcff.onnx")
    said = GateFailure(result=odd.name, gate="--max-<u>", message=HOSTILE)
    gates = Gates(**{**vars(GATES), "failures": (said,)})
    torch = ran(REFERENCE, 18.0, flags={1: ("<s>drift</s>",)}, notes=("<q>note</q>",))
    base = report_of(torch, odd, absent("tensorrt fp32", "failed", HOSTILE), gates=gates)
    values = {
        **vars(base),
        "checkpoint": CheckpointFacts(**{**vars(base.checkpoint), "method": "</title><img src=x onerror=a>"}),
    }
    values["environment"] = {
        **base.environment,
        "versions": {"<b>x</b>": "\udcff"},
        "problems": ["<em>two wheels</em>"],
    }
    return BenchReport(**values)
