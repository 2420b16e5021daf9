"""The figures of docs/gallery.md are those of the report that it names."""

import re

import pytest

from bench.lab.gallery_page import BEGIN, BUSY, END, HEADS, PAGE, TIMES, figures, with_figures
from pmm.bench.schema import read_report
from pmm.utils.errors import InvalidFile
from tests.bench.pages.sample_reports import REFERENCE, ran, report_of
from tests.conftest import ROOT
from tests.refusals import refuses

REPORT = re.compile(r"bench/results/([\w-]+-bench-gallery-[\w-]+\.json)\)")


def test_the_page_has_the_figures_of_the_report_that_it_names():
    page = PAGE.read_text()
    (name,) = REPORT.findall(page)
    path = ROOT / "bench" / "results" / name
    assert with_figures(page, path, busy=BUSY in page) == page
    report = read_report(path)
    assert {link.name for link in report.chain.links if link.status == "ok"} >= {"stored fp32", "certified"}


@pytest.mark.parametrize("busy", [False, True])
def test_each_link_is_a_row_of_the_table(busy):
    page = PAGE.read_text()
    path = ROOT / "bench" / "results" / REPORT.findall(page)[0]
    block = with_figures(page, path, busy=busy).split(BEGIN)[1].split(END)[0]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    columns = len(HEADS) + len(TIMES) * (not busy) + 1
    assert all(line.count("|") == columns + 1 for line in rows)
    assert sum("certified" in line for line in rows) == 2
    assert (BUSY in block) == busy


def test_a_report_without_a_chain_is_refused(tmp_path):
    with refuses(InvalidFile, path=tmp_path, hint="pmm bench --gallery"):
        figures(report_of(ran(REFERENCE, 18.0)), tmp_path)
    with pytest.raises(ValueError, match="unpack"):
        with_figures("no marks", tmp_path)
