"""Checkpoints and tokenizers from the Hugging Face hub, through `huggingface_hub` and its cache.

Honours what that library does: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT. A connection lost in the middle of a file is taken up where
it broke (by the library); when the command is run again, complete files are kept and the others fetched.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from elmexport.checkpoint import pickled
from elmexport.checkpoint.adapter_config import CONFIG as ADAPTER_CONFIG
from elmexport.checkpoint.safetensors import INDEX, SINGLE
from elmexport.checkpoint.tokenizer import BESIDE, TOKENIZER_FILES
from elmexport.documents import decode_json
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.models import known_models
from elmexport.progress import Progress

T = TypeVar("T")

SMALL_FILES = ("config.json", "generation_config.json", INDEX, pickled.INDEX, ADAPTER_CONFIG, *TOKENIZER_FILES, *BESIDE)
WEIGHT_FILES = (SINGLE, "model-*-of-*.safetensors")
BIN_FILES = (pickled.SINGLE, "pytorch_model-*-of-*.bin")  # of repositories that have no safetensors


def download_description(repo: str, revision: str | None) -> Path:
    """Everything of a model but its weights: what says whether the weights are worth downloading. Returns the snapshot's folder,
    which is named by the commit.

    Raises:
        ElmExportError: no such model or revision, access refused, no network, disk full, download interrupted.
    """
    from huggingface_hub import snapshot_download

    return Path(_explained(repo, revision, lambda: snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES))))


def download_weights(repo: str, snapshot: Path, progress: Progress) -> None:
    """Complete `snapshot` (see `download_description`) with the model's safetensors, or with `pytorch_model.bin` where it has none.

    Raises:
        ElmExportError: as `download_description`; or what came is not what the hub lists, by its SHA-256.
    """
    if _complete(snapshot):
        return
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    commit = snapshot.name

    def download() -> list[RepoFile]:
        files = [entry for entry in HfApi().list_repo_tree(repo, revision=commit) if isinstance(entry, RepoFile)]
        safe = any(fnmatch(entry.path, pattern) for entry in files for pattern in WEIGHT_FILES)
        patterns = list(WEIGHT_FILES if safe else BIN_FILES)
        missing = [entry for entry in files if any(fnmatch(entry.path, p) for p in patterns) and not (snapshot / entry.path).exists()]
        progress.stage(f"downloading {repo}", sum(entry.size for entry in missing))
        snapshot_download(repo, revision=commit, allow_patterns=patterns, tqdm_class=_bar_class(progress))
        return missing

    for entry in _explained(repo, commit, download):
        if entry.lfs is not None:
            _check_content(repo, snapshot / entry.path, entry.lfs.sha256)


def _check_content(repo: str, path: Path, sha256: str) -> None:
    """Compare a file that was just downloaded with what the hub lists: the library looks at its size alone. One that differs is removed.

    Raises:
        ElmExportError: it differs.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == sha256:
        return
    for one in (path.resolve(), path):
        one.unlink(missing_ok=True)
    raise ElmExportError(
        f"what came for {path.name} of hub repository {repo} is not the file that the hub lists (SHA-256 {found[:12]}…, listed {sha256[:12]}…); "
        "it was removed: run the command again"
    )


def cached_weights(repo: str) -> bool:
    """Whether the cache holds the configuration and all weights of the last `main` seen. No network."""
    config = _cached(repo, "config.json")
    return config is not None and _complete(config.parent)


def cached_tokenizer(repo: str) -> Path | None:
    """The tokenizer file of `repo` in the cache, None where there is none. No network."""
    return next((path for name in TOKENIZER_FILES if (path := _cached(repo, name)) is not None), None)


def download_tokenizer(repo: str) -> Path:
    """The tokenizer file of `repo`, from the cache or the hub.

    Raises:
        ElmExportError: the repository has no tokenizer; otherwise as `download_description`.
    """
    cached = cached_tokenizer(repo)
    if cached is not None:
        return cached
    from huggingface_hub import snapshot_download

    snapshot = Path(_explained(repo, None, lambda: snapshot_download(repo, allow_patterns=[*TOKENIZER_FILES, *BESIDE])))
    for name in TOKENIZER_FILES:
        if (snapshot / name).is_file():
            return snapshot / name
    raise ElmExportError(
        f"hub repository {repo} holds neither {' nor '.join(TOKENIZER_FILES)}; give --tokenizer another repository, or a file"
    )


def _cached(repo: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


def _complete(snapshot: Path) -> bool:
    """Whether the folder holds all the weights it should. A damaged index is left to be complained of when it is opened."""
    return any(_all_there(snapshot, *names) for names in ((SINGLE, INDEX), (pickled.SINGLE, pickled.INDEX)))


def _all_there(snapshot: Path, single: str, index: str) -> bool:
    if (snapshot / single).exists():
        return True
    try:
        files = set(decode_json((snapshot / index).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((snapshot / str(file)).exists() for file in files)


def _bar_class(progress: Progress) -> type[Any]:
    """A progress bar that draws nothing and reports downloaded bytes to `progress`."""
    from threading import Lock

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    lock = Lock()
    reported = 0

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread to watch it

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            self._bytes = 0.0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            if not self._counts_bytes:
                return
            with lock:
                self._bytes += n or 0
                # The library keeps two bars of bytes (received, and written to disk): the one ahead counts.
                step = int(self._bytes) - reported
                if step > 0:
                    reported += step
                    progress.advance(step)

    return Bar


def _explained(repo: str, revision: str | None, download: Callable[[], T]) -> T:
    """Run `download`; what goes wrong becomes an error that says what to do."""
    from huggingface_hub import errors

    what = f"hub repository {repo}" + (f" at revision {revision}" if revision else "")
    try:
        return download()
    except errors.GatedRepoError as error:
        raise MissingDependencyError(
            f"access to {what} is restricted, and {_token_state(error)}. On its hub page, signed in, accept the licence; then set HF_TOKEN to "
            f"an access token of that account (or run `hf auth login`) and run the command again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ElmExportError(
            f"there is no hub repository {repo}, nor a local folder of that name{_suggestion(repo)}. If it is private, set HF_TOKEN to a token that can read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ElmExportError(
            f"hub repository {repo} has no revision {revision!r}; give a branch, tag or commit that its hub page lists"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_reached(what, error) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise MissingDependencyError(
                f"the hub refused access to {what} (HTTP {status}), and {_token_state(error)}; set HF_TOKEN to a valid token that can read it"
            ) from None
        raise _interrupted(what, f"the hub answered HTTP {status}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ElmExportError(
                f"no space left on the disk while downloading {what}; free some, or set HF_HOME to a folder on a larger disk, and run the command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ElmExportError(
                f"the hub cache cannot be written ({error.strerror}: {error.filename}); set HF_HOME to a folder that can"
            ) from None
        raise _interrupted(what, str(error)) from None
    except Exception as error:
        # Connections that break, and Xet's own failures: which classes those are changes with huggingface_hub's versions.
        raise _interrupted(what, str(error) or type(error).__name__) from error


def _interrupted(what: str, reason: str) -> ElmExportError:
    return MissingDependencyError(
        f"the download of {what} was interrupted ({reason.splitlines()[0] if reason else 'connection lost'}); run the command again: complete files are kept"
    )


def _not_reached(what: str, error: Exception) -> ElmExportError:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return MissingDependencyError(
            f"{what} is not (completely) in the local cache, and HF_HUB_OFFLINE forbids downloading; unset HF_HUB_OFFLINE once, or give --model a local folder"
        )
    cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    reason = f"HTTP {status}" if status else type(cause or error).__name__
    return MissingDependencyError(
        f"the hub could not be reached for {what} ({reason}), and it is not (completely) in the local cache; check the network "
        "(and HF_ENDPOINT, if set), or give --model a local folder. Without a network: --model tiny is built in"
    )


def _token_state(error: Exception) -> str:
    from huggingface_hub import get_token

    return "the account of the token in use has not been granted it" if get_token() else "no token is set"


def _suggestion(repo: str) -> str:
    close = get_close_matches(repo, [model.hub_id for model in known_models() if model.hub_id], n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
