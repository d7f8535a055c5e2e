"""A random model with the vocabulary of `tiny` and a context that holds 25 examples, as lm-eval's backend runs it and as we do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.lm import RuntimeLM
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.torch import TorchRuntime
from tests.evaluation.lm_eval_backend import backend
from tests.memory_checkpoint import random_checkpoint

CONTEXT = 2048
EOS = 2


@dataclass(frozen=True)
class Wide:
    backend: HFLM
    lm: RuntimeLM

    @classmethod
    def make(cls, folder: Path) -> Wide:
        """Write the model into `folder` and open it both ways. Its row of EOS is long, so that it ends its texts early."""
        config = open_checkpoint("tiny").config
        config = replace(config, max_context_length=CONTEXT, rope_max_length=2 * CONTEXT, num_transformer_layers=2)
        arrays = random_checkpoint(config).arrays
        arrays["transformer.token_embeddings.weight"][EOS] *= 4
        save_checkpoint(folder, config, {name: torch.from_numpy(array) for name, array in arrays.items()})
        lm = RuntimeLM(TorchRuntime(open_checkpoint(str(folder))), load_tokenizer(TINY_FOLDER / "tokenizer.model"))
        return cls(backend(folder, folder), lm)
