"""The overview: a picture that any browser reads, with every result of the bench and what its gates said."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from bench.lab.pages.benchmarks import DEMO
from bench.lab.pictures.overview import WIDTH, overview
from pmm.bench.pages.queries import completed
from pmm.bench.schema import GateFailure, read_report
from tests.conftest import ROOT

CROP = Image.new("RGB", (64, 128))
SVG = "{http://www.w3.org/2000/svg}"


def drawn(report):
    embedding = np.linspace(-1, 1, 384, dtype=np.float32)
    return ElementTree.fromstring(overview([CROP] * 3, [CROP] * 3, embedding, report))


def test_each_result_has_a_line_and_stays_in_the_picture():
    report = read_report(ROOT / f"bench/results/{DEMO}.json")
    picture = drawn(report)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    names = [result.name for result in completed(report)]
    assert set(names) <= set(texts)
    assert texts.count("passes all") == len(names) - 1  # all but the reference
    bars = {float(bar.get("x")) + float(bar.get("width")) for bar in picture.iter(f"{SVG}rect") if bar.get("x")}
    assert max(bars) <= WIDTH
    assert len(list(picture.iter(f"{SVG}image"))) == 7


def test_a_gate_that_fails_is_named():
    report = read_report(ROOT / f"bench/results/{DEMO}.json")
    failure = GateFailure(gate="--max-map-drop", result="openvino int8", message="too much")
    texts = [text.text for text in drawn(replace(report, gates=replace(report.gates, failures=(failure,)))).iter()]
    assert texts.count("fails --max-map-drop") == 1
    assert texts.count("passes all") == len(completed(report)) - 2
