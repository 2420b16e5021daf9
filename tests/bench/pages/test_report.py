"""The reports say what the result says: nothing hidden, nothing dressed up, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmm.bench.plots import plots
from pmm.bench.report import markdown, table, write_reports
from pmm.bench.wording import verdict

HOSTILE = "no <script>alert(1)</script> | engine & \x1b[31m`driver`\nsecond line"


def result(backend: str, device: str = "cpu", p50: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A backend that ran: mAP 71.2 %, as torch does, timed at batches 1 and 8."""
    samples = np.random.default_rng(0).gamma(40, p50 / 40, 60)
    batches = [
        {"batch": batch, "p50_ms": p50 * batch**0.8, "p90_ms": 1.2 * p50 * batch**0.8,
         "images_per_s": 1000 * batch**0.2 / p50, "samples_ms": [float(s) * batch**0.8 for s in samples]}
        for batch in (1, 8)
    ]  # fmt: skip
    return {
        "backend": backend, "device": device, "precision": "fp32", "status": "ok", "reason": "", "provider": "plain",
        "artifact": f"out/{backend}.onnx", "artifact_bytes": 3_456_789, "load_s": 0.25, "mAP": 0.712, "rank1": 0.893,
        "mINP": 0.401, "skipped_queries": 0, "map_delta": 0.0, "rank1_delta": 0.0, "min_cosine": 0.9999996,
        "median_cosine": 0.9999999, "batches": batches, **changes,
    }  # fmt: skip


def absent(backend: str, status: str, reason: str) -> dict[str, Any]:
    """A backend that did not run: no figure at all."""
    empty = dict.fromkeys(result(backend))
    return {**empty, "backend": backend, "device": "cuda", "precision": "fp32", "status": status, "reason": reason,
            "provider": "", "batches": []}  # fmt: skip


def report_of(*results: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({
        "schema": "pmm-bench-1",
        "created": "2025-01-02T03:04:05+00:00",
        "checkpoint": {"path": "runs/demo/best.pth", "sha256": "ab" * 32, "method": "pmm", "epoch": 12,
                       "embedding_dim": 256, "parameters_m": 1.234},
        "dataset": {"name": "synthetic", "root": "runs/demo/data", "queries": 300, "gallery": 1500, "distractors": 225,
                    "identities": 100},
        "environment": {"cpu": "Some CPU", "cores": 2, "threads": 2, "gpus": [], "os": "Linux", "python": "3.11",
                        "versions": {"torch": "2.14.1", "onnxruntime": "1.22"}, "commit": None,
                        "kernels": {"compiled": True, "compiler": "g++ 12.2.0", "cuda": None, "architectures": [],
                                    "sources": "0123456789ab"}},
        "method": {"warmup_s": 1.0, "samples_per_batch": 60, "includes": "one call, buffers in place"},
        "results": list(results),
    })  # fmt: skip


TORCH = result("torch", p50=18.0, artifact=None, artifact_bytes=None)
ORT = result("ort-cpu")


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "srcset", "href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(report: dict[str, Any], out: Path, picture: Image.Image | None = None) -> tuple[dict[str, Any], str, str]:
    write_reports(report, out, picture)
    return (
        json.loads((out / "report.json").read_text()),
        (out / "report.md").read_text(encoding="utf-8"),
        (out / "report.html").read_text(encoding="utf-8"),
    )


def test_content_and_round_trip(tmp_path: Path) -> None:
    report = report_of(TORCH, ORT, absent("tensorrt-rtx", "unavailable", "built, but no GPU to run it on"))
    data, text, page = written(report, tmp_path / "new" / "folder", Image.new("RGB", (90, 60), "white"))
    assert data == report
    shown = " ".join(Page(page).text.split())
    headline = "ONNX Runtime on CPU ranks as torch does (mAP 71.2 %, difference 0.00 points) and is 1.8x faster"
    expected = (headline, "synthetic", "built, but no GPU to run it on", "unavailable", "89.3 %", "40.1 %", "0.999999",
                "300 queries", "Some CPU", "2.14.1", "buffers in place", "abab", "3.46 MB", "ort-cpu.onnx",
                "compiled (g++ 12.2.0; no CUDA; sources 0123456789ab)")  # fmt: skip
    for content in (shown, text.replace("\\", "")):
        assert [words for words in expected if words not in content] == []
    assert "10.0 / 12.0" in shown
    assert page.count("<figure>") == 5


def test_page_is_self_contained_and_pictures_are_whole(tmp_path: Path) -> None:
    *_, page = written(report_of(TORCH, ORT), tmp_path, Image.new("RGB", (90, 60), "white"))
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert len(parsed.links) == 9  # four plots, light and dark, and the picture
    for link in parsed.links:
        kind, _, content = link.partition(";base64,")
        decoded = base64.b64decode(content)
        assert kind in ("data:image/svg+xml", "data:image/png")
        assert decoded.startswith(b"\x89PNG") or decoded.rstrip().endswith(b"</svg>")
        # an SVG may name its XML namespaces, but must not fetch anything
        assert not re.search(rb"href=\"(?!#|data:image/png)|url\((?!#)|@import", decoded)
    assert not re.search(r"https?:|@import|url\(", page)


def test_hostile_text_is_shown_not_obeyed(tmp_path: Path) -> None:
    report = report_of(TORCH, ORT, absent("tensorrt", "failed", HOSTILE))
    report["checkpoint"]["method"] = "</title><img src=x onerror=alert(1)>"
    report["environment"]["versions"] = {"<b>x</b>": "\udcff"}
    _, text, page = written(report, tmp_path)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "<script>alert(1)</script>" in parsed.text
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert not re.search(r"(?<!\\)<", text)
    assert r"\<script\>" in text
    line = next(line for line in table(report).splitlines() if line.startswith("- tensorrt"))
    assert "second line" in line
    assert "\x1b" not in line


def test_names_of_backends_are_escaped_in_tables_and_plots(tmp_path: Path) -> None:
    report = report_of(TORCH, result("odd|$name$ <b>", p50=3.0))
    _, text, page = written(report, tmp_path)
    assert "b" not in Page(page).tags
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any("odd" in row for row in rows)
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_table_has_a_line_per_backend() -> None:
    lines = table(report_of(TORCH, ORT, absent("openvino", "unavailable", "not installed"))).splitlines()
    assert [re.split(r"\s*\|\s*", line)[1] for line in lines[:1] + lines[2:4]] == ["backend", "torch (CPU)", "ort-cpu"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert [cell.strip() for cell in lines[3].split("|")[1:9]] == [
        "ort-cpu", "fp32", "71.2 %", "0.00", "89.3 %", "0.999999", "10.0 / 12.0", "100",
    ]  # fmt: skip
    assert lines[5] == "- openvino (GPU), fp32: unavailable: not installed"


def test_loss_of_accuracy_is_called_a_loss(tmp_path: Path) -> None:
    bad = result("ort-cpu", mAP=0.700, map_delta=-0.012, rank1_delta=-0.02)
    said = verdict(report_of(TORCH, bad))
    assert said.headline == (
        "ONNX Runtime on CPU loses 1.20 points of mAP (70.0 % instead of torch's 71.2 %) but is 1.8x faster at batch 1."
    )
    assert said.tone == "bad"
    *_, page = written(report_of(TORCH, bad), tmp_path)
    assert 'class="loss">-1.20<' in page


@pytest.mark.parametrize(
    ("changes", "words", "tone"),
    [
        ({"map_delta": 0.02, "mAP": 0.732}, "gains 2.00 points of mAP", "mixed"),
        ({"map_delta": -0.0004}, "ranks as torch does (mAP 71.2 %, difference -0.04 points)", "good"),
        ({"rank1_delta": -0.0033}, "keeps mAP (difference 0.00 points), but its rank-1 moved by -0.33 points", "mixed"),
        ({"min_cosine": 0.97}, "worst-case cosine of 0.970000 to torch's embeddings, and is 1.8x faster", "good"),
        ({"map_delta": None, "mAP": None}, "could not be compared", "bad"),
        ({"p50": 18.1}, "and is about as fast at batch 1", "good"),
        ({"p50": 36.0}, "but is 2.0x slower at batch 1", "good"),
        ({"device": "cuda", "p50": 0.9}, "and is 20x faster than torch on CPU at batch 1", "good"),
        ({"precision": "fp16"}, "ONNX Runtime fp16 on CPU ranks", "good"),
        ({"batches": []}, "difference 0.00 points).", "good"),
    ],
)
def test_verdict_of_one_backend(changes: dict[str, Any], words: str, tone: str) -> None:
    said = verdict(report_of(TORCH, result("ort-cpu", **changes)))
    assert words in said.headline
    assert said.tone == tone


def test_verdict_of_many_backends_names_each() -> None:
    fast = result("ort-cuda", "cuda", p50=2.0)
    lossy = result("openvino", p50=1.0, precision="int8", mAP=0.65, map_delta=-0.062)
    said = verdict(report_of(TORCH, ORT, fast, lossy, absent("tensorrt", "failed", "out of memory.")))
    assert said.headline == (
        "2 of 3 other backends rank as torch does; the fastest of these, ONNX Runtime on GPU, is 9.0x faster than "
        "torch on CPU at batch 1; mAP is lost or unknown with OpenVINO int8 on CPU; 1 more could not be measured."
    )
    assert said.tone == "bad"
    assert "OpenVINO int8 on CPU loses 6.20 points" in said.sentences[2]
    assert said.sentences[3] == "TensorRT on GPU failed (out of memory)."


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ((ORT,), "unknown: torch fp32, which the others are compared with, was not measured."),
        ((absent("torch", "failed", "boom"), ORT), "which the others are compared with, failed (boom)."),
        ((TORCH,), "torch on CPU reaches mAP 71.2 %; no other backend was measured, so there is nothing to compare."),
        ((TORCH, absent("ort-cpu", "unavailable", "not installed")), "could not run here (not installed)."),
        ((), "is unknown"),
    ],
)
def test_verdict_without_a_comparison(results: tuple[dict[str, Any], ...], words: str) -> None:
    assert words in verdict(report_of(*results)).headline


def test_nothing_ran(tmp_path: Path) -> None:
    report = report_of(absent("torch", "failed", "boom"), absent("ort-cpu", "unavailable", "not installed"))
    _, text, page = written(report, tmp_path)
    assert "no backend could be measured" in text
    assert "nothing to plot" in page
    assert "<img" not in page
    assert "boom" in page
    assert "not installed" in page


def test_few_samples_one_batch_and_odd_numbers(tmp_path: Path) -> None:
    """No p90, no samples, NaN, numpy scalars and paths: what a short or half-failed run hands over."""
    one = result("torch", artifact=tmp_path / "m.onnx", mAP=np.float32(0.5), min_cosine=math.nan)
    one["batches"] = [{"batch": np.int64(1), "p50_ms": 3.0, "p90_ms": None, "images_per_s": 333.0, "samples_ms": []}]
    data, text, _ = written(report_of(one), tmp_path)
    assert data["results"][0]["min_cosine"] is None
    assert data["results"][0]["mAP"] == 0.5
    assert data["results"][0]["artifact"] == str(tmp_path / "m.onnx")
    assert "3.00 / -" in text
    assert [plot.title for plot in plots(data)] == ["Latency per batch", "Throughput", "How latency spreads"]


def test_real_people_are_not_called_synthetic() -> None:
    report = report_of(TORCH)
    report["dataset"]["name"] = "market1501"
    assert "synthetic" not in markdown(report)


def test_plots_are_the_same_every_time() -> None:
    report = report_of(TORCH, ORT)
    assert plots(report) == plots(report)
