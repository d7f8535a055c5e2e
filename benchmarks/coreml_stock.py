"""The stock route to a Core ML package: OpenELM as a plain stateful PyTorch module, torch.jit.trace, `ct.convert`, `linear_quantize_weights`.

What coremltools' guide to stateful models and Apple's article on Llama 3.1 do, with the functions that our package has: `prefill` and
`decode`, fixed numbers of tokens, converted, quantized and saved one by one, then merged with `save_multifunction`. Nothing of elmexport
takes part but the configuration and the weights.

    python benchmarks/coreml_stock.py MODEL --out PACKAGE [--seed 0] [--prefill 64]

coremltools 9.0's torch frontend fails on numpy 2.4 where a size is read off a traced tensor (`aten::Int` of a constant of one element):
sizes here are Python numbers, which a trace stores as they are. coremltools itself is not changed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from elmexport.checkpoint.base import Checkpoint
    from elmexport.graph.dims import LayerDims
    from elmexport.models.openelm.config import OpenELMConfig

BLOCK = 32


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, config: OpenELMConfig, layer: LayerDims, first: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = layer.query_heads, layer.kv_heads, config.head_dim
        self.first, self.tokens = first, tokens
        self.qkv_proj = nn.Linear(config.model_dim, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out_proj = nn.Linear(self.heads * self.size, config.model_dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.size), RMSNorm(self.size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, begin: Tensor, end: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        qkv = self.qkv_proj(x).view(1, self.tokens, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        last = self.first + self.kv_heads
        keys[:, self.first : last, begin:end] = k
        values[:, self.first : last, begin:end] = v
        k, v = (self.repeat(cache[:, self.first : last]) for cache in (keys, values))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).reshape(1, self.tokens, self.heads * self.size))

    def repeat(self, x: Tensor) -> Tensor:
        """One KV head for each query head."""
        context, groups = x.shape[2], self.heads // self.kv_heads
        x = x[:, :, None].expand(1, self.kv_heads, groups, context, self.size)
        return x.reshape(1, self.heads, context, self.size)


class FeedForward(nn.Module):
    def __init__(self, config: OpenELMConfig, layer: LayerDims) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(config.model_dim, 2 * layer.ffn_dim, bias=False)
        self.proj_2 = nn.Linear(layer.ffn_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: OpenELMConfig, layer: LayerDims, first: int, tokens: int) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(config, layer, first, tokens), FeedForward(config, layer)
        self.attn_norm, self.ffn_norm = RMSNorm(config.model_dim), RMSNorm(config.model_dim)


class Decoder(nn.Module):
    def __init__(self, config: OpenELMConfig, tokens: int) -> None:
        super().__init__()
        firsts = [sum(layer.kv_heads for layer in config.layers[:i]) for i in range(len(config.layers))]
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Layer(config, layer, first, tokens) for layer, first in zip(config.layers, firsts, strict=True))
        self.norm = RMSNorm(config.model_dim)


class StatefulOpenELM(nn.Module):
    """`forward(ids [1, tokens], position [1])` gives logits `[1, tokens, vocab]` and updates the buffers `keyCache` and `valueCache`.

    Parameters carry Apple's names; the head is tied to the embedding.
    """

    def __init__(self, config: OpenELMConfig, tokens: int, context: int) -> None:
        super().__init__()
        self.config, self.tokens, self.context = config, tokens, context
        self.transformer = Decoder(config, tokens)
        angles = torch.outer(
            torch.arange(context).float(),
            float(config.rope_freq_constant) ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim),
        )
        cache = torch.zeros(1, sum(layer.kv_heads for layer in config.layers), context, config.head_dim)
        self.register_buffer("cos", torch.cat([angles, angles], 1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], 1).sin())
        self.register_buffer("keyCache", cache)
        self.register_buffer("valueCache", cache.clone())

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        positions = position + torch.arange(self.tokens, dtype=torch.int32)
        begin = position[0]
        end = begin + self.tokens
        mask = torch.where(torch.arange(self.context)[None] > positions[:, None], -torch.inf, 0.0)
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.transformer.token_embeddings(ids)
        for layer in self.transformer.layers:
            x = x + layer.attn(layer.attn_norm(x), cos, sin, mask, begin, end, self.keyCache, self.valueCache)
            x = x + layer.ffn(layer.ffn_norm(x))
        return functional.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def export_stock(checkpoint: Checkpoint, out: Path, *, prefill: int = 64, context: int | None = None, int4: bool = True) -> None:
    """Write the package `out` of a checkpoint with a tied head, weights in symmetric int4 blocks of 32, or fp16."""
    import coremltools as ct

    config = checkpoint.config
    context = config.max_context_length if context is None else context
    weights = {name: checkpoint.tensor(name).float() for name in checkpoint.specs}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        merged = ct.utils.MultiFunctionDescriptor()
        for name, tokens in (("prefill", prefill), ("decode", 1)):
            path = str(Path(folder, f"{name}.mlpackage"))
            converted = convert(config, weights, tokens, context)
            (_quantized(converted) if int4 else converted).save(path)
            merged.add_function(path, src_function_name="main", target_function_name=name)
        merged.default_function_name = "decode"
        ct.utils.save_multifunction(merged, str(out))


def convert(config: OpenELMConfig, weights: dict[str, Tensor], tokens: int, context: int):  # type: ignore[no-untyped-def]
    """coremltools' model of one function, in fp16."""
    import coremltools as ct
    import numpy as np

    model = StatefulOpenELM(config, tokens, context).eval()
    model.load_state_dict(weights, strict=False, assign=True)
    example = torch.zeros(1, tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        traced = torch.jit.trace(model, example, check_trace=False)
    shape = tuple(model.keyCache.shape)
    return ct.convert(
        traced,
        inputs=[ct.TensorType("input_ids", (1, tokens), dtype=np.int32), ct.TensorType("position", (1,), dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name) for name in ("keyCache", "valueCache")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def _quantized(converted):  # type: ignore[no-untyped-def]
    import coremltools as ct

    coreml = ct.optimize.coreml
    options = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=BLOCK)
    return coreml.linear_quantize_weights(converted, coreml.OptimizationConfig(global_config=options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="random weights of the model's shapes")
    parser.add_argument("--prefill", type=int, default=64)
    given = parser.parse_args()
    from elmexport.checkpoint import open_checkpoint

    export_stock(open_checkpoint(given.model, random_weights=given.seed), given.out, prefill=given.prefill)


if __name__ == "__main__":
    main()
