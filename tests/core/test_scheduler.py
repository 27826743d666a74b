"""Continuous batching, preemption, forks: what each sequence says never depends on who runs beside it."""

import random

import pytest

from llmtool.core.admission import sibling_seed
from llmtool.core.engine import Arrival, Engine
from llmtool.core.request import FinishReason, SamplingParams
from llmtool.errors import QueueFull, RequestError, RequestTooLong, UsageError
from tests.support.core import expected, make_engine


def collect(engine: Engine, arrivals: list[Arrival] | None = None) -> dict[tuple[str, int], list[int]]:
    """Every answer's tokens, and the invariants checked after each step."""
    answers: dict[tuple[str, int], list[int]] = {}
    if arrivals is None:
        while engine.has_work:
            for output in engine.step():
                answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            engine.scheduler.check()
    else:
        for output in engine.run_trace(arrivals):
            answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            engine.scheduler.check()
    assert engine.scheduler.allocator.usage()[0] == 0, "no page is in use afterwards"
    return answers


def prompt(rng: random.Random, low: int = 1, high: int = 30) -> list[int]:
    return [rng.randrange(97) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("pages", [16, 24, 200])
@pytest.mark.parametrize("caching", [True, False])
def test_outputs_do_not_depend_on_the_batch(
    preemption: str, in_flight: int, pages: int, caching: bool
) -> None:
    rng = random.Random(pages * 10 + in_flight)
    shared = prompt(rng, 12, 12)
    arrivals, want = [], {}
    for i in range(40):
        p = (shared if rng.random() < 0.5 else []) + prompt(rng)
        n = rng.choice([1, 1, 1, 3])
        params = SamplingParams(max_tokens=rng.randint(1, 20), n=n, temperature=1.0)
        arrivals.append(Arrival(i * 0.004, f"r{i}", p, params, seed=i))
        for index in range(n):
            want[(f"r{i}", index)] = expected(p, params.max_tokens or 0, sibling_seed(i, index))
    engine = make_engine(
        pages, host_pages=pages, prefix_caching=caching, max_in_flight=in_flight, preemption=preemption
    )
    assert collect(engine, arrivals) == want
    stats = engine.stats
    assert stats.num_running == stats.num_waiting == 0
    assert stats.generation_tokens == sum(map(len, want.values()))
    if pages == 16:
        assert stats.preemptions > 0
        assert (stats.swapped_pages > 0) == (preemption == "swap")
    assert (stats.prefix_hits > 0) == caching


def test_token_budget_and_seats_hold() -> None:
    engine = make_engine(200, max_num_seqs=5, max_num_batched_tokens=7)
    for i in range(20):
        engine.add(f"r{i}", [i] * (3 + i), SamplingParams(max_tokens=5))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats.num_running)
        assert engine.last_step is not None and engine.last_step.num_tokens <= 7
    assert most == 5


def test_decoding_goes_on_while_a_long_prompt_is_chunked() -> None:
    engine = make_engine(200, max_num_batched_tokens=8, max_model_len=200)
    engine.add("short", [1, 2, 3], SamplingParams(max_tokens=30))
    engine.step()
    engine.add("long", list(range(90)), SamplingParams(max_tokens=1))
    for _ in range(10):
        outputs = engine.step()
        assert [o.request_id for o in outputs] == ["short"], "one token for the decoder in every step"
        assert engine.last_step is not None and engine.last_step.num_tokens == 8, "the chunk fills the rest"


def test_requests_that_come_together_share_their_prefix_in_the_same_step() -> None:
    engine = make_engine(200, max_num_batched_tokens=64)
    shared = list(range(40))
    for i in range(4):
        engine.add(f"r{i}", [*shared, 50 + i], SamplingParams(max_tokens=1))
    engine.step()
    assert engine.last_step is not None
    assert [s.num_tokens for s in engine.last_step.scheduled] == [41, 1, 1, 1]


def test_siblings_share_the_prompt_pages_copy_on_write() -> None:
    engine = make_engine(200, max_num_batched_tokens=64, tokens_per_page=4)
    engine.add("r", list(range(10)), SamplingParams(max_tokens=8, n=4), seed=5)
    engine.step()
    engine.step()
    ledger = engine.scheduler.allocator.ledger()
    assert ledger.pages_shared == 2, "the two full pages of the prompt"
    assert ledger.pages_used == 2 + 4, "and a tail of its own for each answer"
    assert engine.stats.copied_pages == 3, "the last owner of a page writes in place"
    collect(engine)


def test_first_come_first_served() -> None:
    engine = make_engine(200, max_num_seqs=2)
    for i in range(6):
        engine.add(f"r{i}", [i], SamplingParams(max_tokens=3))
    ends = [o.request_id for o in engine.run_trace([]) if o.finish_reason]
    assert ends == [f"r{i}" for i in range(6)]


def test_priority_order_and_displacement() -> None:
    engine = make_engine(200, max_num_seqs=2, policy="priority")
    engine.add("low1", [1], SamplingParams(max_tokens=10), priority=5)
    engine.add("low2", [2], SamplingParams(max_tokens=10), priority=5)
    engine.step()
    engine.add("high", [3], SamplingParams(max_tokens=2), priority=0)
    answers: dict[tuple[str, int], list[int]] = {}
    ends = []
    while engine.has_work:
        for o in engine.step():
            answers.setdefault((o.request_id, o.index), []).extend(o.token_ids)
            if o.finish_reason:
                ends.append(o.request_id)
        engine.scheduler.check()
    assert ends == ["high", "low1", "low2"]
    assert engine.stats.preemptions == 1
    assert answers[("high", 0)] == expected([3], 2)


def test_priority_preempts_only_where_it_helps() -> None:
    # 10 pages of 4: "old" of the same priority holds 7, so displacing "low" (2) cannot seat 20 tokens (5).
    engine = make_engine(10, max_num_seqs=8, max_num_batched_tokens=64, policy="priority")
    engine.add("old", [1] * 26, SamplingParams(max_tokens=2), priority=0)
    engine.step()
    engine.add("low", [2] * 4, SamplingParams(max_tokens=4), priority=5)
    engine.step()
    assert engine.stats.num_running == 1 or engine.stats.preemptions == 0
    engine.add("high", [3] * 20, SamplingParams(max_tokens=2), priority=0)
    collect(engine)
    assert engine.stats.preemptions == 0


def test_a_shared_prefix_needs_no_displacement() -> None:
    engine = make_engine(24, max_num_batched_tokens=64, policy="priority", max_model_len=80)
    shared = list(range(40))
    engine.add("low1", [*shared, 1], SamplingParams(max_tokens=8), priority=5)
    engine.add("low2", [*shared, 2], SamplingParams(max_tokens=8), priority=5)
    engine.step()
    engine.add("high", [*shared, 3], SamplingParams(max_tokens=2), priority=0)
    collect(engine)
    assert engine.stats.preemptions == 0, "nine of its ten pages are there already"


def test_never_fitting_goes_before_a_full_queue_and_answers_count() -> None:
    engine = make_engine(8, tokens_per_page=4, max_num_seqs=1, max_waiting=2)
    for i in range(3):
        engine.add(f"r{i}", [1], SamplingParams(max_tokens=2))
    with pytest.raises(RequestTooLong):
        engine.add("long", [1] * 40, SamplingParams(max_tokens=2))
    collect(engine)
    with pytest.raises(QueueFull, match="4 more are asked for, and the limit is 3"):
        engine.add("many", [1], SamplingParams(max_tokens=2, n=4, temperature=1.0))


def test_the_same_id_may_come_again_at_once() -> None:
    engine = make_engine()
    for _ in range(3):
        engine.add("r", [1, 2], SamplingParams(max_tokens=2))
        engine.abort("r")
    engine.add("r", [1, 2], SamplingParams(max_tokens=2))
    assert collect(engine) == {("r", 0): expected([1, 2], 2)}


def test_the_peak_counts_pages_of_requests_that_end_in_their_first_step() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    engine.add("r", [1] * 37, SamplingParams(max_tokens=1))
    collect(engine)
    assert engine.stats.pages_peak == 10


def test_a_failing_sequence_does_not_empty_the_shared_cache() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    shared = list(range(40))
    engine.add("a", shared, SamplingParams(max_tokens=1))
    collect(engine)
    engine.executor.failing.add("bad")  # type: ignore[attr-defined]
    engine.add("bad", [*shared, 1], SamplingParams(max_tokens=1))
    collect(engine)
    engine.add("b", [*shared, 2], SamplingParams(max_tokens=1))
    assert [o.num_cached_tokens for o in engine.run_trace([])] == [40]


def test_a_one_token_prompt_has_prompt_logprobs() -> None:
    engine = make_engine()
    engine.add("r", [1], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [o.prompt_logprobs for o in engine.run_trace([])] == [[None]]


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(8, tokens_per_page=4, max_model_len=64)  # 32 tokens of KV
    with pytest.raises(RequestTooLong, match="32 tokens"):
        engine.add("r", [1] * 32, SamplingParams(max_tokens=1))
    with pytest.raises(RequestTooLong, match=r"30 tokens and 3 are asked for.*max_tokens to 2"):
        engine.add("r", [1] * 30, SamplingParams(max_tokens=3))
    with pytest.raises(RequestError, match="no tokens"):
        engine.add("r", [], SamplingParams())
    engine.add("r", [1] * 30, SamplingParams())  # no limit asked: what is left
    assert len(collect(engine)[("r", 0)]) == 2


def test_queue_limit() -> None:
    engine = make_engine(max_num_seqs=2, max_waiting=3)
    for i in range(5):
        engine.add(f"r{i}", [1], SamplingParams(max_tokens=2))
    with pytest.raises(QueueFull, match="limit is 5"):
        engine.add("r5", [1], SamplingParams(max_tokens=2))
    collect(engine)
    engine.add("r5", [1], SamplingParams(max_tokens=2))
    collect(engine)


def test_stops() -> None:
    tokens = expected([7, 8], 20)
    stop = tokens[4]
    first = tokens.index(stop)
    engine = make_engine(eos=[stop])
    engine.add("eos", [7, 8], SamplingParams(max_tokens=20))
    engine.add("ignored", [7, 8], SamplingParams(max_tokens=20, ignore_eos=True))
    engine.add("id", [7, 8], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(tokens[0],)))
    last = {o.request_id: o for o in engine.run_trace([]) if o.finish_reason}
    assert last["eos"].finish_reason == FinishReason.STOP and last["eos"].stop_token == stop
    assert last["ignored"].finish_reason == FinishReason.LENGTH
    assert last["id"].stop_token == tokens[0]
    engine.add("eos", [7, 8], SamplingParams(max_tokens=20))
    assert collect(engine)[("eos", 0)] == tokens[: first + 1]


def test_abort_at_any_moment_frees_everything() -> None:
    for step in range(12):
        for in_flight in (1, 2):
            engine = make_engine(24, max_in_flight=in_flight, preemption="swap", host_pages=24)
            for i in range(6):
                engine.add(f"r{i}", [i] * 10, SamplingParams(max_tokens=9, n=1 + i % 3, temperature=1.0))
            for _ in range(step):
                engine.step()
            gone = engine.abort("r2")
            assert all(o.finish_reason == FinishReason.ABORT for o in gone) and len(gone) <= 3
            engine.abort("r2")
            engine.abort("never was")
            engine.abort("r1", index=1)
            engine.scheduler.check()
            answers = collect(engine)
            assert len(answers[("r3", 0)]) <= 9


def test_one_failing_sequence_does_not_harm_the_others() -> None:
    engine = make_engine()
    engine.executor.failing.add("bad")  # type: ignore[attr-defined]
    engine.add("bad", list(range(20)), SamplingParams(max_tokens=5))
    engine.add("good", list(range(20)), SamplingParams(max_tokens=5))
    outputs = list(engine.run_trace([]))
    bad = [o for o in outputs if o.request_id == "bad"]
    assert bad[-1].finish_reason == FinishReason.ERROR and bad[-1].error == "it was told to fail"
    assert [t for o in outputs if o.request_id == "good" for t in o.token_ids] == expected(list(range(20)), 5)


def test_times_and_counts_are_reported() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add("a", [1] * 8, SamplingParams(max_tokens=2))
    engine.add("b", [1] * 8, SamplingParams(max_tokens=2))
    last = {o.request_id: o for o in engine.run_trace([]) if o.finish_reason}
    a, b = last["a"].times, last["b"].times
    assert a is not None and b is not None
    assert (a.arrival, a.first_scheduled, a.first_token, a.finished) == pytest.approx((0, 0, 0.01, 0.02))
    assert (b.arrival, b.first_scheduled, b.first_token, b.finished) == pytest.approx((0, 0.02, 0.03, 0.04))
    assert last["b"].num_prompt_tokens == 8 and last["b"].num_cached_tokens == 4


def test_prompt_logprobs_do_not_use_the_cache() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    engine.add("a", list(range(20)), SamplingParams(max_tokens=1))
    collect(engine)
    engine.add("b", list(range(20)), SamplingParams(max_tokens=1, prompt_logprobs=0))
    engine.step()
    assert engine.last_step is not None and engine.last_step.scheduled[0].num_tokens == 20


def test_salts_do_not_share() -> None:
    engine = make_engine()
    for request, salt in (("a", ""), ("b", "tenant"), ("c", "tenant")):
        engine.add(request, list(range(21)), SamplingParams(max_tokens=1), cache_salt=salt)
        last = [o for o in engine.run_trace([]) if o.finish_reason][-1]
        assert last.num_cached_tokens == (20 if request == "c" else 0)


def test_a_budget_below_the_seats_is_refused() -> None:
    with pytest.raises(UsageError, match="max_num_batched_tokens"):
        make_engine(max_num_seqs=9, max_num_batched_tokens=8)
