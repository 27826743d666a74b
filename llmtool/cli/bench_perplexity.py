"""`llmtool bench --perplexity`: what it was asked for, the engines it runs, what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from llmtool.bench.perplexity import Perplexity, PerplexityConfig, change, read_text, run, tokenized
from llmtool.bench.result import write_json
from llmtool.bench.run import run_blocking
from llmtool.cli.output import Output, size
from llmtool.config import EngineConfig, coerce, field_names
from llmtool.errors import UsageError

Bar = Callable[[str, float | None], None]


def arguments(positional: Sequence[str], dataset_path: str | None) -> tuple[str | None, str | None]:
    """(model, text file) of what stands on the command line: a file that is no GGUF is the text."""
    texts = [name for name in positional if Path(name).is_file() and not name.endswith(".gguf")]
    models = [name for name in positional if name not in texts]
    if len(models) > 1 or len(texts) + (dataset_path is not None) > 1:
        extra = models[1] if len(models) > 1 else texts[-1]
        raise UsageError(f"Unexpected argument {extra!r}.", "Give one model and one text file.")
    return (models[0] if models else None), (texts[0] if texts else dataset_path)


def baseline_of(engine: EngineConfig, given: Sequence[str]) -> EngineConfig | None:
    """The engine with the settings NAME=VALUE of `given` instead of its own; None without any."""
    if not given:
        return None
    hints, changed = get_type_hints(EngineConfig), {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in field_names(EngineConfig):
            raise UsageError(
                f"--baseline takes settings of the engine as NAME=VALUE, not {text!r}.",
                "For example --baseline dtype=float32.",
            )
        changed[name] = coerce(name, None if value.lower() == "none" else value, hints[name])
        if changed[name] is None and type(None) not in getattr(hints[name], "__args__", ()):
            changed[name] = coerce(name, value, hints[name])  # "none" is a value of its own
    return replace(engine, **changed)


def refuse_ignored(flags: Mapping[str, Any], ignored: frozenset[str]) -> None:
    """UsageError for flags that a run of this kind would not heed."""
    given = [f"--{name.replace('_', '-')}" for name in sorted(ignored) if flags.get(name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)} has no meaning with --perplexity.", "Leave it out.")


def bench_perplexity(
    engine: EngineConfig,
    baseline: EngineConfig | None,
    config: PerplexityConfig,
    text_file: str | None,
    output: Output,
    json_file: str | None,
) -> None:
    """Measures, shows, writes."""
    name, text = read_text(text_file)
    with output.progress() as bar:
        runs = [engine] if baseline is None else [baseline, engine]
        measured = [run_blocking(_measure(settings, config, name, text, bar)) for settings in runs]
    document = {
        "text": name,
        "window": config.perplexity_window,
        "stride": config.stride,
        **measured[-1].as_dict(),
    }
    if baseline is not None:
        document |= {"baseline": measured[0].as_dict(), "change": change(measured[0], measured[-1])}
    output.document(document)
    _show(document, output)
    if json_file is not None:
        write_json(document, json_file)
        output.hint(f"Result written to {json_file}")


async def _measure(
    settings: EngineConfig, config: PerplexityConfig, name: str, text: str, bar: Bar
) -> Perplexity:
    from llmtool.models.tokenizer import Tokenizer
    from llmtool.runtime.fleet import start_engine

    engine = await start_engine(settings, progress=bar)
    try:
        info = engine.info
        if info.pooling is not None:
            raise UsageError(f"{settings.model} is an encoder: it predicts no text.", "Give a decoder.")
        if config.perplexity_window >= info.max_model_len:
            raise UsageError(
                f"A window of {config.perplexity_window} tokens does not fit: the engine takes "
                f"{info.max_model_len}, and one of them is for output.",
                f"Set --perplexity-window to {info.max_model_len - 1} or less.",
            )
        tokens = tokenized(name, text, Tokenizer.from_dir(info.tokenizer_dir), config.perplexity_tokens)
        result = await run(engine, tokens, config, bar)
    finally:
        await engine.close()
    facts = {
        "model": info.served_model_name,
        "dtype": info.dtype,
        "kv_cache_dtype": info.kv_cache_dtype,
        "weight_bytes": info.weight_bytes,
    }
    return replace(result, facts=facts | _unusual(settings))


def _unusual(settings: EngineConfig) -> dict[str, Any]:
    """The settings that are not the defaults."""
    default = EngineConfig()
    values = {name: getattr(settings, name) for name in sorted(field_names(EngineConfig))}
    return {"settings": {name: value for name, value in values.items() if value != getattr(default, name)}}


def _show(document: Mapping[str, Any], output: Output) -> None:
    columns = [document.get("baseline"), document] if "baseline" in document else [document]
    rows = [
        (label, *(form(column[key]) for column in columns if column is not None))
        for label, key, form in (
            ("perplexity", "perplexity", lambda v: f"{v:.4f}"),
            ("nll per token (nats)", "nll_per_token", lambda v: f"{v:.5f}"),
            ("bits per byte", "bits_per_byte", lambda v: f"{v:.5f}"),
            ("tokens scored", "tokens", str),
            ("weights", "weight_bytes", size),
            ("tokens/s", "tokens_per_second", lambda v: "-" if v is None else f"{v:.0f}"),
        )
    ]
    heads = ("baseline", "measured") if "baseline" in document else (str(document["model"]),)
    title = f"{document['text']}, windows of {document['window']} tokens by {document['stride']}"
    output.table(title, ("metric", *heads), rows)
    moved = document.get("change")
    if moved is None:
        return
    if not moved["same_tokens"]:
        output.line(f"Bits per byte change by {moved['bits_per_byte_percent']:+.3f} % (other tokenizer)")
        return
    error = moved["nll_standard_error"]
    spread = "" if error is None else f" ± {error:.5f}"
    output.line(
        f"Perplexity changes by {moved['perplexity_percent']:+.3f} %, nll per token by "
        f"{moved['nll_per_token']:+.5f}{spread} nats"
    )
