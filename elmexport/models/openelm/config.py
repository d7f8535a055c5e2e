"""OpenELM configuration: every field of Apple's `config.json`, and the per-layer dimensions that follow from it.

Layer-wise scaling gives each layer its own number of query heads, KV heads and its own FFN width. They are computed here, once, as
Apple's configuration class computes them (`configuration_openelm.py` of the published models), and checked against the lists that a
checkpoint's file carries. No torch in here: listing models must be instant.
"""

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

RMS_NORM_EPS = 1e-6  # a constant of Apple's OpenELMRMSNorm, not a field of the file
ACTIVATIONS = ("swish", "silu")

# A file without one of the first three is no OpenELM configuration, whatever defaults Apple's class has: those would be another model's.
NEEDED = ("num_transformer_layers", "model_dim", "head_dim")
SIZES = (*NEEDED, "num_gqa_groups", "qkv_multipliers", "ffn_multipliers", "vocab_size")

LARGEST_MULTIPLIER = 1000
Multipliers = float | tuple[float, ...]


def make_divisible(value: float, divisor: int) -> int:
    """Round `value` to the nearest multiple of `divisor`, never below `divisor` nor more than 10 % below `value`.

    The rounding of MobileNet's reference code, which Apple's class uses.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class OpenELMConfig(ModelConfig):
    """The fields of Apple's `config.json` that describe the network, with the defaults of Apple's class.

    `qkv_multipliers` and `ffn_multipliers` are a number (every layer alike), two numbers (interpolated linearly over the layers and
    rounded to two decimals) or one number per layer.
    """

    model_type: ClassVar[str] = "openelm"
    name_prefix: ClassVar[str] = "transformer."
    head_name: ClassVar[str] = "lm_head.weight"
    tied_key: ClassVar[str] = "share_input_output_layers"

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    qkv_multipliers: Multipliers = 1.0
    num_gqa_groups: int = 1
    ffn_multipliers: Multipliers = 4.0
    ffn_with_glu: bool = True
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = False
    share_input_output_layers: bool = False
    rope_freq_constant: float = 10000
    rope_max_length: int = 4096
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)  # `eos_token_id` of the file: a number, or a list

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config.json") -> OpenELMConfig:
        """Read the known keys of `data`, check them, and check the per-layer lists it may carry.

        Raises:
            ElmExportError: sizes that are missing, an unusable value, or per-layer lists that contradict the multipliers.
        """
        known = {field.name for field in fields(cls)} - {"eos_token_ids"}
        values = {key: value for key, value in data.items() if key in known and value is not None}
        if any(key not in values for key in NEEDED):
            missing = [key for key in SIZES if key not in values]
            named = data.get("model_name")  # what CoreNet's conversion to MLX writes instead
            model = f", that of {named[:80]}" if isinstance(named, str) else ""
            raise ElmExportError(
                f"{where}: lacks {', '.join(missing)}; use the config.json of the published model{model}, or that of the training code"
            )
        if "bos_token_id" in data:
            values["bos_token_id"] = data["bos_token_id"]
        eos = data.get("eos_token_id")
        if eos is not None:
            values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        for key in ("qkv_multipliers", "ffn_multipliers"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        config = cls(**values)
        config._check(where)
        config._check_lists(data, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Apple's `config.json`, per-layer lists expanded, in the order of the published files (alphabetical)."""
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        data["ffn_multipliers"] = list(self._per_layer(self.ffn_multipliers, "ffn_multipliers"))
        if isinstance(self.qkv_multipliers, tuple):
            data["qkv_multipliers"] = list(self.qkv_multipliers)
        del data["eos_token_ids"]
        data["eos_token_id"] = self.eos_token_id if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)
        data["num_query_heads"] = [layer.query_heads for layer in self.layers]
        data["num_kv_heads"] = [layer.kv_heads for layer in self.layers]
        data["architectures"] = ["OpenELMForCausalLM"]
        data["model_type"] = self.model_type
        data["use_cache"] = True
        return dict(sorted(data.items()))

    @cached_property
    def layers(self) -> tuple[LayerDims, ...]:
        """Sizes of every layer, as Apple's class derives them from the multipliers."""
        head_multiple = self.head_dim * self.num_gqa_groups
        query_dims = [make_divisible(self.model_dim * m, head_multiple) for m in self._per_layer(self.qkv_multipliers, "qkv_multipliers")]
        ffn_dims = [
            make_divisible(self.model_dim * m, self.ffn_dim_divisor) for m in self._per_layer(self.ffn_multipliers, "ffn_multipliers")
        ]
        heads = [dim // self.head_dim for dim in query_dims]
        return tuple(LayerDims(q, q // self.num_gqa_groups, f) for q, f in zip(heads, ffn_dims, strict=True))

    @cached_property
    def dims(self) -> ModelDims:
        return ModelDims(
            vocab_size=self.vocab_size,
            model_dim=self.model_dim,
            head_dim=self.head_dim,
            layers=self.layers,
            context=self.max_context_length,
            max_context=self.rope_max_length,
            tied=self.share_input_output_layers,
        )

    def module(self) -> nn.Module:
        from elmexport.models.openelm.module import OpenELM

        return OpenELM(self)

    def weights(self) -> Iterator[WeightSpec]:
        """Every tensor of the model under Apple's names, in the order in which a forward pass first uses them."""
        dim = self.model_dim
        yield WeightSpec("transformer.token_embeddings.weight", (self.vocab_size, dim), Role.EMBEDDING)
        for i, layer in enumerate(self.layers):
            prefix = f"transformer.layers.{i}"
            query = layer.query_heads * self.head_dim
            qkv = (layer.query_heads + 2 * layer.kv_heads) * self.head_dim
            up, up_role = (2 * layer.ffn_dim, Role.FFN_GATE_UP) if self.ffn_with_glu else (layer.ffn_dim, Role.FFN_UP)
            yield WeightSpec(f"{prefix}.attn_norm.weight", (dim,), Role.NORM_ATTENTION, i)
            yield WeightSpec(f"{prefix}.attn.qkv_proj.weight", (qkv, dim), Role.ATTENTION_QKV, i)
            if self.normalize_qk_projections:
                yield WeightSpec(f"{prefix}.attn.q_norm.weight", (self.head_dim,), Role.NORM_QUERY, i)
                yield WeightSpec(f"{prefix}.attn.k_norm.weight", (self.head_dim,), Role.NORM_KEY, i)
            yield WeightSpec(f"{prefix}.attn.out_proj.weight", (dim, query), Role.ATTENTION_OUT, i)
            yield WeightSpec(f"{prefix}.ffn_norm.weight", (dim,), Role.NORM_FFN, i)
            yield WeightSpec(f"{prefix}.ffn.proj_1.weight", (up, dim), up_role, i)
            yield WeightSpec(f"{prefix}.ffn.proj_2.weight", (dim, layer.ffn_dim), Role.FFN_DOWN, i)
        yield WeightSpec("transformer.norm.weight", (dim,), Role.NORM_FINAL)
        if not self.share_input_output_layers:
            yield WeightSpec(self.head_name, (self.vocab_size, dim), Role.LM_HEAD)

    def _per_layer(self, multipliers: Multipliers, name: str) -> tuple[float, ...]:
        count = self.num_transformer_layers
        if not isinstance(multipliers, tuple):
            return (multipliers,) * count
        if len(multipliers) == 2:
            first, last = multipliers
            # numpy.linspace's own arithmetic (start + i * step, the end point exact), so that the rounding falls as Apple's does.
            step = (last - first) / (count - 1) if count > 1 else 0.0
            points = [first + i * step for i in range(count)]
            if count > 1:
                points[-1] = last
            return tuple(round(point, 2) for point in points)
        if len(multipliers) == count:
            return multipliers
        raise ElmExportError(
            f"{name} has {len(multipliers)} entries; allowed: one number, two numbers to interpolate between, or one for each of the {count} layers"
        )

    def _check(self, where: str) -> None:
        for key in (
            "vocab_size",
            "max_context_length",
            "num_transformer_layers",
            "model_dim",
            "head_dim",
            "num_gqa_groups",
            "ffn_dim_divisor",
            "rope_max_length",
        ):
            largest = {"num_transformer_layers": MOST_LAYERS, "max_context_length": LONGEST_CONTEXT, "rope_max_length": LONGEST_CONTEXT}
            check_size(getattr(self, key), key, where, largest.get(key, LARGEST_SIZE))
        for key in ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"):
            if not isinstance(getattr(self, key), bool):
                raise ElmExportError(f"{where}: {key} is {getattr(self, key)!r}; it must be true or false")
        for key in ("qkv_multipliers", "ffn_multipliers"):
            value = getattr(self, key)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number <= LARGEST_MULTIPLIER:
                    raise ElmExportError(f"{where}: {key} holds {number!r}; multipliers are numbers above 0, up to {LARGEST_MULTIPLIER}")
            self._per_layer(value, key)
        check_positive(self.rope_freq_constant, "rope_freq_constant", where)
        if not isinstance(self.initializer_range, int | float):
            raise ElmExportError(f"{where}: initializer_range is {self.initializer_range!r}; it must be a number")
        if self.head_dim % 2:
            raise ElmExportError(f"{where}: head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.activation_fn_name not in ACTIVATIONS:
            raise ElmExportError(
                f"{where}: activation_fn_name is {self.activation_fn_name!r}; elmexport supports {' and '.join(ACTIVATIONS)} (the same function)"
            )
        if self.normalization_layer_name != "rms_norm":
            raise ElmExportError(f"{where}: normalization_layer_name is {self.normalization_layer_name!r}; elmexport supports 'rms_norm'")
        if not self.eos_token_ids:
            raise ElmExportError(f"{where}: eos_token_id is an empty list; name the token that ends a text")
        ids = [("eos_token_id", value) for value in self.eos_token_ids]
        for key, value in [("bos_token_id", self.bos_token_id), *ids] if self.bos_token_id is not None else ids:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.vocab_size:
                raise ElmExportError(f"{where}: {key} is {value!r}; it must lie in 0..{self.vocab_size - 1}")

    def _check_lists(self, data: Mapping[str, Any], where: str) -> None:
        computed = {
            "num_query_heads": [layer.query_heads for layer in self.layers],
            "num_kv_heads": [layer.kv_heads for layer in self.layers],
        }
        for key, expected in computed.items():
            stated = data.get(key)
            if not isinstance(stated, list):
                continue
            if len(stated) != len(expected):
                raise ElmExportError(
                    f"{where}: {key} lists {len(stated)} layers, num_transformer_layers says {len(expected)}; one of them is wrong"
                )
            for i, (found, want) in enumerate(zip(stated, expected, strict=True)):
                if found != want:
                    raise ElmExportError(
                        f"{where}: {key}[{i}] is {found!r}, but layer {i} has {want} by qkv_multipliers={str(self.qkv_multipliers)[:120]}, "
                        f"model_dim={self.model_dim}, head_dim={self.head_dim}, num_gqa_groups={self.num_gqa_groups}; correct the list or the multipliers"
                    )
