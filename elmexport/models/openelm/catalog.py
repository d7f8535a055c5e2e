"""The OpenELM models that `elmexport` knows by name: Apple's eight published ones and the embedded `tiny`.

Configurations are data here, so that listing models and exporting random weights need neither a download nor torch.
"""

from __future__ import annotations

from pathlib import Path

from elmexport.models.base import KnownModel
from elmexport.models.openelm.config import OpenELMConfig

TINY_FOLDER = Path(__file__).parent / "tiny"


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


def known_models() -> tuple[KnownModel, ...]:
    """`tiny`, then the published models by size, each base model before its Instruct version."""
    models = [KnownModel("tiny", "OpenELM-tiny", None, _TINY, TINY_FOLDER, "apache-2.0")]
    for size, config in _SIZES.items():
        for suffix in ("", "-Instruct"):
            name = f"OpenELM-{size.replace('.', '_')}{suffix}"
            models.append(KnownModel(size + suffix, name, f"apple/{name}", config, license="apple-sample-code-license"))
    return tuple(models)
