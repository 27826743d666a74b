"""The `openai` client's typed outputs and tools: what the model writes must parse, however small the model."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.acceptance.servers import RunningServer


class Size(StrEnum):
    small = "small"
    large = "large"


class Part(BaseModel):
    name: str = Field(max_length=12)
    size: Size


class Machine(BaseModel):
    """A schema with nesting, lists, enums, bounds and an option."""

    title: str = Field(max_length=20)
    parts: list[Part] = Field(min_length=1, max_length=2)
    price: int = Field(ge=1, le=99)
    in_stock: bool
    note: Literal["new", "used"] | None


class Weather(BaseModel):
    """Get the weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


ASK: Any = [{"role": "user", "content": "Describe a bicycle."}]
ASK_WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris for 3 days?"}]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_parse_gives_a_model(client: openai.OpenAI, server: RunningServer, temperature: float) -> None:
    answer = client.chat.completions.parse(
        model=server.model,
        messages=ASK,
        response_format=Machine,
        temperature=temperature,
        seed=5,
        max_tokens=300,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Machine)
    assert Machine.model_validate_json(choice.message.content or "") == choice.message.parsed


def test_a_parsed_stream(client: openai.OpenAI, server: RunningServer) -> None:
    with client.chat.completions.stream(
        model=server.model, messages=ASK, response_format=Part, temperature=0, max_tokens=80
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Part)


def test_json_mode(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": 'Answer in JSON, for example {"a": 1}.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    text = answer.choices[0].message.content or ""
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:  # a small model may ramble on inside a string, but never outside of JSON
        assert text.lstrip().startswith("{")


def test_a_required_tool_is_called_with_valid_arguments(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.parse(
        model=server.model,
        messages=ASK_WEATHER,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        temperature=0,
        max_tokens=120,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert calls and all(call.function.name == "Weather" for call in calls)
    assert isinstance(calls[0].function.parsed_arguments, Weather)
    assert len({call.id for call in calls}) == len(calls)


def test_a_named_tool_streams_its_arguments(client: openai.OpenAI, server: RunningServer) -> None:
    request: Any = {
        "model": server.model,
        "messages": ASK_WEATHER,
        "tools": [openai.pydantic_function_tool(Weather)],
        "tool_choice": {"type": "function", "function": {"name": "Weather"}},
        "temperature": 0,
        "max_tokens": 120,
    }
    chunks = [
        chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True) if chunk.choices
    ]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    names = [call.function.name for call in deltas if call.function and call.function.name]
    pieces = [call.function.arguments or "" for call in deltas if call.function]
    assert names == ["Weather"] and deltas[0].id
    assert len(pieces) > 2, "the arguments should come piece by piece"
    Weather.model_validate_json("".join(pieces))
    # OpenAI ends a call of a named function with "stop", one of the model's own choice with "tool_calls".
    assert chunks[-1].finish_reason in ("stop", "tool_calls")


def test_the_answer_of_a_tool_goes_back_to_the_model(client: openai.OpenAI, server: RunningServer) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "Weather", "arguments": '{"city": "Paris", "days": 3}'},
    }
    messages: Any = [
        *ASK_WEATHER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    request: Any = {"model": server.model, "temperature": 0, "max_tokens": 8}
    asked = client.chat.completions.create(messages=ASK_WEATHER, **request)
    answer = client.chat.completions.create(
        messages=messages, tools=[openai.pydantic_function_tool(Weather)], tool_choice="none", **request
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    assert answer.usage is not None and asked.usage is not None
    assert answer.usage.prompt_tokens > asked.usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"guided_regex": r"[0-9]{3}-[0-9]{2}"}, r"[0-9]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["blue", "red"]}}, "blue|red"),
        ({"structured_outputs": {"regex": "(ab){2}c"}}, "ababc"),
    ],
)
def test_constraints_under_vllms_names(
    client: openai.OpenAI, server: RunningServer, body: dict[str, Any], pattern: str
) -> None:
    answer = client.completions.create(
        model=server.model, prompt="Answer:", max_tokens=20, temperature=1, seed=2, extra_body=body
    )
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"
