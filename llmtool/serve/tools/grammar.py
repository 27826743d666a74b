"""tool_choice required or named as a JSON schema, so that the call is valid JSON for the tool's parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmtool.core.request import Grammar
from llmtool.serve.protocol.chat import FunctionDefinition

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def named_grammar(function: FunctionDefinition) -> Grammar:
    """The output is the call's arguments and nothing else."""
    return Grammar("json_schema", json.dumps(function.parameters or _ANY_OBJECT))


def required_grammar(functions: Sequence[FunctionDefinition], parallel: bool) -> Grammar:
    """The output is a list of {"name", "arguments"}, one or more of them (exactly one without `parallel`).

    Each tool's parameters move to the schema's $defs whole, so their own references still resolve.
    """
    calls, definitions = [], {}
    for number, function in enumerate(functions):
        place = f"tool_{number}"
        definitions[place] = _moved(function.parameters or _ANY_OBJECT, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if not parallel:
        schema["maxItems"] = 1
    return Grammar("json_schema", json.dumps(schema))


def _moved(schema: Any, place: str) -> Any:
    """`schema` with references to its own root rewritten for its new place. The body's parser bounds the depth."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved(value, place) for value in schema]
    return schema
