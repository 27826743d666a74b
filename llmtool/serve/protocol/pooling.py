"""/v1/embeddings (OpenAI's), /v1/classify, /v1/score and /v1/rerank (vLLM's)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llmtool.serve.protocol.common import Body, Int64
from llmtool.serve.protocol.completions import MAX_PROMPTS, TokenIds

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Inputs = (
    str
    | Texts
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class PoolingFields(Body):
    """truncate_prompt_tokens: how many of an input's first tokens to keep; -1: what the model takes."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=4096)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    priority: Int64 | None = 0


class EmbeddingRequest(PoolingFields):
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    add_special_tokens: bool | None = True


class ClassifyRequest(PoolingFields):
    input: Inputs
    add_special_tokens: bool | None = True


class ScoreRequest(PoolingFields):
    """One text_1 against each text_2, or pair by pair."""

    text_1: str | Texts
    text_2: str | Texts


class RerankRequest(PoolingFields):
    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 0


class PoolingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class PoolingResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    usage: PoolingUsage


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(PoolingResponse):
    data: list[Embedding]


class Classification(BaseModel):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyResponse(PoolingResponse):
    data: list[Classification]


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(PoolingResponse):
    data: list[Score]


class RerankDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int
    document: RerankDocument
    relevance_score: float


class RerankResponse(BaseModel):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RerankResult]
