"""Our decoder against transformers' models, on tiny random models of every family and on SmolLM2."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtool.models.decoder import NativeDecoder
from llmtool.models.loader import load
from llmtool.models.tokenizer import Tokenizer
from llmtool.models.weights import allocate, fill_random
from llmtool.modelspec import ModelSpec
from tests.models.conftest import FAMILIES
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PROMPT = torch.randint(0, 97, (37,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(params=["auto", "off"], ids=["native", "torch"])
def cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the C++ kernels, and without them."""
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tiny: Tiny, cpu_kernels: str) -> tuple[torch.Tensor, PagedSequences]:
    """(transformers' logits of PROMPT [37, vocab], our model with empty pages)."""
    reference, directory = tiny(request.param)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.1  # a comparison of near-constants would prove nothing
    page = 16 if "tiles" in request.param else 4
    return expected, PagedSequences(load(directory, torch.float32, max_length=len(PROMPT)), page)


def test_logits_of_a_whole_prompt(pair: tuple[torch.Tensor, PagedSequences]) -> None:
    expected, ours = pair
    (logits,) = ours.step({"a": PROMPT})
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_logits_token_by_token(pair: tuple[torch.Tensor, PagedSequences]) -> None:
    expected, ours = pair
    logits = torch.cat([ours.step({"a": [token]})[0] for token in PROMPT])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_logits_of_wanted_rows_are_those_of_all(pair: tuple[torch.Tensor, PagedSequences]) -> None:
    """Also none of a step's rows: what it has written is what later steps read."""
    expected, ours = pair
    (none,) = ours.step({"a": PROMPT[:9], "b": PROMPT[:4]}, wanted=[])
    assert len(none) == 0
    (some,) = ours.step({"a": PROMPT[9:30], "b": PROMPT[4:20]}, wanted=[3, 20, 36])
    torch.testing.assert_close(some, expected[[12, 29, 19]], atol=1e-4, rtol=0)
    (last,) = ours.step({"a": PROMPT[30:31]}, wanted=[0])
    torch.testing.assert_close(last, expected[[30]], atol=1e-4, rtol=0)
    (rest,) = ours.step({"a": PROMPT[31:]})
    torch.testing.assert_close(rest, expected[31:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama-tiles", "gemma3", "gpt-oss", "deepseek-v3"])
def test_logits_of_a_tree_are_those_of_its_branches(tiny: Tiny, family: str, cpu_kernels: str) -> None:
    """Tiles, windows, sinks and latent attention: each node as if its branch had come alone."""
    reference, directory = tiny(family)
    ours = PagedSequences(
        load(directory, torch.float32, max_length=len(PROMPT)), 16 if "tiles" in family else 4
    )
    prompt, drafts = PROMPT[:20], PROMPT[20:29]
    parents = [-1, 0, 0, 1, 1, 2, 5, 3, 0]
    branches: list[list[int]] = []
    for node, parent in enumerate(parents):
        branches.append([*(branches[parent] if parent >= 0 else []), node])
    ours.step({"a": prompt, "b": PROMPT[:7]})
    tree = [sum(1 << node for node in branch) for branch in branches]
    logits, other = ours.step({"a": drafts, "b": PROMPT[7:9]}, [*tree, 1, 3])
    with torch.inference_mode():
        for node, branch in enumerate(branches):
            expected = reference(torch.tensor([prompt + [drafts[i] for i in branch]])).logits[0, -1]
            torch.testing.assert_close(logits[node], expected, atol=1e-4, rtol=0)
        expected = reference(torch.tensor([PROMPT[:9]])).logits[0, -2:]
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=0)


def test_logits_in_chunks_among_other_sequences(pair: tuple[torch.Tensor, PagedSequences]) -> None:
    """Two copies at different paces and a stranger in every step: none of them sees another."""
    expected, ours = pair
    rng = random.Random(2)
    got: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    left = {"a": list(PROMPT), "b": list(PROMPT)}
    while any(left.values()):
        chunks: dict[str, list[int]] = {"stranger": [rng.randrange(97) for _ in range(rng.choice([1, 3]))]}
        for name, tokens in left.items():
            n = min(len(tokens), rng.choice([0, 1, 1, 2, 9]))
            if n:
                chunks[name], left[name] = tokens[:n], tokens[n:]
        for name, logits in zip(chunks, ours.step(chunks), strict=True):
            got.setdefault(name, []).append(logits)
    for name in ("a", "b"):
        torch.testing.assert_close(torch.cat(got[name]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_quantized_kernels_equal_dequantized_matrices(
    tiny: Tiny, family: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = tiny(family)
    logits = []
    for mode in ("auto", "off"):
        monkeypatch.setenv("LLMTOOL_CPU_KERNELS", mode)
        model = load(directory, torch.float32, quantization=quantization)
        logits.append(PagedSequences(model).step({"a": PROMPT})[0])
    plain = PagedSequences(load(directory, torch.float32)).step({"a": PROMPT})[0]
    assert not torch.allclose(logits[0], plain, atol=1e-3)
    if quantization == "int8":
        assert (logits[0] - plain).abs().mean() < 0.1 * plain.abs().mean()
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tiny: Tiny, cpu_kernels: str) -> None:
    reference, directory = tiny("qwen3")
    with torch.inference_mode():
        expected = copy.deepcopy(reference).bfloat16()(torch.tensor([PROMPT])).logits[0].float()
    model = load(directory, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    (logits,) = PagedSequences(model).step({"a": PROMPT})
    assert (logits - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.02


def test_parameter_counts(tiny: Tiny) -> None:
    for name in FAMILIES:
        reference, directory = tiny(name)
        spec = ModelSpec.from_dir(directory)
        corrections = [b for n, b in reference.named_buffers() if n.endswith("e_score_correction_bias")]
        expected = sum(p.numel() for p in [*reference.parameters(), *corrections])
        assert spec.num_parameters == expected, name
        assert spec.weight_bytes("bfloat16") == 2 * spec.num_parameters


def test_smollm2_generates_what_transformers_generates(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_dir(smollm2)
    messages = [{"role": "user", "content": "Write one sentence about the sea."}]
    ids = tokenizer.apply_chat_template(messages).token_ids
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    generated = reference.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)[
        0, len(ids) :
    ].tolist()
    del reference
    ours = PagedSequences(load(smollm2, torch.float32), tokens_per_page=16, num_pages=8)
    output, chunk = [], ids
    while len(output) < len(generated):
        (logits,) = ours.step({"a": chunk})
        chunk = [int(logits[-1].argmax())]
        output += chunk
    assert output == generated
    assert len(tokenizer.decode(output).split()) > 5


def test_smollm2_answers_and_stops(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_dir(smollm2)
    model = load(smollm2, torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    ours = PagedSequences(model, tokens_per_page=16, num_pages=8)
    chunk, output = tokenizer.apply_chat_template(question).token_ids, []
    while not output or (output[-1] not in model.spec.eos_ids and len(output) < 12):
        chunk = [int(ours.step({"a": chunk})[0][-1].argmax())]
        output += chunk
    assert tokenizer.id_to_piece(output[-1]) == "<|im_end|>"
    assert "Paris" in tokenizer.decode(output)


@pytest.mark.parametrize(("stored", "off"), [(torch.float8_e4m3fn, 0.1), (torch.float8_e5m2, 0.2)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_keys_and_values_in_eight_bits(
    tiny: Tiny, family: str, stored: torch.dtype, off: float
) -> None:
    """Near those of bfloat16, and the nearer the better the scale: values far below 1 lose digits without one."""
    spec = ModelSpec.from_dir(tiny(family)[1])
    weights = allocate(spec, torch.bfloat16, torch.device("cpu"))
    fill_random(weights, 0)
    model = NativeDecoder(spec, weights)
    steps = ({"a": range(9), "b": [3]}, {"a": [7], "b": [4, 5, 6]})

    def logits(**options: Any) -> torch.Tensor:
        sequences = PagedSequences(model, **options)
        return torch.cat([rows for step in steps for rows in sequences.step(step)])

    plain = logits()

    def error(scale: float) -> float:
        return ((logits(stored=stored, scales=(scale, scale)) - plain).norm() / plain.norm()).item()

    assert 0 < error(1 / 64) < off
    assert error(2.0**16) > 2 * error(1 / 64)
