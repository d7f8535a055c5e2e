"""Make a model wider and turn its channels, so that rows divide by 256 and weights lie on no grid: for judging codes, on a real model.

python benchmarks/widen.py MODEL DIR --dim 768

SmolLM2-135M as `real/smollm.py` makes it has rows of 576, which neither blocks of 128 nor llama.cpp's K-types divide, and weights that were 4-bit ones with
minima, which asymmetric codes find again without a loss. The model written computes the same function: the residual stream is padded with channels that stay
zero (as are attention heads, until they fill it), and pairs of its channels are turned by angles of their own. A norm's weights go into the matrices behind it;
those of the last norm, behind which lies the tied head, have to be equal in a pair, so channels are paired by them and both get the geometric mean (where they
differ by 5 % or more, the channels stay).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ALIKE = 0.05  # relative difference of two weights of the last norm


def widen(
    tensors: dict[str, Tensor], dim: int, layers: int, heads: tuple[int, int], head_dim: int
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Widen a tied OpenELM model of uniform layers, float32, without norms of queries and keys; returns its numbers of query and KV heads, too."""
    last = tensors["transformer.norm.weight"]
    narrow, scale = len(last), (dim / len(last)) ** 0.5  # the mean square over all channels stays
    turn, last = _turn(last)
    turn = torch.cat([turn, torch.zeros(dim - narrow, narrow)]) * scale  # [dim, narrow]: the new stream from the old
    back = turn / scale**2
    queries, keys = heads
    new_keys = -(-dim * keys // (queries * head_dim))
    new_queries = new_keys * queries // keys
    embedding = "transformer.token_embeddings.weight"
    found = {embedding: tensors[embedding] @ turn.T, "transformer.norm.weight": torch.cat([last, torch.ones(dim - narrow)]) / scale**2}
    for layer in range(layers):
        prefix = f"transformer.layers.{layer}."
        qkv = tensors[prefix + "attn.qkv_proj.weight"] * tensors[prefix + "attn_norm.weight"] @ back.T
        q, k, v = qkv.split([queries * head_dim, keys * head_dim, keys * head_dim])
        more = [(new_queries - queries) * head_dim, *[(new_keys - keys) * head_dim] * 2]
        found[prefix + "attn.qkv_proj.weight"] = torch.cat(
            [torch.cat([part, torch.zeros(n, dim)]) for part, n in zip((q, k, v), more, strict=True)]
        )
        out = tensors[prefix + "attn.out_proj.weight"]
        found[prefix + "attn.out_proj.weight"] = turn @ torch.cat([out, torch.zeros(narrow, more[0])], 1)
        found[prefix + "ffn.proj_1.weight"] = tensors[prefix + "ffn.proj_1.weight"] * tensors[prefix + "ffn_norm.weight"] @ back.T
        found[prefix + "ffn.proj_2.weight"] = turn @ tensors[prefix + "ffn.proj_2.weight"]
        for norm in ("attn_norm", "ffn_norm"):
            found[f"{prefix}{norm}.weight"] = torch.ones(dim)
    return found, (new_queries, new_keys)


def _turn(last: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of channels with much the same weight in `last`: the rotation `[channels, channels]`, and the weights, equal in each pair."""
    pairs = last.argsort().reshape(-1, 2)
    pairs = pairs[(last[pairs[:, 1]] / last[pairs[:, 0]] - 1).abs() < ALIKE]
    first, second = pairs.T
    angles = torch.rand(len(pairs), generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    turn, equal = torch.eye(len(last)), last.clone()
    turn[first, first] = turn[second, second] = angles.cos()
    turn[first, second], turn[second, first] = -angles.sin(), angles.sin()
    equal[first] = equal[second] = (last[first] * last[second]).sqrt() * last[first].sign()
    return turn, equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an OpenELM checkpoint of uniform layers, one safetensors file, no q/k norms")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dim", type=int, default=768)
    given = parser.parse_args()
    config = json.loads((given.model / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(given.model / "model.safetensors").items()}
    layers = config["num_transformer_layers"]
    heads = (config["num_query_heads"][0], config["num_kv_heads"][0])
    wide, (queries, keys) = widen(tensors, given.dim, layers, heads, config["head_dim"])
    width = tensors["transformer.layers.0.ffn.proj_2.weight"].shape[1]
    config |= {
        "model_dim": given.dim,
        "num_query_heads": [queries] * layers,
        "num_kv_heads": [keys] * layers,
        "ffn_multipliers": [width / given.dim] * layers,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.model.glob("tokenizer*"):
        shutil.copy(path, given.out)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in wide.items()}, given.out / "model.safetensors", metadata={"format": "pt"}
    )
    (given.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
