"""OLMoE configuration: the fields of a `config.json` that describe the network, checked. No torch in here: listing models must be instant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from elmexport.errors import ElmExportError
from elmexport.graph.dims import LayerDims, ModelDims
from elmexport.models.base import LARGEST_SIZE, LONGEST_CONTEXT, MOST_LAYERS, ModelConfig, check_positive, check_size
from elmexport.weights import Role, WeightSpec

if TYPE_CHECKING:
    from torch import nn

# A file without one of these is no OLMoE configuration, whatever defaults transformers' class has: those would be another model's.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok")

# Values that the module covers, of keys that would change the network. Absent keys have them by default.
COVERED: dict[str, Any] = {
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


MOST_EXPERTS = 1024


@dataclass(frozen=True)
class OlmoeConfig(ModelConfig):
    """The fields of a `config.json` that differ between models. Keys and values are separate matrices, as many heads as queries have or fewer."""

    model_type: ClassVar[str] = "olmoe"
    name_prefix: ClassVar[str] = "model."
    head_name: ClassVar[str] = "lm_head.weight"
    tied_key: ClassVar[str] = "tie_word_embeddings"

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = (50279,)  # `eos_token_id` of the file: a number, or a list
    pad_token_id: int | None = 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config.json") -> OlmoeConfig:
        """Read the known keys of `data` and check them; `rope_parameters` is what transformers 5 writes for `rope_theta` and `rope_scaling`.

        Raises:
            ElmExportError: sizes that are missing, an unusable value, or a model that the module does not cover.
        """
        missing = [key for key in SIZES if data.get(key) is None]
        if missing:
            raise ElmExportError(f"{where}: lacks {', '.join(missing)}; use the config.json of the published model")
        given = {**data, **_rope(data, where)}
        for key, covered in COVERED.items():
            if given.get(key, covered) != covered:
                raise ElmExportError(
                    f"{where}: {key} is {str(given[key])[:80]!r}; elmexport exports OLMoE models with {key} {covered!r} only"
                )
        known = {field.name for field in fields(cls)} - {"eos_token_ids"}
        values = {key: value for key, value in given.items() if key in known and value is not None}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values["pad_token_id"] = given.get("pad_token_id")
        eos = given.get("eos_token_id")
        if eos is not None:
            values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        config = cls(**values)
        config._check(where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of the published models, in its order (alphabetical)."""
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} | COVERED
        del data["eos_token_ids"]
        data["eos_token_id"] = self.eos_token_id if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)
        data["architectures"] = ["OlmoeForCausalLM"]
        data["model_type"] = self.model_type
        data["use_cache"] = True
        return dict(sorted(data.items()))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @cached_property
    def dims(self) -> ModelDims:
        heads = (self.num_attention_heads, self.num_key_value_heads)
        layer = LayerDims(*heads, self.intermediate_size, self.num_experts, self.num_experts_per_tok)
        return ModelDims(
            vocab_size=self.vocab_size,
            model_dim=self.hidden_size,
            head_dim=self.head_dim,
            layers=(layer,) * self.num_hidden_layers,
            context=self.max_position_embeddings,
            max_context=self.max_position_embeddings,
            tied=False,
        )

    def module(self) -> nn.Module:
        from elmexport.models.olmoe.module import Olmoe

        return Olmoe(self)

    def weights(self) -> Iterator[WeightSpec]:
        """Every tensor of the model under the names of the published files, in the order in which a forward pass first uses them."""
        dim, width = self.hidden_size, self.intermediate_size
        kv = self.num_key_value_heads * self.head_dim
        yield WeightSpec("model.embed_tokens.weight", (self.vocab_size, dim), Role.EMBEDDING)
        for i in range(self.num_hidden_layers):
            prefix = f"model.layers.{i}"
            yield WeightSpec(f"{prefix}.input_layernorm.weight", (dim,), Role.NORM_ATTENTION, i)
            yield WeightSpec(f"{prefix}.self_attn.q_proj.weight", (dim, dim), Role.ATTENTION_Q, i)
            yield WeightSpec(f"{prefix}.self_attn.q_norm.weight", (dim,), Role.NORM_QUERY, i)
            yield WeightSpec(f"{prefix}.self_attn.k_proj.weight", (kv, dim), Role.ATTENTION_K, i)
            yield WeightSpec(f"{prefix}.self_attn.k_norm.weight", (kv,), Role.NORM_KEY, i)
            yield WeightSpec(f"{prefix}.self_attn.v_proj.weight", (kv, dim), Role.ATTENTION_V, i)
            yield WeightSpec(f"{prefix}.self_attn.o_proj.weight", (dim, dim), Role.ATTENTION_OUT, i)
            yield WeightSpec(f"{prefix}.post_attention_layernorm.weight", (dim,), Role.NORM_FFN, i)
            yield WeightSpec(f"{prefix}.mlp.gate.weight", (self.num_experts, dim), Role.MOE_ROUTER, i)
            for e in range(self.num_experts):
                expert = f"{prefix}.mlp.experts.{e}"
                yield WeightSpec(f"{expert}.gate_proj.weight", (width, dim), Role.MOE_EXPERTS_GATE, i, e)
                yield WeightSpec(f"{expert}.up_proj.weight", (width, dim), Role.MOE_EXPERTS_UP, i, e)
                yield WeightSpec(f"{expert}.down_proj.weight", (dim, width), Role.MOE_EXPERTS_DOWN, i, e)
        yield WeightSpec("model.norm.weight", (dim,), Role.NORM_FINAL)
        yield WeightSpec(self.head_name, (self.vocab_size, dim), Role.LM_HEAD)

    def _check(self, where: str) -> None:
        for key in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
            largest = {"num_hidden_layers": MOST_LAYERS, "max_position_embeddings": LONGEST_CONTEXT, "num_experts": MOST_EXPERTS}
            check_size(getattr(self, key), key, where, largest.get(key, LARGEST_SIZE))
        for key in ("rms_norm_eps", "rope_theta"):
            check_positive(getattr(self, key), key, where)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ElmExportError(
                f"{where}: hidden_size is {self.hidden_size}, num_attention_heads {self.num_attention_heads}; heads must divide it into even numbers, "
                "which rotary embeddings need"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ElmExportError(
                f"{where}: num_key_value_heads is {self.num_key_value_heads}; it must divide num_attention_heads, {self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ElmExportError(
                f"{where}: num_experts_per_tok is {self.num_experts_per_tok}, of {self.num_experts} experts; it must not exceed them"
            )
        if not self.eos_token_ids:
            raise ElmExportError(f"{where}: eos_token_id is an empty list; name the token that ends a text")
        ids = [("eos_token_id", value) for value in self.eos_token_ids]
        ids += [(key, value) for key in ("bos_token_id", "pad_token_id") if (value := getattr(self, key)) is not None]
        for key, value in ids:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.vocab_size:
                raise ElmExportError(f"{where}: {key} is {value!r}; it must lie in 0..{self.vocab_size - 1}")


def _rope(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` out of `rope_parameters`, where the file has that."""
    found = data.get("rope_parameters")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ElmExportError(f"{where}: rope_parameters is {str(found)[:80]!r}; it must be an object with rope_type and rope_theta")
    plain = found.get("rope_type", "default") == "default"
    theta = {} if found.get("rope_theta") is None else {"rope_theta": found["rope_theta"]}
    return theta | {"rope_scaling": None if plain else dict(found)}
