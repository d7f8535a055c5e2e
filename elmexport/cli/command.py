"""A command whose help page puts its options under headings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# Headings that commands share; others are named where their options are.
MODEL, QUANTIZATION, OUTPUT, GUESSING = "Model", "Quantization", "Output", "Speculative decoding"
_WIDEST = 30  # characters of an option's name that still has its help beside it; click's own


class Command(TyperCommand):
    """Command that lists its options by `rich_help_panel`, in the order in which the panels first come; those without one are last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or own, []).append(record)
        if "Options" in sections:
            sections["Options"] = sections.pop("Options")
        widest = min(max(len(name) for rows in sections.values() for name, _ in rows), _WIDEST)  # --help is always there
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{widest}}", text) for name, text in rows])  # one column for all sections
