"""The models that `elmexport` knows by name: Apple's eight published ones and the embedded `tiny`.

Configurations are data here, so that listing models and exporting random weights need neither a download nor torch. Weights are found by
`elmexport.checkpoint`; other checkpoints of the architecture work by hub id or folder and need no entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elmexport.models.openelm_config import OpenELMConfig

TINY_FOLDER = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class KnownModel:
    """A model that `--model` takes by alias."""

    alias: str  # "1.1B-Instruct", as `elmexport models` prints it
    name: str  # display name, used in file names: "OpenELM-1_1B-Instruct"
    hub_id: str | None  # "apple/OpenELM-1_1B-Instruct", None for the embedded one
    config: OpenELMConfig

    @property
    def parameters(self) -> int:
        """Number of parameters, the tied embedding counted once."""
        return self.config.parameter_count

    def cached(self) -> bool:
        """Whether the weights lie on this machine already. Looks at the hub's cache folder only; no network."""
        if self.hub_id is None:
            return True
        from elmexport.checkpoint.hub import cached_weights

        return cached_weights(self.hub_id)


def _published(layers: int, model_dim: int, head_dim: int) -> OpenELMConfig:
    """What the four sizes have in common; the Instruct models have the configuration of their base."""
    return OpenELMConfig(
        num_transformer_layers=layers,
        model_dim=model_dim,
        head_dim=head_dim,
        num_gqa_groups=4,
        qkv_multipliers=(0.5, 1.0),
        ffn_multipliers=(0.5, 4.0),
        normalize_qk_projections=True,
        share_input_output_layers=True,
    )


_SIZES = {
    "270M": _published(16, 1280, 64),
    "450M": _published(20, 1536, 64),
    "1.1B": _published(28, 2048, 64),
    "3B": _published(36, 3072, 128),
}
_TINY = OpenELMConfig(
    vocab_size=4096,
    max_context_length=256,
    num_transformer_layers=6,
    model_dim=256,
    head_dim=32,
    num_gqa_groups=4,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 4.0),
    normalize_qk_projections=True,
    share_input_output_layers=True,
    rope_max_length=512,
)


def known_models() -> list[KnownModel]:
    """`tiny`, then the published models by size, each base model before its Instruct version."""
    models = [KnownModel("tiny", "OpenELM-tiny", None, _TINY)]
    for size, config in _SIZES.items():
        for suffix in ("", "-Instruct"):
            name = f"OpenELM-{size.replace('.', '_')}{suffix}"
            models.append(KnownModel(size + suffix, name, f"apple/{name}", config))
    return models


def find_model(alias: str) -> KnownModel | None:
    """The model that `alias` names, by any spelling: `1.1B`, `1_1b`, `OpenELM-1_1B` or `apple/OpenELM-1_1B`; None where there is none."""
    wanted = _normal(alias)
    return next((model for model in known_models() if _normal(model.alias) == wanted), None)


def _normal(alias: str) -> str:
    return alias.casefold().replace("_", ".").removeprefix("apple/").removeprefix("openelm-")
