"""The phases of a training: ranges of its epochs, each with an optimizer and a schedule of its own. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pmm.config import Config
from pmm.data.windows import Windows
from pmm.recipe import RecipeConfig
from pmm.utils.errors import ConflictingOptions, InvalidValue


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some epochs that follow each other. It begins with a new optimizer, without the momentum of the one before."""

    recipe: RecipeConfig
    """Of this phase alone: its epochs and its learning rates."""
    name: str = ""
    begin: int = 0
    """Epochs before it."""
    goes_on: bool = False
    """Whether its learning rate is that of its place in the whole training, not that of a training of its own."""
    only: str = ""
    """What the names of the weights that are trained begin with (default: all)."""
    still: str = ""
    """What the names of weights that are not trained yet begin with (default: none)."""
    anew: bool = False
    """Whether the model begins with its initial weights again, and the random numbers with those of the first epoch."""
    occludes: bool = False
    """Whether crops are occluded where that hurts the model of the phase before."""

    @property
    def epochs(self) -> range:
        """Its epochs, from 1."""
        return range(self.begin + 1, self.begin + 1 + self.recipe.epochs)

    def trains(self, name: str) -> bool:
        """Whether the weight of that name is trained."""
        return name.startswith(self.only) and not (self.still and name.startswith(self.still))

    def stream(self, epoch: int) -> int:
        """The epoch whose random numbers `epoch` has."""
        return epoch - self.begin if self.anew else epoch


def single_phase(config: Config) -> tuple[Phase, ...]:
    """All epochs in one."""
    return (Phase(recipe=config.recipe),)


def rpp_phases(config: Config) -> tuple[Phase, ...]:
    """Of PCB+RPP: stripes, then soft parts.

    `authors`: 20 of 50 epochs with stripes, then everything at a tenth of the heads' rate, at a hundredth in the last
    third (github.com/syfafterzy/PCB_RPP_for_reID). `induced`: 60 of 75 as PCB alone, 5 of the part classifier, 10 of
    everything (the paper's four steps, as github.com/Xiaoccer/ReID-PCB_RPP has them).
    """
    part_classifier, recipe = "part_classifier", config.recipe
    if recipe.schedule != "milestones":  # of another recipe, whose rates go on through the phases
        names = ("stripes", "parts") if recipe.rpp_schedule == "authors" else ("stripes", "part classifier", "parts")
        rates: list[dict[str, object]] = [{} for _ in names]
    elif recipe.rpp_schedule == "authors":
        names = ("stripes", "parts")
        rates = [{}, {"lr": recipe.lr / 10, "backbone_lr": 1.0, "milestones": (2 / 3,)}]
    else:
        names = ("stripes", "part classifier", "parts")
        flat = {"lr": recipe.lr / 10, "milestones": ()}
        rates = [{"milestones": (2 / 3,)}, flat, flat]
    shares = (20, 30) if recipe.rpp_schedule == "authors" else (60, 5, 10)
    only = {"part classifier": part_classifier}
    still = {"stripes": part_classifier}
    return tuple(
        Phase(
            recipe=dataclasses.replace(recipe, epochs=epochs, freeze_backbone=0, **own),  # type: ignore[arg-type]
            name=name,
            begin=begin,
            goes_on=recipe.schedule != "milestones",
            only=only.get(name, ""),
            still=still.get(name, ""),
        )
        for name, own, (begin, epochs) in zip(names, rates, _shared(recipe.epochs, shares), strict=True)
    )


def aos_phases(config: Config) -> tuple[Phase, ...]:
    """Of AOS: two trainings alike, the second from the same initial weights, with crops occluded where it hurt the
    first.

    Raises ConflictingOptions for an augmentation that would move or hide what a window was tried on, InvalidValue for
    a step or crops that leave no windows to choose from.
    """
    recipe, data = config.recipe, config.data
    for name in ("cutout", "shift"):
        if value := getattr(recipe, name):
            problem = f"--{name} {value} would change the crops on which --method {config.model.method} tries windows"
            raise ConflictingOptions(problem, f"--{name}", "--method", expected=f"--{name} 0", hint="leave it out")
    Windows(height=data.height, width=data.width, step=recipe.aos_step).check()
    (_, first), (begin, second) = _shared(recipe.epochs, (1, 1))
    half = dataclasses.replace(recipe, freeze_backbone=0)
    return (
        Phase(recipe=dataclasses.replace(half, epochs=first), name="plain crops"),
        Phase(
            recipe=dataclasses.replace(half, epochs=second),
            name="occluded crops",
            begin=begin,
            anew=True,
            occludes=True,
        ),
    )


def phase_of(phases: Sequence[Phase], epoch: int) -> Phase:
    """The one to which `epoch` belongs, from 1; the first before that, and the last after the end."""
    return next((phase for phase in phases if epoch < phase.epochs.stop), phases[-1])


def _shared(epochs: int, shares: Sequence[int]) -> list[tuple[int, int]]:
    """`epochs` cut in proportion to `shares`, at least one each: how many epochs are before each phase, and its own.

    Raises InvalidValue for fewer epochs than phases.
    """
    if epochs < len(shares):
        raise InvalidValue("--epochs", epochs, f"at least {len(shares)}, one for each phase of the training")
    ends = [0]
    for place in range(len(shares)):
        ideal = round(epochs * sum(shares[: place + 1]) / sum(shares))
        ends.append(min(max(ideal, ends[-1] + 1), epochs - (len(shares) - place - 1)))
    return [(begin, end - begin) for begin, end in pairwise(ends)]
