"""Timing of llama-cpp-python's own prompt lookup, `LlamaPromptLookupDecoding`, beside this project's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from elmexport.cores import asked_threads, available_cores
from elmexport.runtimes.llama_cpp import BATCH, engine, gguf_file

_F32 = 0  # ggml's number of the type


def time_own_lookup(path: Path, prompt: Sequence[int], tokens: int, context: int, *, count: int, ngram_size: int) -> dict[str, float]:
    """Time greedy decoding by llama-cpp-python's `Llama`, plainly and with its lookup: seconds of a token.

    Up to `tokens` tokens after `prompt`. Settings are those that generation has here: threads, batch, float32 keys and values, flash attention. The first token is not timed; up to
    `count` tokens are guessed in a step.
    """
    engine()  # whose messages are collected
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    threads = asked_threads() or available_cores()

    def timed(draft: LlamaPromptLookupDecoding | None) -> tuple[float, int]:
        settings = {"n_ctx": context, "n_batch": BATCH, "n_ubatch": BATCH, "n_threads": threads, "n_threads_batch": threads}
        model = Llama(str(gguf_file(path)), **settings, type_k=_F32, type_v=_F32, flash_attn=True, draft_model=draft, verbose=False)
        try:
            list(islice(model.generate(prompt, top_k=1, temp=0.0), tokens))  # as ours, once before the clock starts
            model.reset()
            found = model.generate(prompt, top_k=1, temp=0.0)
            next(found)  # with the prompt
            start = time.perf_counter()
            decoded = len(list(islice(found, tokens - 1)))
            return time.perf_counter() - start, decoded
        finally:
            model.close()

    plain_s, plain = timed(None)
    guessed_s, guessed = timed(LlamaPromptLookupDecoding(max_ngram_size=ngram_size, num_pred_tokens=count))
    return {"plain_s": plain_s / plain, "guessed_s": guessed_s / guessed}
