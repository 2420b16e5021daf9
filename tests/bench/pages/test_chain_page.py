"""The chain on the page, in Markdown and on the terminal."""

import dataclasses

import pytest

from pmm.bench.chain_schema import ChainLink, ChainLoss, ChainReport
from pmm.bench.pages.chain import section
from pmm.bench.pages.report import html, markdown, table
from pmm.bench.pages.verdict import verdict
from pmm.bench.schema import BenchReport, GateFailure
from pmm.utils.from_dict import from_dict
from tests.bench.pages.sample_reports import GATES, HOSTILE, REFERENCE, ran, report_of
from tests.bench.pages.test_report import NO_PICTURES


def loss(map_delta: float = 0.0, lost: int = 0, shared: float = 1.0) -> ChainLoss:
    return ChainLoss(
        map_delta=map_delta,
        map_delta_interval=(map_delta - 0.001, map_delta + 0.001),
        rank1_delta=-lost / 1200,
        rank1_delta_interval=(-lost / 1200, 0.0),
        minp_delta=0.0,
        minp_delta_interval=(0.0, 0.0),
        rank1_lost=lost,
        rank1_gained=0,
        top10_overlap=shared,
        newly_accepted=3,
        newly_rejected=lost,
    )


def link(name: str, kind: str, parent: str | None, **facts: object) -> ChainLink:
    measured = {"mAP": 0.787, "rank1": 0.9, "mINP": 0.4, "fmr": 1e-3, "tpr": 0.689}
    if parent:
        measured |= {"loss": loss(), "total": loss()}
    return ChainLink(name=name, kind=kind, parent=parent, **measured | facts)  # type: ignore[arg-type]


@pytest.fixture
def report() -> BenchReport:
    index = {"alone_ms": 4.0, "alone_per_s": 250.0, "batch_per_s": 800.0, "resident_bytes": 84_000, "build_s": 1.5}
    poor = {"loss": loss(-0.0823, 93, 0.747), "total": loss(-0.0823, 93, 0.747), "failed_gates": ("--max-map-drop",)}
    chain = ChainReport(
        artifact="ort-cpu int8",
        gallery=1000,
        distractors=700,
        impostor_quantiles=((0.01, 12.6, 12.8), (0.5, 19.3, 19.0)),
        depth=300,
        genuine=2000,
        impostor=900_000,
        target_fmr=1e-3,
        threshold=12.345,
        links=(
            link(REFERENCE, "checkpoint", None),
            link("ort-cpu int8", "artifact", REFERENCE),
            link("stored fp32", "stored", "ort-cpu int8", disk_bytes=1_536_000),
            link("certified", "index", "stored fp32", disk_bytes=1_700_000, settings="fp32 on disk", **index),
            link("ivf-pq", "index", "stored fp32", disk_bytes=48_000, settings="16 lists", **index | poor),
            ChainLink(name="hnsw-16", kind="index", parent="stored fp32", status="unavailable", reason=HOSTILE),
            link("hnsw-64", "index", "stored fp32", findings=("shifted ids: all of them <b>",)),
        ),
        seconds=9.0,
    )
    return dataclasses.replace(report_of(ran(REFERENCE, 18.0), ran("ort-cpu int8", 6.0)), chain=chain)


def test_every_link_is_on_each_page(report):
    page, text, printed = html(report, NO_PICTURES), markdown(report), table(report)
    for content in (page, text, printed):
        for name in ("stored fp32", "certified", "ivf-pq", "hnsw-16", "hnsw-64"):
            assert name in content
        assert "-8.23" in content
        assert "shifted ids" in content
    assert "700 of them made up" in page
    assert 'id="chain"' in page
    assert "<b>" not in text.split("## From the checkpoint")[1].split("\n## ")[0]
    assert "<script>" not in page
    assert "\x1b" not in printed


def test_bytes_are_given_per_crop(report):
    costs = section(report).parts[2].table
    (row,) = (row for row in costs.rows if row[0].text == "certified")
    assert {"84 per crop", "1700 per crop"} <= {cell.sub for cell in row}


def test_a_required_link_that_fails_makes_the_verdict_bad(report):
    assert verdict(report).tone != "bad"  # ivf-pq was not asked for
    failure = GateFailure(result="certified", gate="--gallery", message="shifted ids")
    failed = dataclasses.replace(report, gates=dataclasses.replace(GATES, failures=(failure,)))
    found = verdict(failed)
    assert found.tone == "bad"
    assert "certified fails a gate" in found.failing
    assert next((gate.flag, gate.status) for gate in found.gates) == ("--gallery", "failed")


def test_gates_of_the_chain_are_listed_with_it_alone(report):
    gates = dataclasses.replace(GATES, max_fmr_factor=1.5, max_tpr_drop=0.02)
    flags = {gate.flag: gate.requirement for gate in verdict(dataclasses.replace(report, gates=gates)).gates}
    assert "1.5 times" in flags["--max-fmr-factor"]
    assert "2 points" in flags["--max-tpr-drop"]
    without = verdict(dataclasses.replace(report, gates=gates, chain=None)).gates
    assert not {"--max-fmr-factor", "--max-tpr-drop"} & {gate.flag for gate in without}


def test_a_report_without_a_chain_says_nothing_of_one(report):
    assert section(dataclasses.replace(report, chain=None)) is None
    assert from_dict(ChainReport, dataclasses.asdict(report.chain)) == report.chain
