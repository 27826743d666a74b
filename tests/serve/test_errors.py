"""Every bad request gets a 4xx, OpenAI's envelope and a sentence that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from llmtool.config import ServerConfig
from llmtool.errors import EngineDead
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.protocol.completions import CompletionRequest
from tests.serve.conftest import Connect, error_of
from tests.serve.fake import CHATML, tiny_tokenizer

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
DEEP: Any = {}
for _ in range(150):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [[1, True]]}, "prompt[0][1]", "valid integer"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [320]}, "prompt", "Token id 320 is not in the vocabulary of 320"),
        ({"prompt": [5] * 512}, "prompt", "maximum context length is 512 tokens, the prompt alone has 512"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal to"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 10**6}, "n", "less than or equal to 128"),
        ({"n": 2, "temperature": 0}, "n", "greedy"),
        ({"prompt": ["a"] * 40, "n": 128}, "n", "5120 answers"),
        ({"best_of": 2, "n": 3}, "best_of", "must not be smaller than n"),
        ({"best_of": 2, "stream": True}, "stream", "best_of > n cannot be streamed"),
        ({"use_beam_search": True, "logprobs": 1}, "logprobs", "no logprobs"),
        ({"use_beam_search": True, "stream": True}, "stream", "cannot be streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e300}, "temperature", "less than or equal to 100"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"use_beam_search": True, "length_penalty": -100}, "length_penalty", "greater than or equal to -10"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "must not exceed"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048 items"),
        ({"prompt": [[1]] * 2049}, "prompt", "at most 2048 items"),
        ({"logit_bias": [1]}, "logit_bias", "JSON object"),
        ({"logit_bias": {"0": "x"}}, "logit_bias", "numbers"),
        ({"logit_bias": {str(i): "x" for i in range(1025)}}, "logit_bias", "at most 1024 items, not 1025"),
        ({"prompt": [[5] * 200] * 4, "prompt_logprobs": 100}, "prompt_logprobs", "each of 800 prompt tokens"),
        ({"prompt": [[5] * 200] * 4, "echo": True, "logprobs": 100}, "prompt_logprobs", "each of 800"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"320": 1}}, "logit_bias", "vocabulary"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids", "vocabulary"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["a"] * 65}, "stop", "at most 64 items"),
        ({"logprobs": 101}, "logprobs", "less than or equal to 100"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1 or positive"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema.schema"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "structured_outputs", "--allow-lark"),
        ({"guided_grammar": "start: /a/"}, "structured_outputs", "--allow-lark"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "Only one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "needs one of"),
        ({"guided_json": "{"}, "structured_outputs", "not JSON"),
        ({"guided_json": {"type": "nonsense"}}, "response_format", "grammar cannot be used"),
        ({"guided_json": {"$ref": "#"}}, "response_format", "grammar cannot be used"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "response_format", "grammar cannot be used"),
        ({"use_beam_search": True, "guided_choice": ["a"]}, "structured_outputs", "beam search"),
        ({"use_beam_search": True, "response_format": {"type": "json_object"}}, "response_format", "beam search"),
        ({"use_beam_search": True, "top_k": 5}, "top_k", "beam search"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature", "beam search"),
        ({"use_beam_search": True, "prompt_logprobs": 1}, "prompt_logprobs", "beam search"),
        ({"prompt": ["a"] * 20, "n": 60}, "n", "1200 answers"),
    ],
)  # fmt: skip
async def test_bad_completions(connect: Connect, fields: dict[str, Any], param: str, words: str) -> None:
    async with connect() as client:
        error = await client.refused(COMPLETIONS, **{"prompt": "Hello", **fields})
        assert not client.engine.running
    assert error["param"] == param and words in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hello"}, "messages", "valid list"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0]", "reads text only"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
         "messages[0].tool_calls", "only the assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "maximum context length"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", "'required'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": 5}}}], "tool_choice": "required"},
         "tools", "grammar cannot be used"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "cannot be streamed"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set messages"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "may not set self"),
    ],
)  # fmt: skip
async def test_bad_chats(connect: Connect, fields: dict[str, Any], param: str, words: str) -> None:
    async with connect() as client:
        error = await client.refused(CHAT, **{"messages": USER, **fields})
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON object"),
        (b"{", "EOF"),
        (b'{"prompt": "a",}', "trailing comma"),
        (b'{"prompt": "\xff\xfe"}', "unicode"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "recursion limit"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
    ],
)
async def test_bodies_that_are_not_good_json(connect: Connect, body: bytes, words: str) -> None:
    async with connect() as client:
        response = await client.http.post(
            COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400
    assert words in error_of(response)["message"]


async def test_deep_schemas_are_answered_one_way_or_the_other(connect: Connect) -> None:
    async with connect() as client:
        response = await client.post(COMPLETIONS, {"prompt": "a", "guided_json": DEEP})
    assert response.status_code in (200, 400)


async def test_a_body_that_is_not_declared_json(connect: Connect) -> None:
    async with connect() as client:
        response = await client.http.post(COMPLETIONS, content=json.dumps({"prompt": "a"}))
    assert response.status_code == 415 and "application/json" in error_of(response)["message"]


async def test_unknown_model(connect: Connect) -> None:
    async with connect() as client:
        for path in (COMPLETIONS, CHAT):
            error = await client.refused(path, 404, model="gpt-4", prompt="a", messages=USER)
            assert (
                error["code"] == "model_not_found"
                and error["param"] == "model"
                and "'tiny'" in error["message"]
            )
        response = await client.http.get("/v1/models/gpt-4")
        assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


async def test_unknown_paths_and_methods_get_the_envelope(connect: Connect) -> None:
    async with connect() as client:
        missing, wrong = await client.http.get("/v1/nothing"), await client.http.get(CHAT)
    assert missing.status_code == 404 and "/v1/nothing" in error_of(missing)["message"]
    assert (
        wrong.status_code == 405 and "GET" in error_of(wrong)["message"] and wrong.headers["allow"] == "POST"
    )


async def test_context_length_has_the_code_clients_look_for(connect: Connect) -> None:
    async with connect() as client:
        error = await client.refused(COMPLETIONS, prompt=[5] * 600)
    assert (
        error["code"] == "context_length_exceeded" and "600" in error["message"] and "512" in error["message"]
    )


async def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(connect: Connect) -> None:
    seen: list[int] = []

    class Counting(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            seen.append(len(text))
            return super().encode(text, add_special_tokens)

    known = tiny_tokenizer()
    tokenizer = Counting(known.backend, known.special_tokens, {"default": CHATML})
    huge = "word " * 1_000_000
    async with connect(tokenizer=tokenizer) as client:
        for path, body in (
            (COMPLETIONS, {"prompt": huge}),
            (COMPLETIONS, {"prompt": ["a" * 10_000]}),
            (CHAT, {"messages": [{"role": "user", "content": huge}]}),
            ("/tokenize", {"prompt": huge}),
        ):
            error = await client.refused(path, **body)
            assert error["code"] == "context_length_exceeded" and "characters" in error["message"]
        assert not seen
        await client.complete(huge, truncate_prompt_tokens=7)
    assert client.engine.added[-1].prompt == known.encode(huge[-500:])[-7:]
    assert seen == [512 * tokenizer.longest_token]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1.5] * 20_000},
        {"prompt": [[1.5] * 20_000]},
        {"prompt": [[{}]] * 20_000},
        {"prompt": "a", "stop": [5] * 20_000},
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(20_000)}},
        {"prompt": "a", "stop_token_ids": ["x"] * 20_000},
    ],
)
def test_large_wrong_bodies_are_reported_briefly(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(fields)
    assert caught.value.error_count() <= 4  # one per branch of a union


async def test_a_full_queue_is_a_429_with_retry_after_and_leaves_nothing_behind(connect: Connect) -> None:
    async with connect(max_requests=2, delay=0.05) as client:
        response = await client.post(COMPLETIONS, {"prompt": ["a", "b", "c"]})
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
        assert error_of(response)["type"] == "rate_limit_error"
        assert not client.engine.running  # the two that were admitted are aborted


async def test_a_failed_sequence(connect: Connect) -> None:
    async with connect(fail_at=2) as client:
        error = await client.refused(COMPLETIONS, 502, prompt="a")
        assert "not finite" in error["message"]
        response = await client.post(COMPLETIONS, {"prompt": "a", "stream": True})
    events = response.text.split("\n\n")
    assert response.status_code == 200 and events[-2] == "data: [DONE]"
    assert "not finite" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]


async def test_a_dead_engine_is_a_503_everywhere(connect: Connect) -> None:
    async with connect() as client:
        client.engine.dead = EngineDead("secret details")
        for path in (COMPLETIONS, CHAT):
            error = await client.refused(path, 503, prompt="a", messages=USER)
            assert "secret" not in error["message"] and error["type"] == "service_unavailable"
        for path in ("/health", "/ready"):
            assert (await client.http.get(path)).status_code == 503


async def test_our_own_mistakes_are_a_500_without_the_inside(connect: Connect) -> None:
    def script(prompt: list[int], params: object, index: int) -> list[int]:
        raise AssertionError

    async with connect(script) as client:
        client.app.state.context.check_grammar = 5  # not callable
        response = await client.post(COMPLETIONS, {"prompt": "a", "guided_regex": "a"})
    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "internal_error" and "TypeError" not in error["message"]
    assert response.headers["x-request-id"]


async def test_body_limit(connect: Connect) -> None:
    async with connect(config=ServerConfig(max_body_bytes=1000)) as client:
        sent = 0

        async def endless() -> Any:
            nonlocal sent
            while sent < 100_000:
                sent += 100
                yield b"x" * 100

        declared = await client.post(COMPLETIONS, {"prompt": "a" * 1000})
        assert declared.status_code == 413 and "1000 bytes" in error_of(declared)["message"]
        chunked = await client.http.post(COMPLETIONS, content=endless())
        assert chunked.status_code == 413 and sent < 2000
        assert (await client.post(COMPLETIONS, {"prompt": "a" * 900})).status_code in (200, 400)
