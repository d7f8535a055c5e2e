"""Options that `elmexport eval` and `elmexport report` share: tasks, items, text, reference."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.evaluation.evaluate import Settings


class Preset(StrEnum):
    """The values of --preset."""

    ZERO_SHOT = "zero-shot"
    LLM360 = "llm360"
    OPENLLM = "openllm"
    OLMES = "olmes"


Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="lm-eval's tasks by name, with commas; of --preset, only these. none: the text only. [default: cloze]"
    ),
]
PresetName = Annotated[Preset | None, typer.Option(help="The tasks of one of the published tables, with its few-shot examples.")]
Fewshot = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Few-shot examples before each question. [default: the task's own number]")
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Documents of each task: a random choice, the same for every artifact.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="SEED", help="Of the choice that --limit makes.")]
Against = Annotated[
    str,
    typer.Option(metavar="fp16|PATH|none", help="What to compare with: the model itself, another artifact of it, or nothing."),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with the tasks' rows, NAME.SPLIT.jsonl. [default: the Hugging Face hub]"),
]
TextFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Text for perplexity and KL divergence. [default: bundled prose]")]
TextTokens = Annotated[int, typer.Option(min=0, metavar="N", help="Tokens of the text to read at most; 0: do not read it.")]
TokenizerFile = Annotated[
    Path | None, typer.Option(metavar="PATH", help="tokenizer.model or tokenizer.json. [default: the artifact's own]")
]


def settings(
    tasks: str | None,
    preset: Preset | None,
    fewshot: int | None,
    limit: int | None,
    seed: int,
    data: Path | None,
    text: Path | None,
    text_tokens: int,
) -> Settings:
    """Settings of an evaluation from these options.

    Raises:
        ElmExportError: options that contradict each other, or a task that nobody knows.
    """
    from elmexport.evaluation.evaluate import Settings
    from elmexport.evaluation.tasks.presets import chosen_tasks
    from elmexport.evaluation.tasks.suite import check_names

    if text is not None and not text_tokens:
        raise ElmExportError(f"--text {text} with --text-tokens 0 reads nothing; leave one of them out")
    chosen = chosen_tasks(tasks, None if preset is None else preset.value, fewshot)
    check_names(list(chosen))
    return Settings(chosen, limit, seed, data, text, text_tokens)
