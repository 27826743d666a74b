"""What completions and chat share: strict field types, sampling fields, structured output, errors, usage.

Types are strict (``true`` is not 1, ``"5"`` is not 5) and bounded, so that what passes here can only fail for
reasons that need the model. Lists fail at their first wrong item (`fail_fast`): a report of each would take
seconds for a large body. Unknown fields are kept aside and logged at debug level: clients send many.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

log = logging.getLogger("llmtool.serve")

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
JsonObject = dict[str, Any]

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1000
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_IDS = 2**22  # in one list; the model's context is checked later
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Body(BaseModel):
    """A request body or a part of one."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _log_unknown(self) -> Body:
        if self.model_extra and log.isEnabledFor(logging.DEBUG):
            log.debug("%s: ignored unknown fields %s", type(self).__name__, sorted(self.model_extra))
        return self


def _check_bias(value: Any) -> Any:
    """Size and values at once, so that neither is reported per item."""
    if isinstance(value, dict):
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"should have at most {MAX_LOGIT_BIAS} items, not {len(value)}")
        for key, bias in value.items():
            if isinstance(bias, bool) or not isinstance(bias, int | float):
                raise ValueError(f"should map token ids to numbers, which that of {str(key)[:40]!r} is not")
    return value


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class StructuredOutputs(Body):
    """One of these constrains the output. grammar: Lark, in llguidance's dialect."""

    json_: JsonObject | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=65_536)] | None = None
    choice: Annotated[list[StopString], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: Annotated[str, Field(max_length=1_000_000)] | None = None
    json_object: bool | None = None


class JsonSchemaFormat(Body):
    name: Annotated[str, Field(max_length=256)] = "response"
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationFields(Body):
    """Sampling and output fields of /v1/completions and /v1/chat/completions. null means the default."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Int64 | None = None
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, float], BeforeValidator(_check_bias), Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    user: Annotated[str, Field(max_length=4096)] | None = None
    response_format: ResponseFormat | None = None
    # Sampling, vLLM's names. The bounds keep logits and scores inside float32 and float64.
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    use_beam_search: bool | None = False
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | None = False
    # Structured output, vLLM's names, new and old.
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: Annotated[str, Field(max_length=65_536)] | None = None
    guided_choice: (
        Annotated[list[StopString], Field(min_length=1, max_length=1024, fail_fast=True)] | None
    ) = None
    guided_grammar: Annotated[str, Field(max_length=1_000_000)] | None = None
    # Output and scheduling, vLLM's names.
    prompt_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    priority: Int64 | None = 0
    # Ours: draft tokens of this request; the output stays what it is.
    spec: Literal["auto", "off"] | Annotated[int, Field(ge=0, le=16)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
