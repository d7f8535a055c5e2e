"""A mixture of experts scored through onnxruntime, and by lm-eval's own Hugging Face backend over transformers' class: the same items are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.evaluation.lm import RuntimeLM
from elmexport.models.olmoe.catalog import TINY_FOLDER
from elmexport.runtimes import open_artifact
from tests.conftest import ExportTo
from tests.evaluation.lm_eval_backend import ROWS, stock_results
from tests.evaluation.test_against_lm_eval import assert_same_items, our_results

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")


@pytest.mark.slow
def test_accuracies_are_lm_eval_s(export_to: ExportTo, tmp_path: Path) -> None:
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

    model = OlmoeForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TINY_FOLDER / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    theirs = stock_results(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), TASKS, 0)
    checkpoint = open_checkpoint("tiny-moe")
    own = open_tokenizer(checkpoint)
    assert own is not None
    mine = our_results(RuntimeLM(open_artifact(export_to(checkpoint, "onnx", "fp32")), own), dict.fromkeys(TASKS, 0), ROWS)
    for name in TASKS:
        assert mine[name].metrics["acc"] == theirs["results"][name]["acc,none"]
        assert_same_items(mine[name], theirs["samples"][name], 0)
