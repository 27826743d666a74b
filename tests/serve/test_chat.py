from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from llmtool.config import ServerConfig
from llmtool.core.request import Grammar
from llmtool.runtime.structured import grammar_source, grammar_tokenizer
from tests.serve.conftest import Client, Connect, says
from tests.serve.fake import CHATML, PLAIN_CHATML, tiny_tokenizer

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NODE = {
    "type": "function",
    "function": {
        "name": "insert",
        "parameters": {
            "type": "object",
            "properties": {"node": {"$ref": "#/$defs/node"}},
            "required": ["node"],
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                    "required": ["value"],
                    "additionalProperties": False,
                }
            },
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def prompt_of(client: Client) -> str:
    return tiny_tokenizer().decode(client.engine.added[-1].prompt, skip_special_tokens=False)


async def test_an_answer(connect: Connect) -> None:
    async with connect(says("The quick brown fox")) as client:
        answer = await client.chat("Hi", model="tiny")
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "The quick brown fox", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert prompt_of(client) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert client.engine.added[0].params.max_tokens is None  # up to the context's end


async def test_messages_of_every_role_and_shape(connect: Connect) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "Weather?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    async with connect() as client:
        await client.chat(messages=messages)
    assert prompt_of(client) == (
        "<|im_start|>system\nBe\nkind<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_the_engine_hears_where_messages_end(connect: Connect) -> None:
    messages = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant", "user")]
    async with connect(says("x")) as client:
        await client.http.post(URL, json={"model": "tiny", "messages": messages})
        await client.http.post(URL, json={"model": "tiny", "messages": messages[1:] * 5})
    first, second = client.engine.added
    assert first.params.cache_hints == tuple(at + 1 for at, token in enumerate(first.prompt) if token == 2)
    assert len(first.params.cache_hints) == 4
    ends = [at + 1 for at, token in enumerate(second.prompt) if token == 2]
    assert len(ends) == 15 and second.params.cache_hints == (*ends[:4], *ends[-4:])


async def test_template_options(connect: Connect) -> None:
    async with connect() as client:
        await client.chat(add_generation_prompt=False)
        assert prompt_of(client) == "<|im_start|>user\nHello<|im_end|>\n"
        begun = [*USER, {"role": "assistant", "content": "Once upon"}]
        answer = await client.chat(messages=begun, continue_final_message=True, echo=True)
        assert prompt_of(client).endswith("<|im_start|>assistant\nOnce upon")
        assert answer["choices"][0]["message"]["content"] == "Once uponThe quick brown fox"


async def test_streaming_in_openais_order(connect: Connect) -> None:
    async with connect(says("one two three")) as client:
        chunks = await client.events(URL, messages=USER, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *deltas, end, usage = chunks[1:]
    assert "".join(c["choices"][0]["delta"]["content"] for c in deltas) == "one two three"
    assert all(c["choices"][0]["finish_reason"] is None for c in deltas)
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 3
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


async def test_several_answers_stream_with_a_role_each(connect: Connect) -> None:
    async with connect(says("one", "two", "three")) as client:
        chunks = await client.events(URL, messages=USER, n=3)
    for index, text in enumerate(("one", "two", "three")):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"
        assert "".join(c["delta"].get("content", "") for c in mine) == text


async def test_logprobs_whole_and_streamed(connect: Connect) -> None:
    async with connect(says("é")) as client:
        answer = await client.chat(logprobs=True, top_logprobs=2)
        chunks = await client.events(URL, messages=USER, logprobs=True, top_logprobs=2)
        none = await client.chat(logprobs=True)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [c["bytes"] for c in content] == [[0xC3], [0xA9], list(b"<|im_end|>")]
    assert [len(c["top_logprobs"]) for c in content] == [2, 2, 2]
    streamed = [entry for c in chunks if (lp := c["choices"][0]["logprobs"]) for entry in lp["content"]]
    assert streamed == content
    assert [c["top_logprobs"] for c in none["choices"][0]["logprobs"]["content"]] == [[], [], []]


async def test_max_completion_tokens_wins_over_max_tokens(connect: Connect) -> None:
    async with connect() as client:
        answer = await client.chat(max_completion_tokens=2, max_tokens=4)
    assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"


async def test_structured_output_becomes_a_grammar(connect: Connect) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    cases: list[tuple[dict[str, Any], Grammar | None]] = [
        ({"response_format": wrapped}, Grammar("json_schema", json.dumps(schema))),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "{}")),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": schema}}, Grammar("json_schema", json.dumps(schema))),
        ({"structured_outputs": {"json": json.dumps(schema)}}, Grammar("json_schema", json.dumps(schema))),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, Grammar("choice", '["yes", "no"]')),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, Grammar("lark", 'start: "x"')),
        ({"guided_choice": ["yes", "no"]}, Grammar("choice", '["yes", "no"]')),
        ({"guided_json": schema}, Grammar("json_schema", json.dumps(schema))),
    ]
    async with connect(config=ServerConfig(allow_lark=True)) as client:
        for fields, grammar in cases:
            await client.chat(**fields)
            assert client.engine.added[-1].params.grammar == grammar


async def test_tools_are_shown_and_calls_are_found(connect: Connect) -> None:
    async with connect(says(f"I look.\n{CALL}")) as client:
        answer = await client.chat(tools=[WEATHER])
        assert json.dumps(WEATHER) in prompt_of(client)
        hidden = await client.chat(tools=[WEATHER], tool_choice="none")
        assert "get_weather" not in prompt_of(client)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "I look." and choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert hidden["choices"][0]["message"]["content"] == f"I look.\n{CALL}"
    assert hidden["choices"][0]["finish_reason"] == "stop"


async def test_a_template_without_tools_gets_them_in_the_system_message(connect: Connect) -> None:
    async with connect(says(CALL), tokenizer=tiny_tokenizer(PLAIN_CHATML)) as client:
        history = [
            {"role": "system", "content": "Be kind."},
            *USER,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        ]
        answer = await client.chat(messages=history, tools=[WEATHER])
    prompt = prompt_of(client)
    assert prompt.startswith("<|im_start|>system\nBe kind.\n\n") and json.dumps(WEATHER["function"]) in prompt
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\nok\n</tool_response>" in prompt
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize(
    "template", [PLAIN_CHATML.partition("{%- for call")[0] + "<|im_end|>\n{% endfor %}", CHATML]
)
async def test_calls_of_the_history_are_kept_without_tools(connect: Connect, template: str) -> None:
    history = [
        *USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    async with connect(says("yes"), tokenizer=tiny_tokenizer(template)) as client:
        await client.chat(messages=history)
    prompt = prompt_of(client)
    assert prompt.count('{"name": "f", "arguments": {"x": 1}}') == 1 and "ok" in prompt
    # A template that shows calls is left to it; ours writes them without line breaks.
    assert ("<tool_call>\n" in prompt) == (template != CHATML)


async def test_a_forced_call_that_is_cut_off_leaves_no_text(connect: Connect) -> None:
    said = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
    total = len(tiny_tokenizer().encode(said))
    async with connect(says(said)) as client:
        for tokens in range(1, total):
            answer = await client.chat(tools=[WEATHER], tool_choice="required", max_tokens=tokens)
            (choice,) = answer["choices"]
            assert (choice["finish_reason"], choice["message"]["content"] or "") == ("length", "")
            chunks = await client.events(
                URL, messages=USER, tools=[WEATHER], tool_choice="required", max_tokens=tokens
            )
            assert not any(c["choices"][0]["delta"].get("content") for c in chunks)


async def test_streamed_calls_assemble_to_the_whole(connect: Connect) -> None:
    async with connect(says(f"Hm. {CALL}\n{CALL}")) as client:
        chunks = await client.events(URL, messages=USER, tools=[WEATHER])
    deltas = [c["choices"][0]["delta"] for c in chunks]
    parts = [call for d in deltas for call in d.get("tool_calls", [])]
    for index in (0, 1):
        first, *rest = [p for p in parts if p["index"] == index]
        assert first["function"] == {"name": "get_weather", "arguments": ""} and first["type"] == "function"
        assert "".join(p["function"]["arguments"] for p in rest) == '{"city": "Paris"}'
    assert "".join(d.get("content", "") for d in deltas) == "Hm."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_named_tool_is_held_to_its_schema(connect: Connect) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    async with connect(says('{"city": "Oslo"}')) as client:
        answer = await client.chat(tools=[NODE, WEATHER], tool_choice=choice)
        grammar = client.engine.added[0].params.grammar
        chunks = await client.events(URL, messages=USER, tools=[WEATHER], tool_choice=choice)
    assert grammar == Grammar("json_schema", json.dumps(WEATHER["function"]["parameters"]))
    message = answer["choices"][0]["message"]
    assert message["content"] is None and answer["choices"][0]["finish_reason"] == "stop"
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    parts = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(p["function"]["arguments"] for p in parts) == '{"city": "Oslo"}'


async def test_required_tools_constrain_to_valid_calls(connect: Connect) -> None:
    """The grammar accepts exactly the calls whose arguments fit, also through the tools' own references."""
    said = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'
    async with connect(says(said)) as client:
        answer = await client.chat(tools=[WEATHER, NODE], tool_choice="required")
        grammar = client.engine.added[0].params.grammar
        await client.chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
        single = client.engine.added[1].params.grammar
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    nested = '[{"name": "insert", "arguments": {"node": {"value": 1, "next": {"value": 2}}}}]'
    wrong = '[{"name": "insert", "arguments": {"node": {"value": 1, "next": {"value": "2"}}}}]'
    assert accepts(grammar, said) and accepts(grammar, nested)
    assert (
        not accepts(grammar, wrong) and not accepts(grammar, "[]") and not accepts(grammar, '[{"name": "no"')
    )
    two = said[:-1] + ", " + said[1:]
    assert accepts(grammar, two) and accepts(single, said) and not accepts(single, two)


def accepts(grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    tokenizer = grammar_tokenizer(tiny_tokenizer().backend.to_str(), 320, (2,))
    matcher = LLMatcher(tokenizer, grammar_source(grammar), log_level=0)
    return all(matcher.consume_token(t) for t in tiny_tokenizer().encode(text)) and matcher.is_accepting()


async def test_a_constraint_on_the_answer_switches_call_finding_off(connect: Connect) -> None:
    said = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    async with connect(says(said)) as client:
        answer = await client.chat(tools=[WEATHER], response_format={"type": "json_object"})
    assert answer["choices"][0]["message"]["content"] == said


async def test_a_call_cut_by_length_says_length(connect: Connect) -> None:
    async with connect(says(CALL)) as client:
        cut = len(tiny_tokenizer().encode(CALL)) - 20
        answer = await client.chat(tools=[WEATHER], max_tokens=cut)
    assert answer["choices"][0]["finish_reason"] == "length"
