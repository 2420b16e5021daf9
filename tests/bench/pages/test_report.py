"""The reports say what the result says: nothing hidden, nothing dressed up, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pmm.bench.pages.pictures import ReportPictures, worst_pictures
from pmm.bench.pages.plots import plots
from pmm.bench.pages.report import markdown, table, write_reports
from pmm.bench.pages.sections import facts
from pmm.bench.pages.styles import styles_of
from pmm.bench.pages.verdict import verdict
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport, GateFailure, Gates, read_report
from pmm.visualize.lists import RIGHT, WRONG, ListLayout, compared_lists
from tests.bench.pages.sample_reports import (
    GATES,
    REFERENCE,
    absent,
    adopted,
    cpu_machine,
    crashed,
    dropped,
    gpu_machine,
    hostile,
    int8_lost,
    lost,
    ran,
    report_of,
    single_batch,
)

OFF = Gates(max_map_drop=None, max_rank1_flips=None, min_cosine={}, max_p95_ms=None, max_norm_error={})
NO_PICTURES = ReportPictures()
WHITE = Image.new("RGB", (90, 60), "white")
TORCH = ran(REFERENCE, 18.0)
ORT = ran("ort-cpu fp32")


class Page(HTMLParser):
    """The tags, links, table cells and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.cells: list[str] = []
        self.inside = False
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "srcset", "href", "action", "data")]
        self.ids |= {value or "" for key, value in attrs if key == "id"}
        if tag in ("td", "th"):
            self.cells.append("")
            self.inside = True
        if tag == "span" and self.inside:
            self.cells[-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.cells[-1] += data


@dataclasses.dataclass
class Written:
    """One report as it lies on disk."""

    folder: Path
    text: str
    page: str
    shown: str
    """What a reader of the page sees, in one line."""


def written(report: BenchReport, out: Path, pictures: ReportPictures = NO_PICTURES) -> Written:
    write_reports(report, out, pictures)
    page = (out / "report.html").read_text(encoding="utf-8")
    shown = " ".join(Page(page).text.split())
    return Written(out, (out / "report.md").read_text(encoding="utf-8"), page, shown)


@pytest.fixture(scope="module")
def lossy(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """int8 lost accuracy; with all pictures."""
    crops = sorted(str(path) for path in (people / "bounding_box_test").glob("0*.jpg"))[:9]
    report = int8_lost(crops)
    pictures = ReportPictures(ranked=WHITE, worst=worst_pictures(report))
    return written(report, tmp_path_factory.mktemp("lossy") / "new" / "folder", pictures)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Twenty results on a GPU machine."""
    return written(gpu_machine(), tmp_path_factory.mktemp("large"))


def changed(report: BenchReport, **changes: Any) -> BenchReport:
    return dataclasses.replace(report, **changes)


@pytest.mark.parametrize("build", [cpu_machine, gpu_machine, int8_lost, crashed, single_batch, hostile, adopted])
def test_json_is_read_back_as_it_was(build: Any, tmp_path: Path) -> None:
    report = build()
    (tmp_path / "report.json").write_text(report.to_json())
    assert read_report(tmp_path / "report.json") == report


def test_figures_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_reports(report_of(TORCH, ran("ort-cpu fp32", min_cosine=math.nan)), tmp_path / "out", NO_PICTURES)
    assert not (tmp_path / "out").exists()


def test_files_and_what_they_hold(lossy: Written) -> None:
    assert {path.name for path in lossy.folder.iterdir()} == {
        "report.json", "report.md", "report.html", "ranked-lists.png",
    }  # fmt: skip
    assert read_report(lossy.folder / "report.json").reference == REFERENCE
    expected = (
        "ONNX Runtime fp32 on CPU may ship: ", "mAP 71.2 %", "difference 0.00 points", "-0.01 to +0.01",
        "a speedup of 1.84x at batch 1 (1.81x to 1.86x).",
        "synthetic", "300 queries", "Some CPU", "2.14.1", "abab", "94.3 MB", "ort-cpu-fp32.onnx", "0.999999", "40.1 %",
        "compiled (g++ 12.2.0; no CUDA; sources 0123456789ab)", "a distance of 0.8410",
    )  # fmt: skip
    for content in (lossy.shown, lossy.text.replace("\\", "")):
        assert [words for words in expected if words not in content] == []


def test_the_gates_come_before_any_table(lossy: Written) -> None:
    said = "ort-cpu int8: mAP fell by 1.20 points; at most 0.5 is allowed"
    for content, table_begins in ((lossy.page, "<table"), (lossy.text, "| result")):
        before = " ".join(content[: content.index(table_begins)].replace("\\", "").replace("\u00a0", " ").split())
        assert "1 of 3 results fails a gate: ort-cpu int8." in before
        assert said in before
        assert "mAP falls by at most 0.50 points" in before
        assert "Gates: 2 failed, 2 passed, 1 off" in before
    assert 'class="verdict bad"' in lossy.page


def test_both_files_show_the_same_figures(large: Written) -> None:
    """Every cell of a Markdown table stands in a table of the page."""

    def plain(cell: str) -> str:
        return " ".join(re.sub(r"[(),]", " ", cell).split())

    shown = {plain(cell) for cell in Page(large.page).cells}
    rows = [line for line in large.text.replace("\\", "").splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) > 200
    assert {plain(cell) for row in rows for cell in row.strip("|").split("|")} - shown == set()


def test_intervals_and_flags_are_shown(large: Written) -> None:
    for content in (large.shown, large.text.replace("\\", "")):
        for words in ("-1.83 to -1.13", "5.87x to 6.02x", "0.606 to 0.614", "1.52 !", "4.76 !"):
            assert words in content
        assert "torch-compile fp16, batch 1: noisy: the middle half of the samples ranges from 1.31" in content
        assert "another program may have run" in content


def test_queries_with_a_loss_are_shown(lossy: Written) -> None:
    assert 'alt="Queries that ort-cpu int8 ranks worse' in lossy.page
    assert sum(link.startswith("data:image/jpeg") for link in Page(lossy.page).links) == 2
    assert "92.0 %" in lossy.text
    assert "41.0 %" in lossy.text


def colours(picture: Image.Image) -> set[Any]:
    return {colour for _, colour in picture.getcolors(1 << 24) or ()}


def test_compared_lists_frame_what_is_right_and_wrong(people: Path) -> None:
    crops = sorted((people / "bounding_box_test").glob("*.jpg"))[:7]
    right, wrong = [(crop, True) for crop in crops[1:4]], [(crop, False) for crop in crops[4:7]]
    picture = compared_lists(crops[:1], [right], [wrong], heads=("before", "after"), titles=("AP",), height=64)
    layout = ListLayout(height=64, titled=True)
    assert picture.width > layout.size(1, 6)[0], "the two lists stand apart"
    between, bottom = layout.cell(0, 4)[0], picture.height - layout.swatch - 3 * layout.gap
    assert {RIGHT} == colours(picture.crop((0, 0, between, bottom))) & {RIGHT, WRONG}
    assert {WRONG} == colours(picture.crop((between, 0, picture.width, bottom))) & {RIGHT, WRONG}
    assert {RIGHT, WRONG} <= colours(picture.crop((0, bottom, *picture.size))), "the legend"
    for lists in ([], [right, right]):
        with pytest.raises(ValueError, match="two lists per query"):
            compared_lists(crops[:1], lists, [wrong], heads=("a", "b"))
    with pytest.raises(ValueError, match="titles"):
        compared_lists(crops[:1], [right], [wrong], heads=("a", "b"), titles=("one", "two"))


def test_queries_that_lost_next_to_nothing_get_no_picture(people: Path) -> None:
    crops = sorted(str(path) for path in (people / "bounding_box_test").glob("0*.jpg"))[:9]
    tiny = tuple(dataclasses.replace(query, ap=query.ap_reference - 0.002) for query in lost(crops))
    assert worst_pictures(report_of(TORCH, ran("ort-cpu fp32", worst_queries=tiny))) == {}


def test_page_is_self_contained_and_pictures_are_whole(lossy: Written) -> None:
    parsed = Page(lossy.page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & set(parsed.tags)
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert anchors
    assert anchors <= parsed.ids
    pictures = [link for link in parsed.links if not link.startswith("#")]
    assert len(pictures) == 12  # five plots, light and dark, and two pictures
    for link in pictures:
        kind, _, content = link.partition(";base64,")
        decoded = base64.b64decode(content)
        assert kind in ("data:image/svg+xml", "data:image/jpeg")
        assert decoded.startswith(b"\xff\xd8\xff") or decoded.rstrip().endswith(b"</svg>")
        # an SVG may name its XML namespaces, but must not fetch anything
        assert not re.search(rb"href=\"(?!#|data:image/png)|url\((?!#)|@import", decoded)
    assert not re.search(r"https?:|@import|url\(", lossy.page)
    assert lossy.page.count("content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"") == 1


def test_hostile_text_is_shown_not_obeyed(tmp_path: Path) -> None:
    found = written(hostile(), tmp_path)
    parsed = Page(found.page)
    assert not {"script", "u", "i", "s", "q", "em"} & set(parsed.tags)
    assert "<script>alert(1)</script>" in parsed.text
    assert all(link.startswith(("data:image/", "#")) for link in parsed.links)
    assert "\x1b" not in found.page + found.text
    assert not re.search(r"(?<!\\)<", found.text)
    assert r"\<script\>" in found.text
    lines = table(hostile()).splitlines()
    assert any(line.startswith("- tensorrt fp32: failed: ") and "second line" in line for line in lines)
    assert any(line.startswith("gate --max-<u>: odd") and "second line" in line for line in lines)
    assert "\x1b" not in "".join(lines)
    rows = [line for line in found.text.splitlines() if line.startswith("|")]
    odd = [row for row in rows if "odd" in row]
    assert len(odd) > 3
    for row in odd:  # as many cells as the head of its table
        head = next(line for line in reversed(rows[: rows.index(row)]) if line.startswith("| result"))
        assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", head))


def test_terminal_table() -> None:
    lines = table(cpu_machine()).splitlines()
    assert len({len(line) for line in lines[:9]}) == 1
    assert len(lines[0]) < 160
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "openvino fp32", "71.2", "0.00 [-0.01, +0.01]", "0/0", "0.999999", "8.90/9.25", "61.4/63.7", "223/232", "2.02",
        "145",
    ]  # fmt: skip
    assert "94.1/97.1!" in lines[5]
    assert "! aoti fp32, batch 8: drifts: 9 % slower at the end than at the start" in lines
    assert "- tensorrt fp32, fp16; ort-cuda fp32, fp16: unavailable: no NVIDIA GPU here" in lines
    built = "engine built, but there is no NVIDIA GPU here to run it on"
    assert f"- tensorrt-rtx fp16: unavailable: {built}" in lines
    failed = table(int8_lost()).splitlines()
    assert failed[-2] == "gate --max-map-drop: ort-cpu int8: mAP fell by 1.20 points; at most 0.5 is allowed"
    assert all(len(line) < 160 for line in table(gpu_machine()).splitlines())


def test_the_load_of_a_tracker_the_profile_and_the_gpu_are_shown(large: Written) -> None:
    for text in (large.page, large.text):
        for words in ("Load of a tracker", "in order of size", "1 to 40 crops at random", "engine profile", "11,245"):
            assert words in text
    one_of_two = report_of(TORCH, ran("tensorrt fp16", device="cuda", gpu="B"), gpus=("A", "B"))
    assert dict(facts(one_of_two))["GPU"] == "B"
    assert "tracker" not in markdown(report_of(dataclasses.replace(TORCH, tracker=None)))


def test_loss_of_accuracy_is_called_a_loss(lossy: Written) -> None:
    assert re.search(r'class="bad" data-label="difference, points"><span>-1\.20<', lossy.page)
    chance = ran("openvino int8", loss=0.0012, map_delta_interval=(-0.004, 0.0015))
    assert "a loss of up to 0.40 points of mAP cannot be ruled out" in verdict(report_of(TORCH, chance)).details[0]


def one(backend: str = "ort-cpu fp32", p50: float = 9.8, gates: Gates = GATES, **changes: Any) -> BenchReport:
    return report_of(TORCH, ran(backend, p50, **changes), gates=gates)


@pytest.mark.parametrize(
    ("report", "words", "tone"),
    [
        (one(map_delta=-0.0004), "ranks like torch fp32 on CPU (mAP 71.2 %, difference -0.04 points", "good"),
        (one(map_delta=0.02, mAP=0.732), "gains 2.00 points of mAP (73.2 % instead of 71.2 %", "mixed"),
        (one(map_delta=-0.003), "loses 0.30 points of mAP", "mixed"),
        (one(rank1_delta=-0.0033), "keeps mAP (difference 0.00 points", "mixed"),
        (one(rank1_delta=-0.0033), "rank-1 changes by -0.33 points, with a speedup of 1.84x", "mixed"),
        (one(map_delta_interval=None), "(mAP 71.2 %, difference 0.00 points), with", "good"),
        (one(p50=18.1), "about the same speed: a speedup of 0.994x at batch 1 (", "good"),
        (one(p50=36.0), "slower: a speedup of 0.500x at batch 1 (", "good"),
        (one("ort-cuda fp16", 0.9, device="cuda"), "speedup of 20.0x over torch fp32 on CPU at batch 1", "good"),
        (one("tensorrt fp16 graph", 0.9, device="cuda"), "TensorRT fp16 on GPU (CUDA graph) may ship: ", "good"),
        (one("ort-cpu fp32 model.onnx"), "ONNX Runtime fp32 on CPU (model.onnx) may ship: ", "good"),
        (one(batches=()), "95 % interval -0.01 to +0.01).", "good"),
        (one(map_delta=-0.003, gates=OFF), "Only torch fp32 on CPU itself may ship: the only other", "mixed"),
        (one(map_delta=None, mAP=None, gates=OFF), "Only torch fp32 on CPU itself may ship", "mixed"),
        (int8_lost(), "ONNX Runtime fp32 on CPU may ship", "bad"),
        (crashed(), "ONNX Runtime fp32 on CPU may ship", "bad"),
        (report_of(TORCH, ORT, absent("tensorrt fp16")), "may ship", "good"),
        (report_of(TORCH), "reaches mAP 71.2 %; no other backend was measured, so there is nothing", "mixed"),
        (report_of(ORT), "unknown: the reference, torch fp32, was not measured.", "bad"),
        (report_of(absent(REFERENCE, "failed", "boom."), ORT), "torch fp32, failed (boom).", "bad"),
        (report_of(), "unknown", "bad"),
    ],
)
def test_headline_and_tone(report: BenchReport, words: str, tone: str) -> None:
    said = verdict(report)
    assert words in said.headline
    assert said.tone == tone


def test_the_fastest_that_may_ship_is_named_and_the_rest_is_sorted() -> None:
    said = verdict(gpu_machine())
    assert said.ships == "tensorrt fp16 graph"  # int8 is faster, and fails
    assert said.failing == "3 of 22 results fail a gate: ort-cpu int8, tensorrt int8, tensorrt int8 graph."
    same, different, failed, unavailable = said.details
    assert "(16 of 19): tensorrt fp16 graph, tensorrt fp16, aoti fp16" in same
    assert "(3 of 19): tensorrt int8 graph (mAP -1.48 points)" in different
    assert "openvino fp32 (RuntimeError: out of memory)." in failed
    assert "tensorrt-rtx fp16 (TensorRT-RTX does not run on compute" in unavailable
    assert [figure.value for figure in said.figures] == ["5.95x", "+0.01", "0.739 ms", "7,583"]


def test_beside_a_different_ranking_that_may_ship_the_fastest_of_the_same_ranking_is_named() -> None:
    said = verdict(cpu_machine())
    assert said.ships == "openvino int8"
    (line,) = (detail for detail in said.details if detail.startswith("The fastest that ranks like the reference"))
    assert "openvino fp32, with a speedup of 2.02x at batch 1 (2.00x to 2.05x)." in line


def test_rivals_and_unsteady_figures_are_said() -> None:
    flagged = ran("ort-cpu fp32", 9.8, flags={1: ("noisy: of the machine",)})
    said = verdict(report_of(TORCH, flagged, ran("openvino fp32", 9.82)))
    assert any("unreliable (noisy: of the machine)" in detail for detail in said.details)
    assert "No significant difference in speed to openvino fp32." in said.details


def test_every_gate_is_listed_by_what_became_of_it() -> None:
    unknown = GateFailure(result="ort-cpu fp32", gate="--new-gate", message="too much")
    found = verdict(report_of(TORCH, ORT, gates=dataclasses.replace(GATES, failures=(unknown,)))).gates
    assert [(gate.flag, gate.status) for gate in found] == [
        ("--new-gate", "failed"), ("--max-map-drop", "passed"), ("--max-rank1-flips", "passed"),
        ("--min-cosine", "passed"), ("--max-norm-error", "passed"), ("--max-p95-ms", "off"),
    ]  # fmt: skip
    assert found[0].failures == ("ort-cpu fp32: too much",)
    limit = verdict(report_of(TORCH, ORT, gates=dataclasses.replace(OFF, max_p95_ms=12.5))).gates[0]
    assert (limit.status, limit.requirement) == ("passed", "the p95 latency at batch 1 is at most 12.5 ms")


def test_nothing_ran(tmp_path: Path) -> None:
    report = report_of(absent(REFERENCE, "failed", "boom"), absent("ort-cpu fp32", reason="not installed"))
    found = written(report, tmp_path)
    assert "no backend could be measured" in found.text
    assert "No backend could be measured" in found.page
    assert "nothing to plot" in found.page
    assert "Gates: 4 not judged, 1 off" in found.page
    assert "<img" not in found.page
    for content in (found.page, found.text, table(report)):
        assert "boom" in content
        assert "not installed" in content


def bare(result: Result) -> Result:
    """Timed, but nothing else could be measured."""
    empty = {
        field.name: None
        for field in dataclasses.fields(Result)
        if field.default is None and field.name not in ("mAP", "rank1")
    }
    timing = dataclasses.replace(
        result.batches[0], samples_ms=(), speedup=None, end_to_end_ms=None, decode_ms=None, p95_ms=None
    )
    return dataclasses.replace(result, **empty, cameras=(), provider="", batches=(timing,))


def test_figures_that_are_missing_cost_their_columns_only(tmp_path: Path) -> None:
    found = written(report_of(bare(TORCH), bare(ORT), gates=OFF), tmp_path)
    assert "71.2 %" in found.text
    assert "difference" not in next(line for line in found.text.splitlines() if line.startswith("| result"))
    assert "None" not in found.shown + found.text
    few = single_batch()
    drawn = plots(few)
    assert (len(drawn.spread), drawn.sweep) == (1, ())
    assert "too few samples for an interval" in verdict(few).headline


@pytest.fixture(scope="module")
def of_adopted(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """An adopted ONNX file's, with what wrong preprocessing costs."""
    return written(adopted(), tmp_path_factory.mktemp("adopted"))


def test_an_adopted_onnx_file_is_its_own_reference_and_the_report_says_so(of_adopted: Written) -> None:
    found = of_adopted
    expected = (
        "adopted, epoch unknown", "adopted ONNX file", "There is no checkpoint", "own", "cd" * 32, "pytorch 2.4.0",
        "compared with those of ort-cpu fp32", "128x64, PIL's bilinear",
    )  # fmt: skip
    for content in (found.shown, found.text.replace("\\", "")):
        assert [words for words in expected if words not in content] == []
        assert "torch fp32" not in content
        assert "None" not in content
        assert "kernels of the mix" not in content
    assert "epoch 12" in markdown(report_of(TORCH))
    assert "kernels of the mix" in markdown(report_of(TORCH))
    assert "no checkpoint" not in markdown(report_of(TORCH))


def test_what_wrong_preprocessing_costs_is_in_every_report(of_adopted: Written) -> None:
    report, found = adopted(), of_adopted
    figures = (
        "BGR, not RGB", "-12.34", "-15.00 to -10.00", "-19.30", "59.0 %", "71.3 %",
        "pixels in 0..1, not normalised", "not measured: the file normalises its pixels itself",
        "77 identities", "123 queries and 1,877 gallery crops", "only the differences count",
    )  # fmt: skip
    for content in (found.shown, found.text):
        assert [words for words in figures if words not in content] == []
    (line,) = (line for line in table(report).splitlines() if line.startswith("wrong preprocessing"))
    assert "ort-cpu fp32 on 2,000 crops" in line
    assert "-12.34 (BGR, not RGB); 0.00 (OpenCV's" in line
    assert "normalised" not in line
    assert "preprocessing" in Page(found.page).ids
    whole = dataclasses.replace(report.wrong_preprocessing, sample=False)
    assert "on all 123 queries and 1,877" in markdown(changed(report, wrong_preprocessing=whole))
    for content in (markdown(report_of(TORCH)), table(report_of(TORCH))):
        assert "wrong preprocessing" not in content


def test_reports_without_newer_fields_are_read(tmp_path: Path) -> None:
    values = json.loads(report_of(TORCH).to_json())
    del values["wrong_preprocessing"]
    for name in ("kind", "source", "preprocessing"):
        del values["checkpoint"][name]
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert "epoch 12" in markdown(read_report(tmp_path / "report.json"))


def test_real_people_are_not_called_synthetic() -> None:
    report = report_of(TORCH)
    assert "drawn by a program" in markdown(report)
    assert "synthetic" not in markdown(changed(report, dataset=dataclasses.replace(report.dataset, name="market1501")))


def test_known_problems_and_notes_are_said() -> None:
    untimed = "batch 64 could not be timed: out of memory"
    report = report_of(TORCH, ran("ort-cpu fp32", notes=("L2-normalised",), untimed=(untimed,)))
    report = changed(report, environment={**report.environment, "problems": ["two wheels of ONNX Runtime"]})
    assert "This machine: two wheels of ONNX Runtime" in markdown(report)
    for content in (markdown(report), table(report)):
        assert "ort-cpu fp32: L2-normalised" in content
        assert f"ort-cpu fp32: {untimed}" in content


def test_plots_are_the_same_every_time() -> None:
    assert plots(int8_lost()) == plots(int8_lost())


def test_no_two_results_look_alike_in_a_plot() -> None:
    results = [r for r in gpu_machine().results if r.batches] + [ran("torch fp32", device="cpu")]
    styles = styles_of([*results, ran("ort-cpu fp32 a.onnx"), ran("ort-cpu fp32 b.onnx")])
    assert len(styles) == len(set(styles.values())) == 22


def test_too_few_queries_are_said_where_a_gate_may_break_by_chance():
    failure = dataclasses.replace(dropped(ORT), undecided=True)
    said = verdict(report_of(TORCH, ORT, gates=dataclasses.replace(GATES, failures=(failure,))))
    assert "300 queries are too few to judge ort-cpu fp32" in said.failing
    assert "perhaps by chance" in said.headline
    assert [gate.flag for gate in said.gates if gate.status == "undecided"] == ["--max-map-drop"]
    certain = verdict(report_of(TORCH, ORT, gates=dataclasses.replace(GATES, failures=(dropped(ORT),))))
    assert "too few" not in certain.failing
