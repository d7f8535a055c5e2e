"""Options that `elmexport eval` and `elmexport report` share: tasks, items, text, reference."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.cli.command import MODEL
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.evaluation.evaluate import Settings

TASKS, TEXT = "Tasks", "Text"  # headings on help pages


class Preset(StrEnum):
    """The values of --preset."""

    ZERO_SHOT = "zero-shot"
    LLM360 = "llm360"
    OPENLLM = "openllm"
    OLMES = "olmes"


Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="lm-eval's tasks by name, with commas; of --preset, only these. none: the text only. [default: cloze]",
        rich_help_panel=TASKS,
    ),
]
PresetName = Annotated[
    Preset | None, typer.Option(help="The tasks of one of the published tables, with its few-shot examples.", rich_help_panel=TASKS)
]
Fewshot = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Few-shot examples before each question. [default: the task's own number]", rich_help_panel=TASKS
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Documents of each task: a random choice, the same for every artifact.", rich_help_panel=TASKS),
]
Seed = Annotated[int, typer.Option(min=0, metavar="SEED", help="Of the choice that --limit makes.", rich_help_panel=TASKS)]
Against = Annotated[
    str,
    typer.Option(
        metavar="fp16|PATH|none", help="What to compare with: the model itself, another artifact of it, or nothing.", rich_help_panel=MODEL
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder with the tasks' rows, NAME.SPLIT.jsonl. [default: the Hugging Face hub]", rich_help_panel=TASKS
    ),
]
TextFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text for perplexity and KL divergence. [default: bundled prose]", rich_help_panel=TEXT)
]
TextTokens = Annotated[
    int, typer.Option(min=0, metavar="N", help="Tokens of the text to read at most; 0: do not read it.", rich_help_panel=TEXT)
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="tokenizer.model or tokenizer.json. [default: the artifact's own]", rich_help_panel=MODEL),
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
