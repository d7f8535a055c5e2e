"""Upload of an artifact to the Hugging Face hub, with its card, and the figures of a report in it. Nothing there is overwritten unasked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from elmexport.artifact import MANIFEST, Artifact, file_sha256
from elmexport.card import CARD, hub_result, model_card
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.evaluation.evaluated_model import evaluated_artifact
from elmexport.evaluation.results import Report, read_report
from elmexport.manifest import FileFacts, Manifest
from elmexport.progress import Progress, SilentProgress
from elmexport.target import find_target

_REPO = re.compile(r"(?=.{1,96}$)[\w.-]+/[\w.-]+")
_OWN = (".gitattributes",)  # of the hub, in every repository


def push(
    path: Path, repo: str, *, report: Path | None = None, private: bool = False, force: bool = False, progress: Progress | None = None
) -> str:
    """Upload the artifact folder `path` to the hub repository `repo` ("user/name"); returns its address.

    A repository that is not there is made. `report`: an evaluation of this artifact, whose figures go into the card. One commit holds all files. `force` replaces files of the same names.

    Raises:
        ElmExportError: no artifact, one that was altered, a report of another one, or files that the repository has already.
        MissingDependencyError: the hub cannot be reached, or does not accept the token.
    """
    progress = progress or SilentProgress()
    if not _REPO.fullmatch(repo):
        raise ElmExportError(f"{repo!r} is no name of a hub repository; give user/name")
    artifact = Artifact.open(path)
    results = [] if report is None else _results(path, read_report(report), report, progress)
    if problems := artifact.verify(progress):
        raise ElmExportError(f"{path} is not what was exported: {'; '.join(problems)}. Copy it again or export it again")
    with TemporaryDirectory() as temporary:
        files = {name: path / name for name in (*artifact.manifest.files, MANIFEST)}
        if results:
            files |= _with_results(artifact.manifest, results, Path(temporary))
        return _upload(repo, files, private=private, force=force, progress=progress)


def _results(path: Path, report: Report, file: Path, progress: Progress) -> list[dict[str, Any]]:
    """The hub's entries of a report's figures.

    Raises:
        ElmExportError: the report is of another artifact.
    """
    if report.artifact.identity != evaluated_artifact(path, progress).subject.identity:
        raise ElmExportError(f"{file} is a report on {report.artifact.label}, and not on the files of {path}; evaluate this artifact")
    found = []
    for name, task in report.tasks.items():
        found.append(hub_result(f"{name}, {task.fewshot}-shot, {task.n} items", [(task.metric, task.metric, task.metrics[task.metric])]))
    if report.kl is not None:
        found.append(hub_result(report.kl.text, [("kl_divergence", "KL divergence from the model, nats per token", report.kl.mean)]))
    return found


def _with_results(manifest: Manifest, results: Sequence[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """A card with `results`, and the manifest that goes with it."""
    card, document = folder / CARD, folder / MANIFEST
    card.write_text(
        model_card(manifest, find_target(manifest.target).usage(sorted(manifest.files)), results), encoding="utf-8", newline="\n"
    )
    listing = {**manifest.files, CARD: FileFacts(card.stat().st_size, file_sha256(card))}
    document.write_bytes(msgspec.structs.replace(manifest, files=dict(sorted(listing.items()))).to_json().encode())
    return {CARD: card, MANIFEST: document}


def _upload(repo: str, files: dict[str, Path], *, private: bool, force: bool, progress: Progress) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        there = sorted({*api.list_repo_files(repo)} & {*files} - {*_OWN})
        if there and not force:
            raise ElmExportError(
                f"hub repository {repo} holds {', '.join(there[:3])}{' and more' if len(there) > 3 else ''} already; pass --force to replace files of the "
                "same names, or give another name"
            )
        if not progress.lend(f"uploading to {repo}"):
            disable_progress_bars()
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        api.create_commit(repo, operations, commit_message="Upload artifact with elmexport")
    except errors.LocalTokenNotFoundError:
        raise MissingDependencyError(
            "uploading needs an access token: set HF_TOKEN to one that can write, or run `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise MissingDependencyError(
                f"the hub does not let this account write to {repo} (HTTP {status}); set HF_TOKEN to an access token that can, or run `hf auth login`"
            ) from None
        raise MissingDependencyError(f"the hub answered HTTP {status} to the upload to {repo}; run the command again") from None
    except ElmExportError:
        raise
    except Exception as error:  # of the connection: which classes those are changes with huggingface_hub's versions
        raise MissingDependencyError(
            f"the hub could not be reached for {repo} ({type(error).__name__}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and run the command again"
        ) from error
    return str(url)
