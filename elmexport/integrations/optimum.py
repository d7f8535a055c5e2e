"""OpenELM for optimum: importing this module makes `ORTModelForCausalLM`'s machinery and `AutoConfig` know the model.

    from elmexport.integrations.optimum import ORTOpenELMForCausalLM
    model = ORTOpenELMForCausalLM.from_pretrained("OpenELM-450M-onnx-int4")

optimum derives one shape for the empty cache of all layers from the configuration; OpenELM's layers differ, so the shapes are read off the
session instead. Needs `optimum-onnx` (0.1.0 at the time of writing, which needs transformers < 4.58).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class OpenELMConfig(PretrainedConfig):  # type: ignore[misc]
    """Apple's `config.json`, under the names that generation looks for as well."""

    model_type = "openelm"
    attribute_map = {  # noqa: RUF012  (transformers declares it so)
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }

    @property
    def num_attention_heads(self) -> int:
        """Largest number of heads of a layer; only the shapes of a cache that is never used are made from it."""
        return max(self.num_query_heads)


AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)


class ORTOpenELMForCausalLM(ORTModelForCausalLM):  # type: ignore[misc]
    """An exported folder in optimum, `generate` and all."""

    @classmethod
    def from_pretrained(cls, model_id: str | Path, **options: Any) -> ORTOpenELMForCausalLM:
        """Open an artifact folder; `options` as `ORTModelForCausalLM.from_pretrained` takes them."""
        found = sorted(Path(model_id).glob("onnx/*.onnx"))
        if len(found) == 1:
            options.setdefault("file_name", found[0].name)
        # Bound outputs are allocated for one shape of all layers, too.
        return super().from_pretrained(model_id, **{"subfolder": "onnx", "use_io_binding": False, **options})

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        if past_key_values is None:
            empty = [self._empty(name, len(input_ids)) for name in self.key_value_input_names]
            past_key_values = tuple(zip(empty[0::2], empty[1::2], strict=True))  # a key and a value for each layer
        return super().forward(input_ids, attention_mask, past_key_values, use_cache=use_cache, **inputs)

    def _empty(self, name: str, batch: int) -> torch.Tensor:
        _, heads, _, head_dim = self.input_shapes[name]
        return torch.zeros((batch, heads, 0, head_dim), dtype=_DTYPES[self.input_dtypes[name]])
