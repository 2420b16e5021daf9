"""The ablation: methods, or presets, on the same data over several seeds, each training in its own process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pmm.ablation.rows import (
    DEFAULT_ROWS,
    Row,
    check_models,
    config_of,
    resolve_against,
    row_name,
    rows_by_name,
    rows_of,
    with_all_epochs,
)
from pmm.ablation.runs import (
    STANDARD,
    AblationRun,
    RunOutcome,
    changes,
    evaluation_file,
    forget,
    run_all,
    state,
)
from pmm.artifacts.origin import RUNS
from pmm.artifacts.run_folder import BEST
from pmm.config import SYNTHETIC, Config, DataConfig, fast_mode
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import distractors
from pmm.training.data_setup import SYNTHETIC_KEYS, resolve_config, training_data
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import describe_environment
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.facts import how_many
from pmm.utils.hardware import cuda_index, gpu_at, usable_cores
from pmm.utils.task_runner import digest

HOME = Path(__file__).resolve().parents[2]
TRAIN = ("python", "-m", "pmm.train")
EVALUATE = ("python", "-m", "pmm", "evaluate")
LIBRARIES = ("torch", "torchvision", "numpy", "pillow")
FAST_SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What is compared, and how much of the machine that may take."""

    methods: Annotated[str | None, Arg("ROWS", group="rows")] = None
    """Rows with commas between, each a METHOD, METHOD:KEY=VALUE:... with flags of pmm train, or PRESET/METHOD (default:
    all methods of the paper's tables and pmm:k=0, which does not mix; with --compare-presets: pmm)."""
    preset: Annotated[str, Arg("NAME", group="rows")] = "tiny"
    """Preset of the rows that name none."""
    compare_presets: Annotated[str, Arg("NAMES", group="rows")] = ""
    """Presets with commas between, as tiny,paper: each of --methods is trained with each preset."""
    against: Annotated[str, Arg("ROW", group="rows")] = ""
    """Row that the others are compared with (default: baseline if it is a row, else the first row)."""
    seeds: Annotated[int, Arg(group="rows")] = 5
    """Seeds per row. The same seed gives all rows the same order of the data and the same initial backbone."""
    first_seed: Annotated[int, Arg(group="rows")] = 0
    """The first of these seeds; the others follow it."""
    epochs: Annotated[int, Arg(group="rows")] = 0
    """Epochs of each network that is tested (default: those of the preset; on synthetic identities 60 at most). A
    method that trains one before, as aos, has as many for that."""
    dataset: Annotated[str, Arg("NAME", group="data")] = SYNTHETIC
    """Data set, as for pmm train."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of the data set; synthetic identities are drawn into it if it is empty."""
    synthetic_ids: Annotated[int, Arg(group="data")] = DataConfig.synthetic_ids
    """Identities per split, where synthetic ones are drawn."""
    synthetic_seed: Annotated[int, Arg(group="data")] = DataConfig.synthetic_seed
    """Seed of the drawing, where synthetic identities are drawn."""
    device: str = "auto"
    """Where to train and evaluate: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    jobs: int = 1
    """Runs in parallel, which share the cores."""
    runs: Annotated[Path, Arg("DIR")] = RUNS / "ablation"
    """Folder of the runs. Finished runs are kept, and interrupted ones continue."""
    again: Annotated[str, Arg("ROWS")] = ""
    """Rows to run again from scratch, with commas between, or all."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("first_seed", 0), ("epochs", 0), ("jobs", 1)):
            if getattr(self, name) < least:
                raise InvalidValue(name, getattr(self, name), f"{least} or more")
        cuda_index(self.device)


class Ablation:
    """The rows and their runs, checked before any data is drawn or any row trained."""

    folder_flag = "--runs"
    """Of the command line: where the runs are."""

    def __init__(self, options: AblationOptions) -> None:
        """Raises InvalidValue or ConflictingOptions for options that cannot be used."""
        self.options = options
        if (number := cuda_index(options.device)) is not None:
            gpu_at(number)
        if options.compare_presets and options.preset != AblationOptions.preset:
            problem = "--preset and --compare-presets both name presets"
            raise ConflictingOptions(problem, "--preset", "--compare-presets", hint="leave one of them out")
        presets = command_line.names(options.compare_presets or options.preset, flag="--compare-presets")
        rows = ("pmm" if options.compare_presets else DEFAULT_ROWS) if options.methods is None else options.methods
        methods = command_line.names(rows, flag="--methods")
        self.rows: dict[str, Row] = rows_by_name(rows_of(methods, presets))
        self.against = resolve_against(options.against, self.rows)
        again = command_line.names(options.again, flag="--again") if options.again else []
        self._again = set(self.rows) if again == ["all"] else {row_name(a, self.rows, flag="--again") for a in again}
        words = self._shared(options.root)
        for key in SYNTHETIC_KEYS:  # a flag says which people are to be there
            if (value := getattr(options, key)) != getattr(DataConfig(), key):
                words += [f"--{key.replace('_', '-')}", str(value)]
        self.configs: dict[str, Config] = {}
        for name, row in self.rows.items():
            whole = with_all_epochs(row, config_of(row, words), given=bool(options.epochs))
            self.rows[name], self.configs[name] = whole, config_of(whole, words)
        seeds = min(options.seeds, FAST_SEEDS) if fast_mode() else options.seeds
        self.seeds = range(options.first_seed, options.first_seed + seeds)
        self.threads = max(1, usable_cores() // options.jobs)

    def check_models(self) -> None:
        """Raises UserError for an unknown method, or sizes that do not fit. Loads torch."""
        check_models(list(self.rows.values()), list(self.configs.values()))

    @cached_property
    def data(self) -> tuple[Config, ReidDataset]:
        """The configuration and the data set of all runs; synthetic data is drawn if it does not exist.

        Raises UserError if it cannot be read, or was drawn with other options.
        """
        config, _ = training_data(resolve_config(next(iter(self.configs.values()))))
        return config, read_dataset(config.data.dataset, config.data.root)

    @cached_property
    def all_runs(self) -> list[AblationRun]:
        """Seed by seed, so that an interrupted ablation has pairs, and a machine that slows down slows all rows."""
        facts = self.facts()
        return [self.run(name, seed, facts) for seed in self.seeds for name in self.rows]

    def facts(self) -> dict[str, Any]:
        """What all figures depend on beside the configurations, as plain values."""
        crops = [sample.path for part in (self._split.train, self._split.query, self._split.gallery) for sample in part]
        machine = describe_environment(self.threads)
        return {
            "crops": digest(Path(self._root), crops)[:12],
            "device": self.options.device,
            **{key: machine[key] for key in ("python", "cpu", "threads", "gpus", "driver", "kernels")},
            "versions": {name: version for name, version in machine["versions"].items() if name in LIBRARIES},
            "sources": _sources()[:12],
        }

    def check_overwrite(self) -> None:
        """Remove the runs of --again. Raises InvalidFile if another run was made with other settings than this ablation
        has: figures of two kinds must not be in one table."""
        again = [run for run in self.all_runs if run.row in self._again]
        if others := [(run, facts) for run in self.all_runs if run not in again and (facts := changes(run))]:
            run, differences = others[0]
            more = f" (and {len(others) - 1} more runs)" if others[1:] else ""
            problem = f"the run has other settings: {', '.join(differences)}{more}"
            hint = f"run them anew with --again all, or choose another folder with {self.folder_flag}"
            raise InvalidFile(problem, path=run.folder, hint=hint)
        for run in again:
            forget(run)

    def measure(self, finished: Callable[[RunOutcome, int, float], None]) -> list[RunOutcome]:
        """Do the runs that are not finished; see `pmm.ablation.runs.run_all`."""
        return run_all(self.all_runs, root=HOME, slots=self.slots(), finished=finished)

    def slots(self) -> list[dict[str, str]]:
        """The environment variables of each of the runs at once."""
        return [{"OMP_NUM_THREADS": str(self.threads)}] * self.options.jobs

    def data_facts(self) -> dict[str, Any]:
        """The data of all runs, as plain values; `drawn` has the options of synthetic data (None: it is real)."""
        config, split = self.data
        try:
            drawn = json.loads((Path(config.data.root) / "synthetic.json").read_text())
        except (OSError, ValueError):
            drawn = None
        return {
            "dataset": config.data.dataset,
            "root": config.data.root,
            "drawn": drawn if isinstance(drawn, dict) and "seed" in drawn else None,
            "train_crops": len(split.train),
            "train_identities": len({sample.pid for sample in split.train}),
            "test_identities": len({sample.pid for sample in split.query}),
            "queries": len(split.query),
            "gallery": len(split.gallery),
            "distractors": distractors(split.query, split.gallery),
        }

    def describe(self) -> str:
        """The rows, the data and the runs, in three lines."""
        data, options, count = self.data_facts(), self.options, len(self.all_runs)
        drawn = f"synthetic identities, drawn with seed {data['drawn']['seed']}" if data["drawn"] else data["dataset"]
        epochs = " or ".join(map(str, sorted({config.recipe.epochs for config in self.configs.values()})))
        return (
            f"rows: {', '.join(self.rows)}; compared with {self.against}\n"
            f"data: {data['root']}: {drawn}; {data['train_identities']} identities to train on, "
            f"{data['test_identities']} other identities to test on\n"
            f"runs: {count} of {epochs} epochs, {options.jobs} at once with {how_many(self.threads, 'thread')} each, "
            f"in {options.runs}; {self.finished_runs()}"
        )

    def finished_runs(self) -> str:
        """How many runs are finished."""
        done = sum(state(run) == "finished" for run in self.all_runs)
        return f"{done} of {len(self.all_runs)} are finished"

    @property
    def _split(self) -> ReidDataset:
        return self.data[1]

    @property
    def _root(self) -> str:
        return self.data[0].data.root

    def _shared(self, root: str) -> list[str]:
        """The flags of pmm train that all rows share."""
        options = self.options
        words = ["--dataset", options.dataset, "--device", options.device]
        words += ["--root", root] if root else []
        return words + (["--epochs", str(options.epochs)] if options.epochs else [])

    def run(self, name: str, seed: int, facts: Mapping[str, Any]) -> AblationRun:
        """The run of a row and a seed."""
        row, config, options, data = self.rows[name], self.configs[name], self.options, self.data[0].data
        drawn = {key: getattr(data, key) for key in ("dataset", "root", "synthetic_ids", "synthetic_seed")}
        config = dataclasses.replace(config, seed=seed, data=dataclasses.replace(config.data, **drawn))
        folder = options.runs / f"{row.folder}-{seed}"
        return AblationRun(
            row=name,
            seed=seed,
            folder=folder,
            train=(*TRAIN, *self._shared(self._root), *row.words(), "--seed", str(seed), "--out", str(folder)),
            evaluate=self.evaluate(folder, STANDARD),
            facts={"config": config.to_dict(), **facts},
        )

    def evaluate(self, folder: Path, ap: str) -> tuple[str, ...]:
        """The command line that evaluates the run in `folder` by a definition of average precision."""
        options, out = self.options, folder / evaluation_file(ap)
        return (
            *(*EVALUATE, str(folder / BEST), "--dataset", options.dataset, "--root", self._root),
            *("--device", options.device, "--threads", str(self.threads), "--json", str(out)),
            *(() if ap == STANDARD else ("--ap", ap)),
        )


def _sources() -> str:
    """Digest of the sources that train and evaluate: all but the bench, the ablation and what is above it, and the
    exports."""
    package = Path(__file__).resolve().parents[1]
    others = ("bench", "export", "ablation", "reproduction")
    files = (path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in others)
    return digest(package, files)
