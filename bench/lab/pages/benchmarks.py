"""The page of benchmarks: tables made from the results in bench/results, never typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmm.bench.pages.format import between, points
from pmm.bench.pages.verdict import verdict
from pmm.bench.schema import read_report

Report = dict[str, Any]

HEAD = """# Benchmarks

Every table is made from a result in `bench/results/`, which names the machine, the commit and each sample. Times are
medians of calls that were interleaved in one run; a speedup is the median of paired ratios, with its 95 % interval in
brackets. People are synthetic (`pmm synthetic`). **No speed on a GPU is claimed anywhere here.**
"""


DEMO = "2026-12-01-amd-epyc-2-cores-bench-demo"
"""What the README shows of the bench."""


def demo_in_short(folder: Path) -> str:
    """Markdown for the README: the demo's bench, a line per backend, and its verdict."""
    path = folder / f"{DEMO}.json"
    report = json.loads(path.read_text())
    rows = []
    for cells in map(_backend, (result for result in report["results"] if result["status"] == "ok")):
        rows.append([*cells[:4], cells[4].partition(" /")[0], cells[5]])
    head = ["backend", "mAP", "change, points (95 %)", "rank-1 lost / gained", "ms, batch 1", "speedup"]
    machine = f"{report['environment']['cpu']}, {report['environment']['cores']} cores"
    text = (
        f"The demo's model (preset `tiny`, synthetic people) on {machine}, {report['created'][:10]} "
        f"([raw result](bench/results/{DEMO}.json); `make docs` makes a page of all benchmarks):"
    )
    return "\n".join(
        [text, "", *_table(head, rows), "", "Its report begins:", "", f"> {verdict(read_report(path)).headline}"]
    )


def benchmarks_page(folder: Path) -> str:
    """Markdown of the whole page. Raises FileNotFoundError for a result that is not in `folder`, KeyError for one of
    another form."""
    sections = []
    for title, name, text, table in TABLES:
        report = json.loads((folder / f"{name}.json").read_text())
        sections.append("\n".join([f"## {title}", "", text, "", *table(report), "", _source(name, report), ""]))
    return "\n".join([HEAD, *sections])


def _source(name: str, report: Report) -> str:
    environment = report["environment"]
    machine = f"{environment['cpu']}, {environment['cores']} cores"
    return f"*{machine}, {report['created'][:10]}, commit {environment['commit']}; `bench/results/{name}.json`*"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _times(value: float, interval: Sequence[float], digits: int = 1) -> str:
    low, high = interval
    return f"{value:.{digits}f}x ({low:.{digits}f}-{high:.{digits}f})"


def _backends(report: Report) -> list[str]:
    batches = [timing["batch"] for timing in report["results"][0]["batches"]]
    head = ["backend", "mAP", "change, points (95 %)", "rank-1 lost / gained"]
    for batch in batches:
        head += [f"p50 / p95 ms, batch {batch}", "speedup"]
    return _table(head, [_backend(result) for result in report["results"] if result["status"] == "ok"])


def _backend(result: Report) -> list[str]:
    low, high = result["map_delta_interval"]
    reference = low == high == 0 and result["min_cosine"] == 1
    change, spread = points(result["map_delta"]), between((low, high), points)
    change += f" ({spread})" if spread != "0.00 to 0.00" else ""
    cells = [result["name"], f"{100 * result['mAP']:.1f} %", "reference" if reference else change]
    cells.append("" if reference else f"{result['rank1_lost']} / {result['rank1_gained']}")
    for timing in result["batches"]:
        speedup = timing["speedup"]
        cells.append(f"{timing['p50_ms']:.2f} / {timing['p95_ms']:.2f}" if timing["p95_ms"] else "")
        cells.append(_times(speedup["value"], speedup["interval"]) if speedup else "1x")
    return cells


def _speeds(report: Report) -> list[str]:
    rows = []
    for result in report["results"]:
        if result["status"] == "ok":
            timing = next(timing for timing in result["batches"] if timing["batch"] == 8)
            speedup = timing["speedup"]
            times = _times(speedup["value"], speedup["interval"], 2) if speedup else "1x"
            rows.append([result["name"], f"{timing['p50_ms']:.0f} ms", times])
    return _table(["backend", "batch 8", "speedup"], rows)


def _exports(report: Report) -> list[str]:
    latency = {(row["name"], row["batch"]): row for row in report["latency"]}

    def time(name: str, batch: int) -> str:
        row = latency.get((name, batch))
        return f"{row['p50_ms']:.1f} ms ({row['speedup']:.2f}x)" if row else "not run there"

    rows = [
        [
            export["name"],
            f"{export['export_s']:.0f} s",
            f"{export['mb']:.0f} MB",
            f"{100 * export['share']:.2f} %",
            f"{export['build_s']:.1f} s, {export['engine_mb']:.0f} MB" if export.get("build_s") else "not for TensorRT",
            time(export["name"], 1),
            time(export["name"], 8),
        ]
        for export in report["exports"]
    ]
    head = ["file", "export", "size", "share of MACs", "TensorRT-RTX build", "ONNX Runtime, batch 1", "batch 8"]
    return _table(head, rows)


def _ablation(report: Report) -> list[str]:
    rows = []
    for row in report["rows"]:
        spread, difference = (row["metrics"]["mAP"][key] for key in ("spread", "difference"))
        cells = [f"`{row['name']}`", f"{100 * spread['mean']:.1f} %", "", ""]
        if difference:
            low, high = (100 * side for side in difference["interval"])
            verdict = "no significant difference" if low <= 0 <= high else "higher" if low > 0 else "lower"
            cells[2:] = [f"{100 * difference['mean']:+.2f} ({low:+.2f} to {high:+.2f})", verdict]
        rows.append(cells)
    head = ["method", f"mAP, mean of {len(report['seeds'])}", f"minus {report['against']}, points (95 %)", "verdict"]
    return _table(head, rows)


def _mix(report: Report) -> list[str]:
    names = {
        "authors": "the authors' procedure",
        "eager": "eager torch",
        "compiled": "`torch.compile` of it",
        "ours": "ours",
    }
    settings = report["settings"]
    operations = [
        (f"{name}, {setting['layout']}", setting["ops"][name]) for name in ("mix", "mix+pool") for setting in settings
    ]
    rows = []
    for name, words in names.items():
        cells = [words]
        for _, operation in operations:
            (ms,) = (row["both"]["p50_ms"] for row in operation["rows"] if row["name"] == name)
            over = [ratio["ratio"] for ratio in operation["ratios"] if (ratio["of"], ratio["phase"]) == (name, "both")]
            cells.append(f"{ms:.1f} ({over[0]:.1f}x)" if over else f"{ms:.1f}")
        rows.append(cells)
    return _table(["forward + backward, ms", *(title for title, _ in operations)], rows)


def _loading(report: Report) -> list[str]:
    rows = []
    for setting in report["settings"]:
        by_name = {row["name"]: row for row in setting["rows"]}
        cells = [setting["files"], f"{setting['height']}x{setting['width']}"]
        cells.append(f"{by_name['bare PIL']['us_per_crop']:.0f} us")
        for name in ("training loader", "iter_crops"):
            cells.append(_times(by_name[name]["ratio"], by_name[name]["interval"], 2))
        rows.append(cells)
    return _table(["files", "to", "bare loop", "training batches", "evaluation"], rows)


def _ranking(report: Report) -> list[str]:
    rows = []
    for setting in report["market"]["settings"]:
        product, evaluation = setting["rows"]
        kind = setting["embeddings"]
        rows.append(["3,368 x 15,913", f"`query @ gallery.T` alone, {kind}", f"{product['ms']:,.0f} ms", ""])
        times = _times(evaluation["ratio"], evaluation["interval"], 2)
        rows.append(["", "the whole evaluation", f"{evaluation['ms']:,.0f} ms", times])
    for row, what in zip(report["msmt17"]["rows"], ("the whole evaluation", "with re-ranking"), strict=True):
        rows.append(["11,659 x 82,161", what, f"{row['seconds']:.0f} s", f"{row['bytes_above'] / 1e9:.2f} GB"])
    return _table(["queries x gallery", "what", "time", "times the product, or memory above the embeddings"], rows)


def _search(report: Report) -> list[str]:
    rows = [
        [
            row["way"],
            str(row["at_once"]),
            f"{row['ms']:.1f} ms",
            f"{row['queries_per_s']:.0f}",
            _times(row["speedup"]["ratio"], row["speedup"]["interval"]),
        ]
        for row in report["rows_timed"]
    ]
    return _table(["way", "queries at once", "time", "queries/s", "speedup"], rows)


def _saving(report: Report) -> list[str]:
    return _table(["what", "time"], [[row["name"], f"{row['ms']:.0f} ms"] for row in report["rows"]])


TABLES: tuple[tuple[str, str, str, Callable[[Report], list[str]]], ...] = (
    (
        "The demo, every backend",
        DEMO,
        "What `make demo` trains: 1,200 queries against 3,000 gallery crops of 200 identities that it never saw. All "
        "pass the gates. Two shared virtual cores and calls of a millisecond: the bench flags each latency at batch 8 "
        "as noisy; speedups, paired over rounds, are steadier than medians.",
        _backends,
    ),
    (
        "ResNet-50 at 384x128",
        "2026-11-23-amd-epyc-2-cores-bench-paper",
        "Preset `paper` with random weights, which say nothing of accuracy.",
        _speeds,
    ),
    (
        "Files of ResNet-50 at 384x128",
        "2026-11-22-amd-epyc-2-cores-export-paper",
        "Measured when files for CPUs had weights of 8 bits, on a CPU with VNNI; they have 7 bits now, which no CPU's "
        "sums cut off, and the heads' weights are 8 bits wide too.",
        _exports,
    ),
    (
        "The methods on the same people",
        "2026-12-01-amd-epyc-2-cores-ablation",
        "Preset `tiny`, 60 epochs, of `aos` 60 for each of its two networks (`pmm ablation`). Small networks, short "
        "runs and drawn people: the papers' gains are on real ones.",
        _ablation,
    ),
    (
        "The mix of feature maps",
        "2026-11-22-amd-epyc-2-cores-ops-n32-fp32",
        "32 maps of 2048x24x8 in float32, the paper's blocks (`python -m bench.lab.mix_kernels`); in brackets, times "
        "ours. Each result is proved equal before it is timed.",
        _mix,
    ),
    (
        "Loading crops",
        "2026-11-28-amd-epyc-2-cores-loading",
        "Wall time per crop against a bare loop of PIL that decodes, resizes and keeps nothing "
        "(`python -m bench.lab.loading`).",
        _loading,
    ),
    (
        "Evaluation",
        "2026-12-01-amd-epyc-2-cores-ranking",
        "Made-up embeddings of 1,536 numbers: some vary in a few dimensions, as a trained network's do, some are "
        "uniformly random (`python -m bench.lab.ranking --rerank`). The product is numpy's; the evaluation's own is "
        "compiled for AVX-512, which numpy's was not.",
        _ranking,
    ),
    (
        "Search in a million embeddings",
        "2026-11-30-intel-xeon-2-cores-gallery-search",
        "The ten nearest, exactly, of a trained network's embeddings of 384 numbers (`python -m "
        "bench.lab.gallery_search`); every answer is compared with a float64 scan before it is timed.",
        _search,
    ),
    (
        "Saving a run",
        "2026-11-30-intel-xeon-2-cores-saving",
        "What a save of preset `paper` costs the training thread (`python -m bench.lab.saving`).",
        _saving,
    ),
)
"""Title, result, text, and what makes the table."""
