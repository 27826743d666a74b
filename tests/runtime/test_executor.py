from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from llmtool.core.request import BeamParams, Grammar, SamplingParams, TokenLogprob
from llmtool.errors import ModelError
from llmtool.runtime.executor import TorchExecutor
from llmtool.runtime.structured import GrammarCompiler, grammar_tokenizer
from tests.runtime.test_structured import TOKENIZER, ids
from tests.runtime.tiny import EOS, GREEDY, VOCAB, Script, TinyModel, random_prompts


def compiler() -> GrammarCompiler:
    return GrammarCompiler(grammar_tokenizer(TOKENIZER.to_str(), VOCAB, [EOS]))


@pytest.mark.parametrize(("tokens_per_page", "seed"), [(1, 0), (4, 1), (16, 2)])
def test_greedy_equals_transformers_under_random_chunks(
    tiny: TinyModel, tokens_per_page: int, seed: int
) -> None:
    prompts = random_prompts(6, seed)
    script = Script(tiny.executor(tokens_per_page, num_pages=400), seed)
    for i, prompt in enumerate(prompts):
        script.add(str(i), prompt)
    script.run([str(i) for i in range(6)], 12, chunks=random.Random(seed))
    for i, prompt in enumerate(prompts):
        assert script.live[str(i)].output == tiny.greedy(prompt, 12)


def test_sequences_come_and_go(tiny: TinyModel) -> None:
    """More sequences than rows over time: rows and pages are reused, and old contents never matter."""
    script = Script(tiny.executor(num_pages=70, max_num_seqs=4))
    prompts = random_prompts(12, 3, high=20)
    rng = random.Random(0)
    running: list[int] = []
    waiting = list(range(12))
    outputs: dict[int, list[int]] = {}
    while waiting or running:
        while waiting and len(running) < 4:
            running.append(waiting.pop(0))
            script.add(str(running[-1]), prompts[running[-1]])
        wanted = {i: 3 + i % 5 for i in running}
        work = {str(i): script.live[str(i)] for i in running if rng.random() < 0.8}
        if work:
            script.step({s: rng.randint(1, len(v.tokens) - v.computed) for s, v in work.items()})
        for i in [i for i in running if len(script.live[str(i)].output) >= wanted[i]]:
            running.remove(i)
            outputs[i] = script.finish(str(i))
    assert all(outputs[i] == tiny.greedy(prompts[i], 3 + i % 5) for i in range(12))
    script.step({})
    executor = script.executor
    assert not executor._sequences.row_of
    assert sorted(executor._sequences._free) == [0, 1, 2, 3]


def test_rows_grow_past_max_num_seqs(tiny: TinyModel) -> None:
    params = SamplingParams(temperature=0.9, repetition_penalty=1.2, top_p=0.9)
    outputs = []
    for rows in (2, 8):
        script = Script(tiny.executor(num_pages=200, max_num_seqs=rows))
        for i, prompt in enumerate(random_prompts(8, 5, high=12)):
            script.add(str(i), prompt, params, seed=i)
            script.run([str(j) for j in range(i + 1)], 2 + i)
        outputs.append([script.live[str(i)].output for i in range(8)])
    assert outputs[0] == outputs[1]


def test_a_fork_copies_the_page_it_writes(tiny: TinyModel) -> None:
    """Parent and child share a half-filled page; each then writes its own token there."""
    (prompt,) = random_prompts(1, 7, low=10, high=10)
    script = Script(tiny.executor(num_pages=40))
    script.add("parent", prompt)
    script.step({"parent": 10})
    sampled = SamplingParams(temperature=2.0)
    script.fork("parent", "child", sampled, seed=5, shared=9)
    script.run(["child", "parent"], 8)
    alone = Script(tiny.executor(num_pages=40))
    alone.add("child", prompt, sampled, seed=5)
    alone.run(["child"], 8)
    assert script.live["parent"].output == tiny.greedy(prompt, 8)
    assert script.live["child"].output == alone.live["child"].output
    assert script.live["child"].output != script.live["parent"].output


@pytest.mark.parametrize("told_as", ["preempted", "finished"])
def test_preempted_sequences_resume_where_they_were(tiny: TinyModel, told_as: str) -> None:
    prompts = random_prompts(3, 11, low=8)
    params = SamplingParams(temperature=0.8, frequency_penalty=0.5, repetition_penalty=1.1)
    straight = Script(tiny.executor(num_pages=120))
    broken = Script(tiny.executor(num_pages=120), seed=1)
    names = ["a", "b", "c"]
    for script in (straight, broken):
        for seed, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            script.add(name, prompt, GREEDY if name == "a" else params, seed)
    straight.run(names, 10)
    broken.run(names, 4)
    broken.preempt("a", told_as)
    broken.preempt("b", told_as)
    broken.run(["c"], 7)
    assert set(broken.executor._sequences.row_of) == {"c"}
    broken.step({"b": 3})
    broken.preempt("b", told_as)
    broken.run(names, 10)
    assert [broken.live[n].tokens for n in names] == [straight.live[n].tokens for n in names]


def test_swapped_pages_come_back_whole(tiny: TinyModel) -> None:
    prompts = random_prompts(2, 13, low=12)
    script = Script(tiny.executor(num_pages=30, host_pages=20))
    for name, prompt in zip("ab", prompts, strict=True):
        script.add(name, prompt)
    script.run(["a", "b"], 3)
    script.swap_out("a")
    script.step({"b": 1})
    script.executor.store.arena[: script.executor.store.nbytes // 2].fill_(0)  # b's pages may be hit too
    script.preempt("b")
    script.swap_in("a")
    script.run(["a", "b"], 9)
    for name, prompt in zip("ab", prompts, strict=True):
        assert script.live[name].output == tiny.greedy(prompt, 9)


def test_a_step_may_only_move_pages(tiny: TinyModel) -> None:
    script = Script(tiny.executor(num_pages=30, host_pages=20))
    (prompt,) = random_prompts(1, 17, low=12)
    script.add("a", prompt)
    script.run(["a"], 2)
    script.swap_out("a")
    assert script.step({}).tokens == []
    script.swap_in("a")
    assert script.step({}).tokens == []
    script.run(["a"], 6)
    assert script.live["a"].output == tiny.greedy(prompt, 6)


MIXED = [
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.8, logprobs=2),
    SamplingParams(temperature=0.9, min_p=0.05, presence_penalty=0.7),
    SamplingParams(temperature=0.6, frequency_penalty=0.4, repetition_penalty=1.3, logit_bias={7: 4.0}),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, min_tokens=5, stop_token_ids=(9,)),
    SamplingParams(temperature=1.0, grammar=Grammar("regex", "[a-f]+"), logprobs=0),
]


def test_a_request_is_the_same_alone_and_in_any_batch(tiny: TinyModel) -> None:
    prompts = random_prompts(len(MIXED), 19)
    together = Script(tiny.executor(num_pages=200, grammars=compiler), seed=2)
    for i, (prompt, params) in enumerate(zip(prompts, MIXED, strict=True)):
        together.add(str(i), prompt, params, seed=i)
        together.step({str(j): 1 for j in range(i + 1)})  # arrivals one by one, in chunks of one token
    together.run([str(i) for i in range(len(MIXED))], 12, chunks=random.Random(4))
    for i, (prompt, params) in enumerate(zip(prompts, MIXED, strict=True)):
        alone = Script(tiny.executor(num_pages=200, grammars=compiler))
        alone.add("x", prompt, params, seed=i)
        alone.run(["x"], 12)
        assert alone.live["x"].output == together.live[str(i)].output


def test_repetition_penalty_equals_generate(tiny: TinyModel) -> None:
    (prompt,) = random_prompts(1, 23, low=15)
    script = Script(tiny.executor())
    script.add("a", prompt, SamplingParams(temperature=0, repetition_penalty=1.6))
    script.run(["a"], 15)
    theirs = tiny.generate(
        prompt, max_new_tokens=15, do_sample=False, eos_token_id=None, repetition_penalty=1.6
    )
    assert script.live["a"].output == theirs[0]
    assert script.live["a"].output != tiny.greedy(prompt, 15)


def test_min_tokens_hold_back_the_end(tiny: TinyModel) -> None:
    (prompt,) = random_prompts(1, 29)
    bias = {EOS: 100.0, 9: 90.0}
    script = Script(tiny.executor())
    script.add("a", prompt, SamplingParams(temperature=0, min_tokens=4, stop_token_ids=(9,), logit_bias=bias))
    script.run(["a"], 6)
    output = script.live["a"].output
    assert not {EOS, 9} & set(output[:4])
    assert output[4:] == [EOS, EOS]


@pytest.mark.parametrize("chunks", [None, 1, 5])
def test_prompt_logprobs_equal_transformers(tiny: TinyModel, chunks: int | None) -> None:
    (prompt,) = random_prompts(1, 31, low=20)
    script = Script(tiny.executor())
    script.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=3, logprobs=4))
    script.add("silent", prompt)
    got: list[TokenLogprob] = []
    sampled: list[TokenLogprob] = []
    while len(script.live["a"].output) < 3:
        pending = len(script.live["a"].tokens) - script.live["a"].computed
        result = script.step({s: min(pending, chunks or pending) for s in ("silent", "a")})
        assert "silent" not in result.prompt_logprobs
        got += result.prompt_logprobs.get("a", [])
        sampled += result.logprobs.get("a", [])
    tokens = script.live["a"].tokens
    reference = tiny.logprobs(tokens)
    assert [p.token for p in got] == prompt[1:]
    assert [p.token for p in sampled] == tokens[len(prompt) :]
    for position, logprob in enumerate([*got, *sampled]):
        row = reference[position]
        assert logprob.logprob == pytest.approx(row[logprob.token].item(), abs=1e-4)
        assert logprob.rank == int((row > row[logprob.token] + 1e-6).sum()) + 1
        best = row.topk(len(logprob.top))
        assert len(logprob.top) == (3 if position < len(got) else 4)
        assert [t for t, _ in logprob.top] == best.indices.tolist()
        assert [p for _, p in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompt_logprobs_after_preemption(tiny: TinyModel) -> None:
    """In the middle of the prompt they start again; with output they have been delivered and stay away."""
    (prompt,) = random_prompts(1, 37, low=20)
    script = Script(tiny.executor())
    script.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=0))
    assert len(script.step({"a": 6}).prompt_logprobs["a"]) == 6
    script.preempt("a")
    assert [p.token for p in script.step({"a": len(prompt)}).prompt_logprobs["a"]] == prompt[1:]
    script.preempt("a")
    assert not script.step({"a": len(prompt) + 1}).prompt_logprobs


def test_logprobs_are_of_the_model_not_of_the_filters(tiny: TinyModel) -> None:
    (prompt,) = random_prompts(1, 41)
    params = SamplingParams(
        temperature=0.5, top_k=1, logit_bias={3: 100.0}, repetition_penalty=2.0, logprobs=1
    )
    script = Script(tiny.executor())
    script.add("a", prompt, params)
    (logprob,) = script.step({"a": len(prompt)}).logprobs["a"]
    row = tiny.logprobs(prompt)[-1]
    assert logprob.token == 3
    assert logprob.logprob == pytest.approx(row[3].item(), abs=1e-4)
    assert logprob.top[0][0] == int(row.argmax())


def test_beams_report_their_candidates(tiny: TinyModel) -> None:
    (prompt,) = random_prompts(1, 43)
    beam = BeamParams(3)
    script = Script(tiny.executor())
    script.add("a", prompt, SamplingParams(temperature=0, beam=beam))
    result = script.step({"a": len(prompt)})
    best = tiny.logprobs(prompt)[-1].topk(beam.candidates)
    assert [t for t, _ in result.logprobs["a"][0].top] == best.indices.tolist()
    assert [p for _, p in result.logprobs["a"][0].top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(result.tokens[0]) == 1


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
)


def until_eos(script: Script, names: list[str], limit: int = 80) -> None:
    for _ in range(limit):
        work = {n: script.live[n] for n in names if EOS not in script.live[n].output}
        if not work:
            return
        script.step({n: len(v.tokens) - v.computed for n, v in work.items()})
    raise AssertionError("no end")


def test_grammars_hold_through_preemption(tiny: TinyModel) -> None:
    params = SamplingParams(temperature=1.5, grammar=Grammar("json_schema", SCHEMA))
    names = [str(i) for i in range(5)]
    outputs = []
    for preempted in (False, True):
        script = Script(tiny.executor(num_pages=200, grammars=compiler))
        for i, prompt in enumerate(random_prompts(5, 47)):
            script.add(str(i), prompt, params, seed=i)
        script.add("free", [5, 6, 7])
        script.run([*names, "free"], 6)
        if preempted:
            for name in names[:3]:
                script.preempt(name)
        until_eos(script, names)
        assert script.live["free"].output == tiny.greedy([5, 6, 7], len(script.live["free"].output))
        outputs.append([script.live[name].output for name in names])
    assert outputs[0] == outputs[1]
    values = [json.loads(TOKENIZER.decode([t for t in output if t != EOS])) for output in outputs[0]]
    assert all(isinstance(v["ok"], bool) and v["kind"] in ("cat", "dog") for v in values)
    assert len({json.dumps(v) for v in values}) > 1


def poison(executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch, row: int, value: float) -> None:
    real: Callable[[torch.Tensor], torch.Tensor] = executor.model.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits = real(hidden)
        logits[row] = value
        return logits

    monkeypatch.setattr(type(executor.model), "logits", lambda self, hidden: poisoned(hidden))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_logits_end_one_sequence_only(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    prompts = random_prompts(3, 53)
    script = Script(tiny.executor())
    for name, prompt in zip("abc", prompts, strict=True):
        script.add(name, prompt, SamplingParams(temperature=0, logprobs=1))
    with monkeypatch.context() as patch:
        poison(script.executor, patch, 1, value)
        result = script.step({name: len(prompt) for name, prompt in zip("abc", prompts, strict=True)})
    assert list(result.errors) == ["b"]
    assert "not numbers" in result.errors["b"]
    assert [len(t) for t in result.tokens] == [1, 0, 1]
    assert set(result.logprobs) == {"a", "c"}
    script.finish("b")
    script.run(["a", "c"], 5)
    assert script.live["a"].output == tiny.greedy(prompts[0], 5)
    assert script.live["c"].output == tiny.greedy(prompts[2], 5)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_token_ids_outside_the_vocabulary_end_their_sequence(tiny: TinyModel, bad: int) -> None:
    script = Script(tiny.executor())
    script.add("bad", [3, bad, 4])
    script.add("good", [3, 5, 4])
    result = script.step({"bad": 2, "good": 3})
    assert f"{bad} is not in the model's vocabulary of {VOCAB}" in result.errors["bad"]
    assert result.tokens[0] == []
    script.finish("bad")
    script.add("bad", [3, 5, 4])  # the id is free again, and nothing stuck to it
    script.run(["bad", "good"], 4)
    assert script.live["bad"].output == script.live["good"].output == tiny.greedy([3, 5, 4], 4)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "(("), "cannot be used"),
        (Grammar("xml", ""), "no kind"),
        (Grammar("choice", "[]"), "list"),
    ],
)
def test_a_bad_grammar_ends_its_sequence(tiny: TinyModel, grammar: Grammar, message: str) -> None:
    script = Script(tiny.executor(grammars=compiler))
    script.add("bad", [3, 4], SamplingParams(grammar=grammar))
    script.add("good", [3, 5, 4])
    result = script.step({"bad": 2, "good": 3})
    assert message in result.errors["bad"]
    assert result.tokens[1] == tiny.greedy([3, 5, 4], 1)


def test_a_token_that_breaks_the_grammar_ends_its_sequence(tiny: TinyModel) -> None:
    script = Script(tiny.executor(grammars=compiler))
    script.add("a", [3, 4], SamplingParams(temperature=0, grammar=Grammar("regex", "[ab]{9}")))
    script.step({"a": 2})
    script.live["a"].tokens[-1] = ids("z")[0]  # what no step of ours would have sampled
    assert "does not allow token" in script.step({"a": 1}).errors["a"]


def test_nothing_left_to_sample_is_told(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(tiny.executor())
    script.add("a", [3, 4])
    poison(script.executor, monkeypatch, 0, -np.inf)
    assert "everything is forbidden" in script.step({"a": 2}).errors["a"]


def test_grammars_need_a_tokenizer(tiny: TinyModel) -> None:
    script = Script(tiny.executor())
    script.add("a", [3, 4], SamplingParams(grammar=Grammar("regex", "a")))
    assert "no tokenizer" in script.step({"a": 2}).errors["a"]


def test_warmup_leaves_no_trace(tiny: TinyModel) -> None:
    executor = tiny.executor()
    executor.warmup()
    assert not executor._sequences.row_of
    assert not executor._begun
    script = Script(executor)
    script.add("a", [3, 4, 5, 6, 7])
    script.run(["a"], 5)
    assert script.live["a"].output == tiny.greedy([3, 4, 5, 6, 7], 5)


def test_time_is_measured(tiny: TinyModel) -> None:
    script = Script(tiny.executor())
    script.add("a", [3, 4])
    assert script.step({"a": 2}).seconds > 0


def test_the_grammar_compiler_can_be_made_ahead(tiny: TinyModel) -> None:
    made: list[GrammarCompiler] = []

    def make() -> GrammarCompiler:
        made.append(compiler())
        return made[-1]

    executor = tiny.executor(grammars=make)
    assert made == []
    executor.prepare_grammars()
    executor.prepare_grammars()
    assert len(made) == 1
    script = Script(executor)
    script.add("a", [3, 4], SamplingParams(temperature=0, grammar=Grammar("choice", '["ab"]')))
    assert not script.step({"a": 2}).errors
    assert len(made) == 1


def test_a_tokenizer_unfit_for_grammars_fails_who_asks_for_one(tiny: TinyModel) -> None:
    def make() -> GrammarCompiler:
        raise ModelError("The tokenizer cannot be used for structured output: it is odd.")

    executor = tiny.executor(grammars=make)
    executor.prepare_grammars()
    script = Script(executor)
    script.add("a", [3, 4], SamplingParams(grammar=Grammar("choice", '["ab"]')))
    assert "it is odd" in script.step({"a": 2}).errors["a"]
