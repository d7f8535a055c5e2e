"""Rows from the Hugging Face hub, through `datasets` and its cache.

Honours what these libraries do: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Without a network, what the cache holds is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import datasets
from huggingface_hub import HfApi, constants, errors

from elmexport.errors import ElmExportError, MissingDependencyError

ANSWER_SECONDS = 10.0  # that the hub has for its first answer
_LOCAL = "or give local rows with --data FOLDER; the task cloze needs no download"


@contextlib.contextmanager
def hub(dataset: str) -> Iterator[None]:
    """Turn failures of a call of `datasets.load_dataset(dataset)` into errors that say what to do.

    The libraries try six times, for half a minute, to reach a hub that is not there; so one request is made first, and where it is not
    answered they are told to use their cache alone.

    Raises:
        ElmExportError: no such data set, or no access to it.
        MissingDependencyError: the hub cannot be reached and the cache does not hold the data set; the download failed for good.
    """
    failure = None if constants.is_offline_mode() else _unreachable(dataset)
    try:
        with _cache_only() if failure else contextlib.nullcontext():
            yield
    except ElmExportError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ElmExportError(f"{str(error).rstrip('.')}; if you have access to it, set HF_TOKEN, {_LOCAL}") from error
    except Exception as error:  # the libraries' many ways to fail
        if failure:
            raise MissingDependencyError(
                f"cannot reach the hub for the data set {dataset} ({failure}), and it is not in the local cache; check the network "
                f"(and HF_ENDPOINT, if set), {_LOCAL}"
            ) from error
        if constants.is_offline_mode():
            raise MissingDependencyError(
                f"the data set {dataset} is not in the local cache, and HF_HUB_OFFLINE forbids downloading; unset it once, {_LOCAL}"
            ) from error
        raise MissingDependencyError(
            f"the data set {dataset} could not be loaded from the hub ({_first_line(error)}); run the command again, {_LOCAL}"
        ) from error


@cache
def _unreachable(dataset: str) -> str | None:
    """Reason why the hub does not answer, None where it does, whatever it says."""
    try:
        HfApi().dataset_info(dataset, timeout=ANSWER_SECONDS, expand=["sha"])
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        return f"HTTP {status}" if status >= 500 else None  # what else it says is heard from load_dataset
    except Exception as error:  # a network's many ways to fail: which classes those are changes with huggingface_hub's versions
        return _first_line(error)
    return None


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
