"""Tokenizer of an artifact: in the model file, in the folder, or beside a bare file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from elmexport.checkpoint.tokenizer import TOKENIZER_FILES, ModelIds, Tokenizer, load_tokenizer
from elmexport.checkpoint.tokenizer.probes import probes
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, load
from elmexport.models import read_config
from elmexport.runtimes import CHECKPOINT
from elmexport.runtimes.probing import probe


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers, of files of whatever kind, give texts the same ids and end them alike."""
    return one.special.eos == other.special.eos and all(one.encode(text) == other.encode(text) for text in probes(one))


def tokens_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) that tokenizers share which `same_tokens` cannot tell apart, of files of whatever kind."""
    special = tokenizer.special
    facts = [special.eos, special.prefix, [tokenizer.encode(text) for text in probes(tokenizer)]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def artifact_tokenizer(kind: str, path: Path, given: Path | None = None) -> Tokenizer:
    """Find the tokenizer of an artifact of `kind`; `given` is a tokenizer's file to take instead (`find_tokenizer`).

    Raises:
        ElmExportError: there is none.
        MissingDependencyError: what reads it is not installed.
    """
    found = find_tokenizer(kind, path, given)
    if found is None:
        raise ElmExportError(f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}) with it; pass the model's with --tokenizer PATH")
    return found


def find_tokenizer(kind: str, path: Path, given: Path | None = None) -> Tokenizer | None:
    """Find the tokenizer of an artifact: inside the model file, in the folder, or beside or above a bare file.

    `given` is a tokenizer's file to take instead; which ids begin and end texts, the artifact's `config.json` says all the same. None where
    there is none.

    Raises:
        ElmExportError: a damaged file, or one of another model.
        MissingDependencyError: what reads it is not installed.
    """
    suffixes: tuple[str, ...] = ()
    if kind != CHECKPOINT:
        row = find_format(kind)
        if row.tokenizer is not None and given is None:
            probe(kind, path)
            tokenizer: Tokenizer = load(row.tokenizer)(path)
            return tokenizer
        suffixes = row.suffixes
    folders = (path,) if path.is_dir() and path.suffix not in suffixes else path.absolute().parents[:2]
    found = given or next((file for folder in folders for name in TOKENIZER_FILES if (file := folder / name).is_file()), None)
    if found is None:
        return None
    config = next((file for folder in folders if (file := folder / "config.json").is_file()), None)
    return load_tokenizer(found, None if config is None else _model_ids(config))


def _model_ids(config: Path) -> ModelIds | None:
    """What a `config.json` says of texts; None where it is of a model that is not known here (a bare file of another's)."""
    try:
        return ModelIds.of(read_config(config))
    except ElmExportError:
        return None
