"""Tensor names as people store them, found among the names of a family: wrappers' prefixes stripped, training code's names mapped.

Also the names of checkpoints: what a folder or a file is called in messages and file names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

# What wrappers put in front of a model's own names: data parallelism, torch.compile, trainers, PEFT.
PREFIXES = ("base_model.model.", "base_model.", "module.", "_orig_mod.", "model.")
# What wrappers of single modules put in the middle.
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


@dataclass(frozen=True)
class Found:
    """Names of a model's tensors in its files."""

    stored: dict[str, str]  # stored name by the family's name
    unknown: tuple[str, ...]  # stored names that are none of the model's tensors
    doubled: tuple[tuple[str, str], ...]  # pairs of stored names that stand for one tensor
    prefixes: tuple[str, ...]  # that were stripped


def find_names(stored: Iterable[str], wanted: Collection[str], trained_name: Callable[[str], str] | None) -> Found:
    """Match `stored` names with `wanted` ones, the family's. `trained_name` maps those of its training code."""
    matches: dict[str, str] = {}
    unknown, doubled, prefixes = [], [], dict[str, None]()
    for name in stored:
        match = find_name(name, wanted, trained_name)
        if match is None:
            unknown.append(name)
        elif match[0] in matches:
            doubled.append((matches[match[0]], name))
        else:
            matches[match[0]] = name
            prefixes |= dict.fromkeys([match[1]] if match[1] else [])
    return Found(matches, tuple(unknown), tuple(doubled), tuple(prefixes))


def find_name(name: str, wanted: Collection[str], trained_name: Callable[[str], str] | None) -> tuple[str, str] | None:
    """The one of `wanted` that `name` stands for, and the prefix that it took to find it; None where there is none."""
    rest = name
    while True:
        own = rest
        for inner in _INNER:
            own = own.replace(f".{inner}", ".")
        for candidate in (own,) if trained_name is None else (own, trained_name(own)):
            if candidate in wanted:
                return candidate, name[: len(name) - len(rest)]
        prefix = next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None)
        if prefix is None:
            return None
        rest = rest[len(prefix) :]


def display_name(path: Path) -> str:
    """Name of the checkpoint folder (or file, without its suffix) `path`, for file names.

    A snapshot in the hub's cache goes by its repository's name. What file names and command lines cannot take well becomes a hyphen.
    """
    repo = snapshot_repo(path)
    given = Path(os.path.abspath(path))  # not resolved: a link goes by its own name
    name = repo.rpartition("/")[2] if repo is not None else given.stem if path.is_file() else given.name
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


def snapshot_repo(path: Path) -> str | None:
    """The repository (`owner/name`) whose snapshot in a hub cache the folder `path` is; None where it is none."""
    given = Path(os.path.abspath(path))
    match = _SNAPSHOT.fullmatch(given.parent.parent.name) if given.parent.name == "snapshots" else None
    return None if match is None else f"{match['owner']}/{match['name']}"
