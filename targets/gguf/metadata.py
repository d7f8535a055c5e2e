"""Key-value metadata: what the file says of the model as a whole, in the order in which llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.graph.ir import Graph
from elmexport.quantization.recipes import Recipe
from targets.gguf.packing import TYPES

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp's `general.file_type` by the type of most of the weights.
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}


def file_type(recipe: Recipe) -> str:
    """The type that a file of `recipe` is called after: that of its last rule, which takes what no other rule claims."""
    return TYPES[recipe.rules[-1].scheme]


def write_general(writer: GGUFWriter, name: str, parameters: int) -> None:
    """`general.*`: names as llama.cpp's converter reads them out of a model folder's name."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    facts = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), model_path=Path(name), total_params=parameters)
    facts.size_label = facts.size_label or gguf.size_label(parameters, parameters, 0, 0)
    facts.set_gguf_meta_model(writer)


def write_hyperparameters(writer: GGUFWriter, graph: Graph, recipe: Recipe) -> None:
    """`openelm.*`, read off the graph: sizes of every layer, and the constants that its ops carry."""
    import gguf

    config = graph.config
    attention = next(node for node in graph.nodes if node.op == "attention")
    writer.add_block_count(config.num_transformer_layers)
    writer.add_context_length(graph.context)
    writer.add_embedding_length(config.model_dim)
    # Lists even where all layers are alike, as the converter does. gguf writes Python's integers as INT32.
    writer.add_feed_forward_length([layer.ffn_dim for layer in config.layers])
    writer.add_head_count([layer.query_heads for layer in config.layers])
    writer.add_head_count_kv([layer.kv_heads for layer in config.layers])
    writer.add_rope_freq_base(attention.attrs["rope_theta"])
    writer.add_layer_norm_rms_eps(attention.attrs["eps"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[file_type(recipe)]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
