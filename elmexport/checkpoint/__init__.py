"""Checkpoints: weights and tokenizers, found by alias, hub id, folder or file (`open_checkpoint`)."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from elmexport.checkpoint import pickled
from elmexport.checkpoint.adapter_config import CONFIG as ADAPTER_CONFIG
from elmexport.checkpoint.adapter_config import adapter_base
from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.local import holds_checkpoint, open_adapter, open_folder, open_path
from elmexport.checkpoint.names import display_name
from elmexport.checkpoint.random import RandomCheckpoint
from elmexport.checkpoint.safetensors import has_weights
from elmexport.checkpoint.tokenizer import TOKENIZER_FILES, ModelIds, Tokenizer, load_tokenizer
from elmexport.checkpoint.tokenizer.beside import read_template_beside
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.models import find_family, find_model, known_models, read_config
from elmexport.models.base import KnownModel, ModelConfig
from elmexport.progress import Progress, SilentProgress

NO_TOKENIZER = "none"  # --tokenizer none: go without, on purpose
_HUB_ID = re.compile(r"(?=.{1,96}$)[\w.-]+/[\w.-]+")


def open_checkpoint(
    model: str = "tiny",
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    random_weights: int | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a model: a local folder, a CoreNet `.pt` file or the folder it lies in, an alias (`tiny`, `270M`), or a hub id.

    `revision` pins a hub model to a branch, tag or commit. `tokenizer` is a file, a folder, a hub id, or "none"; where it is None, the
    model's own is used, then the one that models of its family were trained with: from the cache for local files, else from its hub
    repository. `random_weights` is a seed: the model's shapes with random values, nothing downloaded. `adapter` is the folder or file of a LoRA or
    DoRA adapter of the model, which is merged into the weights as they are read.

    Only headers are read; `tokenizer_path` of the result is None where no tokenizer was found (see `require_tokenizer`).

    Raises:
        ElmExportError: no such model, unusable files, weights that do not fit their configuration, or a download that failed. For a
            hub model, no access to its tokenizer either, before any weights are downloaded.
    """
    progress = progress or SilentProgress()
    if not model.strip():
        raise ElmExportError(f"--model is empty; give one of {_aliases()}, a hub id (owner/name), a local folder, or a CoreNet .pt file")
    if adapter is not None and not adapter.exists():
        raise ElmExportError(f"--adapter {adapter}: no such file or folder; give the folder of an adapter, as PEFT or CoreNet writes it")
    known = find_model(model)
    folder = Path(model).expanduser()
    shadowed = known if known is not None and holds_checkpoint(folder) else None
    if shadowed is not None:
        known = None
    path = None if known else _local_path(model)
    if revision is not None and (path is not None or random_weights is not None or (known and known.folder is not None)):
        raise ElmExportError(f"--revision {revision} applies to models from the hub; {model!r} is not downloaded: leave --revision out")
    checkpoint: Checkpoint
    if random_weights is not None:
        checkpoint = _open_random(model, known, path, tokenizer, random_weights)
    elif known and known.folder is not None:
        checkpoint = open_embedded(known, tokenizer)
    elif path is not None:
        checkpoint = _open_local(path, tokenizer)
    else:
        checkpoint = _open_hub(model, known, revision, tokenizer, progress)
    checkpoint.check()
    if adapter is not None:
        checkpoint = open_adapter(adapter, checkpoint)
    if shadowed is not None:
        checkpoint.notes.append(
            f"--model {model} is the local folder {folder.absolute()}; the model that `elmexport models` calls {shadowed.alias} was not used"
        )
    return checkpoint


def open_embedded(known: KnownModel, tokenizer: str | None = None) -> Checkpoint:
    """Open a model that comes with elmexport, whatever folders of its name there are."""
    assert known.folder is not None
    return open_folder(known.folder, known.config, Source(known.name, "embedded"), _chosen(tokenizer, known.folder))


def require_tokenizer(checkpoint: Checkpoint) -> Path:
    """The tokenizer of `checkpoint`, for work that cannot go on without. Tries the hub repository of the family's tokenizer as a last resort.

    Raises:
        ElmExportError: there is none, and how to get one.
    """
    if checkpoint.tokenizer_path is not None:
        return checkpoint.tokenizer_path
    return _download_tokenizer(checkpoint.source.name, checkpoint.config)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of `checkpoint` with the model's own ids and chat template; None where it has none.

    A template counts only if it lies in the model's own folder: beside a tokenizer that was taken from elsewhere lies another model's.

    Raises:
        ElmExportError: a damaged file, or a tokenizer of another model.
    """
    if checkpoint.tokenizer_path is None:
        return None
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, ModelIds.of(checkpoint.config))
    tokenizer.chat_template = None if checkpoint.folder is None else read_template_beside(checkpoint.folder)
    return tokenizer


def _open_random(model: str, known: KnownModel | None, path: Path | None, tokenizer: str | None, seed: int) -> RandomCheckpoint:
    if known is not None:
        return RandomCheckpoint(known.config, known.name, seed, _chosen(tokenizer, known.folder))
    if path is None:
        raise ElmExportError(
            f"--random-weights needs shapes: {model!r} is neither a known model ({_aliases()}) nor a folder with a config.json"
        )
    folder = path if path.is_dir() else path.parent
    return RandomCheckpoint(read_config(folder / "config.json"), display_name(folder), seed, _chosen(tokenizer, folder))


def _open_local(path: Path, tokenizer: str | None) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    tokenizer_path = _chosen(tokenizer, folder)
    checkpoint = open_path(path, tokenizer_path)
    repo = find_family(checkpoint.config.model_type).tokenizer_repo
    if tokenizer_path is None and tokenizer is None and repo is not None:
        from elmexport.checkpoint.hub import cached_tokenizer

        checkpoint.tokenizer_path = cached_tokenizer(repo)
    return checkpoint


def _open_hub(model: str, known: KnownModel | None, revision: str | None, tokenizer: str | None, progress: Progress) -> Checkpoint:
    repo = known.hub_id if known and known.hub_id else model
    return open_repository(repo, revision, tokenizer, progress)


def open_repository(repo: str, revision: str | None, tokenizer: str | None, progress: Progress) -> Checkpoint:
    """Open the hub repository `repo`, whatever folders of its name there are; downloads what the cache lacks.

    Raises:
        ElmExportError: see `open_checkpoint`.
    """
    from elmexport.checkpoint import hub

    snapshot = hub.download_description(repo, revision)
    name = repo.rpartition("/")[2]
    if not (snapshot / "config.json").is_file():
        if (snapshot / ADAPTER_CONFIG).is_file():
            base = adapter_base(snapshot)
            raise ElmExportError(
                f"hub repository {repo} holds an adapter, not a model: give its base with --model{f' {base}' if base else ''}, download the adapter "
                f"(hf download {repo} --local-dir DIR), and pass --adapter DIR"
            )
        raise ElmExportError(f"hub repository {repo} holds no config.json, so it is no model; give --model a repository that does")
    # Everything that can fail cheaply comes before the gigabytes.
    config = read_config(snapshot / "config.json")
    tokenizer_path = _chosen(tokenizer, snapshot)
    if tokenizer_path is None and tokenizer is None:
        tokenizer_path = _download_tokenizer(name, config)
    hub.download_weights(repo, snapshot, progress)
    if not has_weights(snapshot) and not pickled.has_bin(snapshot):
        raise ElmExportError(f"hub repository {repo} holds neither safetensors weights nor pytorch_model.bin; give --model one that does")
    return open_folder(snapshot, config, Source(name, f"hub:{repo}", snapshot.name), tokenizer_path)


def _chosen(tokenizer: str | None, folder: Path | None) -> Path | None:
    """The file that `--tokenizer` names; without one, the file in the model's own folder."""
    if tokenizer == NO_TOKENIZER:
        return None
    if tokenizer is None:
        return None if folder is None else _tokenizer_in(folder)
    path = Path(tokenizer).expanduser()
    if _exists(path, "--tokenizer", tokenizer):
        if path.is_file():
            return path
        found = _tokenizer_in(path)
        if found is None:
            raise ElmExportError(f"--tokenizer {tokenizer}: the folder holds neither {' nor '.join(TOKENIZER_FILES)}")
        return found
    if _HUB_ID.fullmatch(tokenizer) and path.suffix not in (".model", ".json"):
        from elmexport.checkpoint.hub import download_tokenizer

        return download_tokenizer(tokenizer)
    raise ElmExportError(
        f"--tokenizer {tokenizer}: no such file; give a tokenizer.model or tokenizer.json, a folder that holds one, a hub id, or {NO_TOKENIZER}"
    )


def _tokenizer_in(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _download_tokenizer(model: str, config: ModelConfig) -> Path:
    from elmexport.checkpoint.hub import download_tokenizer

    family = find_family(config.model_type)
    fix = f"give --tokenizer PATH ({family.tokenizer_words}: tokenizer.model or tokenizer.json), or --tokenizer HUB-ID, or --tokenizer {NO_TOKENIZER} to go without"
    if family.tokenizer_repo is None:
        raise MissingDependencyError(f"{model} comes without a tokenizer; {fix}")
    try:
        return download_tokenizer(family.tokenizer_repo)
    except ElmExportError as error:
        raise MissingDependencyError(
            f"{model} comes without a tokenizer; {family.name} uses {family.tokenizer_words}, and it could not be had from {family.tokenizer_repo}: "
            f"{error}. Or {fix}"
        ) from None


def is_local(model: KnownModel) -> bool:
    """Whether the weights of `model` lie on this machine already. Looks at the hub's cache folder only; no network."""
    if model.hub_id is None:
        return True
    from elmexport.checkpoint.hub import cached_weights

    return cached_weights(model.hub_id)


def _local_path(model: str) -> Path | None:
    """`model` as a path; None where it can only be a hub id.

    Raises:
        ElmExportError: it is neither.
    """
    path = Path(model).expanduser()
    if _exists(path, "--model", model):
        return path
    if _HUB_ID.fullmatch(model) and not model.startswith(".") and path.suffix != ".pt":
        return None
    if "/" in model or path.suffix in (".pt", ".safetensors"):
        raise ElmExportError(f"--model {model}: no such file or folder")
    aliases = [known.alias for known in known_models()]
    by_folded = {alias.casefold(): alias for alias in aliases}
    close = [by_folded[found] for found in get_close_matches(model.casefold().replace("_", "."), by_folded, n=2, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ElmExportError(
        f"unknown model {model!r}.{hint} Known: {_aliases()}; or give a hub id (owner/name), a local folder, or a CoreNet .pt file"
    )


def _exists(path: Path, option: str, value: str) -> bool:
    """Whether `path`, which `option` gave as `value`, is there. Raises ElmExportError where the file system refuses the name."""
    try:
        return path.exists()
    except OSError as error:
        raise ElmExportError(f"{option} {value}: {error.strerror}; give a path that can exist") from None


def _aliases() -> str:
    return ", ".join(known.alias for known in known_models())


__all__ = ["Checkpoint", "is_local", "open_checkpoint", "open_embedded", "open_repository", "open_tokenizer", "require_tokenizer"]
