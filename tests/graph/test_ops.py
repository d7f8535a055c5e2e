"""The op vocabulary: eager results against numpy in float64, and fake results against eager ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elmexport.graph import ops
from tests import reference

EPS = 1e-6
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 6, 2, 8, 12
THETA = 10000.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def attention_arguments(tokens: int, position: int, *, normalize: bool = True, batch: int = 1) -> dict[str, Any]:
    """A cache that is random beyond what has been fed: nothing of it may be seen."""
    norms = (1 + normal(HEAD_DIM, seed=1), 1 + normal(HEAD_DIM, seed=2)) if normalize else (None, None)
    return {
        "qkv": normal(batch, tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "q_norm": norms[0],
        "k_norm": norms[1],
        "k_cache": 9 * normal(batch, KV_HEADS, CONTEXT, HEAD_DIM, seed=3),
        "v_cache": 9 * normal(batch, KV_HEADS, CONTEXT, HEAD_DIM, seed=4),
        "position": torch.tensor(position),
        "query_heads": HEADS,
        "kv_heads": KV_HEADS,
        "rope_theta": THETA,
        "eps": EPS,
    }


def numpy_attention(arguments: dict[str, Any]) -> np.ndarray:
    """Attention from position 0 by `tests.reference`, whose projections are made identities."""
    qkv = arguments["qkv"].numpy()
    layer = {"attn.qkv_proj.weight": np.eye(qkv.shape[-1]), "attn.out_proj.weight": np.eye(HEADS * HEAD_DIM)}
    for name in ("q_norm", "k_norm"):
        if arguments[name] is not None:
            layer[f"attn.{name}.weight"] = arguments[name].numpy()
    config = SimpleNamespace(head_dim=HEAD_DIM, num_gqa_groups=HEADS // KV_HEADS, rope_freq_constant=THETA)
    return np.stack([reference._attention(config, layer, sequence) for sequence in qkv])


def test_embed_takes_rows() -> None:
    table = normal(7, 4)
    ids = torch.tensor([[3, 0, 6], [6, 6, 1]])
    np.testing.assert_array_equal(ops.embed(ids, table), table.numpy()[ids.numpy()])


def test_linear_is_x_times_the_transposed_weight() -> None:
    x, weight = normal(2, 3, 4), normal(5, 4, seed=1)
    np.testing.assert_allclose(ops.linear(x, weight), np.einsum("bti,oi->bto", x.numpy(), weight.numpy()), atol=1e-14)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 3e5])
def test_rms_norm(magnitude: float) -> None:
    x, weight = magnitude * normal(2, 3, 16), normal(16, seed=1)
    np.testing.assert_allclose(ops.rms_norm(x, weight, EPS), reference._rms_norm(x.numpy(), weight.numpy()), rtol=1e-12)


def test_swiglu_gates_with_the_first_half() -> None:
    x = normal(2, 3, 10)
    gate, up = x.numpy()[..., :5], x.numpy()[..., 5:]
    np.testing.assert_allclose(ops.swiglu(x), gate / (1 + np.exp(-gate)) * up, atol=1e-14)


def test_silu() -> None:
    x = normal(2, 3, 5)
    np.testing.assert_allclose(ops.silu(x), x.numpy() / (1 + np.exp(-x.numpy())), atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_attention_from_position_0(normalize: bool) -> None:
    arguments = attention_arguments(CONTEXT, 0, normalize=normalize, batch=2)
    out, _, _ = ops.attention(**arguments)
    np.testing.assert_allclose(out, numpy_attention(arguments), atol=1e-12)


@pytest.mark.parametrize("position", [1, 5, CONTEXT - 1])
def test_attention_continues_from_its_caches(position: int) -> None:
    whole = attention_arguments(CONTEXT, 0)
    first = whole | {"qkv": whole["qkv"][:, :position]}
    out, k_cache, v_cache = ops.attention(**first)
    rest = whole | {"qkv": whole["qkv"][:, position:], "k_cache": k_cache, "v_cache": v_cache, "position": torch.tensor(position)}
    out = torch.cat((out, ops.attention(**rest)[0]), dim=1)
    np.testing.assert_allclose(out, numpy_attention(whole), atol=1e-12)


def test_attention_is_functional_and_touches_only_its_tokens() -> None:
    arguments = attention_arguments(3, 4)
    before = arguments["k_cache"].clone()
    _, k_cache, v_cache = ops.attention(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    for given, returned in ((before, k_cache), (arguments["v_cache"], v_cache)):
        changed = (given != returned).any(-1).any(1)[0]
        assert changed.tolist() == [4 <= slot < 7 for slot in range(CONTEXT)]


def test_rope_angles_are_exact_at_far_positions() -> None:
    """In float32 arithmetic, position 4095 would lose four decimal digits of its angle."""
    cos, sin = ops.rope_angles(torch.tensor([4095]), 64, THETA, torch.float32)
    angle = 4095 / THETA ** (np.arange(32) / 32)
    np.testing.assert_allclose(cos[0].numpy(), np.tile(np.cos(angle), 2), atol=1e-7)
    np.testing.assert_allclose(sin[0].numpy(), np.tile(np.sin(angle), 2), atol=1e-7)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("embed", (torch.tensor([[3, 0, 6]]), normal(7, 4))),
        ("linear", (normal(2, 3, 4), normal(5, 4))),
        ("rms_norm", (normal(2, 3, 4), normal(4), EPS)),
        ("swiglu", (normal(2, 3, 10),)),
        ("silu", (normal(2, 3, 5),)),
        ("add", (normal(2, 3, 5), normal(2, 3, 5))),
        ("attention", tuple(attention_arguments(3, 4).values())),
        ("attention", tuple(attention_arguments(3, 4, normalize=False).values())),
    ],
    ids=["embed", "linear", "rms_norm", "swiglu", "silu", "add", "attention", "attention-unnormalized"],
)
def test_torch_accepts_the_op(op: str, arguments: tuple[Any, ...]) -> None:
    """torch's own check of a custom op: schema, no hidden mutation or aliasing, fake shapes and dtypes as the eager ones."""
    torch.library.opcheck(getattr(ops, op), arguments)
