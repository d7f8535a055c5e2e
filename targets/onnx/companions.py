"""Companion files of the model, by which other runtimes open the folder: transformers.js, onnxruntime-genai, optimum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elmexport.contracts.onnx import ATTENTION_MASK, INPUT_IDS, LOGITS, past, present
from elmexport.target import ExportJob


def write_companions(job: ExportJob, model: Path, folder: Path) -> None:
    """Write `generation_config.json` and `genai_config.json`; `model` is the `.onnx` file inside `folder`."""
    _write(folder / "generation_config.json", {**job.special_ids, "do_sample": False})
    _write(folder / "genai_config.json", _genai(job, model.relative_to(folder).as_posix()))


def _genai(job: ExportJob, filename: str) -> dict[str, Any]:
    """onnxruntime-genai's description of a decoder. Head counts differ from layer to layer: it reads them off the graph and takes these
    only where a graph leaves them open, so the largest stand here."""
    dims = job.graph.dims
    return {
        "model": {
            "type": "decoder",
            **job.special_ids,
            "context_length": job.graph.context,
            "vocab_size": dims.vocab_size,
            "decoder": {
                "filename": filename,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": dims.head_dim,
                "hidden_size": dims.model_dim,
                "num_attention_heads": max(layer.query_heads for layer in dims.layers),
                "num_key_value_heads": max(layer.kv_heads for layer in dims.layers),
                "num_hidden_layers": len(dims.layers),
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": past("%d", "key"),
                    "past_value_names": past("%d", "value"),
                },
                "outputs": {"logits": LOGITS, "present_key_names": present("%d", "key"), "present_value_names": present("%d", "value")},
            },
        },
        "search": {"do_sample": False, "max_length": job.graph.context, "past_present_share_buffer": True},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
