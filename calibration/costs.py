"""Cache of sensitivities: measured once for a model, two texts and a choice of schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from calibration.sensitivity import KLEvaluator, Sensitivity, sensitivities
from calibration.statistics import Statistics
from calibration.text import Sample
from elmexport import __version__
from elmexport.cache import cached_path, keep_document
from elmexport.checkpoint.base import Checkpoint
from elmexport.documents import decode_json
from elmexport.progress import Progress
from elmexport.quantization.schemes import CodedScheme, find_scheme

FORMAT = 2  # of the files; raised when the same measurement would give other figures


def known_sensitivities(
    checkpoint: Checkpoint,
    candidates: Mapping[str, Sequence[CodedScheme]],
    weighting: Sample,
    weigh: Callable[[], Statistics],
    sample: Sample,
    evaluator: KLEvaluator,
    progress: Progress,
) -> list[Sensitivity]:
    """Measure `sensitivities`, or take them out of the cache if they have been measured before.

    Errors are weighted by what `weigh` measures on `weighting`; `evaluator` reads `sample`.

    Raises:
        ElmExportError: the cache cannot be written.
    """
    names = {name: [scheme.recipe_name for scheme in schemes] for name, schemes in candidates.items()}
    key = [FORMAT, __version__, checkpoint.identity(), weighting.sha256, sample.sha256, names]
    path = cached_path("sensitivities", key, ".json")
    known = _read(path, checkpoint, names)
    if known is not None:
        return known
    found = sensitivities(checkpoint, candidates, weigh(), evaluator, progress)
    keep_document(path, {item.spec.name: {scheme.recipe_name: kl for scheme, kl in item.kl.items()} for item in found})
    return found


def _read(path: Path, checkpoint: Checkpoint, names: Mapping[str, Sequence[str]]) -> list[Sensitivity] | None:
    """What lies in `path`; None where there is nothing, or not what was asked for: then it is measured again."""
    try:
        document = decode_json(path.read_bytes())
        kinds: dict[str, dict[CodedScheme, float]] = {}
        for name, wanted in names.items():
            kinds[name] = {}
            for label in wanted:
                scheme = find_scheme(label)
                assert isinstance(scheme, CodedScheme)
                kinds[name][scheme] = float(document[name][label])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [Sensitivity(spec, kinds[spec.name]) for spec in checkpoint.specs.values() if spec.name in kinds]
