"""The trace of the four published sizes: its structure, its weights, and that it holds none."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from elmexport.errors import ElmExportError
from elmexport.graph.ir import BATCH, TOKENS, Graph, Node
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.weights import Role

# The fields of the published config.json files in which the sizes differ, and the parameters that Apple states.
PUBLISHED = {
    "270M": ({"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64}, 271_527_168),
    "450M": ({"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64}, 457_179_136),
    "1.1B": ({"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64}, 1_079_891_456),
    "3B": ({"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128}, 3_036_647_424),
}


def published_config(size: str) -> OpenELMConfig:
    return OpenELMConfig(
        **PUBLISHED[size][0],
        qkv_multipliers=(0.5, 1.0),
        ffn_multipliers=(0.5, 4.0),
        num_gqa_groups=4,
        normalize_qk_projections=True,
        share_input_output_layers=True,
    )


@pytest.fixture(scope="module")
def small_graph(small_config: OpenELMConfig) -> Graph:
    return trace(small_config)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    config = published_config(size)
    graph = trace(config)
    layers = config.num_transformer_layers
    assert len(graph.nodes) == 10 * layers + 3  # a layer: 2 norms, 4 projections, attention, swiglu, 2 sums; around them embed, norm, head
    assert sum(spec.size for spec in graph.weight_specs()) == PUBLISHED[size][1]
    assert graph.values[graph.result].shape == (BATCH, TOKENS, 32000)
    for i, dims in enumerate(config.layers):
        assert graph.values[graph.present_keys[i]].shape == (BATCH, dims.kv_heads, 2048, config.head_dim)


def test_every_weight_is_used_once_in_forward_order(small_config: OpenELMConfig, small_graph: Graph) -> None:
    assert list(small_graph.weight_specs()) == list(small_config.weights())
    uses = Counter(spec.name for node in small_graph.nodes for spec in node.weights.values())
    tied = "transformer.token_embeddings.weight"
    assert {name for name, count in uses.items() if count != 1} == {tied}
    assert uses[tied] == 2
    assert [node.role for node in small_graph.nodes if tied in {spec.name for spec in node.weights.values()}] == [
        Role.EMBEDDING,
        Role.LM_HEAD,
    ]


def test_nodes_of_one_layer(small_config: OpenELMConfig, small_graph: Graph) -> None:
    layer = [node for node in small_graph.nodes if node.layer == 2]
    assert [node.op for node in layer] == [
        "rms_norm",
        "linear",
        "attention",
        "linear",
        "add",
        "rms_norm",
        "linear",
        "swiglu",
        "linear",
        "add",
    ]
    assert len({node.name for node in small_graph.nodes}) == len(small_graph.nodes)
    attention = layer[2]
    assert attention.attrs == {"query_heads": 9, "kv_heads": 3, "rope_theta": 10000.0, "eps": 1e-6}
    assert set(attention.weights) == {"q_norm", "k_norm"}
    assert attention.inputs["k_cache"] == "k_cache.2" and attention.inputs["v_cache"] == "v_cache.2"
    assert attention.outputs[1:] == (small_graph.present_keys[2], small_graph.present_values[2])
    assert [node.role for node in layer if node.role] == [Role.ATTENTION_QKV, Role.ATTENTION_OUT, Role.FFN_GATE_UP, Role.FFN_DOWN]
    assert layer[6].outputs[0] in small_graph.values
    assert small_graph.values[layer[6].outputs[0]].shape == (BATCH, TOKENS, 2 * small_config.layers[2].ffn_dim)


def test_nodes_stand_after_what_they_read(small_graph: Graph) -> None:
    known = {"ids", "position"} | {f"{side}_cache.{i}" for side in "kv" for i in range(3)}
    for node in small_graph.nodes:
        assert set(node.inputs.values()) <= known, node.name
        known |= set(node.outputs)
    assert {small_graph.result, *small_graph.present_keys, *small_graph.present_values} <= known


def test_symbolic_shapes(small_graph: Graph) -> None:
    assert small_graph.values["ids"].shape == (BATCH, TOKENS)
    assert small_graph.values["position"].shape == ()
    assert small_graph.values["k_cache.1"].shape == (BATCH, 2, 128, 32)


def test_options(small_config: OpenELMConfig) -> None:
    config = replace(small_config, normalize_qk_projections=False, share_input_output_layers=False, ffn_with_glu=False)
    graph = trace(config)
    assert list(graph.weight_specs()) == list(config.weights())
    head = next(node for node in graph.nodes if node.name == "lm_head")
    assert head.weights["weight"].name == "lm_head.weight" and head.role is Role.LM_HEAD
    counts = Counter(node.op for node in graph.nodes)
    assert counts["silu"] == 3 and counts["swiglu"] == 0
    assert all(not node.weights for node in graph.nodes if node.op == "attention")


def test_a_head_dimension_equal_to_the_token_count_is_no_trap(small_config: OpenELMConfig) -> None:
    """Sizes that coincide with the example inputs of the trace must not become symbols, nor symbols numbers."""
    config = replace(small_config, head_dim=2, num_transformer_layers=2, qkv_multipliers=1.0, ffn_multipliers=(1.0, 2.0), vocab_size=3)
    graph = trace(config, 3)
    assert graph.values[graph.result].shape == (BATCH, TOKENS, 3)
    assert graph.values["k_cache.0"].shape == (BATCH, config.layers[0].kv_heads, 3, 2)


@pytest.mark.parametrize("context", [0, -1, 257])
def test_context_out_of_range(small_config: OpenELMConfig, context: int) -> None:
    with pytest.raises(ElmExportError, match=rf"context is {context}; this model takes 1 to 256 tokens"):
        trace(small_config, context)


def test_context_of_one_token(small_config: OpenELMConfig) -> None:
    graph = trace(small_config, 1)
    assert graph.values[graph.present_keys[0]].shape == (BATCH, 1, 1, 32)


@pytest.mark.slow
def test_torch_export_finds_the_same(small_config: OpenELMConfig, small_graph: Graph) -> None:
    """The same ops on the same operands, by their places, with the same symbolic shapes."""
    from torch.export import Dim, export

    with torch.device("meta"):
        ids, position = torch.zeros(2, 3, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        caches = [torch.zeros(2, layer.kv_heads, 128, small_config.head_dim) for layer in small_config.layers]
        module = small_config.module()
    batch, tokens = Dim("batch", min=1), Dim("tokens", min=1, max=128)
    shapes = ({0: batch, 1: tokens}, None, [{0: batch}] * len(caches), [{0: batch}] * len(caches))
    program = export(module, (ids, position, caches, [cache.clone() for cache in caches]), dynamic_shapes=shapes, strict=False)
    parameters = program.graph_signature.inputs_to_parameters
    symbols: dict[str, str] = {}
    made: dict[torch.fx.Node, tuple[object, ...]] = {}  # what a value is: a weight, an input, or an output of a node, by their numbers
    found = []
    places = iter(small_graph.values)
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            if fx.name not in parameters and not symbols:
                symbols = {str(size): name for size, name in zip(fx.meta["val"].shape, (BATCH, TOKENS), strict=True)}
            made[fx] = ("weight", parameters[fx.name]) if fx.name in parameters else ("value", next(places))
        elif fx.op == "call_function" and isinstance(fx.target, torch._ops.OpOverload) and fx.target.namespace == "elmexport":
            node = small_graph.nodes[len(found)]
            operands = [made[given] if isinstance(given, torch.fx.Node) else given for given in fx.args if given is not None]
            found.append((fx.target._schema.name.partition("::")[2], operands))
            made[fx] = ("value", node.outputs[0])
            values = [user for user in fx.users if node.op == "attention"] or [fx]
            for value in values:
                name = node.outputs[0] if value is fx else node.outputs[value.args[1]]
                made[value] = ("value", name)
                shape = tuple(symbols.get(str(size), size) for size in value.meta["val"].shape)
                assert small_graph.values[name].shape == shape, name
    assert found == [(node.op, _operands(node)) for node in small_graph.nodes]


def _operands(node: Node) -> list[object]:
    """Operands of a node in the order of its op's arguments."""
    by_name = {name: ("value", value) for name, value in node.inputs.items()} | {
        name: ("weight", spec.name) for name, spec in node.weights.items()
    }
    given = by_name | node.attrs
    order = [argument.name for argument in getattr(torch.ops.elmexport, node.op).default._schema.arguments]
    return [given[name] for name in order if name in given]


def test_no_memory_for_weights() -> None:
    """3B has 12 GB of float32 parameters; the process that traces it must stay far below, and load no compiler."""
    code = """if True:
        import sys
        from elmexport.bench.memory import peak_bytes
        from tests.graph.test_trace import published_config, trace
        graph = trace(published_config("3B"))
        assert not {"torch._dynamo", "sympy"} & set(sys.modules)
        print(len(graph.nodes), peak_bytes())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nodes, peak = map(int, done.stdout.split())
    assert nodes == 363
    assert peak < 2**30, f"peak resident memory {peak / 2**30:.1f} GiB"
