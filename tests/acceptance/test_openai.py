"""The `openai` client: typed answers, streams, logprobs, seeds. Oracles: transformers and the API's own rules."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance.servers import RunningServer

PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def test_the_model_is_listed(client: openai.OpenAI, server: RunningServer) -> None:
    (model,) = client.models.list().data
    assert model.id == server.model and model.object == "model"
    assert model.model_dump()["max_model_len"] == 8192
    assert client.models.retrieve(server.model) == model


def test_a_completion_is_what_transformers_generates(
    exact_client: openai.OpenAI, exact_server: RunningServer, reference: Any, tokenizer: Any
) -> None:
    answer = exact_client.completions.create(
        model=exact_server.model, prompt=PROMPT, temperature=0, max_tokens=24
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert answer.object == "text_completion"
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ids.shape[1], 24)
    assert answer.usage.total_tokens == ids.shape[1] + 24


def test_a_chat_is_what_transformers_generates(
    exact_client: openai.OpenAI, exact_server: RunningServer, reference: Any, tokenizer: Any
) -> None:
    answer = exact_client.chat.completions.create(
        model=exact_server.model, messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = reference.generate(**inputs, max_new_tokens=24, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.refusal is None
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None and answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_prompts_of_every_shape_and_n(
    exact_client: openai.OpenAI, exact_server: RunningServer, tokenizer: Any
) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        answer = exact_client.completions.create(
            model=exact_server.model, prompt=prompt, max_tokens=6, **more
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = tokenizer(PROMPT).input_ids
    (one,) = texts(PROMPT, temperature=0)
    assert texts(ids, temperature=0) == [one]
    assert texts([ids], temperature=0) == [one]
    assert texts([PROMPT, "Once upon a time"], temperature=0)[0] == one
    assert texts(PROMPT, temperature=0, echo=True) == [PROMPT + one]
    assert len(texts([ids, ids[:3]], n=3, seed=1)) == 6
    assert len(set(texts(PROMPT, n=4, seed=1, temperature=1.5))) > 1
    assert len(texts(PROMPT, best_of=3, n=2, seed=1)) == 2


def test_a_stream_says_what_the_whole_answer_says(
    exact_client: openai.OpenAI, exact_server: RunningServer
) -> None:
    request: Any = {
        "model": exact_server.model,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = exact_client.chat.completions.create(**request)
    chunks = list(
        exact_client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    *said, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in said)
    assert len({chunk.id for chunk in chunks}) == 1
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in said]
    assert ends[-1] == whole.choices[0].finish_reason and not any(ends[:-1])


def test_a_stream_without_usage_has_none(client: openai.OpenAI, server: RunningServer) -> None:
    chunks = list(
        client.completions.create(model=server.model, prompt=PROMPT, max_tokens=4, temperature=0, stream=True)
    )
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_streamed_answers_keep_apart(exact_client: openai.OpenAI, exact_server: RunningServer) -> None:
    request: Any = {"model": exact_server.model, "prompt": PROMPT, "n": 3, "seed": 11, "max_tokens": 12}
    whole = [choice.text for choice in exact_client.completions.create(**request).choices]
    texts = ["", "", ""]
    for chunk in exact_client.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole


def test_the_stream_helper_accumulates(client: openai.OpenAI, server: RunningServer) -> None:
    with client.chat.completions.stream(
        model=server.model, messages=MESSAGES, temperature=0, max_tokens=40, stop=[" "]
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content and final.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_transformers(
    exact_client: openai.OpenAI, exact_server: RunningServer, reference: Any, tokenizer: Any
) -> None:
    answer = exact_client.chat.completions.create(
        model=exact_server.model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=5,
    )
    entries = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert entries is not None and len(entries) == 8
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == answer.choices[0].message.content
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for entry in entries:
        with torch.inference_mode():
            expected = reference(inputs).logits[0, -1].log_softmax(-1).topk(5)
        assert [e.token for e in entry.top_logprobs] == [
            tokenizer.decode([i]) for i in expected.indices.tolist()
        ]
        assert [e.logprob for e in entry.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-3)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        inputs = torch.cat([inputs, expected.indices[None, :1]], dim=1)


def test_logprobs_of_an_echoed_prompt(
    exact_client: openai.OpenAI, exact_server: RunningServer, reference: Any, tokenizer: Any
) -> None:
    answer = exact_client.completions.create(
        model=exact_server.model, prompt=PROMPT, max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    found = answer.choices[0].logprobs
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        table = reference(ids).logits[0].log_softmax(-1)  # [tokens, vocab]
    expected = [table[i, token].item() for i, token in enumerate(ids[0, 1:])]
    assert found is not None and found.token_logprobs is not None and found.tokens is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-3)
    assert "".join(found.tokens) == answer.choices[0].text
    text = answer.choices[0].text
    for offset, token in zip(found.text_offset or [], found.tokens, strict=True):
        assert text[offset:].startswith(token)


def test_a_stop_string_ends_the_answer(exact_client: openai.OpenAI, exact_server: RunningServer) -> None:
    request: Any = {"model": exact_server.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    text = exact_client.completions.create(**request).choices[0].text
    stop = text[9:13]
    whole = exact_client.completions.create(**request, stop=[stop, "never said"])
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    streamed = exact_client.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_a_seed_gives_the_same_answer_alone_and_in_company(exact_server: RunningServer) -> None:
    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=exact_server.api, max_retries=0) as client:

            async def ask(seed: int) -> str:
                answer = await client.chat.completions.create(
                    model=exact_server.model,
                    messages=MESSAGES,
                    temperature=1.2,
                    top_p=0.9,
                    seed=seed,
                    max_tokens=12,
                )
                return answer.choices[0].message.content or ""

            alone = [await ask(seed) for seed in range(4)]
            return alone, list(await asyncio.gather(*(ask(seed % 4) for seed in range(12))))

    alone, together = asyncio.run(main())
    assert together == alone * 3
    assert len(set(alone)) > 1


def test_an_answer_names_its_request(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert answer._request_id == "mine-1"
    assert client.completions.create(model=server.model, prompt=PROMPT, max_tokens=1)._request_id


def test_sampling_extras_through_extra_body(
    exact_client: openai.OpenAI, exact_server: RunningServer, tokenizer: Any
) -> None:
    def ask(**extra: Any) -> openai.types.Completion:
        return exact_client.completions.create(
            model=exact_server.model, prompt=PROMPT, max_tokens=8, seed=3, extra_body=extra
        )

    greedy = exact_client.completions.create(
        model=exact_server.model, prompt=PROMPT, max_tokens=8, temperature=0
    )
    assert ask(top_k=1).choices[0].text == greedy.choices[0].text
    assert ask(min_p=1.0).choices[0].text == greedy.choices[0].text
    banned = tokenizer(" Paris").input_ids
    assert len(banned) == 1
    without = exact_client.completions.create(
        model=exact_server.model,
        prompt=PROMPT,
        max_tokens=1,
        temperature=0,
        logit_bias={str(banned[0]): -100},
    )
    assert greedy.choices[0].text.startswith(" Paris") and without.choices[0].text != " Paris"
    stopped = exact_client.completions.create(
        model=exact_server.model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        extra_body={"stop_token_ids": banned},
    )
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text == ""
    assert ask(ignore_eos=True, min_tokens=8).usage.completion_tokens == 8  # type: ignore[union-attr]


def test_probabilities_of_one_position_sum_to_one(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=100
    )
    (top,) = answer.choices[0].logprobs.top_logprobs  # type: ignore[union-attr,misc]
    assert 0.8 < sum(math.exp(value) for value in top.values()) <= 1.001  # type: ignore[union-attr]
