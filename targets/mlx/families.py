"""mlx-lm's model classes, by model family: what they take for granted, and where mlx-swift's differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import Role
from targets.mlx.swift import openelm_notes


@dataclass(frozen=True)
class Requirement:
    """Something that a class of mlx-lm takes for granted."""

    words: str  # what is wrong with a model without it
    met: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class ModelClass:
    """A family in mlx-lm. Its configuration is the family's own `config.json`, its modules go by the family's names."""

    requirements: tuple[Requirement, ...]
    tied_key: str  # of config.json
    eps_key: str  # of config.json: the eps of every norm
    swift_notes: Callable[[ModelConfig, float], tuple[str, ...]]  # of a model and its alpha: why mlx-swift cannot run it

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that the class cannot express.

        Raises:
            ElmExportError: what mlx-lm takes for granted and the model lacks.
        """
        refused = [requirement.words for requirement in self.requirements if not requirement.met(config)]
        if refused:
            raise ElmExportError(
                f"mlx-lm's {config.model_type} class cannot express this model: {'; '.join(refused)}. Export it to onnx instead"
            )


def _gated(config: ModelConfig) -> bool:
    return not any(spec.role is Role.FFN_UP for spec in config.weights())


# By model_type.
CLASSES: Mapping[str, ModelClass] = {
    "openelm": ModelClass(
        requirements=(Requirement("ffn_with_glu is false (the feed-forward network always has a gate)", _gated),),
        tied_key="share_input_output_layers",
        eps_key="rms_norm_eps",
        swift_notes=openelm_notes,
    ),
    "olmoe": ModelClass(
        requirements=(),
        tied_key="tie_word_embeddings",
        eps_key="rms_norm_eps",
        swift_notes=lambda config, alpha: (),
    ),
}


def model_class(config: ModelConfig) -> ModelClass:
    """Find mlx-lm's class for the family of `config`.

    Raises:
        ElmExportError: there is none that elmexport knows.
    """
    if config.model_type not in CLASSES:
        raise ElmExportError(
            f"mlx-lm has no class for {config.model_type!r} models that elmexport knows ({', '.join(CLASSES)}); export it to onnx instead"
        )
    return CLASSES[config.model_type]
