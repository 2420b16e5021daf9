"""Evaluate a checkpoint or any artifact on a data set: mAP, CMC, mINP.

pmm evaluate ARTIFACT [--dataset NAME --root DIR] [--rerank] [--flip-test] [--json FILE] ...
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.origin import resolve_dataset
from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.data.readers import read_dataset
from pmm.embedding.evaluate import Evaluation, evaluate
from pmm.evaluation.ranking import describe_ranking, figures, per_query_csv
from pmm.evaluation.reranking import Reranking
from pmm.runtime.runner_flags import BatchRunnerFlags
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, printable
from pmm.utils.files import existing_file, output_file, sha256, write_file


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """`pmm evaluate ARTIFACT`"""

    artifact: Annotated[Path, Arg("ARTIFACT", positional=True)]
    """Checkpoint, ONNX file, AOTInductor package or engine."""
    dataset: Annotated[str, Arg("NAME", group="data")] = ""
    """Data set: market1501, ..., folder for one folder of crops per identity, or folder:camera/identity and the like;
    pmm check --help lists them (default: the one that the checkpoint was trained on)."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of the data set (default: the one that the checkpoint was trained on)."""
    bad_images: Annotated[BadImageOptions, Arg(group="data")] = field(default_factory=BadImageOptions)
    json: Annotated[Path | None, Arg("FILE")] = None
    """Also write the figures to this file."""
    per_query: Annotated[Path | None, Arg("FILE.csv")] = None
    """Also write a line per query to this file: its AP and the rank of its first match."""
    metric: Literal["auto", "euclidean", "cosine"] = "auto"
    """How embeddings are compared; auto is the metric that the model was trained for."""
    ap: Literal["standard", "trapezoid", "truncated50"] = "standard"
    """Average precision: standard (over the whole ranking), trapezoid (as Market-1501's Matlab code) or truncated50 (as
    the PMM authors' code)."""
    rerank: Annotated[bool, Arg(group="re-ranking")] = False
    """Re-rank with k-reciprocal neighbours (Zhong et al., 2017)."""
    reranking: Annotated[Reranking, Arg(group="re-ranking")] = field(default_factory=Reranking)
    flip_test: bool = False
    """Use the mean of the embeddings of each crop and of its mirror image."""
    memory_limit: Annotated[str, Arg("SIZE")] = "2GB"
    """Memory that ranking may use besides the embeddings, as 500MB or 2GB."""
    running: BatchRunnerFlags = field(default_factory=BatchRunnerFlags)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(EvaluateCommand, prog=prog, description=__doc__ or "")
    running, limit = command.running, command_line.size(command.memory_limit, flag="--memory-limit")
    unused = {"--k1", "--k2", "--rerank-lambda"} & command_line.flags_in()
    if unused and not command.rerank:
        problem = f"{' and '.join(sorted(unused))} need{'s' * (len(unused) == 1)} --rerank"
        raise ConflictingOptions(problem, *sorted(unused), hint="add --rerank")
    artifact = existing_file(command.artifact, "a checkpoint or an exported file")
    if command.json and command.per_query and command.json.resolve() == command.per_query.resolve():
        problem = f"--json and --per-query are both {command.json}"
        raise ConflictingOptions(problem, "--json", "--per-query", hint="name two files")
    for path, suffixes in ((command.json, ()), (command.per_query, (".csv",))):
        if path:
            output_file(path, artifact, manifest_path(artifact), suffixes=suffixes)
    data = resolve_dataset(artifact, command.dataset, command.root)
    if not (command.dataset and command.root):
        print(f"data set: {printable(data.name)}, as the file says")
    split = read_dataset(data.name, data.root)
    for note in (*split.notes, *split.left_out):
        command_line.note(prog, note)

    digest = sha256(artifact) if command.json else ""  # now: it may be trained on while this takes its time
    result = evaluate(
        artifact, split, data.root, metric=command.metric, ap=command.ap,
        reranking=command.reranking if command.rerank else None, flip_test=command.flip_test,
        skip_bad_images=command.bad_images.skip_bad_images, memory_limit=limit,
        backend=running.backend, device=running.device, batch_size=running.batch_size, threads=running.threads,
    )  # fmt: skip
    bad = result.unreadable
    for line in bad_image_lines({**bad["query"], **bad["gallery"]}):
        command_line.note(prog, line)
    counts = f"{len(result.dataset.query)} queries, {len(result.dataset.gallery)} gallery crops"
    if any(bad.values()):
        counts += f" (without {len(bad['query'])} and {len(bad['gallery'])} that cannot be read)"
    print(printable(f"{artifact} on {data.root}: {counts}"))
    print(_in_words(how := _how(result)))
    print(describe_ranking(result), flush=True)  # before a disk can be full
    if result.note:
        command_line.note(prog, result.note)
    if command.json:
        what = {"artifact": str(artifact), "artifact_sha256": digest, "dataset": split.name, "root": data.root}
        write_file(command.json, json.dumps({**figures(result), **how, **what, **_assumed(result)}, indent=2) + "\n")
    if command.per_query:
        write_file(command.per_query, per_query_csv(result.dataset, result))


def _how(result: Evaluation) -> dict[str, Any]:
    """What the figures depend on, besides the artifact and the data."""
    return {
        "backend": result.backend,
        "precision": result.precision,
        "metric": result.metric,
        "ap": result.ap,
        "reranking": dataclasses.asdict(result.reranking) if result.reranking else None,
        "flip_test": result.flip_test,
    }


def _assumed(result: Evaluation) -> dict[str, Any]:
    """How many crops, what had to be assumed, and what was left out."""
    data = result.dataset
    return {
        "queries": len(data.query),
        "gallery": len(data.gallery),
        "notes": [*data.notes, *data.left_out, *filter(None, [result.note])],
        "unreadable": {name: [str(file) for file in files] for name, files in result.unreadable.items()},
    }


def _in_words(how: dict[str, Any]) -> str:
    words = [f"{how['backend']} {how['precision']}", f"metric {how['metric']}", f"ap {how['ap']}"]
    if how["flip_test"]:
        words.append("flip test")
    if rerank := how["reranking"]:
        words.append(f"re-ranked (k1 {rerank['k1']}, k2 {rerank['k2']}, lambda {rerank['weight']})")
    return ", ".join(words)
