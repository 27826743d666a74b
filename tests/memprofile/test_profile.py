"""The whole document: bytes sum to the card, whatever the model and the requests; and what does not fit says so."""

import pytest

from llmtool.errors import InfeasibleError, UsageError
from llmtool.memprofile.demand import ALLOCATORS
from llmtool.memprofile.ledger import card_ledger
from llmtool.memprofile.profile import profile
from llmtool.memprofile.requests import Ask, named, traced
from llmtool.modelspec import ModelSpec
from llmtool.modelspec.catalogue import published
from llmtool.runtime.budget import activation_bytes
from tests.memprofile.test_demand import setting
from tests.workload.fake import data_file


@pytest.mark.parametrize(
    ("model", "workload", "changes"),
    [
        ("llama-3.1-8b", "chat", {"card": 24 << 30}),
        ("gemma-3-27b", "docqa", {"card": 80 << 30, "max_len": 20000}),
        ("falcon-h1-1.5b", "agent", {"card": 24 << 30, "max_len": 32768}),
        ("jamba-1.5-mini", "summarize", {"card": 141 << 30}),
        ("llama-3.1-70b", "chat", {"card": 80 << 30, "tp": 4, "kv_dtype": "fp8"}),
        ("deepseek-v3", "chat", {"card": 141 << 30, "tp": 8, "dtype": "fp8"}),
        ("gpt-oss-20b", "agent", {"card": 24_000_000_001, "dtype": "fp4", "arena": 3_000_000_007}),
    ],
)
def test_every_byte_of_the_card_is_accounted_for(model: str, workload: str, changes: dict) -> None:
    s = setting(model, image=0, **changes)
    d = profile(s, named(workload, 200), workload, ALLOCATORS, explain=1000)
    assert sum(row["bytes"] for row in d["ledger"]) == s.card
    assert all(isinstance(row["bytes"], int) and row["bytes"] > 0 for row in d["ledger"])
    rows = {row["allocator"]: row for row in d["allocators"]}
    assert set(rows) == set(ALLOCATORS)
    assert (
        rows["near"]["mean_batch"]
        >= 0.97 * rows["paged"]["mean_batch"]
        >= 0.9 * rows["contiguous"]["mean_batch"]
    )
    for row in rows.values():
        assert "refused" in row or (
            0 <= row["p50_batch"] <= row["p95_batch"] <= row["peak_batch"] <= s.max_seqs
        )
        assert "refused" in row or 0 <= row["live_share"] <= 1
    for point in d["timeline"]:
        assert min(point["bytes"].values()) >= 0
        assert len({sum(p["bytes"].values()) for p in d["timeline"]}) == 1
    bill = d["explain"]
    assert bill["taken"] == bill["by_allocator"]["near"] >= bill["live"] == s.geometry.live_bytes(1000)
    assert len(d["what_ifs"]) <= 3 and all(w["gain"] > 0.999 for w in d["what_ifs"])
    assert d["binding"]["layer_type"] in {t.name for t in s.geometry.types()}


def test_weights_by_type() -> None:
    parts = {p.name: p.bytes for p in card_ledger(setting("llama-3.1-8b", dtype="fp8")).parts}
    whole = sum(p.bytes for p in card_ledger(setting("llama-3.1-8b")).parts if p.name.startswith("weights"))
    assert whole == 2 * 8_030_261_248
    wide = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert parts["weights, bf16"] == wide and parts["weights, fp8"] * 2 == whole - wide


def test_what_if_is_what_then_is() -> None:
    s, asks = setting("gemma-2-9b", card=24 << 30, max_len=8192), named("summarize", 200)
    d = profile(s, asks, "summarize", ("near",))
    best = next(w for w in d["what_ifs"] if w["change"] == "--kv-dtype fp8")
    then = profile(
        setting("gemma-2-9b", card=24 << 30, max_len=8192, kv_dtype="fp8"), asks, "summarize", ("near",)
    )
    assert then["allocators"][0]["mean_batch"] == pytest.approx(best["mean_batch"])
    assert best["gain"] == pytest.approx(best["mean_batch"] / d["allocators"][0]["mean_batch"])


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(InfeasibleError, match="weights take"):
        card_ledger(setting("llama-3.1-70b", card=80 << 30))
    with pytest.raises(InfeasibleError, match="of KV cannot be had"):
        card_ledger(setting("llama-3.1-8b", card=24 << 30, arena=20 << 30))
    tight = setting("llama-3.1-8b", card=24 << 30, arena=1 << 30)
    with pytest.raises(InfeasibleError, match="1 of 2 requests could never run"):
        profile(tight, [Ask(10, 10), Ask(11000, 10)], "two", ALLOCATORS)
    with pytest.raises(InfeasibleError, match="longer than 12288"):
        profile(tight, [Ask(20000, 10)], "one", ALLOCATORS)
    with pytest.raises(UsageError, match="--explain 99999"):
        profile(tight, [Ask(10, 10)], "one", ALLOCATORS, explain=99999)


@pytest.mark.parametrize(
    "file",
    [
        "AzureLLMInferenceTrace_conv.csv",
        "mooncake_synthetic_trace.jsonl",
        "vidur_arxiv_summarization_lengths.csv",
    ],
)
def test_recorded_traces(file: str) -> None:
    s = setting("gemma-3-27b", card=141 << 30, max_len=65536)
    asks = traced(data_file("traces", file), 300, s.checkpoint)
    assert len(asks) == 300
    d = profile(s, asks, file, ("paged", "near"))
    paged, near = d["allocators"]
    assert near["mean_batch"] >= paged["mean_batch"] and near["never_fit"] == 0
    assert sum(row["bytes"] for row in d["ledger"]) == s.card
    assert (near["hit_rate"] > 0) == ("mooncake" in file)


def test_captured_steps_have_an_arena_of_their_own() -> None:
    """It is taken from the KV memory, and within what the engine keeps for it, which counts from above."""
    plain, captured = (card_ledger(setting("llama-3.1-8b", captured=n)) for n in (0, 256))
    parts = {p.name: p.bytes for p in captured.parts}
    assert "captured steps" not in {p.name for p in plain.parts}
    assert captured.arena == plain.arena - parts["captured steps"] and parts["captured steps"] > 0
    assert sum(parts.values()) + captured.arena == captured.card
    spec = ModelSpec.from_config(dict(published("llama-3.1-8b") or {}))
    assert parts["captured steps"] <= activation_bytes(spec, 2, 256, 0)
