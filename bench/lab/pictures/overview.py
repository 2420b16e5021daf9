"""The picture at the top of the README: from people, through the stages of PMM, to backends with their verdict."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.bench.pages.format import points, times
from pmm.bench.pages.queries import completed, failed_gates, reference_of, speedup
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport

WIDTH = 900
CROP = (64, 128)
"""Width and height of a crop in the picture."""
ROW = 34
"""Height of a backend's line."""
BATCH = 1
"""Images per call of the speedups."""

STYLE = """
:root { --ink: #24292f; --faint: #646b75; --rule: #d5d9df; --bar: #0f8b7e; --bad: #c2410c; --ground: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #9aa3af; --rule: #3a414d; --bar: #2dc5b3; --bad: #ff8a5c; --ground: #14171c }
}
text { font: 17px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; fill: var(--ink) }
.faint { fill: var(--faint); font-size: 15px }
.title { font-weight: 600 }
.end { text-anchor: end }
.good { fill: var(--bar) }
.bad { fill: var(--bad) }
.ground { fill: var(--ground) }
.rule { stroke: var(--rule) }
.flow { fill: none; stroke: var(--faint); stroke-width: 2; stroke-dasharray: 5 5; animation: flow 1s linear infinite }
@keyframes flow { to { stroke-dashoffset: -10 } }
@media (prefers-reduced-motion: reduce) { .flow { animation: none } }
"""


def overview(
    people: Sequence[Image.Image],
    stages: Sequence[Image.Image],
    embedding: npt.NDArray[np.float32],
    report: BenchReport,
) -> str:
    """An SVG document, for a light and a dark page.

    Args:
        people: crops, the last one being the one that goes through the stages.
        stages: where each stage looks in that crop.
        embedding: of that crop [D], D divisible by the number of stages.
        report: a bench of the model; its results become lines with a verdict.
    """
    results = completed(report)[::-1]  # the reference, the slowest, comes first
    height = 250 + ROW * (len(results) + 1) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t">',
        '<title id="t">People, the three stages of PMM, the embedding, and backends with their verdict</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="12"/>',
        *_network(people, stages, embedding),
        *_verdicts(report, results, 250),
        _text(24, height - 20, f"Preset tiny, synthetic people, {_machine(report)}", "faint"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _machine(report: BenchReport) -> str:
    return f"{report.environment['cpu']}, {report.environment['cores']} cores, {report.created[:10]}"


def _network(
    people: Sequence[Image.Image], stages: Sequence[Image.Image], embedding: npt.NDArray[np.float32]
) -> list[str]:
    top, middle = 52, 52 + CROP[1] // 2
    parts = [_text(24, 34, "people", "title"), _text(302, 34, "three stages", "title")]
    parts += [_text(700, 34, f"{embedding.size} numbers", "title")]
    for index, person in enumerate(people):
        parts.append(_image(24 + 72 * index, top, person, CROP))
    ends = [24 + 72 * len(people) - 8]
    for index, stage in enumerate(stages):
        left = 302 + 124 * index
        parts.append(_image(left, top, stage, CROP))
        parts.append(_arrow(ends[-1] + 6, left - 6, middle))
        ends.append(left + CROP[0])
    parts.append(_arrow(ends[-1] + 6, 694, middle))
    parts.append(_text(302, top + CROP[1] + 24, "each learns from what the stages before it do not look at", "faint"))
    parts.append(_image(700, top, _cells(embedding, len(stages)), (176, CROP[1]), "pixelated"))
    return parts


def _cells(embedding: npt.NDArray[np.float32], stages: int) -> Image.Image:
    """A pixel per number, the stages below each other; grey is 0."""
    shades = (127.5 + 127.5 * embedding / max(np.abs(embedding).max(), 1e-12)).round().astype(np.uint8)
    rows = next(rows for rows in range(4, 0, -1) if embedding.size % (rows * stages) == 0) * stages
    return Image.fromarray(shades.reshape(rows, -1))


def _verdicts(report: BenchReport, results: Sequence[Result], top: int) -> list[str]:
    heads = (
        (24, "which backend may ship?", "title"),
        (384, "mAP, points", "faint end"),
        (412, f"speedup, batch {BATCH}", "faint"),
        (876, "gates", "faint end"),
    )
    parts = [_text(left, top, text, kind) for left, text, kind in heads]
    largest = max([ratio.value for result in results if (ratio := speedup(report, result, BATCH))], default=1)
    for index, result in enumerate(results):
        line = top + ROW * (index + 1)
        parts.append(f'<line class="rule" x1="24" x2="876" y1="{line - 23}" y2="{line - 23}"/>')
        parts.append(_text(24, line, result.name))
        ratio = speedup(report, result, BATCH)
        width = round(240 * (ratio.value if ratio else 1) / max(largest, 1))
        failed = failed_gates(report, result)
        if result is reference_of(report):
            parts.append(_text(384, line, "reference", "faint end"))
        else:
            parts.append(_text(384, line, points(result.map_delta), "end"))
            said = f"fails {', '.join(failed)}" if failed else "passes all"
            parts.append(_text(876, line, said, "bad end" if failed else "good end"))
        parts.append(f'<rect class="good" x="412" y="{line - 13}" width="{width}" height="13" rx="3"/>')
        parts.append(_text(420 + width, line, times(ratio.value) if ratio else "1x"))
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


def _arrow(left: float, right: float, y: float) -> str:
    return (
        f'<path class="flow" d="M{left:g} {y:g}H{right - 7:g}"/>'
        f'<path fill="var(--faint)" d="M{right - 9:g} {y - 5:g}l9 5l-9 5z"/>'
    )


def _image(x: float, y: float, image: Image.Image, size: tuple[int, int], rendering: str = "auto") -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    place = f'x="{x:g}" y="{y:g}" width="{size[0]}" height="{size[1]}" preserveAspectRatio="none"'
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<image {place} style="image-rendering: {rendering}" href="{url}"/>'
