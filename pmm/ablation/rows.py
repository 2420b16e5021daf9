"""The rows that are compared: `[PRESET/]METHOD[:KEY=VALUE ...]`, as pmm, pmm:k=0 or tiny/bdb:lr=0.002:block=2x1."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pmm.config import Config
from pmm.models.registry import phases_of
from pmm.presets import preset
from pmm.utils.errors import ConflictingOptions, InvalidValue, UserError

DEFAULT_ROWS = "baseline,bdb,cutout-batch,cutmix,a-cutmix,pmm:k=0,pmm,pcb,pcb-rpp,aos,cama"
"""pmm:k=0: three heads and no mixing."""
BASELINE = "baseline"
NOT_A_ROWS = (
    "out", "resume", "device", "preset", "method", "dataset", "root", "synthetic-ids", "synthetic-seed", "seed", "help",
)  # fmt: skip
"""Flags of pmm train that are the same for all rows, or another part of a row."""


@dataclass(frozen=True)
class Row:
    """A preset, a method, and values of the configuration that differ from the preset's."""

    preset: str
    method: str
    settings: tuple[tuple[str, str], ...] = ()
    """Flags of pmm train without their dashes, and values."""

    @property
    def short(self) -> str:
        """Without the preset."""
        return ":".join([self.method, *(f"{key}={value}" for key, value in self.settings)])

    @property
    def full(self) -> str:
        return f"{self.preset}/{self.short}"

    @property
    def folder(self) -> str:
        """Path of its runs, but for the seed."""
        return f"{_safe(self.preset)}/{_safe(self.short)}"

    def words(self) -> list[str]:
        """Its part of pmm train's command line."""
        settings = (word for key, value in self.settings for word in (f"--{key}", *_values(value)))
        return ["--preset", self.preset, "--method", self.method, *settings]


def parse_row(text: str, default_preset: str) -> Row:
    """The row that `text` describes. Raises InvalidValue if it is not one, or names an unknown preset."""
    match = re.fullmatch(r"(?:([^/:=\s]+)/)?([^/:=\s]+)((?::[\w-]+=[^:\s]+)*)", text)
    if match is None:
        raise InvalidValue("--methods", text, "[PRESET/]METHOD[:KEY=VALUE...], as pmm, pmm:k=0 or tiny/bdb:lr=0.002")
    settings = [tuple(part.split("=", 1)) for part in match[3].split(":")[1:]]
    row = Row(match[1] or default_preset, match[2], tuple((key.replace("_", "-"), value) for key, value in settings))
    if shared := [key for key, _ in row.settings if key in NOT_A_ROWS]:
        hint = f"use --{shared[0]} if pmm ablation has it"
        raise InvalidValue("--methods", text, f"rows without {shared[0]}, which is the same for all", hint=hint)
    preset(row.preset)
    return row


def rows_of(methods: Sequence[str], presets: Sequence[str]) -> list[Row]:
    """The rows of `methods`; with several `presets` each of them in each preset.

    Raises:
        InvalidValue: a text that is no row, or a row that is there twice.
        ConflictingOptions: a row that names a preset, beside several `presets`.
    """
    if len(presets) > 1 and (with_preset := [text for text in methods if "/" in text]):
        problem = f"row '{with_preset[0]}' of --methods names a preset, and --compare-presets does too"
        raise ConflictingOptions(problem, "--methods", "--compare-presets", hint="leave one of them out")
    rows = [parse_row(text, name) for text in methods for name in presets]
    if twice := [row for index, row in enumerate(rows) if row.folder in {other.folder for other in rows[:index]}]:
        raise InvalidValue("--methods", ",".join(methods), f"each row once; {twice[0].full} is in it twice")
    return rows


def rows_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    """Name -> row, in order; the preset is part of a name only if there are several."""
    several = len({row.preset for row in rows}) > 1
    return {row.full if several else row.short: row for row in rows}


def row_name(text: str, rows: dict[str, Row], *, flag: str) -> str:
    """The name of the row that `text` means, with its preset or without. Raises InvalidValue if there is none."""
    for name, row in rows.items():
        if text in (name, row.full):
            return name
    raise InvalidValue(flag, text, choices=rows)


def resolve_against(text: str, rows: dict[str, Row]) -> str:
    """The name of the row that the others are compared with: that of `text`, else baseline, else the first."""
    return row_name(text, rows, flag="--against") if text else BASELINE if BASELINE in rows else next(iter(rows))


def config_of(row: Row, shared: Sequence[str]) -> Config:
    """The configuration that pmm train makes of the row and of the flags that all rows share.

    Raises UserError for a key or a value that it does not take.
    """
    from pmm.training.flags import parse  # what lists rows without training them needs no package of ours

    with _named(row):
        return parse([*shared, *row.words()]).config


def with_all_epochs(row: Row, config: Config, *, given: bool) -> Row:
    """The row with the epochs of all its trainings: a method that first trains another network than the one that is
    tested has as many epochs for each as other rows have in all.

    Not if the row says how many it has, or its method has a number of its own in the preset; `given`: all rows have
    another than that.
    """
    trainings = 1 + sum(phase.anew for phase in phases_of(config))
    own = preset(row.preset, row.method).recipe.epochs != preset(row.preset).recipe.epochs
    if trainings == 1 or "epochs" in dict(row.settings) or (own and not given):
        return row
    settings = (*row.settings, ("epochs", str(trainings * config.recipe.epochs)))
    return dataclasses.replace(row, settings=settings)


def check_models(rows: Sequence[Row], configs: Sequence[Config]) -> None:
    """Build every network once, before hours of work.

    Raises UserError for an unknown method, or sizes that do not fit.
    """
    import torch

    from pmm.models.registry import build_model

    for row, config in zip(rows, configs, strict=True):
        with _named(row), torch.device("meta"):
            build_model(dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2)))


@contextlib.contextmanager
def _named(row: Row) -> Iterator[None]:
    """An error within says which row it is about."""
    try:
        yield
    except UserError as error:
        error.problem = f"row '{row.full}': {error.problem}"
        raise


def _values(value: str) -> list[str]:
    """2x1 -> 2 and 1: a flag that takes two numbers."""
    return value.split("x") if re.fullmatch(r"\d+x\d+", value) else [value]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]", "-", name.replace(":", "-"))
