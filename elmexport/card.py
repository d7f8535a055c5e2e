"""Model card of an artifact, `README.md` with the metadata that the Hugging Face hub reads: what it is, how to run it, what it cost.

Same inputs give the same card: nothing here records a time or a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from elmexport.files import write_text
from elmexport.manifest import Manifest, SelfCheck
from elmexport.models import known_models
from elmexport.models.base import KnownModel
from elmexport.target import Usage, find_target

CARD = "README.md"
_HUB = "hub:"  # before the repository, in a manifest's source
_FREE = ("apache-2.0", "mit")  # licences that the hub knows by these names


def write_card(folder: Path, manifest: Manifest, results: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the card of an artifact whose files lie in `folder`.

    `results` are the hub's entries of figures that were measured beside the self-check's.

    Raises:
        ElmExportError: the file cannot be written.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    usage = find_target(manifest.target).usage(files)
    write_text(folder / CARD, model_card(manifest, usage, results))


def model_card(manifest: Manifest, usage: Sequence[Usage], results: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of a card. `usage`: how programs run the artifact."""
    metadata = yaml.safe_dump(_metadata(manifest, results), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{metadata}---\n\n" + "\n\n".join(_paragraphs(manifest, usage)) + "\n"


def _metadata(manifest: Manifest, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known, base = _known(manifest), _base(manifest)
    found: dict[str, Any] = {}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "quantized"}
    found["library_name"] = manifest.target
    if known is not None and known.license is not None:
        if known.license in _FREE:
            found["license"] = known.license
        else:
            found |= {"license": "other", "license_name": known.license, "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"}
    found |= {"pipeline_tag": "text-generation", "tags": ["elmexport", manifest.target, manifest.quant.name]}
    measured = [*_self_check_results(manifest.self_check), *results]
    if measured:
        found["model-index"] = [{"name": f"{manifest.model.name}-{manifest.target}-{manifest.quant.name}", "results": measured}]
    return found


def _self_check_results(check: SelfCheck) -> list[dict[str, Any]]:
    if not check.done:
        return []
    return [
        hub_result(
            "the model's own distributions",
            [
                ("kl_divergence", "KL divergence from the model, nats per token", check.kl_mean),
                ("top1_agreement", "Tokens whose most likely prediction is the model's", check.top1_agreement),
            ],
        )
    ]


def hub_result(dataset: str, metrics: Sequence[tuple[str, str, float | None]]) -> dict[str, Any]:
    """One entry of a card's `model-index`: figures (type, name, value) on a data set."""
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": dataset.replace(" ", "-").replace("'", "")},
        "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in metrics],
    }


def _paragraphs(manifest: Manifest, usage: Sequence[Usage]) -> list[str]:
    model, quant, base = manifest.model, manifest.quant, _base(manifest)
    title = f"# {model.name}, {quant.name}, as {manifest.target}"
    origin = f"[{base}](https://huggingface.co/{base})" if base is not None else f"{model.name} ({model.source})"
    words = quant.words[0].upper() + quant.words[1:]
    facts = (
        f"{origin}, exported by elmexport. {words}: {manifest.bits_per_weight:.2f} bits per weight. Context: {manifest.context:,} tokens."
    )
    if quant.calibration is not None:
        facts += f" Codes were found by `{quant.method}` on {quant.calibration.text}."
    parts = [title, facts, "## What it cost", _cost(manifest.self_check), "## How to run it"]
    parts.append('elmexport, on any machine:\n\n```bash\nelmexport generate . "Once upon a time"\nelmexport eval .\n```')
    parts += [f"{one.program}:\n\n```{one.language}\n{one.code}\n```" for one in usage]
    parts += ["## Licence", _licence(_known(manifest), base)]
    return parts


def _cost(check: SelfCheck) -> str:
    if not check.done:
        return f"Not measured at the export: {check.reason}. `elmexport eval .` measures it."
    return (
        f"Measured on this artifact, in the engine that runs it, on {check.tokens} tokens of {check.text}: mean KL divergence from the model "
        f"{check.kl_mean:.4g} nats per token, the same most likely token at {check.top1_agreement:.1%}. `elmexport eval .` measures accuracy and perplexity. "
        "`manifest.json` has the recipe, and the hash of every file."
    )


def _licence(known: KnownModel | None, base: str | None) -> str:
    whose = "the model that it was made from" if base is None else base
    if known is None or known.license is None:
        return f"The weights are under the licence of {whose}."
    return f"The weights are under the licence of {whose}: {known.license}."


def _known(manifest: Manifest) -> KnownModel | None:
    """The known model that the artifact was made from: by the hub's name, or the embedded one; a name alone may be anybody's."""
    source = manifest.model.source
    if source == "embedded":
        return next((model for model in known_models() if model.folder is not None and model.name == manifest.model.name), None)
    return next((model for model in known_models() if model.hub_id is not None and source == f"{_HUB}{model.hub_id}"), None)


def _base(manifest: Manifest) -> str | None:
    source = manifest.model.source
    return source.removeprefix(_HUB) if source.startswith(_HUB) and " " not in source else None
