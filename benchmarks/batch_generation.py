"""Many prompts decoded at once against one after the other: the same texts, in one process, in turns.

    python benchmarks/batch_generation.py [--model tiny] [--subjects checkpoint "gguf int4" "gguf q8_0"] [--prompts 16] [--tokens 64] [--rounds 3]

Exports the model, continues as many of the bundled prompts (from the first again where there are not enough), greedily. The texts are compared.
Figures are medians of the rounds, after a first that is not counted; CPU seconds are of all threads. One thread unless ELMEXPORT_THREADS and
OMP_NUM_THREADS say otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
os.environ.setdefault("ELMEXPORT_THREADS", "1")

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.exporting import export_checkpoint
from elmexport.runtimes.prompts import bundled_prompts
from elmexport.runtimes.text import Completion, TextModel, TextOptions, open_text_model
from elmexport.runtimes.torch import TorchRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--random-weights", type=int, metavar="SEED")
    parser.add_argument("--subjects", nargs="+", default=["checkpoint", "gguf int4", "gguf q8_0"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model, random_weights=given.random_weights)
    with tempfile.TemporaryDirectory() as folder:
        for subject in given.subjects:
            model = open_subject(subject, checkpoint, Path(folder))
            compare(subject, model, given.prompts, given.tokens, given.rounds)
            model.close()


def open_subject(subject: str, checkpoint: Checkpoint, folder: Path) -> TextModel:
    if subject == "checkpoint":
        tokenizer = open_tokenizer(checkpoint)
        assert tokenizer is not None, "the model has no tokenizer"
        return TextModel(subject, TorchRuntime(checkpoint), tokenizer)
    target, quant = subject.split()
    return open_text_model(export_checkpoint(checkpoint, target, quant, out=folder / subject.replace(" ", "-"), verify=False).path)


def compare(subject: str, model: TextModel, count: int, tokens: int, rounds: int) -> None:
    prompts = [model.encode(prompt) for prompt in islice(cycle(bundled_prompts()), count)]
    options, notes = TextOptions(tokens), list[str]()
    ways: dict[str, Callable[[], Sequence[Completion]]] = {
        "one by one": lambda: [model.complete_ids(ids, options) for ids in prompts],
        "at once": lambda: list(model.complete_many(prompts, options, note=notes.append)),
    }
    texts = [[one.tokens for one in way()] for way in ways.values()]
    assert texts[0] == texts[1], "the texts differ"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = ({name: statistics.median(pair[i] for pair in pairs) for name, pairs in times.items()} for i in (0, 1))
    generated = sum(map(len, texts[0]))
    for name in ways:
        print(f"{subject:<12} {name:<10} {generated} tokens  wall {walls[name]:7.3f} s  CPU {cpus[name]:7.3f} s", end="  ")
        print(f"{walls['one by one'] / walls[name]:5.2f} x wall {cpus['one by one'] / cpus[name]:5.2f} x CPU", flush=True)
    for note in dict.fromkeys(notes):
        print(f"note: {subject}: {note}")


if __name__ == "__main__":
    main()
