"""The gates of the chain: bounds that each link must keep."""

from __future__ import annotations

from collections.abc import Iterator

from pmm.bench.chain_schema import ChainLink, ChainReport
from pmm.bench.gates import map_drop_message, rank1_flips_message
from pmm.bench.schema import GateFailure, Gates

GALLERY = "--gallery"
"""The gate of faults and of links that could not be measured; it has no bound."""


def chain_failures(chain: ChainReport, gates: Gates, *, queries: int) -> Iterator[GateFailure]:
    """Every gate that a stored precision or an index fails (the artifact's are those of its result). mAP and rank-1 are
    held against the checkpoint's, the rates at the deployed threshold against the artifact's, whose threshold it is, or
    against those of the exact list where an index lists no more; that a list ends is no fault of the index.

    Args:
        queries: how many have a relevant row.
    """
    artifact = next((link for link in chain.links if link.kind == "artifact"), chain.links[0])
    for link in chain.links:
        cut = next((each for each in chain.path(link.name) if each.kind == "list"), None)
        for gate, message, undecided in _failed(link, artifact, cut, gates, queries):
            if link.kind == "index" and link.knob and gate != GALLERY:
                message = f"{message}; raise its {link.knob}"
            yield GateFailure(result=link.name, gate=gate, message=message, undecided=undecided)


def _failed(
    link: ChainLink, artifact: ChainLink, cut: ChainLink | None, gates: Gates, queries: int
) -> Iterator[tuple[str, str, bool]]:
    """Gates, messages, and whether it may be by chance. `cut`: the exact list that the link's are held against, if
    it is one of few rows."""
    for finding in link.findings:
        yield GALLERY, finding, False
    if link.status != "ok":
        if link.required or link.status == "failed":
            yield GALLERY, f"{link.status}: {link.reason}; none of its figures could be measured", False
        return
    if link.kind not in ("stored", "index"):
        return
    total, of_cut = link.total, cut.loss if cut else None
    if total is not None:
        most, drop = gates.max_map_drop, (of_cut.map_delta if of_cut else 0) - total.map_delta
        if most is not None and drop > most:
            # of a list that ends, what of it is the index's has no interval
            yield "--max-map-drop", *map_drop_message(drop, most, None if cut else total.map_delta_interval, queries)
        most, flips = gates.max_rank1_flips, total.rank1_lost + total.rank1_gained
        if most is not None and flips > most * queries:
            yield "--max-rank1-flips", *rank1_flips_message(flips, most, queries)
    before = cut or artifact  # both count only pairs that are listed
    most, start = gates.max_fmr_factor, before.fmr
    if most is not None and link.fmr is not None and start is not None and link.fmr > most * start:
        rate = f"the false match rate at the deployed threshold is {link.fmr:.2e}, not {start:.2e}"
        yield "--max-fmr-factor", f"{rate}; at most {most:g} times as many are allowed", False
    most, start = gates.max_tpr_drop, before.tpr
    if most is not None and link.tpr is not None and start is not None and start - link.tpr > most:
        fell = f"the true-positive rate at the deployed threshold is {link.tpr:.1%}, not {start:.1%}"
        yield "--max-tpr-drop", f"{fell}; a fall of at most {100 * most:g} points is allowed", False
