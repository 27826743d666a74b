from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmtool.core.request import SamplingParams
from llmtool.runtime import sampler
from llmtool.runtime.random import uniforms
from llmtool.runtime.sampler import GrammarMask, SamplingRows, largest, sample

CPU = torch.device("cpu")
EOS = 1


def oracle_distribution(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    allowed: set[int] | None = None,
) -> dict[int, float]:
    """Token -> probability, one row, in plain Python, by the definitions; greedy gives one token probability 1."""
    x = {t: v for t, v in enumerate(logits) if allowed is None or t in allowed}
    for t, bias in params.logit_bias.items():
        if t in x:
            x[t] += bias
    if len(output) < params.min_tokens:
        for t in {EOS, *params.stop_token_ids}:
            x.pop(t, None)
    for t in x:
        if t in prompt or t in output:
            x[t] = x[t] / params.repetition_penalty if x[t] > 0 else x[t] * params.repetition_penalty
        x[t] -= params.frequency_penalty * output.count(t)
        x[t] -= params.presence_penalty * (t in output)
    if params.greedy:
        best = max(x.values())
        return {min(t for t, v in x.items() if v == best): 1.0}
    x = {t: v / params.temperature for t, v in x.items()}
    peak = max(x.values())
    p = {t: math.exp(v - peak) for t, v in x.items()}
    p = {t: v for t, v in p.items() if v >= params.min_p}
    if params.top_k > 0:
        kth = sorted(p.values(), reverse=True)[min(params.top_k, len(p)) - 1]
        p = {t: v for t, v in p.items() if v >= kth}
    if params.top_p < 1:
        mass, total = 0.0, sum(p.values())
        for v in sorted(p.values(), reverse=True):
            mass += v
            if mass >= params.top_p * total * (1 - 1e-12):
                break
        p = {t: w for t, w in p.items() if w >= v}
    total = sum(p.values())
    return {t: v / total for t, v in sorted(p.items())}


def oracle_token(distribution: dict[int, float], u: float) -> int:
    at = 0.0
    for token, p in distribution.items():
        at += p
        if u < at:
            return token
    return token


class Case:
    """A few sequences with their parameters and histories, ready to sample."""

    def __init__(
        self, params: list[SamplingParams], vocab: int, seed: int = 0, levels: int | None = None
    ) -> None:
        rng = np.random.default_rng(seed)
        n = len(params)
        x = rng.normal(0, 2, (n, vocab))
        if levels:  # few distinct values: many ties
            x = np.round(x * levels) / levels
        self.logits = torch.tensor(x, dtype=torch.float32)
        self.params = params
        self.prompts = [rng.integers(0, vocab, 5).tolist() for _ in params]
        self.outputs = [rng.integers(0, vocab, 4).tolist() for _ in params]
        self.seeds = list(range(100, 100 + n))
        self.rows = SamplingRows(n, vocab, [EOS], CPU)
        for i in range(n):
            self.rows.add(i, params[i], self.seeds[i], self.prompts[i], self.outputs[i])

    def run(self, which: list[int] | None = None, mask: GrammarMask | None = None) -> list[int]:
        which = list(range(len(self.params))) if which is None else which
        index = np.array(which)
        tokens, peaks = sample(
            self.logits[which],
            self.rows,
            index,
            np.array([9 + i for i in which]),
            np.array([len(self.outputs[i]) for i in which]),
            mask,
        )
        assert torch.isfinite(peaks).all()
        return tokens.tolist()

    def oracle(self, i: int, allowed: set[int] | None = None) -> dict[int, float]:
        return oracle_distribution(
            self.logits[i].tolist(), self.params[i], self.prompts[i], self.outputs[i], allowed
        )

    def expected(self, i: int, allowed: set[int] | None = None) -> int:
        u = uniforms(np.array([self.seeds[i]], np.uint64), np.array([9 + i]))[0]
        return oracle_token(self.oracle(i, allowed), float(u))


FILTERS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=20),
    "top_k": SamplingParams(top_k=3),
    "top_k of one": SamplingParams(top_k=1, temperature=5),
    "top_k past the vocabulary": SamplingParams(top_k=10_000),
    "top_p": SamplingParams(top_p=0.6),
    "top_p of one token": SamplingParams(top_p=1e-9, temperature=3),
    "top_p nearly off": SamplingParams(top_p=0.999999),
    "min_p": SamplingParams(min_p=0.2),
    "min_p of one": SamplingParams(min_p=1.0, temperature=4),
    "all three": SamplingParams(top_k=8, top_p=0.7, min_p=0.05, temperature=1.5),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition below one": SamplingParams(repetition_penalty=0.5),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=-1.5),
    "greedy with penalties": SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=1, frequency_penalty=2
    ),
    "bias": SamplingParams(logit_bias={3: 5.0, 7: -100.0, 10**6: 1.0}),
    "greedy with bias": SamplingParams(temperature=0, logit_bias={5: 100.0}),
    "min_tokens": SamplingParams(min_tokens=9, stop_token_ids=(4, 6), logit_bias={EOS: 50.0, 4: 50.0}),
    "min_tokens reached": SamplingParams(min_tokens=4, logit_bias={EOS: 50.0}),
    "everything": SamplingParams(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.3, logit_bias={2: 1.0}, min_tokens=6, stop_token_ids=(8,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [17, 1000])
@pytest.mark.parametrize("levels", [None, 2])
def test_each_filter_equals_its_definition(name: str, vocab: int, levels: int | None) -> None:
    case = Case([FILTERS[name]] * 12, vocab, levels=levels)
    assert case.run() == [case.expected(i) for i in range(12)]


@pytest.mark.parametrize("levels", [None, 2])
def test_a_row_is_the_same_alone_and_in_a_mixed_batch(levels: int | None) -> None:
    case = Case([*FILTERS.values(), *FILTERS.values()], 700, seed=5, levels=levels)
    n = len(case.params)
    together = case.run()
    assert together == [case.expected(i) for i in range(n)]
    assert [case.run([i])[0] for i in range(n)] == together
    order = np.random.default_rng(1).permutation(n).tolist()
    assert case.run(order) == [together[i] for i in order]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.01, 0.7, 1.0, 3.0, 100.0]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.3, 1.0, 1.4]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([-1.0, 0.0, 0.6]),
    min_tokens=st.integers(0, 6),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params_strategy, min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([None, 1, 4]))
def test_combinations_keep_what_the_definition_keeps(
    params: list[SamplingParams], seed: int, levels: int | None
) -> None:
    case = Case(params, 40, seed, levels)
    for i, token in enumerate(case.run()):
        # Rounding may move a draw to a neighbour, or a borderline token in or out of the nucleus, in float32.
        distribution = case.oracle(i)
        assert token == case.expected(i) or distribution.get(token, 0) > 0


def test_rows_past_the_window_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small window must change nothing, and a nucleus inside the window must not sort."""
    flat = [
        SamplingParams(top_p=0.8, temperature=9),
        SamplingParams(top_k=60),
        SamplingParams(top_k=60, top_p=0.5),
    ]
    case = Case(flat * 4, 300)
    expected = case.run()
    assert expected == [case.expected(i) for i in range(12)]
    sorts: list[int] = []
    real = sampler.sorted_descending

    def counting(x: torch.Tensor) -> torch.Tensor:
        sorts.append(len(x))
        return real(x)

    monkeypatch.setattr(sampler, "sorted_descending", counting)
    monkeypatch.setattr(sampler, "WINDOW", 8)
    assert case.run() == expected
    assert sum(sorts) == 12
    sharp = Case([SamplingParams(top_p=0.5, temperature=0.2)] * 3, 300)
    monkeypatch.setattr(sampler, "WINDOW", 64)
    assert sharp.run() == [sharp.expected(i) for i in range(3)]
    assert sum(sorts) == 12


def test_a_greedy_batch_costs_one_max(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([FILTERS["greedy"]] * 4, 50)
    monkeypatch.setattr(sampler, "_sample_touched", None)
    assert case.run() == case.logits.argmax(dim=1).tolist()


def test_logits_are_left_alone() -> None:
    case = Case([FILTERS["everything"]] * 3, 50)
    before = case.logits.clone()
    case.run()
    sample(case.logits, case.rows, np.arange(3), np.arange(3), np.zeros(3, np.int64))
    assert torch.equal(case.logits, before)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_largest_is_torchs(rows: int) -> None:
    """Ties, infinities and NaN included."""
    x = torch.randint(-3, 4, (rows, 50)).float()
    if rows > 3:
        x[1, 7], x[2, 9:11], x[3] = torch.nan, torch.inf, -torch.inf
    peaks, tokens = largest(x)
    theirs, _ = x.max(dim=1)
    assert torch.equal(peaks.nan_to_num(99.0), theirs.nan_to_num(99.0)) and tokens.dtype == torch.int64
    wanted = [row.isnan().nonzero()[0] if row.isnan().any() else (row == row.max()).nonzero()[0] for row in x]
    assert tokens.tolist() == [int(at) for at in wanted]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 9)
    logits[:, [4, 7]] = 1.0
    rows = SamplingRows(2, 9, [EOS], CPU)
    rows.add(0, SamplingParams(temperature=0), 0, [], [])
    rows.add(1, SamplingParams(temperature=0, repetition_penalty=1.1), 0, [0], [])
    tokens, _ = sample(logits, rows, np.arange(2), np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert tokens.tolist() == [4, 4]


@pytest.mark.parametrize("name", ["plain", "all three", "repetition"])
def test_frequencies_follow_the_distribution(name: str) -> None:
    """Chi-square over 20,000 positions of one stream against the oracle's probabilities."""
    case = Case([FILTERS[name]], 30, seed=3)
    n = 20_000
    tokens, _ = sample(
        case.logits.expand(n, -1), case.rows, np.zeros(n, np.int64), np.arange(n), np.full(n, 4, np.int64)
    )
    distribution = case.oracle(0)
    counts = np.bincount(tokens.numpy(), minlength=30)
    assert counts.sum() == sum(counts[t] for t in distribution), "a token outside the distribution was drawn"
    likely = [t for t, p in distribution.items() if p * n >= 5]
    observed = [*(counts[t] for t in likely), n - sum(counts[t] for t in likely)]
    expected = [*(distribution[t] * n for t in likely), n * (1 - sum(distribution[t] for t in likely))]
    if expected[-1] < 1:
        assert observed[-1] < 20
        observed, expected = (
            observed[:-1],
            [e * sum(observed[:-1]) / sum(expected[:-1]) for e in expected[:-1]],
        )
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_streams_of_different_seeds_differ_and_seeds_are_64_bit_signed() -> None:
    n = 200
    rows = SamplingRows(3, 100, [EOS], CPU)
    for row, seed in enumerate((0, -1, 2**63 - 1)):
        rows.add(row, SamplingParams(), seed, [], [])
    logits = torch.zeros(n, 100)
    streams = [
        tuple(sample(logits, rows, np.full(n, row), np.arange(n), np.zeros(n, np.int64))[0].tolist())
        for row in range(3)
    ]
    assert len(set(streams)) == 3


def test_penalties_follow_the_output_as_it_grows() -> None:
    params = SamplingParams(
        temperature=0, frequency_penalty=0.7, presence_penalty=0.2, repetition_penalty=1.1
    )
    rng = np.random.default_rng(2)
    prompt = [3, 3, 5]
    output: list[int] = []
    rows = SamplingRows(1, 20, [EOS], CPU)
    rows.add(0, params, 0, prompt, output)
    x = torch.tensor(rng.normal(0, 1, (1, 20)), dtype=torch.float32)
    for position in range(30):
        tokens, _ = sample(x, rows, np.zeros(1, np.int64), np.array([position]), np.array([len(output)]))
        token = int(tokens[0])
        assert {token: 1.0} == oracle_distribution(x[0].tolist(), params, prompt, output)
        output.append(token)
        rows.append(0, [token])
    resumed = SamplingRows(1, 20, [EOS], CPU)
    resumed.add(0, params, 0, prompt, output)
    assert torch.equal(resumed.penalties.output_counts[0], rows.penalties.output_counts[0])


def test_penalty_slots_are_reused_clean_and_the_table_grows() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=50)
    rows = SamplingRows(2, 8, [EOS], CPU)
    for row in range(2):
        rows.add(row, params, 0, [2, 3], [4])
    rows.remove(0)
    rows.add(0, params, 0, [6], [])
    x = torch.tensor([[0, 0, 9, 8, 7, 6, 5, 4.0]] * 2)
    tokens, _ = sample(x, rows, np.arange(2), np.arange(2), np.array([0, 1]))
    assert tokens.tolist() == [2, 5]
    rows.grow(9)
    for row in range(2, 9):
        rows.add(row, params, 0, [2], [])
    tokens, _ = sample(x[:1].expand(9, -1), rows, np.arange(9), np.arange(9), np.zeros(9, np.int64))
    assert tokens.tolist() == [2, 5, *[3] * 7]


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    case = Case([SamplingParams(temperature=0, repetition_penalty=1.7)] * 6, 64, seed=9)
    history = torch.tensor([p + o for p, o in zip(case.prompts, case.outputs, strict=True)])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(history, case.logits.clone())
    slots = torch.from_numpy(case.rows.penalty_slot)
    ones = torch.full((6,), 1.7), torch.zeros(6), torch.zeros(6)
    assert torch.equal(case.rows.penalties.apply(case.logits, slots, *ones), theirs)


def mask_of(index: list[int], allowed: list[set[int]], vocab: int) -> GrammarMask:
    bits = np.zeros((len(index), -(-vocab // 32) * 32), np.uint8)
    for row, ids in zip(bits, allowed, strict=True):
        row[list(ids)] = 1
    return GrammarMask(np.array(index), np.packbits(bits, axis=1, bitorder="little").view(np.int32))


def test_grammar_masks_apply_to_their_rows_only() -> None:
    params = [*[FILTERS["greedy"]] * 4, *[FILTERS["plain"]] * 4, FILTERS["everything"]]
    case = Case(params, 70, seed=4)
    allowed = {1: {5, 31, 32, 69}, 2: {0}, 5: {63, 64, 2, 3}, 8: {2, 9, 40, 41, 42}}
    tokens = case.run(mask=mask_of(list(allowed), list(allowed.values()), 70))
    assert tokens == [case.expected(i, allowed.get(i)) for i in range(9)]
    alone = Case(params[1:2], 70, seed=4)
    alone.logits = case.logits[1:2]
    assert alone.run(mask=mask_of([0], [allowed[1]], 70)) == tokens[1:2]


def test_an_ended_grammar_wins_over_min_tokens() -> None:
    params = SamplingParams(temperature=0, min_tokens=10)
    case = Case([params, params], 40)
    case.logits[:, EOS] = 50
    tokens = case.run(mask=mask_of([0, 1], [{EOS}, {EOS, 7}], 40))
    assert tokens == [EOS, 7]


@pytest.mark.parametrize(
    "params", [FILTERS["greedy"], FILTERS["plain"], FILTERS["everything"]], ids=["g", "p", "e"]
)
def test_rows_that_cannot_be_sampled_are_reported_and_harm_no_other(params: SamplingParams) -> None:
    case = Case([params] * 4, 30)
    expected = [case.expected(i) for i in range(4)]
    case.logits[1, 3] = torch.nan
    case.logits[2] = -torch.inf
    tokens, peaks = sample(case.logits, case.rows, np.arange(4), 9 + np.arange(4), np.full(4, 4))
    assert torch.isfinite(peaks).tolist() == [True, False, False, True]
    assert [tokens[0].item(), tokens[3].item()] == [expected[0], expected[3]]
    assert all(0 <= t < 30 for t in tokens.tolist())


def test_a_beam_row_draws_nothing() -> None:
    from llmtool.core.request import BeamParams

    rows = SamplingRows(1, 8, [EOS], CPU)
    rows.add(0, replace(SamplingParams(), beam=BeamParams(2)), 0, [], [])
    assert rows.features[0] == 0
