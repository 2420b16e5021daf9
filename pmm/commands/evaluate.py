"""Evaluate a checkpoint or any artifact on a data set: mAP, CMC, mINP.

pmm evaluate ARTIFACT [--dataset NAME --root DIR] [--rerank] [--flip-test] [--json FILE] ...
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.dataset_location import DatasetLocation
from pmm.artifacts.origin import resolve_dataset
from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.data.dataset_specs import dataset_spec
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import unrankable
from pmm.embedding.embed_split import EmbeddedSplit, embed_split
from pmm.evaluation.ranking import RankingOptions, describe, figures, per_query_csv, rank_split
from pmm.evaluation.reranking import Reranking
from pmm.runtime.open import BACKEND_HELP, check_backend, open_runner
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, printable
from pmm.utils.files import existing_file, output_file, sha256, write_file
from pmm.utils.hardware import check_threads, cuda_index

if TYPE_CHECKING:
    from pmm.runtime.base import Runner


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
    k1: Annotated[int, Arg(group="re-ranking")] = 20
    """Neighbours that are looked at for each item."""
    k2: Annotated[int, Arg(group="re-ranking")] = 6
    """Nearest neighbours whose sets are averaged."""
    rerank_lambda: Annotated[float, Arg(group="re-ranking")] = 0.3
    """Share of the original distance in the final one."""
    flip_test: bool = False
    """Use the mean of the embeddings of each crop and of its mirror image."""
    memory_limit: Annotated[str, Arg("SIZE")] = "2GB"
    """Memory that ranking may use beside the embeddings, as 500MB or 2GB."""
    threads: int = 0
    """CPU threads of the backend and of the ranking (default: their own choice)."""
    backend: Annotated[str, Arg("NAME", help=BACKEND_HELP)] = "auto"
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, Arg(short="-b", least=1)] = 64
    """Images per call."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_threads(self.threads)
        cuda_index(self.device)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(EvaluateCommand, prog=prog, description=__doc__ or "")
    limit = command_line.size(command.memory_limit, flag="--memory-limit")
    reranking = Reranking(k1=command.k1, k2=command.k2, weight=command.rerank_lambda) if command.rerank else None
    unused = {"--k1", "--k2", "--rerank-lambda"} & command_line.flags_in()
    if unused and not command.rerank:
        problem = f"{', '.join(sorted(unused))} without --rerank would change nothing"
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
    _check_rankable(split, data)
    for note in (*split.notes, *split.left_out):
        print(f"note: {note}")

    digest = sha256(artifact) if command.json else ""  # now: it may be trained on while this takes its time
    with open_runner(artifact, command.backend, device=command.device, threads=command.threads) as runner:
        ranking = RankingOptions(
            metric=runner.embedding.metric if command.metric == "auto" else command.metric,
            ap=command.ap,
            reranking=reranking,
            memory_limit=limit,
            threads=command.threads,
        )
        ranking.check(split, runner.embedding.dim)
        embedded = embed_split(
            runner, split, Path(data.root), skip_bad_images=command.bad_images.skip_bad_images,
            batch_size=command.batch_size, flip=command.flip_test,
        )  # fmt: skip
        how = _how(command, runner, ranking)
    split, query, gallery, bad = embedded
    if any(bad.values()):
        _check_rankable(split, data)
        for line in bad_image_lines({**bad["query"], **bad["gallery"]}):
            print(printable(f"{prog}: note: {line}"), file=sys.stderr)
    result = rank_split(split, query, gallery, ranking, label="re-ranking" if reranking else "")
    counts = f"{len(query)} queries, {len(gallery)} gallery crops"
    if any(bad.values()):
        counts += f" (without {len(bad['query'])} and {len(bad['gallery'])} that cannot be read)"
    print(printable(f"{artifact} on {data.root}: {counts}"))
    print(_in_words(how))
    print(describe(result), flush=True)  # before a disk can be full
    if command.json:
        results = {**figures(result), **how, **_what(artifact, digest, data, embedded)}
        write_file(command.json, json.dumps(results, indent=2) + "\n")
    if command.per_query:
        write_file(command.per_query, per_query_csv(split, result))


def _how(command: EvaluateCommand, runner: Runner, ranking: RankingOptions) -> dict[str, Any]:
    """What the figures depend on, beside the artifact and the data."""
    return {
        "backend": runner.info.backend,
        "precision": runner.info.precision,
        "metric": ranking.metric,
        "ap": ranking.ap,
        "reranking": dataclasses.asdict(ranking.reranking) if ranking.reranking else None,
        "flip_test": command.flip_test or runner.embedding.flip_tta,
    }


def _check_rankable(split: ReidDataset, data: DatasetLocation) -> None:
    """Raises InvalidFile if figures on it would be meaningless."""
    if why := unrankable(split.query, split.gallery):
        listed = f"pmm check --dataset {data.name} --root {shlex.quote(data.root)} lists all problems"
        raise InvalidFile(why, path=data.root, hint=listed)


def _what(artifact: Path, digest: str, data: DatasetLocation, embedded: EmbeddedSplit) -> dict[str, Any]:
    """The artifact and the data, what had to be assumed of them, and what was left out."""
    split = embedded.split
    return {
        "artifact": str(artifact),
        "artifact_sha256": digest,
        "dataset": dataset_spec(data.name).name,
        "root": data.root,
        "queries": len(split.query),
        "gallery": len(split.gallery),
        "notes": [*split.notes, *split.left_out],
        "unreadable": {name: [str(file) for file in files] for name, files in embedded.bad.items()},
    }


def _in_words(how: dict[str, Any]) -> str:
    words = [f"{how['backend']} {how['precision']}", f"metric {how['metric']}", f"ap {how['ap']}"]
    if how["flip_test"]:
        words.append("flip test")
    if rerank := how["reranking"]:
        words.append(f"re-ranked (k1 {rerank['k1']}, k2 {rerank['k2']}, lambda {rerank['weight']})")
    return ", ".join(words)
