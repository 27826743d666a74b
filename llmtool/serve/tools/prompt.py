"""Messages and tools as the chat template wants them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmtool.errors import RequestError
from llmtool.serve.protocol.chat import ChatMessage, Tool, ToolCall

# For templates that know nothing of tools: the Hermes convention, which most models have seen.
_INSTRUCTIONS = """You can call these functions:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON inside <tool_call></tool_call> tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Plain dicts with string contents and parsed call arguments. Raises RequestError naming the message."""
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(number: int, message: ChatMessage) -> dict[str, Any]:
    where = f"messages[{number}]"
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": _text(message, where)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if role != "assistant":
            raise RequestError(
                f"{where}.tool_calls: only the assistant calls tools.", param=f"{where}.tool_calls"
            )
        result["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    elif message.content is None and role != "assistant":
        raise RequestError(
            f"{where}.content: a {message.role} message needs content.", param=f"{where}.content"
        )
    for key, value in (message.model_extra or {}).items():
        result.setdefault(key, value)  # templates read more than OpenAI's fields, as reasoning_content
    return result


def _text(message: ChatMessage, where: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    parts = []
    for i, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            what = f"{where}.content[{i}]"
            raise RequestError(
                f"{what}: this model reads text only, not a part of type {part.type!r}.", param=what
            )
        parts.append(part.text)
    return "\n".join(parts)


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            what = f"{where}.function.arguments"
            raise RequestError(f"{what}: this should be JSON in a string.", param=what) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
        for tool in tools
    ]


def with_instructions(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`messages` with the tools described in the system message, and calls and results spelled out as text."""
    described = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    plain = spelled_out(messages)
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{described}"}, *plain[1:]]
    return [{"role": "system", "content": described}, *plain]


def spelled_out(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with calls and results as text, for templates that show neither."""
    return [_plain(message) for message in messages]


def without_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {"role": "assistant", "content": text}
