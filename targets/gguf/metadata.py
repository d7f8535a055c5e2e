"""Key-value metadata: what the file says of the model as a whole, in llama.cpp's own order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmexport.graph.ir import Graph
from elmexport.quantization.recipes import Recipe
from elmexport.quantization.schemes import Float
from elmexport.target import ExportJob
from targets.gguf.families import architecture
from targets.gguf.imatrix import ImportanceMatrix
from targets.gguf.packing import TYPES
from targets.gguf.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, Metadata

# The names by which llama.cpp calls files of our own recipes; its recipes go by its own names.
_FILE_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def file_type(recipe: Recipe) -> str:
    """File type of `recipe` in llama.cpp's words: "Q4_K_M". A recipe that llama.cpp has no name for goes by the type of its last rule.

    Rules that no tensor needs may name schemes that have no type here; those are passed over.
    """
    from gguf import LlamaFileType

    name = _FILE_TYPES.get(recipe.name, recipe.name.upper())
    if name != "F32" and f"MOSTLY_{name}" not in LlamaFileType.__members__:
        name = next((TYPES[rule.scheme] for rule in reversed(recipe.rules) if rule.scheme in TYPES), TYPES[recipe.fallback])
    return name if name == "F32" or f"MOSTLY_{name}" in LlamaFileType.__members__ else f"{name}_S"  # a file of Q4_K alone is called Q4_K_S


def describe(name: str, parameters: int, experts: int = 0, in_experts: int = 0) -> Metadata:
    """Describe the model in `general.*`, as llama.cpp's converter reads them out of a model folder's name.

    Of its `parameters`, those `in_experts` are in `experts` equal parts.
    """
    import gguf

    facts = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), model_path=Path(name), total_params=parameters)
    facts.size_label = facts.size_label or gguf.size_label(parameters, parameters - in_experts, in_experts // max(experts, 1), experts)
    return facts


def file_name(facts: Metadata, recipe: Recipe) -> str:
    """The file's name without its suffix, as llama.cpp's converter chooses it: model, size and type, with hyphens."""
    import gguf

    return gguf.naming_convention(facts.name, facts.basename, facts.finetune, facts.version, facts.size_label, file_type(recipe))


def write_metadata(
    writer: GGUFWriter, facts: Metadata, job: ExportJob, imatrix: ImportanceMatrix | None, chat_template: str | None
) -> None:
    """Write all keys, in the order in which they end up in llama.cpp's files: its quantizer moves two of the converter's to the end."""
    import gguf

    kind = file_type(job.recipe)
    number = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    writer.add_type(gguf.GGUFType.MODEL)
    facts.set_gguf_meta_model(writer)
    _write_hyperparameters(writer, job.graph, sizes_by_layer=architecture(job.config).sizes_by_layer)
    if is_float(job.recipe):
        writer.add_file_type(number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tokenizer(writer, job.tokenizer, job.graph.dims.vocab_size, chat_template)
    if is_float(job.recipe):
        return
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(number)
    if imatrix is not None:
        writer.add_string("quantize.imatrix.file", imatrix.path.name[:127])  # llama-quantize cuts here too
        if imatrix.datasets:
            writer.add_string("quantize.imatrix.dataset", imatrix.datasets[0][:127])
        writer.add_uint32("quantize.imatrix.entries_count", len(imatrix.entries))
        if imatrix.chunks > 0:
            writer.add_uint32("quantize.imatrix.chunks_count", imatrix.chunks)


def is_float(recipe: Recipe) -> bool:
    """Whether no tensor is quantized: a file that llama.cpp's converter writes alone."""
    return all(isinstance(rule.scheme, Float) for rule in recipe.rules)


def _write_hyperparameters(writer: GGUFWriter, graph: Graph, *, sizes_by_layer: bool) -> None:
    """`<architecture>.*`, read off the graph: sizes of the layers, and the constants that its ops carry."""
    dims, (first, *_) = graph.dims, graph.dims.layers

    def sizes(by_layer: list[int]) -> Any:
        # Lists even where all layers are alike, as the converter does. gguf writes Python's integers as INT32.
        return by_layer if sizes_by_layer else by_layer[0]

    writer.add_block_count(len(dims.layers))
    writer.add_context_length(graph.context)
    writer.add_embedding_length(dims.model_dim)
    writer.add_feed_forward_length(sizes([layer.ffn_dim for layer in dims.layers]))
    writer.add_head_count(sizes([layer.query_heads for layer in dims.layers]))
    writer.add_head_count_kv(sizes([layer.kv_heads for layer in dims.layers]))
    writer.add_rope_freq_base(graph.rope_theta)
    writer.add_layer_norm_rms_eps(graph.attentions[0].attrs["eps"])
    if sizes_by_layer:
        writer.add_rope_dimension_count(dims.head_dim)
        writer.add_key_length(dims.head_dim)
        writer.add_value_length(dims.head_dim)
    if first.experts:
        writer.add_expert_count(first.experts)
        writer.add_expert_used_count(first.active_experts)
