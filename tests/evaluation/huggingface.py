"""OpenELM as an ordinary Hugging Face model, written from its architecture alone, for lm-eval's own Hugging Face backend.

Nothing of `elmexport` is used here but the stored tensors: plain torch, no cache, float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ReferenceConfig(PretrainedConfig):
    model_type = "openelm-reference"

    def __init__(self, max_position_embeddings: int = 256, bos_token_id: int = 1, eos_token_id: int = 2, **kwargs: Any) -> None:
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 0  # of the cache that `generate` makes, which this model leaves empty


class ReferenceModel(PreTrainedModel, GenerationMixin):
    config_class = ReferenceConfig

    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / "config.json").read_text())
        super().__init__(ReferenceConfig(self.facts["max_context_length"]))
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # a model without parameters has no device
        self.post_init()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}  # the whole text every time: there is no cache

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        facts, weights = self.facts, self.weights
        x = weights["transformer.token_embeddings.weight"][input_ids]
        length, head_dim = input_ids.shape[1], facts["head_dim"]
        frequencies = 1.0 / facts["rope_freq_constant"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        for layer in range(facts["num_transformer_layers"]):
            x = x + self._attention(x, f"transformer.layers.{layer}.", layer, angles)
            x = x + self._feed_forward(x, f"transformer.layers.{layer}.")
        x = _norm(x, weights["transformer.norm.weight"])
        return CausalLMOutput(logits=x @ weights["transformer.token_embeddings.weight"].T)

    def _attention(self, x: torch.Tensor, prefix: str, layer: int, angles: torch.Tensor) -> torch.Tensor:
        weights, head_dim = self.weights, self.facts["head_dim"]
        heads, groups = self.facts["num_query_heads"][layer], self.facts["num_kv_heads"][layer]
        qkv = _norm(x, weights[prefix + "attn_norm.weight"]) @ weights[prefix + "attn.qkv_proj.weight"].T
        qkv = qkv.view(*x.shape[:2], heads + 2 * groups, head_dim).transpose(1, 2)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        q = _rotate(_norm(q, weights[prefix + "attn.q_norm.weight"]), angles)
        k = _rotate(_norm(k, weights[prefix + "attn.k_norm.weight"]), angles)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2) @ weights[prefix + "attn.out_proj.weight"].T

    def _feed_forward(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        weights = self.weights
        gate, up = (_norm(x, weights[prefix + "ffn_norm.weight"]) @ weights[prefix + "ffn.proj_1.weight"].T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ weights[prefix + "ffn.proj_2.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return x * angles.cos() + half * angles.sin()
