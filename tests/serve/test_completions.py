from __future__ import annotations

import pytest

from tests.serve.conftest import Connect, says
from tests.serve.fake import tiny_tokenizer

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
TEXT = "The quick brown fox"


async def test_a_text_prompt(connect: Connect) -> None:
    async with connect(says(TEXT)) as client:
        answer = await client.complete("Hello world", model="tiny", max_tokens=50)
    assert (
        answer["object"] == "text_completion"
        and answer["model"] == "tiny"
        and answer["id"].startswith("cmpl-")
    )
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (TEXT, "stop", None)
    tokens = tiny_tokenizer().encode("Hello world")
    assert client.engine.added[0].prompt == tokens
    produced = len(tiny_tokenizer().encode(TEXT)) + 1  # and the end token
    assert answer["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": produced,
        "total_tokens": len(tokens) + produced,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert not client.engine.running


async def test_every_shape_of_prompt_in_order(connect: Connect) -> None:
    def script(prompt: list[int], params: object, index: int) -> list[int]:
        return [*prompt, 2]  # says what it heard

    tok = tiny_tokenizer()
    async with connect(script) as client:
        one = await client.complete(tok.encode("fox"), max_tokens=20)
        texts = await client.complete(["one", "two", "three"], max_tokens=20)
        ids = await client.complete(
            [tok.encode("four"), tok.encode("five")], max_tokens=20, n=2, temperature=0.5
        )
    assert [c["text"] for c in one["choices"]] == ["fox"]
    assert [(c["index"], c["text"]) for c in texts["choices"]] == [(0, "one"), (1, "two"), (2, "three")]
    assert [(c["index"], c["text"]) for c in ids["choices"]] == [
        (0, "four"),
        (1, "four"),
        (2, "five"),
        (3, "five"),
    ]
    assert ids["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}  # two prompts, whatever n is
    assert texts["usage"]["prompt_tokens"] == sum(len(tok.encode(t)) for t in ("one", "two", "three"))


async def test_max_tokens_defaults_to_16_and_cuts(connect: Connect) -> None:
    async with connect(says("x" * 100)) as client:
        answer = await client.complete()
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"
        nothing = await client.complete(max_tokens=None)
        assert nothing["usage"]["completion_tokens"] == 16


async def test_parameters_reach_the_engine(connect: Connect) -> None:
    async with connect() as client:
        await client.complete(
            max_tokens=9, min_tokens=2, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
            presence_penalty=0.3, frequency_penalty=-0.4, logit_bias={"5": 1.5}, logprobs=3, prompt_logprobs=1,
            stop_token_ids=[9], ignore_eos=True, n=2, seed=-3, priority=-2, cache_salt="s", unknown_field=1,
        )  # fmt: skip
    added = client.engine.added[0]
    p = added.params
    assert (added.priority, added.cache_salt) == (-2, "s")
    assert (p.max_tokens, p.min_tokens, p.temperature, p.top_k, p.top_p, p.min_p) == (9, 2, 0.5, 7, 0.9, 0.1)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.2, 0.3, -0.4)
    assert (p.logit_bias, p.logprobs, p.prompt_logprobs, p.stop_token_ids) == ({5: 1.5}, 3, 1, (9,))
    assert (p.ignore_eos, p.n, p.seed, p.grammar, p.beam) == (True, 2, -3, None, None)


async def test_stop_string_is_cut_and_the_sequence_aborted(connect: Connect) -> None:
    async with connect(says("one two three four"), delay=0.001) as client:
        answer = await client.complete(max_tokens=50, stop=["zzz", "o th"])
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one tw", "stop", "o th")
        assert client.engine.aborted and not client.engine.running
        # Only the tokens up to the one that completed the stop string count.
        assert answer["usage"]["completion_tokens"] < len(tiny_tokenizer().encode("one two three four"))
        kept = await client.complete(max_tokens=50, stop="o th", include_stop_str_in_output=True)
        assert kept["choices"][0]["text"] == "one two th"


async def test_a_stop_token_has_no_text_but_a_reason(connect: Connect) -> None:
    (x,) = tiny_tokenizer().encode("x")
    async with connect(says("ax" + "b" * 9)) as client:
        answer = await client.complete(stop_token_ids=[x])
        assert answer["choices"][0] | {"logprobs": 0} == {
            "index": 0, "text": "a", "logprobs": 0, "finish_reason": "stop", "stop_reason": x,
        }  # fmt: skip
        shown = await client.complete(stop_token_ids=[x], include_stop_str_in_output=True)
        assert shown["choices"][0]["text"] == "ax"


async def test_special_tokens_are_shown_on_request(connect: Connect) -> None:
    async with connect(
        lambda prompt, params, index: [*tiny_tokenizer().encode("a<|im_start|>b"), 2]
    ) as client:
        hidden = await client.complete()
        shown = await client.complete(skip_special_tokens=False)
    assert hidden["choices"][0]["text"] == "ab"
    assert shown["choices"][0]["text"] == "a<|im_start|>b"


async def test_logprobs_name_every_token(connect: Connect) -> None:
    async with connect(says("one two")) as client:
        answer = await client.complete(logprobs=2, max_tokens=50)
    tokens = [*tiny_tokenizer().encode("one two"), 2]
    got = answer["choices"][0]["logprobs"]
    assert got["tokens"] == [tiny_tokenizer().token_bytes(t).decode() for t in tokens]
    assert "".join(got["tokens"]) == "one two<|im_end|>"
    assert got["token_logprobs"] == [-0.5] * len(tokens)
    assert got["text_offset"] == [sum(map(len, got["tokens"][:i])) for i in range(len(tokens))]
    for token, top in zip(got["tokens"], got["top_logprobs"], strict=True):
        assert len(top) == 2 and max(top, key=top.get) == token


async def test_echo_with_logprobs_and_no_tokens_scores_the_prompt(connect: Connect) -> None:
    prompt = "The lazy dog"
    ids = tiny_tokenizer().encode(prompt)
    async with connect(says("one")) as client:
        answer = await client.complete(ids, echo=True, logprobs=1, max_tokens=0)
        (choice,) = answer["choices"]
        assert choice["text"] == prompt and answer["usage"]["completion_tokens"] == 0
        assert "".join(choice["logprobs"]["tokens"]) == prompt
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
        one = await client.complete(prompt, echo=True, logprobs=1, max_tokens=1)
        assert len(one["choices"][0]["logprobs"]["tokens"]) == len(ids) + 1  # what lm-eval slices
        assert one["choices"][0]["text"].startswith(prompt)
        chunks = await client.events(URL, prompt=prompt, echo=True, logprobs=1, max_tokens=50)
        assert "".join(c["choices"][0]["text"] for c in chunks) == prompt + "one"
        offsets = [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]]
        tokens = [t for c in chunks for t in c["choices"][0]["logprobs"]["tokens"]]
        assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]


async def test_prompt_logprobs_and_token_ids(connect: Connect) -> None:
    ids = tiny_tokenizer().encode("lazy dog")
    async with connect(says("one")) as client:
        answer = await client.complete("lazy dog", prompt_logprobs=1, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == ids and choice["token_ids"] == [*tiny_tokenizer().encode("one"), 2]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    entry = choice["prompt_logprobs"][1][str(ids[1])]
    assert entry == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": tiny_tokenizer().token_bytes(ids[1]).decode(),
    }


async def test_best_of_returns_the_likeliest_first(connect: Connect) -> None:
    texts = (
        "one",
        "two two",
        "three",
        "four four four",
    )  # the fake's answer i has logprob -0.5 - i per token
    async with connect(says(*texts)) as client:
        answer = await client.complete(n=2, best_of=4, max_tokens=50)
        assert client.engine.added[0].params.n == 4
    lengths = [len(tiny_tokenizer().encode(t)) + 1 for t in texts]
    scores = [-(0.5 + i) * length for i, length in enumerate(lengths)]
    best = sorted(range(4), key=lambda i: -scores[i])[:2]
    assert [c["text"] for c in answer["choices"]] == [texts[i] for i in best]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert [c["logprobs"] for c in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == sum(lengths)  # what was generated is what was paid for


async def test_tokens_of_a_split_character_begin_where_it_does(connect: Connect) -> None:
    said = "a🙂b"  # the tiny vocabulary has no emoji: four tokens, one for each byte
    async with connect(says(said, end=False)) as client:
        whole = (await client.complete(max_tokens=50, logprobs=0))["choices"][0]
        chunks = await client.events("/v1/completions", prompt="a", max_tokens=50, logprobs=0)
    assert whole["text"] == said and whole["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 1, 1, 1, 2]


async def test_beam_search_reaches_the_engine(connect: Connect) -> None:
    async with connect(says("one", "two")) as client:
        answer = await client.complete(
            n=2, best_of=4, use_beam_search=True, length_penalty=0.5, early_stopping=True, temperature=0
        )
        await client.complete(n=2, use_beam_search=True)  # no temperature: the engine takes none but 0
    assert client.engine.added[1].params.temperature == 0
    beam, n = client.engine.added[0].params.beam, client.engine.added[0].params.n
    assert (beam.width, beam.length_penalty, beam.early_stopping, n) == (4, 0.5, True, 2)
    assert [c["text"] for c in answer["choices"]] == ["one", "two"]


async def test_truncate_prompt_tokens_keeps_the_end(connect: Connect) -> None:
    ids = list(range(10, 40))
    async with connect() as client:
        await client.complete(ids, truncate_prompt_tokens=5)
        assert client.engine.added[-1].prompt == ids[-5:]
        await client.complete(list(range(3, 303)) * 3, truncate_prompt_tokens=-1)
        assert len(client.engine.added[-1].prompt) == 512 - 16
        await client.complete(list(range(3, 303)) * 3, truncate_prompt_tokens=-1, max_tokens=100)
        assert len(client.engine.added[-1].prompt) == 512 - 100


@pytest.mark.parametrize("per_step", [1, 3, 100])
async def test_streaming_gives_the_same_text_as_not(connect: Connect, per_step: int) -> None:
    text = "Hello — the “quick” fox 🦊 jumps. END of story"
    async with connect(says(text), per_step=per_step) as client:
        for stop in (None, ["END"], ["🦊 j", "quick” cat"]):
            whole = await client.complete(max_tokens=200, stop=stop)
            chunks = await client.events(URL, prompt="Hello world", max_tokens=200, stop=stop)
            assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
            assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert chunks[-1]["choices"][0].get("stop_reason") == whole["choices"][0]["stop_reason"]
            assert len({c["id"] for c in chunks}) == 1
            assert "�" not in "".join(c["choices"][0]["text"] for c in chunks)


async def test_usage_chunk_comes_last_with_no_choices(connect: Connect) -> None:
    async with connect(says("one two")) as client:
        chunks = await client.events(URL, prompt="a", stream_options={"include_usage": True})
        whole = await client.complete("a")
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert all(c["usage"] is None for c in chunks[:-1])
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await client.events(URL, prompt="a", stream_options=options)
        counts = [c["usage"]["completion_tokens"] for c in chunks]
        assert counts == sorted(counts) and counts[0] >= 1


async def test_streams_of_several_prompts_and_answers_interleave(connect: Connect) -> None:
    async with connect(says("one two three", "four five six"), delay=0.001) as client:
        chunks = await client.events(URL, prompt=["a", "b"], n=2, max_tokens=50)
    texts = {
        i: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)
    }
    assert texts == {0: "one two three", 1: "four five six", 2: "one two three", 3: "four five six"}
    first_done = next(i for i, c in enumerate(chunks) if c["choices"][0]["finish_reason"])
    assert {c["choices"][0]["index"] for c in chunks[:first_done]} == {0, 1, 2, 3}


async def test_text_that_could_become_a_stop_string_is_held_back(connect: Connect) -> None:
    async with connect(says("abcabd"), per_step=1) as client:
        chunks = await client.events(URL, prompt="x", stop=["abd"], max_tokens=50)
        assert "".join(c["choices"][0]["text"] for c in chunks) == "abc"
        held = await client.events(URL, prompt="x", stop=["abdz"], max_tokens=50)
        assert "".join(c["choices"][0]["text"] for c in held) == "abcabd"  # released at the end
