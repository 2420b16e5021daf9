"""The data sets known by name: where they lie below a root, how they look, and how many images they have."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm.config import SYNTHETIC
from pmm.data.folder_layout import parse_layout
from pmm.utils.errors import InvalidValue

MARKET_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
FOLDER_HELP = (
    "folder means one folder of crops per identity; folder:LAYOUT says what each folder is, from the outer to the "
    "inner one: identity, camera, date or any, as folder:camera/identity (folder:identity/identity: people who are "
    "numbered anew in each outer folder)"
)
MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")


@dataclass(frozen=True, kw_only=True)
class Published:
    """Counts by a data set's authors: images per part without junk, identities of train and of query, cameras.

    Test identities are those of the queries: galleries have more.
    """

    train: int
    query: int
    gallery: int
    train_ids: int
    test_ids: int
    cameras: int


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set by name: the places below a root to look for it, of which the first match counts, and its layout."""

    name: str
    layout: Literal["market", "msmt17", "folder"]
    places: tuple[str, ...] = ("",)
    folders: tuple[str, ...] = MARKET_FOLDERS
    """Folders of images: train, query and gallery; of MSMT17, train and test."""
    lists: tuple[str, ...] = ()
    example: str = ""
    """A file name."""
    levels: tuple[str, ...] = ()
    """Of `folder` data sets: what the folders above the images are, see `pmm.data.folder_layout`; empty if not said."""
    aliases: tuple[str, ...] = ()
    published: Published | None = None

    def is_at(self, folder: Path) -> bool:
        """Whether the folders and lists are in `folder` (never of `folder` data sets, which have no fixed ones)."""
        return bool(self.folders) and not self.missing_in(folder)

    def missing_in(self, folder: Path) -> list[str]:
        """Those of the folders and lists that are not in `folder`."""
        folders = [f"{name}/" for name in self.folders if not (folder / name).is_dir()]
        return folders + [name for name in self.lists if not (folder / name).is_file()]

    def place_below(self, root: Path) -> Path | None:
        """The first of the places that holds the data set."""
        return next((root / place for place in self.places if self.is_at(root / place)), None)

    @property
    def expected(self) -> str:
        """What `is_at` looks for, in words."""
        if self.levels:
            return f"{'/'.join(self.levels)}/IMAGE, directly or below train/, query/ and gallery/, or train/ and test/"
        if self.layout == "folder":
            return (
                "train/, query/ and gallery/ with one folder of crops per identity in each (train/ may be missing), "
                "or train/ and test/ of such folders, or such folders alone"
            )
        lists = f" and the lists {', '.join(self.lists)}" if self.lists else ""
        return f"the folders {', '.join(self.folders)}{lists}"


_SPECS = (
    DatasetSpec(
        name="market1501",
        layout="market",
        places=("", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"),
        example="0002_c1s1_000451_03.jpg",
        aliases=("market",),
        published=Published(train=12_936, query=3_368, gallery=15_913, train_ids=751, test_ids=750, cameras=6),
    ),
    DatasetSpec(
        name="dukemtmc-reid",
        layout="market",
        places=("", "dukemtmc-reid", "DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID"),
        example="0001_c2_f0046182.jpg",
        aliases=("dukemtmc",),
        published=Published(train=16_522, query=2_228, gallery=17_661, train_ids=702, test_ids=702, cameras=8),
    ),
    DatasetSpec(
        name="cuhk03-np-labeled",
        layout="market",
        places=("", "cuhk03-np/labeled", "labeled", "cuhk03-np-labeled", "cuhk-label"),
        example="0001_c1_1.png",
        aliases=("cuhk-label",),
        published=Published(train=7_368, query=1_400, gallery=5_328, train_ids=767, test_ids=700, cameras=2),
    ),
    DatasetSpec(
        name="cuhk03-np-detected",
        layout="market",
        places=("", "cuhk03-np/detected", "detected", "cuhk03-np-detected", "cuhk-detect"),
        example="0001_c1_1.png",
        aliases=("cuhk-detect",),
        published=Published(train=7_365, query=1_400, gallery=5_332, train_ids=767, test_ids=700, cameras=2),
    ),
    DatasetSpec(
        name="msmt17-v1",
        layout="msmt17",
        places=("", "msmt17-v1", "MSMT17_V1", "msmt17/MSMT17_V1"),
        folders=("train", "test"),
        lists=MSMT17_LISTS,
        example="0000_000_01_0303morning_0015_0.jpg",
        published=Published(train=32_621, query=11_659, gallery=82_161, train_ids=1_041, test_ids=3_060, cameras=15),
    ),
    DatasetSpec(
        name="msmt17-v2",
        layout="msmt17",
        places=("", "msmt17-v2", "MSMT17_V2", "msmt17/MSMT17_V2"),
        folders=("mask_train_v2", "mask_test_v2"),
        lists=MSMT17_LISTS,
        example="0000_000_01_0303morning_0015_0.jpg",
        published=Published(train=32_621, query=11_659, gallery=82_161, train_ids=1_041, test_ids=3_060, cameras=15),
    ),
    DatasetSpec(name="folder", layout="folder", folders=()),
    DatasetSpec(name=SYNTHETIC, layout="market", example="0002_c1s1_000451_03.jpg"),
)
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}
"""Name -> data set. A new one is an entry above and a word in the help of `pmm.config`; a new layout also needs a
scanner (`pmm.data.readers.LAYOUTS`), and a look at `pmm.data.counts` and `findings`, which know the published ones."""
ALIASES: dict[str, str] = {alias: spec.name for spec in _SPECS for alias in spec.aliases}


def dataset_spec(name: str) -> DatasetSpec:
    """The data set with this name or alias, or with folders as `folder:camera/identity` says. Raises InvalidValue for
    an unknown one."""
    base, colon, layout = name.partition(":")
    if colon and base == "folder":
        return dataclasses.replace(DATASETS[base], name=name, levels=parse_layout(layout, name=name))
    spec = DATASETS.get(ALIASES.get(name, name))
    if spec is None:
        raise InvalidValue("--dataset", name, choices=DATASETS)
    return spec


def names_for_folder(folder: Path) -> list[str]:
    """Names of the data sets that usually lie in a folder of that name."""
    name = folder.name.casefold()
    return [
        n for n, spec in DATASETS.items() if name in {Path(place).name.casefold() for place in spec.places if place}
    ]


def names_at(root: Path) -> list[str]:
    """Names of the data sets that are at `root` or in one of their places below it; but for the synthetic one, which
    looks like Market-1501."""
    return [name for name, spec in DATASETS.items() if name != SYNTHETIC and spec.place_below(root)]
