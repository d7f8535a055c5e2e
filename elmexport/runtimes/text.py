"""Text generation with an artifact: its tokenizer, and generation from text to text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from elmexport.checkpoint.tokenizer import TOKENIZER_FILES, ModelIds, StreamDecoder, Tokenizer, load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, load
from elmexport.models import read_config
from elmexport.runtimes import CHECKPOINT, artifact_kind, open_as
from elmexport.runtimes.generation import Stop, generate
from elmexport.runtimes.sampler import Sampling


def generate_text(
    path: Path,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None],
    tokenizer: Path | None = None,
    chat: bool = False,
) -> Stop:
    """Continue `prompt` with the artifact `path`, hand the text to `write` piece by piece, and return why it ended.

    The prompt is read after BOS, where the model has one. With `chat` it is what a user says, put into the model's chat template: control tokens
    of the template are control tokens, what the user says is text, whatever it spells. `tokenizer` is a tokenizer file, the artifact's own
    where None.

    Raises:
        ElmExportError: a prompt that is not text, a model without a chat template, or see `open_artifact`, `artifact_tokenizer` and `generate`.
        MissingDependencyError: the engine is not installed.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # bytes of an argument that could not be decoded
        raise ElmExportError(f"the prompt {prompt!r} is not text in the encoding {sys.getfilesystemencoding()}; use UTF-8") from None
    kind = artifact_kind(path)
    chosen = artifact_tokenizer(kind, path, tokenizer)
    if chat:
        from elmexport.checkpoint.tokenizer.chat import user_turn

        ids = chosen.encode_spans(user_turn(chosen, prompt))
    else:
        ids = chosen.encode(prompt)
    runtime = open_as(kind, path)
    try:
        decoder = StreamDecoder(chosen, ids)
        tokens = generate(runtime, ids, max_tokens=max_tokens, sampling=sampling, eos_ids=chosen.special.eos)
        for token in tokens:
            write(decoder.feed(token))
        write(decoder.finish())
    finally:
        runtime.close()
    assert tokens.stop is not None
    return tokens.stop


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
