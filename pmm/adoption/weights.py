"""The weights of a file in the user's network, every key of both accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pmm.artifacts.torch_file import COUNTER, as_float32, first_names
from pmm.artifacts.weights_file import EMA, TRAINING_STATE, key_table, leaves_of, read_weights_file
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import existing_file, sha256

EXPECTED = "the weights of the network (.pth, .pt, .tar, .safetensors)"
_CLASSIFIER = re.compile(
    r"(^|\.)(classifier\w*|cls_head|fc|head|head_dist|last_linear|logits|softmax\w*)(\.(fc|l))?\.(weight|bias)$"
)
"""Names of a training's last layer, whose rows are its identities."""


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What of a file is in a network."""

    path: Path
    sha256: str
    taken: dict[str, str]
    """Name in the network -> key in the file."""
    bent: dict[str, str]
    """Name in the network -> key, and shapes there and here, where these differ."""
    unused: dict[tuple[str, str], list[str]]
    """Other keys of the file, as the table has them."""
    unknown: list[str]
    """Keys of weights of which the network knows nothing."""

    def account(self, state: Mapping[str, Tensor], read: Collection[str]) -> str:
        """A table of all keys of the file and of the network, whose embeddings need the weights `read`.

        Raises InvalidFile, naming keys, if the file lacks one of those, has it in another shape, or has weights of
        which the network knows nothing.
        """
        missing = [name for name in read if name not in self.taken and name not in self.bent]
        problems = [
            (f"it lacks {len(missing)} of the {len(read)} weights that the embeddings need", missing),
            ("weights of another shape", [said for name, said in self.bent.items() if name in read]),
            (f"{len(self.unknown)} weights that the network does not have", self.unknown),
        ]
        found = [f"{problem} ({first_names(keys)})" for problem, keys in problems if keys]
        if found:
            patterns = f"--ignore {self.unknown[0]}" if self.unknown and len(found) == 1 else ""
            hint = "give the factory the arguments that it was trained with" + (
                f", or leave weights out with {patterns}" if patterns else ""
            )
            raise InvalidFile(", ".join(found), path=self.path, hint=hint)
        kept = [name for name in state if name not in self.taken and name not in self.bent]
        rows = {
            ("taken", "needed by the embeddings"): [key for name, key in self.taken.items() if name in read],
            ("taken", "not needed by the embeddings"): [key for name, key in self.taken.items() if name not in read],
            ("left out", "of another shape, not needed by the embeddings"): list(self.bent.values()),
            **self.unused,
            ("kept", "as the factory made them, not needed by the embeddings"): kept,
        }
        return key_table("weights", f"{self.path}", {row: keys for row, keys in rows.items() if keys})


def load_weights(module: nn.Module, path: Path, ignore: Sequence[str] = ()) -> LoadedWeights:
    """Copy into `module` what fits of the file `path`; keys that match one of the patterns `ignore` may be surplus.

    Raises InvalidFile if it is missing or damaged, could run code, or holds no weights of the network, or several that
    differ with nothing to choose by; InvalidValue for a pattern that matches nothing; MissingLibrary for a .safetensors
    file where that library is missing.
    """
    path = existing_file(path, EXPECTED)
    leaves = leaves_of(read_weights_file(path, EXPECTED))
    tensors = {key: value for key, value in leaves.items() if isinstance(value, Tensor)}
    state = module.state_dict()
    prefix, inner, copies = _place(tensors, state, ignore, path)
    keys = {name: _joined(prefix, name.removeprefix(inner)) for name in state if name.startswith(inner)}
    for pattern in ignore:
        if not any(_matches(key, prefix, pattern) for key in leaves):
            raise InvalidValue("--ignore", pattern, f"a pattern of keys in {path}")
    found = {name: key for name, key in keys.items() if key in tensors}
    bent = {
        name: f"{key} {list(tensors[key].shape)} instead of {list(state[name].shape)}"
        for name, key in found.items()
        if tensors[key].shape != state[name].shape
    }
    taken = {name: key for name, key in found.items() if name not in bent}
    if not taken:
        problem = (
            f"it holds no weights of this network (it has {first_names(leaves)}, the network {first_names(state)})"
        )
        raise InvalidFile(problem, path=path, expected=EXPECTED, hint="is it of another network?")
    with torch.no_grad():
        for name, key in taken.items():
            value = tensors[key] if not state[name].is_floating_point() else as_float32(tensors[key], key, path)
            state[name].copy_(value)
    # a file may hold a tensor once that the network has under two names
    tied = {_identity(state[name]): key for name, key in taken.items()}
    taken |= {
        name: tied[_identity(value)] for name, value in state.items() if name not in found and _identity(value) in tied
    }
    unused, unknown = _rest(leaves, set(found.values()), prefix, copies, ignore)
    return LoadedWeights(path=path, sha256=sha256(path), taken=taken, bent=bent, unused=unused, unknown=unknown)


def _place(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], ignore: Sequence[str], path: Path
) -> tuple[str, str, list[str]]:
    """The prefix below which the file has most weights of the network, averaged ones first, the beginning of the
    network's own names that the file does not have, and prefixes below which there are as many.

    Of prefixes, the patterns `ignore` leave out too. Raises InvalidFile if weights that differ are as good a choice.
    """
    first = {name.partition(".")[0] for name in state}
    found: list[tuple[int, bool, str, str]] = []
    for inner in ("", *([f"{next(iter(first))}."] if len(first) == 1 else [])):
        shapes = {name.removeprefix(inner): value.shape for name, value in state.items()}
        counts: Counter[str] = Counter()
        for key, value in tensors.items():
            words = key.split(".")
            for start in range(len(words)):
                name = ".".join(words[start:])
                if not name.endswith(COUNTER) and shapes.get(name) == value.shape:
                    counts[".".join(words[:start])] += 1
        found += [(-hits, not EMA.search(prefix), prefix, inner) for prefix, hits in counts.items()]
    found = [place for place in found if not any(fnmatchcase(f"{place[2]}.", each) for each in ignore)] or found
    best = min(found, key=lambda place: place[:2], default=(0, False, "", ""))
    hits, _, prefix, inner = best
    whole = sum(not name.endswith(COUNTER) for name in state)
    choices: dict[tuple[str, ...], str] = {}  # a place may be found with and without the network's own prefix
    for count, plain, other, beginning in found:
        if (count, plain) == best[:2] and -2 * hits > whole:  # a few fit by chance
            choices.setdefault(tuple(_joined(other, name.removeprefix(beginning)) for name in state), other)
    own, *others = choices or [()]
    rivals = [choices[keys] for keys in others if any(map(partial(_differ, tensors), own, keys))]
    if rivals:
        places = [prefix, *rivals]
        shown = first_names(place or "no prefix" for place in places)
        hint = f"leave all but one out, as with --ignore '{next(filter(None, reversed(places)))}.*'"
        problem = f"it holds weights of the network below {shown}, and they differ"
        raise InvalidFile(problem, path=path, expected="one set of weights", hint=hint)
    return prefix, inner, [other for count, _, other, _ in found if count == hits and other != prefix]


def _differ(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one != other and one in tensors and other in tensors and not torch.equal(tensors[one], tensors[other])


def _rest(
    leaves: Mapping[str, Any], found: Collection[str], prefix: str, copies: Sequence[str], ignore: Sequence[str]
) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """The keys that are not `found` in the network: those of which a reason is known, and the others."""
    rows: dict[tuple[str, str], list[str]] = {}
    unknown = []
    for key, value in leaves.items():
        if key in found:
            continue
        if not isinstance(value, Tensor):
            reason = "no weights"
        elif TRAINING_STATE.match(key):
            reason = "the state of its training"
        elif key.endswith(COUNTER):
            reason = "counters of its training"
        elif any(_matches(key, prefix, pattern) for pattern in ignore):
            reason = "--ignore"
        elif any(key.startswith(f"{copy}.") for copy in copies):
            reason = "another copy of the weights"
        elif _CLASSIFIER.search(key) and value.dim() <= 2:
            reason = "a classifier, which the network does not have"
        else:
            unknown.append(key)
            continue
        rows.setdefault(("left out", reason), []).append(key)
    return rows, unknown


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _matches(key: str, prefix: str, pattern: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(key.removeprefix(f"{prefix}."), pattern)


def _identity(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride()
