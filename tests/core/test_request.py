"""What SamplingParams accept, refuse and normalise."""

import math

import pytest

from llmtool.core.request import SamplingParams
from llmtool.errors import RequestError


def test_normalised_as_vllm_does() -> None:
    assert SamplingParams(temperature=1e-50).greedy
    assert SamplingParams(temperature=1e-3).temperature == 0.01
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", -1),
        ("min_tokens", 2**63),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("top_k", -2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("presence_penalty", 3.0),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logprobs", 101),
        ("n", 0),
        ("n", 129),
        ("seed", 2**63),
        ("stop_token_ids", tuple(range(200))),
    ],
)
def test_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field and field in caught.value.message


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(RequestError, match="all answers would be the same"):
        SamplingParams(n=2, temperature=0.0)
