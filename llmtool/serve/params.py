"""Request bodies to `SamplingParams` and `Grammar`: defaults, cross-field rules, structured output."""

from __future__ import annotations

import json
from typing import Any

from llmtool.core.request import BeamParams, Grammar, SamplingParams
from llmtool.errors import RequestError, RequestTooLong
from llmtool.serve.protocol.common import GenerationFields, JsonObject, ResponseFormat, StructuredOutputs

USUAL_LOGPROBS = 20  # vLLM's limit
MAX_PROMPT_LOGPROBS = 2**16


def check_combination(body: GenerationFields, wants_logprobs: bool) -> None:
    """Rules between fields, which types cannot say. Raises RequestError."""
    n, best_of = body.n or 1, body.best_of
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream=true.", param="stream_options")
    if best_of is not None and best_of < n:
        raise RequestError(f"best_of ({best_of}) must not be smaller than n ({n}).", param="best_of")
    if body.use_beam_search and wants_logprobs:
        raise RequestError("A beam search reports no logprobs.", param="logprobs")
    if body.stream and body.use_beam_search:
        raise RequestError("A beam search is only known at its end: it cannot be streamed.", param="stream")
    if body.stream and best_of is not None and best_of > n:
        raise RequestError("The best of several answers is only known at the end: best_of > n cannot be streamed.",
                           param="stream")  # fmt: skip


def sampling_params(
    body: GenerationFields,
    *,
    vocab_size: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """The engine's parameters; best_of > n asks the engine for best_of answers. Raises RequestError."""
    n = body.n or 1
    beam = None
    if body.use_beam_search:
        length_penalty = 1.0 if body.length_penalty is None else body.length_penalty
        beam = BeamParams(body.best_of or n, length_penalty, bool(body.early_stopping))
        if grammar is not None:
            given = "structured_outputs" if body.response_format is None else "response_format"
            raise RequestError("A beam search takes no structured output.", param=given)
    elif logprobs is None and body.best_of is not None and body.best_of > n:
        logprobs = 0  # the best are chosen by them
    stop_token_ids = tuple(body.stop_token_ids or ())
    _check_tokens(stop_token_ids, vocab_size, "stop_token_ids")
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens ({body.min_tokens}) must not exceed max_tokens ({max_tokens}).", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=_default(body.temperature, 0.0 if beam else 1.0),
        top_k=body.top_k or 0,
        top_p=_default(body.top_p, 1.0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_default(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        n=n if beam else max(n, body.best_of or n),
        seed=body.seed,
        grammar=grammar,
        beam=beam,
        spec={"auto": None, "off": 0}[body.spec] if isinstance(body.spec, str) else body.spec,
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_tokens(token_ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    for token in token_ids:
        if token >= vocab_size:
            raise RequestError(
                f"Token id {token} in {param} is not in the vocabulary of {vocab_size}.", param=param
            )


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(
                f"logit_bias has the key {key[:40]!r}, which is not a token id.", param="logit_bias"
            )
        result[int(key)] = value
    _check_tokens(tuple(result), vocab_size, "logit_bias")
    return result


def requested_grammar(body: GenerationFields) -> Grammar | None:
    """The one constraint the body asks for, by response_format, structured_outputs or a guided_* field."""
    found: list[Grammar] = []
    if body.response_format is not None:
        found += _from_response_format(body.response_format)
    if body.structured_outputs is not None:
        given = _from_structured(body.structured_outputs)
        if not given:  # better than to ignore a constraint of a kind unknown here
            raise RequestError(
                "structured_outputs needs one of json, regex, choice, grammar or json_object.",
                param="structured_outputs",
            )
        found += given
    old = StructuredOutputs(
        json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )
    found += _from_structured(old)
    if len(found) > 1:
        raise RequestError("Only one constraint on the output can be given.", param="structured_outputs")
    return found[0] if found else None


def _from_response_format(given: ResponseFormat) -> list[Grammar]:
    if given.type == "text":
        return []
    if given.type == "json_object":
        return [Grammar("json_object", "{}")]
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise RequestError(
            "response_format of type json_schema needs json_schema.schema.", param="response_format"
        )
    return [Grammar("json_schema", json.dumps(given.json_schema.schema_))]


def _from_structured(given: StructuredOutputs) -> list[Grammar]:
    found: list[Grammar] = []
    if given.json_ is not None:
        found.append(Grammar("json_schema", json.dumps(_schema(given.json_))))
    if given.regex is not None:
        found.append(Grammar("regex", given.regex))
    if given.choice is not None:
        found.append(Grammar("choice", json.dumps(given.choice)))
    if given.grammar is not None:
        found.append(Grammar("lark", given.grammar))
    if given.json_object:
        found.append(Grammar("json_object", "{}"))
    return found


def _schema(given: JsonObject | str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise RequestError(
            "The JSON schema is a string that is not JSON.", param="structured_outputs"
        ) from None


def check_prompt_logprobs(num_prompt: int, count: int | None) -> None:
    """They come for every token of the prompt, 70 bytes of JSON each: many of many would hold up others."""
    if count is not None and count > USUAL_LOGPROBS and count * num_prompt > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"{count} logprobs for each of {num_prompt} prompt tokens are too many: "
            f"above {USUAL_LOGPROBS} each, the limit is {MAX_PROMPT_LOGPROBS} in all.",
            param="prompt_logprobs",
        )


def check_length(num_prompt: int, max_model_len: int, param: str = "prompt") -> None:
    """Refuse, with the numbers, what can never fit. The engine checks prompt and output together."""
    if num_prompt == 0:
        raise RequestError("The prompt is empty: there is nothing to continue.", param=param)
    if num_prompt >= max_model_len:
        raise RequestTooLong(
            f"This model's maximum context length is {max_model_len} tokens, the prompt alone has {num_prompt}.",
            "Shorten it, or set truncate_prompt_tokens.",
            param=param,
            code="context_length_exceeded",
        )


def truncated(token_ids: list[int], keep: int | None, max_model_len: int, room: int = 1) -> list[int]:
    """The last `keep` tokens (-1: what leaves `room` for the output)."""
    if keep is None:
        return token_ids
    if keep == 0:
        raise RequestError(
            "truncate_prompt_tokens must be -1 or positive, not 0.", param="truncate_prompt_tokens"
        )
    # With no room for any prompt the engine says so, with the numbers.
    keep = max(1, max_model_len - room) if keep < 0 else keep
    return token_ids[-keep:]
