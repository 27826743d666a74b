"""The two-level arena under load: fragmentation, the batch that fits, and its cost in CPU time.

The first two are simulated (page counts, no model, exact on any machine), the third is measured.

- fragmentation: what is left of large pages when most requests that grew together have ended, with large pages
  tied to requests (Jenga: request-aware allocation) and without.
- batch: Ministral-8B, 20 requests of 55-110k tokens, 1,000 tokens of output each, first come first served;
  how many decode together, on average over steps, under uniform and LCM pages.
- cost: `take` and `release` per small page.

python benchmarks/memory_arena.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from common import save

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.arena import Arena
from llmtool.core.memory.page_plan import PagePlan, plan_pages
from llmtool.sim.catalogue import geometry_of

BUDGETS_GIB = (24, 32, 48)  # KV memory of an 80 GB card beside 16 GB of weights, and less


def fragmentation(tied: bool, requests: int = 64) -> dict[str, float]:
    """Requests of 4-16k tokens of Gemma-3-27B (without the end of its windows) grow page by page in random order,
    then nine in ten end. Part of the owned large pages that is empty small pages, before and after."""
    arena = Arena.of(plan_pages(geometry_of("gemma-3-27b"), mode="lcm"), 20_000)
    draw = random.Random(7)
    goals = {f"r{i}": draw.randint(256, 1024) for i in range(requests)}
    order = [name for name, goal in goals.items() for _ in range(goal)]
    draw.shuffle(order)
    pages: dict[str, list[int]] = {name: [] for name in goals}
    for name in order:
        taken = arena.take([1, 1], name if tied else "all")
        pages[name] += [page for group in taken.pages for page in group]
    before = _empty_percent(arena)
    for name in draw.sample(sorted(pages), requests * 9 // 10):
        for page in pages[name]:
            arena.release(page, 0, keep=False)
    arena.check()
    return {"all_running_empty_percent": before, "nine_in_ten_ended_empty_percent": _empty_percent(arena)}


def _empty_percent(arena: Arena) -> float:
    ledger = arena.ledger()
    return 100 * ledger["empty"] / (ledger["used"] + ledger["empty"] + ledger["padding"])


def decode_batch(plan: PagePlan, budget: int, tied_seed: int = 3) -> float:
    """Mean number of requests that decode together. Each holds, from its start, what decoding at its end needs."""
    draw = random.Random(tied_seed)
    waiting = [draw.randint(55_000, 110_000) for _ in range(20)]
    num_large = budget // plan.large_page
    arena = Arena.of(plan, num_large)
    running: dict[str, tuple[int, list[int]]] = {}
    batches, count, now, outputs = [], 0, 0, 1000
    while waiting or running:
        while waiting:
            wants = [pool.small_pages(waiting[0] + outputs) for pool in plan.pools]
            try:
                taken = arena.take(wants, f"r{count}")
            except OutOfPages:
                break
            waiting.pop(0)
            running[f"r{count}"] = (now + outputs, [p for group in taken.pages for p in group])
            count += 1
        if not running:
            raise SystemExit(f"a request alone does not fit {budget} bytes")
        end = min(stop for stop, _ in running.values())
        batches.append((end - now, len(running)))
        now = end
        for name in [name for name, (stop, _) in running.items() if stop == now]:
            for page in running.pop(name)[1]:
                arena.release(page, now, keep=False)
    arena.check()
    return sum(steps * size for steps, size in batches) / sum(steps for steps, _ in batches)


def cost(keep: bool, rounds: int = 200) -> dict[str, float]:
    """Microseconds of CPU time a small page; 256 requests in turn take 8 pages of each of two types."""
    plan = plan_pages(geometry_of("gemma-3-27b"))
    arena = Arena.of(plan, 1024)
    wants, take_s, release_s, pages = [8] * len(plan.pools), 0.0, 0.0, 0
    for round_ in range(rounds):
        t0 = time.process_time()
        taken = arena.take(wants, f"r{round_ % 256}")
        t1 = time.process_time()
        for group in taken.pages:
            for page in group:
                arena.release(page, round_, keep=keep)
        release_s += time.process_time() - t1
        take_s += t1 - t0
        pages += sum(wants)
    return {"take_us": take_s * 1e6 / pages, "release_us": release_s * 1e6 / pages}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    fragments = {
        name: {k: round(v, 2) for k, v in fragmentation(tied).items()}
        for name, tied in (("large pages tied to requests", True), ("not tied", False))
    }
    print(fragments)
    batches = []
    for gib in BUDGETS_GIB:
        row: dict[str, float] = {"budget_gib": gib}
        for mode in ("uniform", "lcm", "near"):
            plan = plan_pages(geometry_of("ministral-8b"), mode=mode)  # type: ignore[arg-type]
            row[mode] = round(decode_batch(plan, gib << 30), 2)
        row["lcm_over_uniform"] = round(row["lcm"] / row["uniform"], 2)
        batches.append(row)
        print(row)
    costs = {}
    for name, keep in (("freed", False), ("kept for its prefix", True)):
        runs = [cost(keep) for _ in range(args.repeats)]
        costs[name] = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
    print(costs)
    data = {
        "fragmentation_simulated": fragments,
        "ministral_batch_simulated": batches,
        "cost_per_small_page": costs,
    }
    note = "cost measured on a machine with other work on it: noisy"
    save("memory_arena", {**data, "repeats": args.repeats, "note": note})


if __name__ == "__main__":
    main()
