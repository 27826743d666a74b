"""Part of its KV memory that a decoding request wastes, for every model of the catalogue under every page plan.

Computed, not measured: exact on any machine. One request, nothing cached for others; four tiles of image tokens
where a model reads images. `worst`: the most over every 7th length of [1k, 8k) and every 997th of [8k, 128k]; the
last, partly filled page of 16 tokens alone costs up to 1.5 % at 1k there.

python benchmarks/memory_waste.py
"""

from __future__ import annotations

from common import save

from llmtool.core.memory.page_plan import MODES, PagePlan, plan_pages
from llmtool.errors import InfeasibleError
from llmtool.modelspec.catalogue import names
from llmtool.sim.catalogue import geometry_of

LENGTHS = {"1k": 1024, "8k": 8192, "32k": 32768, "128k": 131072}
SPANS = {"worst_1k_8k": range(1024, 8192, 7), "worst_8k_128k": range(8192, 131073, 997)}
TARGETS = {"1k": 2.5, "8k": 2.0, "32k": 2.0, "128k": 2.0}
IMAGE = 4 * 1601
KNOWN = (
    ("llama-3.2-11b-vision", 43, 6193, 79.6),
    ("gemma-2-9b", 8192, 0, 25.0),
    ("ministral-8b", 131072, 0, 56.25),
)


def percent(plan: PagePlan, length: int) -> float:
    image = IMAGE if any(spec.kind == "cross_attention" for spec in plan.geometry.layers) else 0
    return round(100 * plan.waste(length, image), 2)


def row(name: str, mode: str) -> dict[str, object]:
    geometry = geometry_of(name)
    entry: dict[str, object] = {"model": name, "plan": mode}
    try:
        plan = plan_pages(geometry, mode=mode)  # type: ignore[arg-type]
    except InfeasibleError as error:
        return {**entry, "refused": error.message}
    entry |= {"large_page_kib": plan.large_page / 1024, "tables": len(plan.groups)}
    entry |= {"waste_percent": {label: percent(plan, length) for label, length in LENGTHS.items()}}
    return entry | {label: max(percent(plan, n) for n in span) for label, span in SPANS.items()}


def main() -> None:
    known = []
    for name, text, image, published in KNOWN:
        ours = 100 * plan_pages(geometry_of(name), 1, mode="uniform").waste(text, image)
        known.append(
            {"model": name, "text": text, "image": image, "published": published, "ours": round(ours, 2)}
        )
        print(f"{name}: {ours:.2f} % (published: {published} %)")
    table = [row(name, mode) for name in names() for mode in MODES]
    for entry in table:
        print(
            entry["model"], entry["plan"], entry.get("waste_percent", "refused"), entry.get("worst_1k_8k", "")
        )
    missed = [
        {"model": e["model"], "length": label, "waste_percent": e["waste_percent"][label]}  # type: ignore[index]
        for e in table
        if e["plan"] == "near"
        for label, target in TARGETS.items()
        if e["waste_percent"][label] > target  # type: ignore[index]
    ]
    plans = {name: plan_pages(geometry_of(name)).explain() for name in names()}
    save(
        "memory_waste",
        {
            "known_answers": known,
            "targets_percent": TARGETS,
            "near_misses_target": missed,
            "rows": table,
            "plans": plans,
        },
    )
    print(f"near misses its target {len(missed)} times")


if __name__ == "__main__":
    main()
