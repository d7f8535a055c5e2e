"""llama.cpp's architectures by model family: names, what their loaders take for granted, and the tensors that each role becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import Role


@dataclass(frozen=True)
class Requirement:
    """Something that llama.cpp's loader of an architecture takes for granted."""

    words: str  # what is wrong with a model without it: "normalize_qk_projections is false (queries and keys always pass a norm)"
    met: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp.

    `tensors`: by role, the names without block and ".weight"; a weight's rows are dealt to several in equal parts, and what every expert has is
    stacked. `sizes_by_layer`: heads and widths are stated for each layer, and the size of heads.
    """

    name: str  # of the metadata: general.architecture
    tensors: Mapping[Role, tuple[str, ...]]
    requirements: tuple[Requirement, ...] = ()
    sizes_by_layer: bool = False

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that the architecture cannot express.

        Raises:
            ElmExportError: what llama.cpp takes for granted and the model lacks.
        """
        refused = [requirement.words for requirement in self.requirements if not requirement.met(config)]
        if refused:
            raise ElmExportError(
                f"llama.cpp's {self.name} architecture cannot express this model: {'; '.join(refused)}. Export it to onnx instead"
            )


def _has(role: Role) -> Callable[[ModelConfig], bool]:
    """Whether every layer has a weight of `role`."""
    return lambda config: sum(spec.role is role for spec in config.weights()) == len(config.dims.layers)


# By model_type. The order of the requirements is that of the message.
ARCHITECTURES: Mapping[str, Architecture] = {
    "openelm": Architecture(
        name="openelm",
        tensors={
            Role.EMBEDDING: ("token_embd",),
            Role.ATTENTION_QKV: ("attn_qkv",),
            Role.ATTENTION_OUT: ("attn_output",),
            Role.FFN_GATE_UP: ("ffn_gate", "ffn_up"),  # the gate is the first half
            Role.FFN_DOWN: ("ffn_down",),
            Role.NORM_ATTENTION: ("attn_norm",),
            Role.NORM_FFN: ("ffn_norm",),
            Role.NORM_QUERY: ("attn_q_norm",),
            Role.NORM_KEY: ("attn_k_norm",),
            Role.NORM_FINAL: ("output_norm",),
        },
        requirements=(
            Requirement(
                "share_input_output_layers is false (the output head is always the embedding table)", lambda config: config.dims.tied
            ),
            Requirement("normalize_qk_projections is false (queries and keys always pass a norm)", _has(Role.NORM_QUERY)),
            Requirement("ffn_with_glu is false (the feed-forward network always has a gate)", _has(Role.FFN_GATE_UP)),
        ),
        sizes_by_layer=True,
    ),
    "olmoe": Architecture(
        name="olmoe",
        tensors={
            Role.EMBEDDING: ("token_embd",),
            Role.ATTENTION_Q: ("attn_q",),
            Role.ATTENTION_K: ("attn_k",),
            Role.ATTENTION_V: ("attn_v",),
            Role.ATTENTION_OUT: ("attn_output",),
            Role.MOE_ROUTER: ("ffn_gate_inp",),
            Role.MOE_EXPERTS_GATE: ("ffn_gate_exps",),
            Role.MOE_EXPERTS_UP: ("ffn_up_exps",),
            Role.MOE_EXPERTS_DOWN: ("ffn_down_exps",),
            Role.NORM_ATTENTION: ("attn_norm",),
            Role.NORM_FFN: ("ffn_norm",),
            Role.NORM_QUERY: ("attn_q_norm",),
            Role.NORM_KEY: ("attn_k_norm",),
            Role.NORM_FINAL: ("output_norm",),
            Role.LM_HEAD: ("output",),
        },
        requirements=(
            Requirement(
                "num_key_value_heads is not num_attention_heads (keys are normed over as many numbers as queries)",
                lambda config: all(layer.kv_heads == layer.query_heads for layer in config.dims.layers),
            ),
        ),
    ),
}


def architecture(config: ModelConfig) -> Architecture:
    """llama.cpp's architecture for the family of `config`.

    Raises:
        ElmExportError: there is none.
    """
    if config.model_type not in ARCHITECTURES:
        raise ElmExportError(
            f"llama.cpp has no architecture for {config.model_type!r} models that elmexport knows ({', '.join(ARCHITECTURES)}); export it to onnx instead"
        )
    return ARCHITECTURES[config.model_type]
