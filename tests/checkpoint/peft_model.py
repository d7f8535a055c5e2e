"""A torch model with the module names of a published OpenELM, small enough to be wrapped by PEFT itself: what it computes is not OpenELM's."""

from __future__ import annotations

import torch
from torch import nn

from elmexport.checkpoint.base import Checkpoint


class Block(nn.Module):
    def __init__(self, sizes: dict[str, torch.Size], prefix: str) -> None:
        super().__init__()
        self.attn, self.ffn = nn.Module(), nn.Module()
        for part, name in ((self.attn, "qkv_proj"), (self.attn, "out_proj"), (self.ffn, "proj_1"), (self.ffn, "proj_2")):
            kind = "attn" if part is self.attn else "ffn"
            rows, columns = sizes[f"{prefix}.{kind}.{name}.weight"]
            setattr(part, name, nn.Linear(columns, rows, bias=False))


class NamedModel(nn.Module):
    """Matrices of `checkpoint` under its own names: `transformer.layers.N.attn.qkv_proj` and so on, and the embedding."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        sizes = {name: torch.Size(spec.shape) for name, spec in checkpoint.specs.items()}
        self.transformer = nn.Module()
        self.transformer.token_embeddings = nn.Embedding(*sizes["transformer.token_embeddings.weight"])
        count = len(checkpoint.config.dims.layers)
        self.transformer.layers = nn.ModuleList(Block(sizes, f"transformer.layers.{i}") for i in range(count))
        for name, parameter in self.named_parameters():
            parameter.data = checkpoint.tensor(name).to(torch.float32).clone()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Every matrix once, so that PEFT's own forward pass can be compared."""
        embedded: torch.Tensor = self.transformer.token_embeddings(ids)
        return embedded
