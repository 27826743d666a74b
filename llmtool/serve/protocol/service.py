"""The small routes: models, tokenize, detokenize, version, status."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llmtool.serve.protocol.chat import MAX_MESSAGES, ChatMessage, Tool
from llmtool.serve.protocol.common import MAX_TOKEN_IDS, Body, JsonObject, TokenId


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmtool"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Body):
    """Either prompt or messages."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = False


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]


class DetokenizeResponse(BaseModel):
    prompt: str


class KVGroup(BaseModel):
    """Layers that share block tables. Bytes."""

    name: str
    layers: int
    tokens_per_page: int
    page_bytes: int
    bytes_per_token: int


class KVMemory(BaseModel):
    """Bytes; the parts sum to the arena."""

    arena: int
    parts: dict[str, int]
    groups: list[KVGroup]


class Memory(BaseModel):
    """Bytes and requests of a running server. hit_rate: of prompt tokens looked up in the prefix cache."""

    model: str
    weight_bytes: int
    kv: KVMemory
    running: int
    waiting: int
    preemptions: int
    hit_rate: float


class Version(BaseModel):
    version: str


class Replica(BaseModel):
    """state: starting, up, down (it will be started again) or dead."""

    number: int
    role: str
    state: str
    restarts: int


class Status(BaseModel):
    """status: ok or ready; degraded where some of several replicas are not up."""

    status: str
    replicas: list[Replica] | None = None
