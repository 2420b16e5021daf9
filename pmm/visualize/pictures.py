"""The pictures of one checkpoint, or of two side by side; each loads what it needs when it is drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pmm.artifacts.run_folder import METRICS_FILE
from pmm.data.bad_images import MEND, naming_all
from pmm.data.crops import load_crops
from pmm.data.occlusion import TABLE, image_names, read_table
from pmm.data.samples import Sample
from pmm.data.splits import matchable
from pmm.utils.errors import InvalidFile, InvalidValue, UserError
from pmm.visualize.checkpoint_data import CheckpointData, adopted_data, checkpoint_data, name_of, pick
from pmm.visualize.curves import LoggedRun, curves_picture, read_run
from pmm.visualize.sheet import HEIGHT
from pmm.visualize.style import shortened

if TYPE_CHECKING:
    from pmm.evaluation.parity.labels import QueryGallery
    from pmm.runtime.eager import EagerRunner
    from pmm.visualize.cam import View
    from pmm.visualize.ranked import Scores

PICTURES = {
    "cam": "where each classifier looks",
    "mix": "Hard-Mix before and after, on training crops",
    "parts": "which part each cell belongs to, by learnt parts",
    "occlusions": "what hurts when it is hidden, on training crops",
    "lists": "the first results of queries, right and wrong",
    "curves": "losses, held-out accuracy, learning rate",
}
OF_SOME = ("parts", "occlusions")
"""Those of few methods: of others, nobody misses them."""
LISTS = "draw its rankings: --what lists"
MIX_BATCH = 16
"""Crops that partners are drawn from, where fewer are shown."""


class NothingToDraw(UserError):
    """The checkpoint has nothing for this kind of picture."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures are drawn; see the command line."""

    crops: int = 5
    exactly: bool = False
    """Whether fewer than `crops` is an error."""
    split: str = "test"
    root: Path | None = None
    seed: int = 0
    height: int = HEIGHT
    device: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An opened checkpoint and its data."""

    path: Path
    method: str
    runner: EagerRunner
    data: CheckpointData


class Pictures:
    """Draws a checkpoint, with `against`, if any, to its left."""

    def __init__(
        self, checkpoint: Path, against: Path | None, options: PictureOptions, more_runs: Sequence[LoggedRun] = ()
    ) -> None:
        """`more_runs` are drawn with the curves of the checkpoints' runs."""
        self.sources = [path for path in (against, checkpoint) if path is not None]
        self.options, self.more_runs = options, more_runs

    def draw(self, name: str) -> Image.Image:
        """The picture of that name in PICTURES. Raises UserError, NothingToDraw if there is nothing to show; of images
        that cannot be read, all of the data set are named."""
        ways: dict[str, Callable[[], Image.Image]] = {
            "cam": self._cam, "mix": self._mix, "parts": self._parts, "occlusions": self._occlusions,
            "lists": self._lists, "curves": self._curves,
        }  # fmt: skip
        try:
            return ways[name]()
        except InvalidFile as error:
            files = self._images() if "subjects" in vars(self) else []
            if error.path not in files:
                raise
            raise naming_all(error, files, hint=MEND) from error

    def _images(self) -> list[Path]:
        """Of the data set of the main checkpoint."""
        data = self.subjects[-1].data
        return [sample.path for sample in (*data.dataset.query, *data.dataset.gallery, *data.trained)]

    @cached_property
    def subjects(self) -> list[Subject]:
        """The checkpoints to compare, the main one last."""
        from pmm.artifacts.trained_model import read_model
        from pmm.runtime.eager import EagerRunner, torch_device

        device, subjects, root = torch_device(self.options.device), [], self.options.root
        for path in self.sources:
            trained = read_model(path)
            config = trained.config
            data = checkpoint_data(config, path, root) if config else adopted_data(trained.data, path, root)
            runner = EagerRunner(trained.model, trained.preprocessing, device)
            subjects.append(Subject(path=path, method=trained.method, runner=runner, data=data))
        return subjects

    @property
    def titles(self) -> list[str]:
        """The name of each: its method, and its run if two have the same method."""
        methods = [subject.method for subject in self.subjects]
        if len(set(methods)) == len(methods):
            return methods
        places = [path.resolve() for path in self.sources]
        one_run = len({place.parent for place in places}) < len(places)
        names = [place.name if one_run else place.parent.name for place in places]
        return [f"{method} ({shortened(name)})" for method, name in zip(methods, names, strict=True)]

    def _cam(self) -> Image.Image:
        from pmm.visualize.cam import cam_picture

        for subject in self.subjects:
            if subject.method == "adopted":
                raise NothingToDraw("an adopted network has no stages to look into", path=subject.path, hint=LISTS)
        data, true = self.subjects[-1].data, self.options.split == "train"
        if true and not data.trained:
            raise NothingToDraw(data.unknown)
        chosen = self._pick(data.trained if true else data.dataset.query, f"{self.options.split} crops")
        views = [
            self._view(subject, title, chosen, true) for subject, title in zip(self.subjects, self.titles, strict=True)
        ]
        return cam_picture([name_of(sample) for sample in chosen], views, true=true, height=self.options.height)

    def _view(self, subject: Subject, title: str, chosen: Sequence[Sample], true: bool) -> View:
        import torch

        from pmm.visualize.cam import View, stage_cams, to_model

        size, data, model = subject.runner.preprocessing, subject.data, subject.runner.model
        crops = load_crops([sample.path for sample in chosen], size)
        images, classes = to_model(model, crops, size), None
        if true:
            labels = data.labels
            unknown = [sample.pid for sample in chosen if sample.pid not in labels]
            if unknown:
                problem = f"it was not trained on person {unknown[0]}"
                raise InvalidFile(problem, path=subject.path, hint="use --split test")
            classes = torch.tensor([labels[sample.pid] for sample in chosen], device=images.device)
        stages = stage_cams(model, images, classes)
        answers = sorted({int(label) for stage in stages for label in stage.classes})
        if not data.trained:
            logging.getLogger("pmm").warning("%s: training identities without crops: %s", subject.path, data.unknown)
        faces = {} if true else data.faces(size, answers)
        return View(title=title, crops=crops, stages=stages, names=data.names(), faces=faces)

    def _mix(self) -> Image.Image:
        from pmm.visualize.mixing import has_hard_mix, mix_picture

        subject = self.subjects[-1]
        data, runner = subject.data, subject.runner
        if not has_hard_mix(runner.model):
            raise NothingToDraw(f"method {subject.method} has no Hard-Mix", path=subject.path)
        if not data.trained:
            raise NothingToDraw(data.unknown)
        rows = len(self._pick(data.trained, "training crops"))
        batch = pick(data.trained, min(max(rows, MIX_BATCH), len(data.trained)), self.options.seed)
        crops = load_crops([sample.path for sample in batch], runner.preprocessing)
        labels = [data.labels[sample.pid] for sample in batch]
        return mix_picture(
            runner.model,
            crops,
            labels,
            runner.preprocessing,
            names=[f"person {sample.pid}" for sample in batch],
            rows=rows,
            seed=self.options.seed,
            height=self.options.height,
        )

    def _parts(self) -> Image.Image:
        import torch

        from pmm.visualize.cam import eval_mode, to_model
        from pmm.visualize.parts import parts_picture

        subject = self.subjects[-1]
        model: Any = subject.runner.model
        size = subject.runner.preprocessing
        chosen = self._pick(subject.data.dataset.query, "test crops")
        crops = load_crops([sample.path for sample in chosen], size)
        shares = None
        if subject.method != "adopted":
            with eval_mode(model), torch.no_grad():
                shares = model.part_shares(to_model(model, crops, size))
        if shares is None:
            raise NothingToDraw(f"method {subject.method} learns no parts", path=subject.path)
        names = [name_of(sample) for sample in chosen]
        return parts_picture(names, crops, shares.cpu().numpy(), model.backbone.stride, height=self.options.height)

    def _occlusions(self) -> Image.Image:
        from pmm.visualize.parts import occlusion_picture

        subject = self.subjects[-1]
        file = subject.path.parent / TABLE
        if not file.is_file():
            raise NothingToDraw(f"there is no {TABLE} beside it, which --method aos makes", path=subject.path)
        table, data = read_table(file), subject.data
        image_of = dict(zip(data.trained, image_names(data.trained, data.root), strict=True))
        samples = self._pick(
            [sample for sample in data.trained if image_of[sample] in table.rows], "crops in the table"
        )
        crops = load_crops([sample.path for sample in samples], subject.runner.preprocessing)
        images = [image_of[sample] for sample in samples]
        return occlusion_picture(
            [name_of(sample) for sample in samples],
            crops,
            [table.certainty(image, mirrored=False) for image in images],
            [table.drops(image, mirrored=False) for image in images],
            table.windows,
            height=self.options.height,
        )

    def _lists(self) -> Image.Image:
        from pmm.visualize.ranked import compared_picture, ranked_picture

        split = self.subjects[-1].data.dataset
        queries = self._count(sum(matchable(split.query, split.gallery)), "queries with a match in the gallery")
        rankings = [self._ranking(subject, title) for subject, title in zip(self.subjects, self.titles, strict=True)]
        if len(rankings) == 1:
            return ranked_picture(split, *rankings[0], queries=queries)
        first, second = self.titles
        return compared_picture(split, rankings[0], rankings[1], heads=(first, second), queries=queries)

    def _ranking(self, subject: Subject, title: str) -> tuple[QueryGallery, Scores]:
        """Embeddings of queries and gallery, and the average precision of each query."""
        from pmm.embedding.embed import embed_samples
        from pmm.evaluation.parity.labels import QueryGallery
        from pmm.evaluation.ranking import rank_split

        split, batch = self.subjects[-1].data.dataset, self.options.batch_size
        query, gallery = (
            embed_samples(subject.runner, samples, batch_size=batch, label=f"{title}, {name}")
            for name, samples in (("query", split.query), ("gallery", split.gallery))
        )
        return QueryGallery(query, gallery), rank_split(split, query, gallery).per_query_ap

    def _curves(self) -> Image.Image:
        folders = list(dict.fromkeys(path.resolve().parent for path in self.sources))
        runs = [read_run(folder) for folder in folders if (folder / METRICS_FILE).is_file()]
        if not runs and not self.more_runs:
            raise NothingToDraw(
                f"no {METRICS_FILE} beside it", path=self.sources[-1], hint="give --runs DIR, runs with one"
            )
        return curves_picture([*runs, *self.more_runs])

    def _pick(self, samples: Sequence[Sample], what: str) -> list[Sample]:
        return pick(samples, self._count(len(samples), what), self.options.seed)

    def _count(self, available: int, what: str) -> int:
        """How many of the `available` ones to show. Raises InvalidValue if a flag wants more."""
        if self.options.crops > available and self.options.exactly:
            raise InvalidValue("--crops", self.options.crops, f"{available} at most, the number of {what}")
        if not available:
            raise NothingToDraw(f"there are no {what}")
        return min(self.options.crops, available)
