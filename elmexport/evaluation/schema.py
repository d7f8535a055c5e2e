"""The JSON Schema of a report, from its types."""

from __future__ import annotations

from typing import Any

import msgspec

from elmexport.evaluation.results import COMPARISON_KEYS, SCHEMA, Report


def report_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what `Report.to_json` writes: every key is present."""
    schema = msgspec.json.schema(Report)
    definitions = schema["$defs"]
    for definition in definitions.values():
        definition["required"] = list(definition["properties"])
        for described in definition["properties"].values():
            described.pop("default", None)
    definitions["Report"]["properties"]["schema"] = {"const": SCHEMA}
    compared = definitions.pop("TaskComparison")["properties"]
    task = definitions["TaskResult"]
    # A task is flat in the document: its metrics, whose names differ from task to task, and the comparison lie beside its other keys.
    own = {key: value for key, value in task["properties"].items() if key not in ("metrics", "comparison")}
    nullable = {key: {"anyOf": [compared[key], {"type": "null"}]} for key in COMPARISON_KEYS}
    task |= {"properties": own | nullable, "required": [*own, *nullable], "additionalProperties": {"type": "number"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
