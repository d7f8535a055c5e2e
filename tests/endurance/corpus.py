"""Sound files of every kind that elmexport reads, of a model of 300,000 parameters: what the mutations begin with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from elmexport.cli.main import main
from elmexport.models.openelm.config import OpenELMConfig

EXPORTS: Mapping[str, tuple[str, str]] = {
    "gguf": ("gguf", "q4_k_m"),
    "onnx": ("onnx", "int4"),
    "coreml": ("coreml", "int8"),
    "mlx": ("mlx", "int4"),
}
TEMPLATE = "{{ bos_token }}{% for one in messages %}[{{ one['role'] }}]{{ one['content'] }}{% endfor %}[assistant]"
RECIPE = """name = "mine"
words = "mine, 4-bit blocks"
activations = "fp32"
norms = "fp32"
scales = "fp16"
fallback = "fp16"
max_self_check_kl = 20.0

[[rule]]
roles = ["embedding", "lm_head"]
scheme = "int8-block32"

[[rule]]
layers = "0-3"
scheme = "int4-block32"

[[rule]]
scheme = "int4-block32"
"""
ROWS = {
    "arc_easy.test.jsonl": {
        "id": "a",
        "question": "Which is wet?",
        "choices": {"text": ["water", "sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "piqa.validation.jsonl": {"goal": "To boil water", "sol1": "heat it.", "sol2": "cool it.", "label": 0},
}


def run(*arguments: str) -> int:
    """Run a command in this process; its exit code."""
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main ends with SystemExit")


def small_config() -> OpenELMConfig:
    """One layer, two heads, 512 tokens."""
    return OpenELMConfig(
        vocab_size=512,
        max_context_length=64,
        rope_max_length=128,
        num_transformer_layers=1,
        model_dim=256,
        head_dim=32,
        num_gqa_groups=1,
        qkv_multipliers=(0.25,),
        ffn_multipliers=(0.5,),
        ffn_dim_divisor=32,
        normalize_qk_projections=True,
        share_input_output_layers=True,
    )


def build(root: Path) -> None:
    """Make the corpus in `root`: a folder a kind of file."""
    import torch

    from elmexport.checkpoint.save import save_checkpoint
    from tests.memory_checkpoint import random_checkpoint
    from tests.small_tokenizer import train_tokenizer

    model = root / "model"
    config = small_config()
    source = random_checkpoint(config)
    tensors = {name: source.read(name) for name in source.specs}
    save_checkpoint(model, config, tensors)
    (model / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": False}))
    train_tokenizer(model)
    (model / "tokenizer.vocab").unlink()
    for name, (target, quant) in EXPORTS.items():
        assert run(target, "--model", str(model), "--quant", quant, "--out", str(root / name), "--no-verify", "--calibrate", "none") == 0
    shutil.copytree(root / "gguf", root / "manifest")
    json_model = root / "json"
    shutil.copytree(model, json_model)
    (json_model / "tokenizer.model").unlink()
    shutil.copy(root / "onnx" / "tokenizer.json", json_model)
    beside = root / "beside"
    shutil.copytree(json_model, beside)
    (beside / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE, "added_tokens_decoder": {"511": {"content": "|", "special": False}}})
    )  # fmt: skip
    (beside / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<s>"], "pad_token": "</s>"}))
    (beside / "added_tokens.json").write_text(json.dumps({}))
    (beside / "chat_template.jinja").write_text(TEMPLATE)
    save_checkpoint(root / "shards", config, tensors, shards=3)
    for name, file in (("pt", "model.pt"), ("bin", "pytorch_model.bin")):
        (root / name).mkdir()
        shutil.copy(model / "config.json", root / name)
        torch.save(tensors if name == "bin" else {"model_state_dict": tensors, "epoch": 1}, root / name / file)
    for name in ("shards", "pt", "bin"):
        shutil.copy(model / "tokenizer.model", root / name)
    for name in ("recipe", "statistics", "weights", "imatrix", "report", "rows"):
        (root / name).mkdir()
    (root / "recipe" / "mine.toml").write_text(RECIPE)
    statistics = str(root / "statistics" / "a.safetensors")
    text = root / "text.txt"
    text.write_text((files("calibration") / "texts" / "weighting.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    imatrix = str(root / "imatrix" / "a.gguf")
    common = ("--model", str(model), "--text", str(text), "--tokens", "256", "--window", "64", "--hessian")
    assert run("calibrate", *common, "--out", statistics, "--imatrix", imatrix) == 0
    options = ("--quant", "int4", "--method", "gptq", "--calibrate", statistics, "--save-weights", str(root / "weights" / "a.safetensors"))
    assert run("gguf", "--model", str(model), *options, "--out", str(root / "calibrated"), "--no-verify") == 0
    for file, row in ROWS.items():
        (root / "rows" / file).write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    options = ("--against", "none", "--tokenizer", str(model / "tokenizer.model"), "--text-tokens", "64")
    report = ("--data", str(root / "rows"), "--tasks", "arc_easy,piqa", "--report", str(root / "report" / "a.json"))
    assert run("eval", str(root / "onnx"), *report, *options) == 0
