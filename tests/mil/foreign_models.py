"""Models as people write them in plain PyTorch, for coremltools' converter. Nothing of ours takes part.

Their forms keep clear of two defects of coremltools 9.0's torch frontend: on numpy 2.4 it cannot read a known size off a traced tensor (so
fixed sizes are numbers here), and `triu` of infinities becomes a difference of infinities (so masks are finite).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coreml_stock import Decoder, rotate
from elmexport.models.openelm.config import OpenELMConfig

HIDDEN = -1e4


class Images(nn.Module):
    """Convolutions of many kinds, norms, pools, activations, and a branch that goes up again; classes and a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 32, 1),
            nn.Hardswish(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(32, 32, 3, padding="same", dilation=2),
            nn.SiLU(),
            nn.AvgPool2d(2),
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 2, 2),
            nn.GroupNorm(4, 16),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.PixelShuffle(2),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.down(x)
        classes = self.head(F.adaptive_avg_pool2d(features, 1).flatten(1)).log_softmax(-1)
        return classes, torch.sigmoid(self.up(features))


class AnySize(nn.Module):
    """A classifier for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Encoder(nn.Module):
    """BERT's architecture: token and place embeddings, attention under a padding mask, GELU, norms behind; hidden states and a pooled one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.norm = nn.Embedding(100, 32), nn.Embedding(64, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True) for _ in range(2))
        self.pool = nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = ids.shape[1]
        x = self.norm(self.tokens(ids) + self.places(torch.arange(count))[None])
        hidden = (1.0 - mask[:, None, None, :].float()) * HIDDEN
        for layer in self.layers:
            attention = layer.self_attn
            q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).view(1, count, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            x = layer.norm1(x + attention.out_proj(out.transpose(1, 2).reshape(1, count, 32)))
            x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
        return x, torch.tanh(self.pool(x[:, 0]))


class StatelessOpenELM(nn.Module):
    """The whole text at once, of any length; the module that the stock route's benchmark has, without its caches."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.config, self.transformer = config, Decoder(config, 0)

    def forward(self, ids: Tensor) -> Tensor:
        count, size = ids.shape[1], self.config.head_dim
        frequencies = float(self.config.rope_freq_constant) ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(count)[:, None] * torch.cat([frequencies, frequencies])[None]
        cos, sin = angles.cos(), angles.sin()
        mask = torch.full((count, count), HIDDEN).triu(1)
        x = self.transformer.token_embeddings(ids)
        for layer in self.transformer.layers:
            attention = layer.attn
            groups = attention.heads // attention.kv_heads
            heads = attention.qkv_proj(layer.attn_norm(x)).view(1, count, attention.heads + 2 * attention.kv_heads, size).transpose(1, 2)
            q, k, v = heads.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=1)
            q, k = rotate(attention.q_norm(q), cos, sin), rotate(attention.k_norm(k), cos, sin)
            scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * size**-0.5 + mask
            out = torch.softmax(scores, -1) @ v.repeat_interleave(groups, 1)
            x = x + attention.out_proj(out.transpose(1, 2).reshape(1, count, attention.heads * size))
            x = x + layer.ffn(layer.ffn_norm(x))
        return F.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)


class Stateful(nn.Module):
    """A decoder in the form of swift-transformers' models: caches of all layers in two states, any number of tokens, the mask's width says
    where they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv, self.out = nn.Embedding(100, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.register_buffer("keyCache", torch.zeros(2, 1, 2, 64, 8))
        self.register_buffer("valueCache", torch.zeros(2, 1, 2, 64, 8))

    def forward(self, inputIds: Tensor, causalMask: Tensor) -> Tensor:
        x = self.tokens(inputIds)
        count, end = inputIds.shape[1], causalMask.shape[-1]
        past = end - count
        for layer in range(2):
            heads = self.qkv(x).view(1, count, 8, 8).transpose(1, 2)
            q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
            self.keyCache[layer, :, :, past:end, :] = k
            self.valueCache[layer, :, :, past:end, :] = v
            k, v = (cache[layer, :, :, :end, :].repeat_interleave(2, 1) for cache in (self.keyCache, self.valueCache))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=causalMask)
            x = x + self.out(out.transpose(1, 2).reshape(1, count, 32))
        return F.linear(x, self.tokens.weight)
