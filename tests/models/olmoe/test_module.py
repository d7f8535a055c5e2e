"""The forward pass against transformers' OlmoeForCausalLM, an independent class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from elmexport.graph.forward import KVCaches, forward
from elmexport.graph.ops import moe, route
from elmexport.models import trace
from tests.moe_models import SMALL, random_moe, some_ids, transformers_logits
from tests.reference import log_probs


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_are_those_of_transformers(kv_heads: int) -> None:
    checkpoint = random_moe(replace(SMALL, num_key_value_heads=kv_heads))
    graph, ids = trace(checkpoint.config), some_ids(SMALL)
    caches = KVCaches(graph, dtype=torch.float64)
    # All but the last tokens at once, those one at a time, from the caches.
    parts = [ids[:40], *np.split(ids[40:], 8)]
    found, position = [], 0
    for part in parts:
        logits = forward(graph, lambda spec: checkpoint.tensor(spec.name), torch.from_numpy(part)[None], position, caches)
        found.append(logits[0].numpy())
        position += len(part)
    expected = transformers_logits(checkpoint, ids)
    assert expected.std() > 0.5
    assert np.abs(log_probs(np.concatenate(found)) - log_probs(expected)).max() < 1e-5


def test_the_module_runs_as_its_graph_does() -> None:
    checkpoint, ids = random_moe(), torch.from_numpy(some_ids(SMALL, 12))[None]
    module = SMALL.module()
    module.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.specs})
    graph = trace(SMALL)
    caches = KVCaches(graph)
    out, keys, _ = module(ids, torch.tensor(0), [x.clone() for x in caches.keys], [x.clone() for x in caches.values])
    torch.testing.assert_close(forward(graph, lambda spec: checkpoint.tensor(spec.name), ids, 0, caches), out)
    torch.testing.assert_close(caches.keys[2], keys[2])


def test_weights_are_not_renormalized() -> None:
    weights, chosen = route(torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64), 2)
    assert chosen.tolist() == [[1, 2]]
    np.testing.assert_allclose(weights, [np.exp([3.0, 2.0]) / np.exp([1.0, 3.0, 2.0, 0.0]).sum()], rtol=1e-12)


def test_the_op_is_the_weighted_sum_of_its_experts() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, logits = random(2, 5, 8), random(2, 5, 4)
    gate, up, down = [random(6, 8) for _ in range(4)], [random(6, 8) for _ in range(4)], [random(8, 6) for _ in range(4)]
    found = moe(x, logits, gate, up, down, 2).numpy()
    for row, place in ((row, place) for row in range(2) for place in range(5)):
        token, scores = x[row, place].numpy(), np.exp(logits[row, place].numpy())
        expected = np.zeros(8)
        for expert in np.argsort(-scores)[:2]:
            a = gate[expert].numpy() @ token
            expected += scores[expert] / scores.sum() * (down[expert].numpy() @ (a / (1 + np.exp(-a)) * (up[expert].numpy() @ token)))
        np.testing.assert_allclose(found[row, place], expected, rtol=1e-10, atol=1e-12)


def test_observers_see_what_experts_read() -> None:
    """Each token, at as many experts as are active; names and widths are those of the graph."""
    checkpoint, graph = random_moe(), trace(SMALL)
    seen: dict[str, torch.Tensor] = {}
    forward(
        graph,
        lambda spec: checkpoint.tensor(spec.name),
        torch.from_numpy(some_ids(SMALL))[None],
        0,
        KVCaches(graph),
        observe=lambda node, out: seen.__setitem__(node.outputs[0], out),
    )
    for node in (node for node in graph.nodes if node.op == "moe"):
        inputs = [seen[node.expert_input(expert)] for expert in range(node.experts) if node.expert_input(expert) in seen]
        assert sum(map(len, inputs)) == 48 * SMALL.num_experts_per_tok
        assert {rows.shape[1] for rows in inputs} == {SMALL.hidden_size} == {graph.values[node.expert_input(0)].shape[1]}
        assert graph.values[node.expert_hidden(0)].shape == ("routed", SMALL.intermediate_size)
        assert graph.linear_inputs[node.weights["down.3"].name] == node.expert_hidden(3)
        assert graph.linear_inputs[node.weights["up.3"].name] == node.expert_input(3)
