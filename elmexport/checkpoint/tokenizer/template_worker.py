"""Process that renders chat templates: a request a line on standard input, an answer a line on standard output, both JSON.

A template comes with a model, from anywhere. Jinja2's sandbox keeps it from files and from Python; that it ends, and in little memory, nothing
in the same process could make sure of. Run as a file: it imports Jinja2 and nothing of elmexport.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space
LONGEST = 1 << 22  # characters of a prompt


class Generation(Extension):
    """`{% generation %}`, which marks what an assistant says and changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's own class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: dict[str, Any], now: datetime) -> str:
    """Render `template` as transformers does.

    Raises:
        Exception: whatever a template's text leads to.
    """
    parts, length = [], 0
    for part in _environment(now.strftime).from_string(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise ValueError(f"it makes a prompt of more than {LONGEST} characters")
    text = "".join(parts)
    text.encode("utf-8")  # half of a surrogate pair is no text
    return text


def _environment(strftime: Callable[[str], str]) -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": strftime}
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(request["template"], request["variables"], datetime.fromisoformat(request["now"]))}
    except TemplateError as error:
        return {"error": ((error.message or "").splitlines() or [type(error).__name__])[0]}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main() -> None:
    """Answer until the input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
