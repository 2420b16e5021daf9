"""A reproduction: the rows of the paper's tables, each trained with its method's own recipe, on the data of a user."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pmm.ablation.runs import AblationRun, RunOutcome, figures
from pmm.ablation.study import Ablation, AblationOptions
from pmm.artifacts.origin import RUNS
from pmm.presets import preset
from pmm.recipe import RecipeConfig
from pmm.reproduction.figures import PAPER_AP, PAPER_ROWS, Dataset
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidValue
from pmm.utils.facts import how_many
from pmm.utils.hardware import cuda_index, gpu_at, nvidia_gpus

SETTINGS: dict[tuple[str, str], tuple[str, ...]] = {("aos", "market1501"): ("dropout=0.6",)}
"""Method and data set -> values of its authors for that data set alone (github.com/huanghoujing/AOS4ReID)."""
NOT_YET = "not trained yet"
MACHINE = ("python", "cpu", "threads", "gpus", "driver", "kernels")
"""Facts of an ablation that may differ between the runs of a reproduction: it compares no times."""


@dataclass(frozen=True, kw_only=True)
class ReproductionOptions:
    """Which rows of the paper's tables, on which data, and how much of the machine that may take."""

    dataset: Annotated[Dataset, Arg(group="data")] = "market1501"
    """Data set of the paper's tables; their CUHK03 is cuhk03-np-detected."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of the data set, or the folder that has it under its usual name."""
    rows: Annotated[str, Arg("METHODS", group="rows")] = ""
    """Rows of the tables, by their methods with commas between (default: all)."""
    preset: Annotated[str, Arg("NAME", group="rows")] = "paper"
    """Preset: paper, each method's own recipe; tiny trains on a CPU in minutes, to see that all works."""
    seeds: Annotated[int, Arg(group="rows")] = 1
    """Seeds per row; one alone gives no interval."""
    first_seed: Annotated[int, Arg(group="rows")] = 0
    """The first of these seeds; the others follow it."""
    epochs: Annotated[int, Arg(group="rows")] = 0
    """Epochs of each network that is tested (default: those of its recipe)."""
    devices: Annotated[str, Arg("NAMES", group="machine")] = "auto"
    """Where to train: auto (every GPU), cpu, or GPUs with commas between, as cuda:0,cuda:2."""
    jobs: Annotated[int, Arg(group="machine")] = 1
    """Runs at once on each of --devices."""
    images_per_pass: Annotated[int, Arg("N", group="machine")] = 0
    """Most images in a forward and backward pass: a larger batch is cut into equal parts, which takes less memory, and
    batch statistics, triplets and partners stay within a part (default: no limit, batches of up to 128 images). 64 is
    for a GPU with 12 GB."""
    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder of the runs and of table.md and table.json (default: runs/reproduce-DATASET). Finished runs are kept, and
    interrupted ones continue."""
    again: Annotated[str, Arg("METHODS")] = ""
    """Rows to run again from scratch, with commas between, or all."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("first_seed", 0), ("epochs", 0), ("jobs", 1), ("images_per_pass", 0)):
            if getattr(self, name) < least:
                raise InvalidValue(name, getattr(self, name), f"{least} or more")


class Reproduction(Ablation):
    """The rows as an ablation that is evaluated by both definitions of average precision, on any number of GPUs."""

    folder_flag = "--out"

    def __init__(self, asked: ReproductionOptions) -> None:
        """Raises InvalidValue or ConflictingOptions for options that cannot be used, BackendUnavailable for GPUs that
        are not there."""
        methods = _methods(asked.rows, "--rows") if asked.rows else list(PAPER_ROWS)
        texts = {method: _row(method, asked) for method in methods}
        again = asked.again
        if again not in ("", "all"):
            again = ",".join(texts[method] for method in _methods(asked.again, "--again", methods))
        if not asked.root:
            problem, hint = f"--dataset {asked.dataset} needs --root", "add --root DIR, the folder of the data set"
            raise ConflictingOptions(problem, "--dataset", "--root", hint=hint)
        self.dataset = asked.dataset
        kind, self.devices = _devices(asked)
        options = AblationOptions(
            methods=",".join(texts.values()),
            preset=asked.preset,
            seeds=asked.seeds,
            first_seed=asked.first_seed,
            epochs=asked.epochs,
            dataset=asked.dataset,
            root=asked.root,
            device=kind,
            jobs=asked.jobs * len(self.devices),
            runs=asked.out or RUNS / f"reproduce-{asked.dataset}",
            again=again,
        )
        super().__init__(options)

    def facts(self) -> dict[str, Any]:
        """Without the machine: runs of several may be in one table."""
        return {key: value for key, value in super().facts().items() if key not in MACHINE}

    def run(self, name: str, seed: int, facts: Mapping[str, Any]) -> AblationRun:
        """As in an ablation, and evaluated by the paper's definition of average precision too."""
        run = super().run(name, seed, facts)
        return dataclasses.replace(run, by_other_ap={PAPER_AP: self.evaluate(run.folder, PAPER_AP)})

    def slots(self) -> list[dict[str, str]]:
        """Each process sees its GPU alone."""
        shared = {"OMP_NUM_THREADS": str(self.threads)}
        if self.devices == ["cpu"]:
            return [shared] * self.options.jobs
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        numbers = [cuda_index(device) or 0 for device in self.devices]
        one_each = [{"CUDA_VISIBLE_DEVICES": visible[n] if visible else str(n), **shared} for n in numbers]
        return one_each * (self.options.jobs // len(one_each))

    def outcomes(self, ended: Mapping[str, RunOutcome]) -> list[RunOutcome]:
        """Of all runs as they are now; `ended`: those of this call, by their names."""
        return [
            ended.get(run.name, RunOutcome(run=run, figures=(found := figures(run)), note="" if found else NOT_YET))
            for run in self.all_runs
        ]

    def describe(self) -> str:
        """The rows, the data and the runs, in three lines."""
        data, options = self.data_facts(), self.options
        epochs = ", ".join(f"{row.method} {self.configs[name].recipe.epochs}" for name, row in self.rows.items())
        return (
            f"rows, with their epochs: {epochs}\n"
            f"data: {data['root']}: {data['dataset']}; {data['train_identities']} identities to train on, "
            f"{data['test_identities']} other identities to test on\n"
            f"runs: {len(self.all_runs)}, on {', '.join(self.devices)}, {options.jobs} at once with "
            f"{how_many(self.threads, 'thread')} each, in {options.runs}; {self.finished_runs()}"
        )


def _methods(text: str, flag: str, known: list[str] | None = None) -> list[str]:
    """Raises InvalidValue for a name that is none of `known` (default: of the tables' methods)."""
    found = command_line.names(text, flag=flag)
    for name in found:
        if name not in (known or PAPER_ROWS):
            raise InvalidValue(flag, name, choices=known or PAPER_ROWS)
    return found


def _row(method: str, asked: ReproductionOptions) -> str:
    """The row as `pmm ablation --methods` has it. Raises InvalidValue for a limit that no batch can be cut to."""
    settings = [*SETTINGS.get((method, asked.dataset), ())]
    recipe = preset(asked.preset, method).recipe
    if 0 < asked.images_per_pass < recipe.batch_size:
        settings.append(f"accumulate={_parts(recipe, asked.images_per_pass, method)}")
    return ":".join([method, *settings])


def _parts(recipe: RecipeConfig, most: int, method: str) -> int:
    """The least number of parts of a batch with `most` images at most."""
    possible = []
    for parts in range(2, recipe.batch_size + 1):
        with contextlib.suppress(ConflictingOptions):
            dataclasses.replace(recipe, accumulate=parts)
            possible.append(parts)
    for parts in possible:
        if recipe.batch_size / parts <= most:
            return parts
    least = recipe.batch_size // max([1, *possible])
    raise InvalidValue("--images-per-pass", most, f"at least {least}, to which the batches of {method} can be cut")


def _devices(asked: ReproductionOptions) -> tuple[str, list[str]]:
    """The kind of the devices, cpu or cuda, and their names. Raises InvalidValue or BackendUnavailable."""
    wanted, gpus = command_line.names(asked.devices, flag="--devices"), nvidia_gpus()
    if wanted == ["cpu"] or (wanted == ["auto"] and not gpus and asked.preset.startswith("tiny")):
        return "cpu", ["cpu"]
    if wanted != ["auto"] and not all(re.fullmatch(r"cuda(:\d{1,4})?", name) for name in wanted):
        raise InvalidValue("--devices", asked.devices, "auto, cpu, or GPUs with commas between, as cuda:0,cuda:1")
    if not gpus:
        problem = f"no NVIDIA GPU is visible, and on a CPU a run of preset {asked.preset} takes days"
        hint = "use --devices cpu to do it all the same, or --preset tiny to see that all works"
        raise BackendUnavailable(problem, hint=hint)
    numbers = range(len(gpus)) if wanted == ["auto"] else {cuda_index(name) or 0: None for name in wanted}
    for number in numbers:
        gpu_at(number)
    return "cuda", [f"cuda:{number}" for number in numbers]
