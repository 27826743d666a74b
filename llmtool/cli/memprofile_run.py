"""The body of `llmtool memprofile`: flags become a profile, its tables, its picture and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtool.cli.command import optional_size
from llmtool.cli.output import Output
from llmtool.config import MAX_CAPTURED_TOKENS
from llmtool.errors import UsageError
from llmtool.hardware import find_device
from llmtool.memprofile.demand import ALLOCATORS
from llmtool.memprofile.ledger import size
from llmtool.memprofile.profile import profile
from llmtool.memprofile.requests import Ask, named, traced
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.sim.ir import Recurrent, read_ir

Arguments = Mapping[str, Any]
LONGEST = 131072
# Filled, shaded and empty cells of the timeline: read by the next step, not read, kept for prefixes, free.
BAR = {"read": "█", "tails": "▓", "cached": "░", "free": "·"}


def run(output: Output, a: Arguments) -> None:
    setting, asks, workload = read(a)
    compare = tuple(name.strip() for name in a["compare"].split(",") if name.strip())
    unknown = [name for name in compare if name not in ALLOCATORS]
    if unknown or not compare:
        raise UsageError(
            f"--compare knows no allocator {unknown[0]!r}." if unknown else "--compare names no allocator.",
            f"Choose from {', '.join(ALLOCATORS)}.",
        )
    document = profile(setting, asks, workload, compare, a["explain"])
    if a["html"]:
        from llmtool.cli.memprofile_html import write_html

        write_html(a["html"], document)
        output.hint(f"Report in {a['html']}.")
    output.document(document)
    show(output, document)


def read(a: Arguments) -> tuple[Setting, list[Ask], str]:
    """What the flags ask for. Raises UsageError and ModelError."""
    model = a["model"]
    if model is None:
        raise UsageError("Which model?", "Give a catalogue name, a config.json or a directory.")
    if (a["device"] is None) == (a["memory"] is None):
        raise UsageError("Give either --device or --memory.", "As --device h200 or --memory 80GiB.")
    if a["workload"] and a["trace"]:
        raise UsageError("A workload and a trace exclude each other.", "Give one of them.")
    if a["num_prompts"] < 1:
        raise UsageError(f"The number of requests must be at least 1, not {a['num_prompts']}.")
    ir = read_ir(read_config(model), Path(model).name or model)
    card = optional_size(a["memory"]) or find_device(a["device"], a["devices_file"]).memory
    # States are in no captured step, as the engine has it.
    eager = a["enforce_eager"] or any(isinstance(m, Recurrent) for b in ir.blocks for m in b.mixers)
    setting = Setting(
        ir,
        card,
        dtype=a["dtype"] or ir.native,
        kv_dtype=a["kv_dtype"],
        tp=a["tensor_parallel_size"],
        utilization=a["gpu_memory_utilization"],
        budget=a["max_num_batched_tokens"],
        max_seqs=a["max_num_seqs"],
        max_len=a["max_model_len"] or min(ir.max_positions, LONGEST),
        page=a["block_size"],
        checkpoint=a["checkpoint_every"],
        image=a["image_tokens"],
        arena=optional_size(a["kv_cache_memory"]),
        captured=0 if eager else min(MAX_CAPTURED_TOKENS, a["max_num_batched_tokens"]),
    )
    if a["trace"]:
        return setting, traced(a["trace"], a["num_prompts"], setting.checkpoint), Path(a["trace"]).name
    name = a["workload"] or "chat"
    return setting, named(name, a["num_prompts"], a["seed"]), name


def show(output: Output, d: Mapping[str, Any]) -> None:
    card = d["card_bytes"]
    title = f"{d['model']}: where {size(card)} go" + (
        f", on each of {d['devices']}" if d["devices"] > 1 else ""
    )
    rows = [[r["part"], size(r["bytes"]), f"{r['bytes'] / card:.1%}", r["note"]] for r in d["ledger"]]
    total = sum(r["bytes"] for r in d["ledger"])
    output.table(
        title, ["part", "bytes", "of the card", ""], [*rows, ["sum", size(total), f"{total / card:.1%}", ""]]
    )
    _allocators(output, d)
    b = d["binding"]
    if b["limit"] == "memory":
        output.line(
            f"What binds: {b['layer_type']}, {b['share_of_taken']:.0%} of what running requests take."
        )
    elif b["limit"] == "max_num_seqs":
        output.line("What binds: --max-num-seqs; memory is left.")
    else:
        output.line("Nothing binds: all requests fit at once.")
    for w in d["what_ifs"]:
        cards = f" on {w['devices']}x the cards" if w["devices"] > 1 else ""
        output.line(f"What if {w['change']}: {w['gain']:.2f}x the batch{cards} ({w['mean_batch']:.1f}).")
    columns = list(d["contexts"][0]["sequences"]) if d["contexts"] else []
    output.table(
        "Sequences that fit at once, by their length",
        ["tokens", *columns],
        [[str(c["tokens"]), *(str(c["sequences"][k]) for k in columns)] for c in d["contexts"]],
    )
    if d["explain"]:
        _bill(output, d["explain"])
    _timeline(output, d["timeline"])


def _allocators(output: Output, d: Mapping[str, Any]) -> None:
    w = d["workload"]
    rows = []
    for r in d["allocators"]:
        if "refused" in r:
            rows.append([r["allocator"], "refused", "", "", "", "", "", ""])
            continue
        rows.append(
            [
                r["allocator"],
                str(r["fit_at_mean_length"]),
                str(r["p50_batch"]),
                str(r["p95_batch"]),
                f"{r['mean_batch']:.1f}",
                str(r["preemptions"]),
                f"{r['hit_rate']:.0%}",
                f"{r['live_share']:.0%}",
            ]
        )
    note = [f"{r['allocator']}: {r['refused']}" for r in d["allocators"] if "refused" in r]
    note += [
        f"{r['allocator']}: {r['never_fit']} requests could never run."
        for r in d["allocators"]
        if r.get("never_fit")
    ]
    if w["left_out_too_long"]:
        note.append(f"{w['left_out_too_long']} requests were longer than --max-model-len and are left out.")
    output.table(
        f"{w['requests']} requests of {w['name']}, {w['mean_prompt']:.0f} in and {w['mean_output']:.0f} out on "
        "average, replayed (simulated)",
        ["allocator", "fit", "p50 batch", "p95", "mean", "preemptions", "prefix hits", "KV read"],
        rows,
        " ".join(note),
    )


def _bill(output: Output, e: Mapping[str, Any]) -> None:
    rows = [
        [
            i["type"],
            str(i["layers"]),
            str(i["tables"]),
            str(i["small_pages"]),
            str(i["large_pages"]),
            size(i["live"]),
            size(i["outside"]),
            size(i["padding"]),
            size(i["taken"]),
        ]
        for i in e["items"]
    ]
    lost = 1 - e["live"] / e["taken"] if e["taken"] else 0.0
    others = ", ".join(f"{name} {size(count)}" for name, count in e["by_allocator"].items() if name != "near")
    output.table(
        f"One decoding request of {e['tokens']} tokens: {size(e['taken'])}, {lost:.1%} of it not read",
        ["layer type", "layers", "tables", "small pages", "large", "read", "not read", "padding", "taken"],
        rows,
        f"Elsewhere: {others}." if others else "",
    )


def _timeline(output: Output, points: Sequence[Mapping[str, Any]]) -> None:
    """The arena over time: a column for each moment, stacked from the bottom."""
    if not points or output.as_json:
        return
    height = 10
    columns = [_column(p["bytes"], height) for p in points]
    output.line("The arena over steps (near): " + ", ".join(f"{mark} {name}" for name, mark in BAR.items()))
    for row in range(height - 1, -1, -1):
        output.line(f"{(row + 1) / height:>5.0%} " + "".join(column[row] for column in columns))
    batches = [p["batch"] for p in points]
    output.line(f"      sequences: {batches[0]} at first, {max(batches)} at most, {batches[-1]} at the end")


def _column(parts: Mapping[str, int], height: int) -> str:
    """From the bottom up."""
    total = sum(parts.values())
    groups = dict.fromkeys(BAR, 0)
    for name, count in parts.items():
        groups[_group(name)] += count
    cells, done = "", 0
    for name, count in groups.items():
        done += count
        cells += BAR[name] * (round(height * done / total) - len(cells))
    return cells.ljust(height, BAR["free"])[:height]


def _group(name: str) -> str:
    if "tails" in name:
        return "tails"
    if "cached" in name:
        return "cached"
    return "free" if "free" in name else "read"


def show_live(output: Output, url: str) -> None:
    from llmtool.memprofile.live import fetch

    document = fetch(url)
    output.document(document)
    arena = document["kv"]["arena"]
    rows = [
        [name.replace("_", " "), size(count), f"{count / arena:.1%}" if arena else ""]
        for name, count in document["kv"]["parts"].items()
    ]
    output.table(f"{document['model']}: KV memory of {size(arena)}", ["part", "bytes", "of it"], rows)
    groups = [
        [
            g["name"],
            str(g["layers"]),
            str(g["tokens_per_page"]),
            size(g["page_bytes"]),
            size(g["bytes_per_token"]),
        ]
        for g in document["kv"]["groups"]
    ]
    output.table("Pages", ["group", "layers", "tokens", "page", "per token"], groups)
    output.line(
        f"{document['running']} requests running, {document['waiting']} waiting; {document['preemptions']} "
        f"preemptions; prefix hits {document['hit_rate']:.0%}."
    )
