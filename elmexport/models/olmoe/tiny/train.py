"""Train the tiny OLMoE checkpoint on a CPU from plain text: 8 experts a layer, 2 active, q/k norm over the full width, untied head.

    python train.py --train books.txt --valid heldout.txt --out DIR --minutes 45

Writes tokenizer.json, config.json and model.safetensors (fp16, the tensor names of OLMoE's published files), and prints what the routers
do. Matrices are trained with Muon (orthogonalized momentum), the rest with AdamW; the checkpoint is an exponential average of the weights.
The load-balancing and router-z losses are those of the OLMoE paper (arXiv:2409.02060).
"""

import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

DIM, LAYERS, HEADS, EXPERTS, ACTIVE, FFN, VOCAB, CONTEXT, BATCH = 256, 4, 8, 8, 2, 128, 3072, 256, 8
HEAD_DIM, EPS, THETA = DIM // HEADS, 1e-5, 10000.0
BALANCE_LOSS, ROUTER_Z_LOSS = 0.01, 0.001
END, PAD = "<|endoftext|>", "<|padding|>"
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": DIM,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": CONTEXT,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": ACTIVE,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "router_aux_loss_coef": BALANCE_LOSS,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCAB,
}

angles = torch.outer(torch.arange(CONTEXT).float(), THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)).repeat(1, 2)


def rope(x):
    first, second = x.chunk(2, -1)
    tokens = x.shape[2]
    return x * angles[:tokens].cos().to(x.dtype) + torch.cat((-second, first), -1) * angles[:tokens].sin().to(x.dtype)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = Norm(), Norm()

    def forward(self, x):
        heads = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        q, k, v = (y.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for y in heads)
        out = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Router and experts; keeps its losses and the probabilities of its last batch."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, 2 * FFN, DIM))
        self.down = nn.Parameter(torch.empty(EXPERTS, DIM, FFN))

    def forward(self, x):
        rows = x.flatten(0, 1)
        logits = F.linear(rows.float(), self.gate.weight)
        self.probabilities = logits.softmax(-1)
        weights, chosen = self.probabilities.topk(ACTIVE, -1)
        share = F.one_hot(chosen, EXPERTS).float().mean((0, 1)) * ACTIVE
        balance = EXPERTS * (share * self.probabilities.mean(0)).sum()
        self.loss = BALANCE_LOSS * balance + ROUTER_Z_LOSS * logits.logsumexp(-1).square().mean()
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        tokens = order // ACTIVE
        outs = []
        for expert, part in enumerate(rows[tokens].split(counts)):
            gate, up = F.linear(part, self.gate_up[expert]).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, self.down[expert]))
        out = torch.cat(outs) * weights.flatten()[order, None].to(outs[0].dtype)
        return torch.zeros_like(rows, dtype=out.dtype).index_add(0, tokens, out).view_as(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm = Attention(), Experts(), Norm(), Norm()

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class OLMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm, self.lm_head = nn.Embedding(VOCAB, DIM), Norm(), nn.Linear(DIM, VOCAB, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration toward the nearest semi-orthogonal matrix, of the last two axes (coefficients of the Muon optimizer)."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def train_tokenizer(path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(path)], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def published(name, p):
    """The tensors of OLMoE's files that hold the parameter `p`: one for each expert's projection."""
    if name.endswith(("mlp.gate_up", "mlp.down")):
        stem, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(p):
            parts = matrix.chunk(2) if kind == "gate_up" else [matrix]
            for part, projection in zip(parts, ["gate", "up"] if kind == "gate_up" else ["down"], strict=True):
                yield f"model.{stem}.experts.{expert}.{projection}_proj.weight", part
    else:
        yield (name if name.startswith("lm_head") else f"model.{name}"), p


def main():
    parser = argparse.ArgumentParser()
    for name in ("train", "valid", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(args.train)
    tokenizer.save(str(args.out / "tokenizer.json"))

    def encode(path):
        parts = tokenizer.encode_batch(path.read_text(encoding="utf8").split("\n\n\n"))
        return torch.tensor([i for part in parts for i in (*part.ids, 0)])

    train, valid = encode(args.train), encode(args.valid)
    model = OLMoE()
    named = list(model.named_parameters())
    for name, p in named:
        if p.dim() > 1:
            wide = 0.02 if "embed" in name or "gate.weight" in name else p.shape[-1] ** -0.5 * (0.5 if "o_proj" in name or "down" in name else 1)
            nn.init.normal_(p, std=wide)
    by_muon = [p for n, p in named if p.dim() > 1 and not any(part in n for part in ("embed", "lm_head", "gate.weight"))]
    muons = set(map(id, by_muon))
    adam = torch.optim.AdamW([p for _, p in named if id(p) not in muons], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    momentum, average = [torch.zeros_like(p) for p in by_muon], [p.detach().clone() for _, p in named]
    generator, start, step = torch.Generator().manual_seed(0), time.time(), 0
    while (done := (time.time() - start) / 60 / args.minutes) < 1:
        rate = min(1, step / 100) * (1 if done < 0.5 else max(0.02, (1 - done) / 0.5))
        x = torch.stack([train[i : i + CONTEXT + 1] for i in torch.randint(0, len(train) - CONTEXT - 1, (BATCH,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x[:, :-1])
        loss = F.cross_entropy(out.float().reshape(-1, VOCAB), x[:, 1:].reshape(-1))
        (loss + sum(layer.mlp.loss for layer in model.layers)).backward()
        with torch.no_grad():
            for p, m in zip(by_muon, momentum, strict=True):
                m.lerp_(p.grad, 0.05)
                wide = max(1, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - 0.001 * rate).add_(orthogonalize(p.grad.lerp(m, 0.95)), alpha=-0.02 * rate * wide)
                p.grad = None
            for group in adam.param_groups:
                group["lr"] = 3e-3 * rate
            adam.step()
            adam.zero_grad(set_to_none=True)
            for a, (_, p) in zip(average, named, strict=True):
                a.lerp_(p, 0.005 if step > 200 else 0.1)
        step += 1
        if step % 100 == 0:
            print(step, round(loss.item(), 3), f"{(time.time() - start) / 60:.1f} min", flush=True)
    with torch.no_grad():
        for a, (_, p) in zip(average, named, strict=True):
            p.copy_(a.half())
        held, routed = [], [[] for _ in range(LAYERS)]
        for window in valid[: 101 * CONTEXT].unfold(0, CONTEXT + 1, CONTEXT):
            held.append(F.cross_entropy(model(window[None, :-1])[0], window[1:]).item())
            for layer, found in zip(model.layers, routed, strict=True):
                found.append(layer.mlp.probabilities)
    print("held-out perplexity", math.exp(sum(held) / len(held)), "after", step * BATCH * CONTEXT, "tokens; routing entropy of", math.log(EXPERTS))
    for i, found in enumerate(map(torch.cat, routed)):
        mean = found.mean(0)
        share = F.one_hot(found.topk(ACTIVE, -1).indices, EXPERTS).float().mean((0, 1))
        of_mean, of_tokens = -(mean * mean.log()).sum(), -(found * found.log()).sum(-1).mean()
        shares = " ".join(f"{value:.3f}" for value in share)
        print(f"layer {i}: of the mean {of_mean:.3f}, of a token {of_tokens:.3f}; share of each expert {shares}")
    tensors = {stored: part.detach().half().contiguous() for name, p in named for stored, part in published(name, p)}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    main()
