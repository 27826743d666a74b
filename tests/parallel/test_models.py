"""Whole models over processes: layers with states, a pruned and quantised one, and SmolLM2."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from llmtool.models.loader import load
from llmtool.models.tokenizer import Tokenizer
from tests.models.conftest import smollm2 as smollm2  # the fixture
from tests.models.paged import PagedSequences
from tests.parallel.engine import check, engine_of, running
from tests.runtime.test_engine_equality import conversations
from tests.runtime.test_hybrids import MODELS, SIZES
from tests.runtime.tiny import TinyModel

LONGEST = 64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("falcon-h1-norm", 2, 1), ("falcon-h1", 3, 1), ("lfm2-biased", 2, 1), ("lfm2", 1, 2)],
)
def test_layers_with_states(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Heads of a state space with fewer groups than ranks, a norm over channels of several ranks, and channels of a
    convolution."""
    config_class, settings = MODELS[name]
    heads = {"num_attention_heads": 6, "hidden_size": 48} if tp == 3 else {}
    layers = {"full_attn_idxs": [0, 2]} if pp == 2 else {}
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **settings, **heads, **layers}))
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(tmp_path)
    whole = TinyModel(load(tmp_path, torch.float32), model, tmp_path)
    rng = random.Random(len(name))
    answers = [(prompt, whole.greedy(prompt, rng.randint(8, 20))) for prompt in conversations(6, 3)]
    limits = {"max_model_len": LONGEST, "kv_cache_memory_bytes": 2**23}
    with running(tmp_path, tp, pp, **limits) as parts:
        check(engine_of(parts), answers)
        check(engine_of(parts, max_num_batched_tokens=13), answers)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_smollm2_answers_as_one_process_does(smollm2: Path, quantization: str | None) -> None:
    """Nine heads over three KV heads on two ranks: six and three."""
    tokenizer = Tokenizer.from_dir(smollm2)
    questions = ("Write one sentence about the sea.", "What is the capital of France?", "Count to ten.")
    decoder = load(smollm2, torch.float32, quantization=quantization)
    answers = []
    for question in questions:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}]).token_ids
        sequences, chunk, said = PagedSequences(decoder, tokens_per_page=16, num_pages=16), ids, []
        while len(said) < 24:
            said.append(int(sequences.step({"a": chunk})[0][-1].argmax()))
            chunk = said[-1:]
        answers.append((ids, said))
    del decoder
    settings = {"quantization": quantization, "kv_cache_memory_bytes": 2**26, "block_size": 16}
    with running(smollm2, 2, 1, max_model_len=256, **settings) as parts:
        check(engine_of(parts), answers)
