"""Attention over paged KV on a GPU: against the device's copy bandwidth, SDPA and flex_attention.

python benchmarks/gpu/attention.py [--dry-run] [--seconds 240]

Llama-3.1-8B's heads (32 queries, 8 KV, 128 dimensions), bfloat16. KV read per second over what a copy moves, both
measured in this run. Peers read contiguous KV of equal lengths, which is easier than pages. Targets: >= 0.90 of the
copy from 256 MB of KV, >= 0.85 from 64 MB, <= 10 us for one sequence of 1K; verification of up to 8 tokens <= 1.15x
of one; strided pages within 3 %; one long sequence beside 31 short ones <= 1.2x of what its bytes take.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
import torch
import torch.nn.functional as F
from llmtool_kernels.attention import UNIT, AttentionBatch, KVLayout, paged_attention
from measure import RESULTS, Budget, Run, attempt, copy_bandwidth, median_seconds, save, table

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
L2_BYTES = 60 * 2**20
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2


@dataclass(frozen=True, slots=True)
class Case:
    """lengths: of the sequences; queries: new tokens of each; stride: page bytes over those of this layer."""

    name: str
    lengths: tuple[int, ...]
    page: int = 16
    queries: int = 1
    stride: int = 1

    @property
    def kv_bytes(self) -> int:
        return sum(self.lengths) * TOKEN_BYTES

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1


def cases(dry_run: bool) -> list[Case]:
    if dry_run:
        return [
            Case("1 x 48", (48,)),
            Case("2 x 40, pages of 32", (40, 40), page=32),
            Case("2 x 40, 3 queries", (40, 40), queries=3),
            Case("2 x 40, strided", (40, 40), stride=3),
            Case("1 x 200 + 3 x 20", (200, 20, 20, 20)),
        ]
    grid = [
        Case(f"{batch} x {length}, pages of {page}", (length,) * batch, page)
        for page in (16, 32, 64)
        for batch, length in (
            (1, 1024),
            (1, 16384),
            (1, 262144),
            (8, 4096),
            (32, 512),
            (32, 4096),
            (128, 2048),
        )
    ]
    verify = [Case(f"32 x 4096, {q} queries", (4096,) * 32, queries=q) for q in (2, 4, 8)]
    chunk = [Case("1 x 8192, chunk of 2048", (8192,), queries=2048)]
    strided = [Case(f"32 x 4096, stride {s}", (4096,) * 32, stride=s) for s in (3, 32)]
    mixed = [Case("1 x 65536 + 31 x 512", (65536,) + (512,) * 31)]
    return grid + verify + chunk + strided + mixed


class Data:
    """A case's KV, in pages in random order and, where lengths are equal, contiguous too."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.case = case
        layer_bytes = case.page * TOKEN_BYTES
        units = layer_bytes * case.stride // UNIT
        counts = [-(-length // case.page) for length in case.lengths]
        order = random.Random(seed).sample(range(sum(counts)), sum(counts))
        tables = [[order.pop() * units for _ in range(count)] for count in counts]
        self.layout = KVLayout(layer_bytes * (case.stride // 2), case.page, KV_HEADS, DIM, DIM)
        self.arena = torch.empty(sum(counts) * units * UNIT, dtype=torch.uint8, device=device)
        self.arena.view(torch.bfloat16).normal_()
        queries = [case.queries] * len(case.lengths)
        self.batch = AttentionBatch.build(queries, case.lengths, tables, case.page, device)
        n = sum(queries)
        self.q = torch.randn(n, Q_HEADS, DIM, dtype=torch.bfloat16, device=device)
        self.new = torch.randn(2, n, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
        self.write_and_attend()  # what is timed on a GPU reads only: the new tokens' KV is there before

    def write_and_attend(self) -> torch.Tensor:
        return paged_attention(self.q, *self.new, self.arena, self.layout, self.batch, SCALE)

    def ours(self) -> torch.Tensor:
        if not self.q.is_cuda:
            return self.write_and_attend()
        from llmtool_kernels.gpu.attention import read_pages

        return read_pages(self.q, self.arena, self.layout, self.batch, SCALE)

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, Hq, queries, D], k and v [B, Hkv, L, D] of the same numbers."""
        case, page = self.case, self.case.page
        elements = self.arena.view(torch.bfloat16)
        width = page * KV_HEADS * DIM
        at = self.batch.block_tables.long() * (UNIT // 2) + self.layout.layer_offset // 2  # [B, pages]
        parts = []
        for part in range(2):
            index = (at + part * width)[..., None] + torch.arange(width, device=at.device)
            rows = elements[index].view(len(case.lengths), -1, KV_HEADS, DIM)[:, : case.lengths[0]]
            parts.append(rows.transpose(1, 2).contiguous())
        q = self.q.view(len(case.lengths), case.queries, Q_HEADS, DIM).transpose(1, 2).contiguous()
        return q, parts[0], parts[1]


def measure(case: Case, device: torch.device, copy: float, budget: Budget, flex: bool) -> dict[str, Any]:
    """A row of the table. Data is held often enough that no cache keeps it from one run to the next."""
    sets = 1 if device.type != "cuda" else max(1, min(8, -(-4 * L2_BYTES // case.kv_bytes)))
    data = [Data(case, device, seed) for seed in range(sets)]
    seconds = median_seconds([d.ours for d in data], device)
    row: dict[str, Any] = {
        "case": case.name,
        "kv_mb": case.kv_bytes / 1e6,
        "us": seconds * 1e6,
        "tb_per_s": case.kv_bytes / seconds / 1e12,
        "of_copy": case.kv_bytes / seconds / copy,
        "error": None,
        "sdpa_us": None,
        "flex_us": None,
    }
    if not case.equal or case.kv_bytes * 3 > 40e9:
        return row
    dense = [d.contiguous() for d in data]
    mask = _mask(case, device)
    reference = F.scaled_dot_product_attention(
        *(x.float() for x in dense[0]), attn_mask=mask, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    ours = data[0].ours().view(reference.shape).float()
    row["error"] = ((ours - reference).norm() / reference.norm()).item()
    row["sdpa_us"] = attempt(lambda: 1e6 * median_seconds(_sdpa(dense, mask), device))
    if flex and budget.allows(f"flex_attention, {case.name}", 30):
        row["flex_us"] = attempt(lambda: 1e6 * median_seconds(_flex(dense, case, device), device))
    return row


def _mask(case: Case, device: torch.device) -> torch.Tensor | None:
    if case.queries == 1:
        return None
    length = case.lengths[0]
    keys = torch.arange(length, device=device)
    return keys <= torch.arange(length - case.queries, length, device=device)[:, None]


def _sdpa(dense: Sequence[tuple[torch.Tensor, ...]], mask: torch.Tensor | None) -> list[Run]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)

    return [run(*d) for d in dense]


def _flex(dense: Sequence[tuple[torch.Tensor, ...]], case: Case, device: torch.device) -> list[Run]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if case.queries > 1:
        behind = case.lengths[0] - case.queries
        block_mask = create_block_mask(
            lambda b, h, q, k: k <= q + behind, None, None, case.queries, case.lengths[0], device=device
        )
    attend: Callable[..., torch.Tensor] = flex_attention
    if device.type == "cuda":
        torch._dynamo.reset()
        attend = torch.compile(flex_attention, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
        return lambda: attend(q, k, v, block_mask=block_mask, scale=SCALE, enable_gqa=True)

    return [run(*d) for d in dense]


def main(dry_run: bool, budget: Budget, directory: Path) -> list[dict[str, Any]]:
    device = torch.device("cpu" if dry_run else "cuda")
    with torch.inference_mode():
        copy = copy_bandwidth(device, 2**16 if dry_run else 2**31)
        rows = []
        for case in cases(dry_run):
            if budget.allows(case.name, 5):
                flex = case.page == 16 and case.stride == 1
                rows.append(measure(case, device, copy, budget, flex))
        after = copy_bandwidth(device, 2**16 if dry_run else 2**31)
    table(f"attention; a copy moves {copy / 1e12:.3f} TB/s before, {after / 1e12:.3f} after", rows)
    verdicts = targets.of_attention(rows)
    table("targets", verdicts)
    data = {
        "targets": verdicts,
        "copy_bytes_per_s": [copy, after],
        "rows": rows,
        "left_out": budget.left_out,
        "dry_run": dry_run,
    }
    save("attention", data, directory)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: that all of it runs")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    main(args.dry_run, Budget(args.seconds), args.out)
