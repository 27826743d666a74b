"""Sequences that begin on one engine and go on on another, with their KV: every kind of page, by its contents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.core.engine import Engine
from llmtool.core.request import FinishReason, SamplingParams
from llmtool.core.steplog import StepLogWriter, replay
from tests.support.core import expected, make_engine
from tests.support.pages import PARTS

MODELS = [None, *PARTS]


def prompts(seed: int, count: int) -> list[list[int]]:
    """Some begin alike."""
    rng = random.Random(seed)
    stems = [[rng.randrange(90) for _ in range(20)] for _ in range(2)]
    return [
        rng.choice(stems)[: rng.randint(0, 20)] + [rng.randrange(90) for _ in range(rng.randint(1, 12))]
        for _ in range(count)
    ]


def split_run(
    first: Engine,
    second: Engine,
    asked: list[list[int]],
    counts: list[int],
    lose: frozenset[int] = frozenset(),
) -> dict[int, list[int]]:
    """Each prompt on `first` up to one token, the rest on `second`. lose: those whose KV does not arrive."""
    answers: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    for i, prompt in enumerate(asked):
        first.add(str(i), prompt, SamplingParams(max_tokens=counts[i]), seed=i, handoff=True)
    while first.has_work or second.has_work:
        for output in first.step():
            i = int(output.request_id)
            answers[i] += output.token_ids
            if output.finish_reason is not FinishReason.LENGTH:
                continue
            kv = first.leaving.pop(output.request_id, None)
            assert (kv is not None) == (counts[i] > 1)
            if kv is not None:
                params = SamplingParams(max_tokens=counts[i])
                moved = None if i in lose else kv
                second.add(str(i), asked[i], params, seed=i, given=answers[i], kv=moved)
        for output in second.step():
            answers[int(output.request_id)] += output.token_ids
        first.scheduler.check()
        second.scheduler.check()
    assert not first.leaving and not second._arrived
    return answers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("caching", [True, False])
@given(seed=st.integers(0, 2**32 - 1), tight=st.booleans())
@settings(max_examples=12, deadline=None)
def test_every_token_is_that_of_one_engine(name: str | None, caching: bool, seed: int, tight: bool) -> None:
    rng = random.Random(seed)
    asked = prompts(seed, 8)
    counts = [rng.randint(1, 24) for _ in asked]
    first = make_engine(64, model_name=name, prefix_caching=caching)
    pages = max(second_pages(name), 1) if tight else 64
    second = make_engine(pages, model_name=name, prefix_caching=caching)
    lose = frozenset(i for i in range(8) if rng.random() < 0.2)
    answers = split_run(first, second, asked, counts, lose)
    assert answers == {i: expected(p, counts[i], i) for i, p in enumerate(asked)}
    for engine in (first, second):
        assert engine.stats.pages_used == 0


def second_pages(name: str | None) -> int:
    """So few that sequences wait for pages, and are preempted, on the engine that they move to."""
    allocator = make_engine(64, model_name=name).scheduler.allocator
    return allocator.pages_for(64) + allocator.pages_for(24)


def test_pages_run_short_where_they_move_to() -> None:
    asked = [[i] * 20 for i in range(8)]
    second = make_engine(second_pages(None))
    answers = split_run(make_engine(64), second, asked, [24] * 8)
    assert answers == {i: expected(p, 24, i) for i, p in enumerate(asked)}
    assert second.stats.preemptions > 0


def test_prefixes_are_found_where_prompts_run() -> None:
    first, second = make_engine(64), make_engine(64)
    stem = list(range(24))
    split_run(first, second, [[*stem, i] for i in range(5)], [8] * 5)
    assert first.stats.prefix_hits == 4 * 24
    assert second.stats.prompt_tokens == 0, "a prompt is counted where it was computed"
    assert second.stats.prefix_queries == 0


def test_what_moved_is_in_the_prefix_cache_there() -> None:
    first, second = make_engine(64), make_engine(64)
    split_run(first, second, [list(range(24))], [8])
    second.add("whole", list(range(24)), SamplingParams(max_tokens=2))
    while second.has_work:
        second.step()
    assert second.stats.prefix_hits == 20, "all but the last page, whose last token is computed"


def test_a_stop_token_ends_it_where_it_begins() -> None:
    engine = make_engine()
    prompt = [4, 5, 6]
    (token,) = expected(prompt, 1, 3)
    params = SamplingParams(max_tokens=9, stop_token_ids=(token,))
    engine.add("r", prompt, params, seed=3, handoff=True)
    outputs = [o for _ in range(3) for o in engine.step()]
    assert [o.finish_reason for o in outputs] == [FinishReason.STOP] and not engine.leaving


def test_an_abort_before_admission_forgets_the_kv() -> None:
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=16)
    engine.add("running", [1] * 8, SamplingParams(max_tokens=30))
    engine.step()
    engine.add("waits", [2] * 8, SamplingParams(max_tokens=30), given=[3], kv=b"anything")
    engine.abort("waits")
    while engine.has_work:
        engine.step()
    assert not engine._arrived and engine.stats.pages_used == 0


def test_step_logs_of_both_sides_replay(tmp_path: Path) -> None:
    engines = [make_engine(200, model_name="full+window") for _ in range(2)]
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    files = [path.open("w") for path in paths]
    for engine, file in zip(engines, files, strict=True):
        engine._log = StepLogWriter(file, engine.scheduler)
    split_run(engines[0], engines[1], prompts(7, 8), [12] * 8, frozenset({2}))
    for path, file in zip(paths, files, strict=True):
        file.close()
        result = replay(path)
        assert result.mismatch is None and result.steps >= 8
