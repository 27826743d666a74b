"""Beam search over forked sequences against a dense oracle that keeps whole token lists and no pages."""

import itertools

import pytest

from llmtool.core.request import BeamParams, FinishReason, SamplingParams
from llmtool.errors import RequestError
from tests.support.core import make_engine, next_logprobs


def oracle(
    prompt: list[int], width: int, max_tokens: int, eos: set[int], penalty: float, early: bool
) -> list[tuple[float, tuple[int, ...]]]:
    """The selection rule of transformers' `generate`, on plain lists."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, max_tokens + 1):
        candidates = [
            (score + logprob, (*tokens, token))
            for score, tokens in live
            for token, logprob in next_logprobs([*prompt, *tokens], 97)
        ]
        candidates.sort(key=lambda c: -c[0])
        keep = candidates[: (1 + max(1, len(eos))) * width]
        ended = [c[1][-1] in eos or length == max_tokens for c in keep]
        done += [(s / length**penalty, t) for (s, t), e in list(zip(keep, ended, strict=True))[:width] if e]
        done = sorted(done, key=lambda h: -h[0])[:width]
        live = [c for c, e in zip(keep, ended, strict=True) if not e][:width]
        full = len(done) == width
        if not live or (full and (early or live[0][0] / length**penalty <= done[-1][0])):
            break
    return done


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pages", [12, 40, 400])
@pytest.mark.parametrize("penalty,early", [(1.0, False), (0.0, False), (1.5, True), (-10.0, False)])
def test_equals_the_oracle(width: int, pages: int, penalty: float, early: bool) -> None:
    eos = {3, 11, 40, 41, 42}
    params = SamplingParams(
        max_tokens=9,
        n=width,
        temperature=0.0,
        beam=BeamParams(width, length_penalty=penalty, early_stopping=early),
    )
    engine = make_engine(pages, max_num_batched_tokens=32, eos=sorted(eos), max_model_len=40)
    prompts = {f"r{i}": [i + 1] * (5 + 3 * i) for i in range(3)}
    for request, prompt in prompts.items():
        engine.add(request, prompt, params)
    outputs = []
    for output in engine.run_trace([]):
        engine.scheduler.check()
        outputs.append(output)
    assert len(outputs) == 3 * width and engine.scheduler.allocator.usage()[0] == 0
    for request, prompt in prompts.items():
        want = oracle(prompt, width, 9, eos, penalty, early)
        got = sorted((o for o in outputs if o.request_id == request), key=lambda o: o.index)
        assert [tuple(o.token_ids) for o in got] == [tokens for _, tokens in want]
        for o, (score, tokens) in zip(got, want, strict=True):
            assert o.cumulative_logprob / len(tokens) ** penalty == pytest.approx(score)
            assert o.finish_reason == (FinishReason.STOP if tokens[-1] in eos else FinishReason.LENGTH)
    if width == 4 and pages == 12:
        assert engine.stats.preemptions > 0


def test_beams_share_their_common_pages() -> None:
    engine = make_engine(400, max_num_batched_tokens=64, max_model_len=64)
    engine.add("r", list(range(40)), SamplingParams(max_tokens=12, temperature=0.0, beam=BeamParams(4)))
    shared = 0
    while engine.has_work:
        engine.step()
        shared = max(shared, engine.scheduler.allocator.ledger().pages_shared)
    assert shared >= 10, "the prompt's pages, once for all beams"


def test_abort_and_failure_end_all_answers() -> None:
    for fail, step in itertools.product((False, True), range(6)):
        engine = make_engine(60, max_num_batched_tokens=32)
        engine.add("r", [5] * 9, SamplingParams(max_tokens=8, n=2, temperature=0.0, beam=BeamParams(3)))
        for _ in range(step):
            assert engine.step() == []
        if fail:
            engine.executor.failing.update(["r", "r/1", "r/2", "r/3", "r/4", "r/5"])  # type: ignore[attr-defined]
            outputs = engine.step()
        else:
            outputs = engine.abort("r")
        reason = FinishReason.ERROR if fail else FinishReason.ABORT
        assert [(o.index, o.finish_reason) for o in outputs] == [(0, reason), (1, reason)]
        while engine.has_work:
            engine.step()
        engine.scheduler.check()
        assert engine.scheduler.allocator.usage()[0] == 0


def test_no_beam_ends_before_min_tokens() -> None:
    eos = {3, 11, 40, 41, 42}
    params = SamplingParams(max_tokens=9, min_tokens=5, n=3, temperature=0.0, beam=BeamParams(3))
    for i in range(8):
        engine = make_engine(400, max_num_batched_tokens=32, eos=sorted(eos))
        engine.add("r", [i + 1] * 5, params)
        for output in engine.run_trace([]):
            assert not eos & set(output.token_ids[:4])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"repetition_penalty": 1.2},
        {"logit_bias": {1: 5.0}},
        {"prompt_logprobs": 1},
    ],
)
def test_parameters_that_a_beam_search_would_ignore_are_refused(change: dict) -> None:
    with pytest.raises(RequestError, match="beam search takes no"):
        SamplingParams(**{"temperature": 0.0, "beam": BeamParams(2)} | change)


def test_more_beams_than_seats_are_refused() -> None:
    engine = make_engine(max_num_seqs=2)
    with pytest.raises(RequestError, match="3 beams"):
        engine.add("r", [1], SamplingParams(max_tokens=2, temperature=0.0, beam=BeamParams(3)))
