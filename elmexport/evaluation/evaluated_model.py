"""Evaluated models: an artifact, or the model it came from as fp16 reference. Each is described first and opened when its turn comes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact, file_sha256
from elmexport.card import CARD
from elmexport.checkpoint import NO_TOKENIZER, open_checkpoint, open_embedded, open_repository
from elmexport.checkpoint.base import WITH_ADAPTER, Checkpoint
from elmexport.checkpoint.local import open_adapter
from elmexport.checkpoint.random import RandomCheckpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.results import ModelFacts, Subject
from elmexport.manifest import Model
from elmexport.models import config_from_dict, known_models
from elmexport.progress import Progress, SilentProgress
from elmexport.runtimes import CHECKPOINT, artifact_kind, engine_name, open_as
from elmexport.runtimes.base import Runtime

FP16 = "fp16"  # --against fp16: the model itself


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to evaluate. `open_runtime` may take long and much memory; the caller closes what it returns."""

    subject: Subject
    open_runtime: Callable[[], Runtime]


def evaluated_artifact(path: Path, progress: Progress | None = None) -> EvaluatedModel:
    """The artifact (or bare model file, or checkpoint) `path`; reads every byte of it once, for its identity.

    Raises:
        ElmExportError: see `elmexport.runtimes.artifact_kind`.
    """
    kind = artifact_kind(path)
    if kind == CHECKPOINT:
        return _evaluated_checkpoint(open_checkpoint(str(path), tokenizer=NO_TOKENIZER), str(path), None, progress)
    files, progress = _files(path), progress or SilentProgress()
    progress.stage("reading files", sum(file.stat().st_size for _, file in files))
    identity = hashlib.sha256("".join(f"{name} {file_sha256(file, progress)}\n" for name, file in files).encode()).hexdigest()
    quant, words, bits, model = "unknown", "not recorded", None, ModelFacts("unknown", None)
    if (path / MANIFEST).is_file():
        manifest = Artifact.open(path).manifest
        quant, words, bits = manifest.quant.name, manifest.quant.words, manifest.bits_per_weight
        model = ModelFacts(manifest.model.name, manifest.model.identity)
    subject = Subject(
        label=path.resolve().name,
        path=str(path),
        target=kind,
        engine=engine_name(kind),
        quant=quant,
        words=words,
        bits_per_weight=bits,
        bytes=sum(file.stat().st_size for _, file in files),
        identity=identity,
        model=model,
    )
    return EvaluatedModel(subject, lambda: open_as(kind, path))


def find_reference(artifact: Path, against: str = FP16, *, adapter: Path | None = None, progress: Progress | None = None) -> EvaluatedModel:
    """Find the reference to compare with: "fp16", the model that the manifest names, or the path of a checkpoint or artifact.

    The fp16 reference is the model's weights rounded to fp16, computed in float32, with the artifact's own context so that both shorten a
    long prompt alike. `adapter` is merged into it: the one that the artifact was exported with.

    Raises:
        ElmExportError: a model that the manifest does not say how to find, a download that failed, or another model than the artifact's.
    """
    kind = artifact_kind(artifact)
    manifest = Artifact.open(artifact).manifest if (artifact / MANIFEST).is_file() else None
    own = None if manifest is None else manifest.model.identity
    context = None if manifest is None else manifest.context
    if against == FP16 and kind == CHECKPOINT:  # the model itself
        against = str(artifact)
    if against != FP16:
        if artifact_kind(Path(against)) != CHECKPOINT:
            evaluated = evaluated_artifact(Path(against), progress)
        else:
            checkpoint = open_checkpoint(against, tokenizer=NO_TOKENIZER, adapter=adapter)
            evaluated = _evaluated_checkpoint(checkpoint, against, context, progress, rounded=True)
    elif manifest is None:
        raise ElmExportError(f"{artifact} has no {MANIFEST} that names the model it was made from; pass --against PATH, the model's folder")
    else:
        checkpoint = _named_checkpoint(artifact, manifest.model, adapter, progress)
        evaluated = fp16_reference(checkpoint, checkpoint.config.dims.context if context is None else context, progress)
    if kind == CHECKPOINT:
        own = open_checkpoint(str(artifact), tokenizer=NO_TOKENIZER).identity(progress)
    other = evaluated.subject.model
    if own is not None and other.identity is not None and own != other.identity:
        raise ElmExportError(
            f"{artifact} is of the model {own[:12]}…, {against} of {other.name}, {other.identity[:12]}…: "
            "not the same weights. Compare artifacts of one model, or pass the model it came from with --against PATH"
        )
    return evaluated


def fp16_reference(checkpoint: Checkpoint, context: int, progress: Progress | None = None) -> EvaluatedModel:
    """The model as the reference of its artifacts with a context of `context` tokens: weights rounded to fp16, computed in float32."""
    return _evaluated_checkpoint(checkpoint, "", context, progress, rounded=True)


def _named_checkpoint(artifact: Path, model: Model, adapter: Path | None, progress: Progress | None) -> Checkpoint:
    """The checkpoint that the manifest of `artifact` names, merged with `adapter` if it was exported with one."""
    source, _, merged = model.source.partition(WITH_ADAPTER)
    if merged and adapter is None:
        too = " and --against PATH, the base's folder or file" if source in ("local folder", "CoreNet checkpoint") else ""
        raise ElmExportError(
            f"{artifact} was exported with the adapter {merged}, whose place its {MANIFEST} does not record; pass --adapter PATH{too}, or --against none"
        )
    base = _named_base(artifact, model, source, progress)
    return open_adapter(adapter, base) if adapter is not None else base


def _named_base(artifact: Path, model: Model, source: str, progress: Progress | None) -> Checkpoint:
    if source == "embedded":
        embedded = [known for known in known_models() if known.folder is not None]
        return open_embedded(next((known for known in embedded if model.name.startswith(known.name)), embedded[0]), NO_TOKENIZER)
    if source.startswith("hub:"):
        return open_repository(source.removeprefix("hub:"), model.revision, NO_TOKENIZER, progress or SilentProgress())
    seed = re.fullmatch(r"random weights, seed (\d+)", source)
    if seed is not None:
        config = config_from_dict(model.config, where=str(artifact / MANIFEST))
        return RandomCheckpoint(config, model.name.removesuffix(f"-random{seed[1]}"), int(seed[1]))
    raise ElmExportError(
        f"{artifact} was exported from {model.name}, a {source}, whose place its {MANIFEST} does not record; pass --against PATH, the checkpoint's folder or file"
    )


def _evaluated_checkpoint(
    checkpoint: Checkpoint, path: str, context: int | None, progress: Progress | None = None, *, rounded: bool = False
) -> EvaluatedModel:
    """`rounded`: weights to fp16 first, which makes it the fp16 reference."""
    identity = checkpoint.identity(progress)
    context = checkpoint.config.dims.context if context is None else context
    words = "weights rounded to fp16, computed in float32" if rounded else "weights as stored, computed in float32"
    subject = Subject(
        label=f"{checkpoint.source.name} {FP16}" if rounded else checkpoint.source.name,
        path=path,
        target=CHECKPOINT,
        engine=engine_name(CHECKPOINT),
        quant="fp16 reference" if rounded else "none",
        words=words,
        bits_per_weight=16.0 if rounded else None,
        bytes=2 * checkpoint.config.parameter_count if rounded else None,
        identity=hashlib.sha256(f"{identity} {words} context {context}".encode()).hexdigest(),
        model=ModelFacts(checkpoint.source.name, identity),
    )

    def open_runtime() -> Runtime:
        import torch

        from elmexport.runtimes.torch import TorchRuntime

        return TorchRuntime(checkpoint, context=context, rounded_to=torch.float16 if rounded else None)

    return EvaluatedModel(subject, open_runtime)


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files that hold the model and what belongs to it, by name: without the manifest and the card, which describe them."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return [(name, file) for file in found if (name := file.relative_to(path).as_posix()) not in (MANIFEST, CARD)]
    # beside an .onnx lie its external data, model.onnx_data or model.onnx.data
    return [(file.name, file) for file in sorted(path.parent.iterdir()) if file.is_file() and file.name.startswith(path.name)]
