"""POST /v1/embeddings, /v1/classify, /v1/score and /v1/rerank: an encoder's vectors of texts, and what follows."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from llmtool.core.request import FinishReason
from llmtool.errors import LLMToolError, RequestError, RequestTooLong
from llmtool.models.tokenizer import LONG_TEXT
from llmtool.serve.context import ServeContext, new_id
from llmtool.serve.errors import ServerDraining
from llmtool.serve.generation import GenerationFailed, TokenUsage
from llmtool.serve.ports import PoolingInfo
from llmtool.serve.protocol.completions import MAX_PROMPTS
from llmtool.serve.protocol.pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingFields,
    RerankRequest,
    ScoreRequest,
)
from llmtool.serve.sse import until_disconnect

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sequences for the engine. segments: where the second text of each pair begins, () without pairs."""

    token_ids: list[list[int]]
    segments: tuple[int, ...] = ()


class PoolingCall:
    """One call of one of the routes: each method gives its response.

    They raise what a wrong request deserves (RequestError, QueueFull, ...), and ClientGone.
    """

    def __init__(self, context: ServeContext, body: PoolingFields, request: Request) -> None:
        context.check_serving()
        context.check_model(body.model)
        info = context.engine.info.pooling
        if info is None:
            raise RequestError(
                f"{context.model_name} generates text: it has no embeddings, labels or scores.",
                "Serve an encoder for them, such as minilm, or use /v1/completions.",
            )
        self._context = context
        self._info: PoolingInfo = info
        self._body = body
        self._request = request
        self._created = int(time.time())
        self._usage = TokenUsage()

    async def embed(self, body: EmbeddingRequest) -> Response:
        if self._info.task != "embed":
            raise RequestError("This model is a classifier: it has no embeddings.", "Use /v1/classify.")
        size = _checked_size(self._info, body.dimensions)
        inputs = await self._inputs(body.input, body.add_special_tokens is not False)
        vectors = await self._vectors("embd", inputs)
        rows = [_cut(vector, size, self._info.normalized) for vector in vectors]
        as_text = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
                if as_text
                else row.tolist(),
            }
            for i, row in enumerate(rows)
        ]
        return self._list("embd", data)

    async def classify(self, body: ClassifyRequest) -> Response:
        info = self._info
        if info.task != "classify":
            raise RequestError("This model has no classification head.", "Use /v1/embeddings.")
        inputs = await self._inputs(body.input, body.add_special_tokens is not False)
        vectors = await self._vectors("classify", inputs)
        data = [
            {
                "index": i,
                "label": info.labels[int(row.argmax())],
                "probs": row.tolist(),
                "num_classes": len(row),
            }
            for i, row in enumerate(vectors)
        ]
        return self._list("classify", data)

    async def score(self, body: ScoreRequest) -> Response:
        firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(firsts) not in (1, len(seconds)):
            raise RequestError(
                f"{len(firsts)} texts against {len(seconds)}: text_1 must be one, or as many as text_2.",
                param="text_1",
            )
        scores = await self._scores("score", firsts, seconds)
        return self._list(
            "score", [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        )

    async def rerank(self, body: RerankRequest) -> Response:
        scores = await self._scores("rerank", [body.query], body.documents)
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n or None]
        results = [
            {"index": i, "document": {"text": body.documents[i]}, "relevance_score": scores[i]} for i in best
        ]
        model, usage = self._context.model_name, self._usage_dict()
        return _json({"id": new_id("rerank"), "model": model, "usage": usage, "results": results})

    # -- scores --------------------------------------------------------------------------------------------

    async def _scores(self, kind: str, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """Of the one first text, or of each, with each second one: a cross-encoder's, or embeddings' cosine."""
        if self._info.task == "classify":
            if self._info.size != 1:
                raise RequestError(
                    f"This model has {self._info.size} labels: a score needs one, as cross-encoders have.",
                    "Use /v1/classify.",
                )
            pairs = [(firsts[0] if len(firsts) == 1 else firsts[i], text) for i, text in enumerate(seconds)]
            return [float(row[0]) for row in await self._vectors(kind, await self._pairs(pairs))]
        inputs = Inputs(await self._tokenized([*firsts, *seconds], True))
        rows = [_cut(row, self._info.size, True) for row in await self._vectors(kind, inputs)]
        count = len(firsts)
        return [float(rows[i if count > 1 else 0] @ row) for i, row in enumerate(rows[count:])]

    async def _pairs(self, pairs: Sequence[tuple[str, str]]) -> Inputs:
        limit = self._context.engine.info.max_model_len
        most = limit * self._context.tokenizer.longest_token
        encoded = await self._in_thread(
            lambda: [
                self._context.tokenizer.encode_pair(self._prepared(a)[:most], self._prepared(b)[:most])
                for a, b in pairs
            ]
        )
        token_ids = [self._fitted(ids, i, "text_2") for i, (ids, _) in enumerate(encoded)]
        segments = [segment for _, segment in encoded]
        # A second text that truncation left nothing of has no beginning.
        kept = (s if s < len(ids) else 0 for s, ids in zip(segments, token_ids, strict=True))
        return Inputs(token_ids, tuple(kept))

    # -- inputs --------------------------------------------------------------------------------------------

    async def _inputs(self, given: Any, add_special_tokens: bool) -> Inputs:
        """The four shapes of `input` as sequences."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        if isinstance(given[0], str):
            return Inputs(await self._tokenized(given, add_special_tokens))
        vocab = self._context.engine.info.vocab_size
        for token_ids in given:
            if max(token_ids) >= vocab:
                raise RequestError(
                    f"Token id {max(token_ids)} is not in the vocabulary of {vocab}.", param="input"
                )
        return Inputs([self._fitted(token_ids, i) for i, token_ids in enumerate(given)])

    async def _tokenized(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        tokenizer, keep = self._context.tokenizer, self._body.truncate_prompt_tokens
        most = self._context.engine.info.max_model_len * tokenizer.longest_token
        for i, text in enumerate(texts):
            if len(text) > most and keep is None:
                raise self._too_long(i, f"{len(text)} characters")
        prepared = [self._prepared(text)[:most] for text in texts]
        if sum(map(len, prepared)) < LONG_TEXT:
            await asyncio.sleep(0)  # between many short requests the others get their turn
            ids = [tokenizer.encode(text, add_special_tokens) for text in prepared]
        else:
            ids = await self._in_thread(lambda: tokenizer.encode_batch(prepared, add_special_tokens))
        return [self._fitted(row, i, framed=add_special_tokens) for i, row in enumerate(ids)]

    async def _in_thread(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._context.tokenizing, work)

    def _prepared(self, text: str) -> str:
        text = self._info.prompt + text
        return text.lower() if self._info.lowercase else text

    def _fitted(self, ids: list[int], number: int, param: str = "input", framed: bool = True) -> list[int]:
        """The sequence as the engine gets it: its beginning if it is cut, with the special tokens at its end."""
        limit, keep = self._context.engine.info.max_model_len, self._body.truncate_prompt_tokens
        if keep == 0:
            raise RequestError(
                "truncate_prompt_tokens must be -1 or positive, not 0.", param="truncate_prompt_tokens"
            )
        if keep is not None:
            keep = limit if keep < 0 else keep
            if len(ids) > keep:
                ending = self._context.tokenizer.ending if framed else []
                if ids[len(ids) - len(ending) :] != ending or keep <= len(ending):
                    ending = []
                ids = ids[: keep - len(ending)] + ending
        if not ids:
            raise RequestError(f"{param}[{number}] has no tokens.", param=param)
        if len(ids) > limit:
            raise self._too_long(number, f"{len(ids)} tokens", param)
        return ids

    def _too_long(self, number: int, length: str, param: str = "input") -> RequestTooLong:
        return RequestTooLong(
            f"This model's maximum context length is {self._context.engine.info.max_model_len} tokens, "
            f"{param}[{number}] has {length}.",
            "Shorten it, or set truncate_prompt_tokens.",
            param=param,
            code="context_length_exceeded",
        )

    # -- the engine ----------------------------------------------------------------------------------------

    async def _vectors(self, kind: str, inputs: Inputs) -> list[Vector]:
        """One per sequence, in order."""
        return await until_disconnect(self._request.receive, self._pool(kind, inputs))

    async def _pool(self, kind: str, inputs: Inputs) -> list[Vector]:
        context, metrics = self._context, self._context.metrics
        if len(inputs.token_ids) > 2 * MAX_PROMPTS:  # firsts and seconds
            raise RequestError(f"{len(inputs.token_ids)} inputs in one request are too many.", param="input")
        self._usage.prompt_tokens = sum(map(len, inputs.token_ids))
        self._request.state.usage = self._usage
        stream = await context.engine.pool(
            new_id(kind), inputs.token_ids, segments=inputs.segments, priority=self._body.priority or 0
        )
        observer = metrics.observe_pooling(inputs.token_ids, self._request.state.arrival)
        vectors: dict[int, Vector] = {}
        try:
            async for out in stream:
                if out.finish_reason is FinishReason.ERROR:
                    raise GenerationFailed(out.error or "The engine could not go on with this input.")
                if out.finish_reason is FinishReason.ABORT:
                    raise ServerDraining("The server stopped before this answer was complete.")
                vectors[out.index] = np.frombuffer(out.vector, np.float32)
                observer.finished(out.times)
        except LLMToolError:
            observer.ended("error")
            raise
        finally:
            stream.abort()
            observer.ended("abort")
        return [vectors[i] for i in range(len(vectors))]

    # -- responses -----------------------------------------------------------------------------------------

    def _usage_dict(self) -> dict[str, int]:
        count = self._usage.prompt_tokens
        return {"prompt_tokens": count, "total_tokens": count}

    def _list(self, kind: str, data: list[dict[str, Any]]) -> Response:
        head = {"id": new_id(kind), "object": "list", "created": self._created}
        model, usage = self._context.model_name, self._usage_dict()
        return _json({**head, "model": model, "data": data, "usage": usage})


def _json(content: Any) -> Response:
    # Ten times as fast as json.dumps for lists of floats.
    return Response(to_json(content), media_type="application/json")


def _checked_size(info: PoolingInfo, dimensions: int | None) -> int:
    """How many numbers of an embedding to keep. Raises RequestError where the model was not trained for it."""
    if dimensions is None or dimensions == info.size:
        return info.size
    if not info.matryoshka or dimensions > info.size or (info.sizes and dimensions not in info.sizes):
        allowed = info.size
        if info.matryoshka:
            what = f"one of {', '.join(map(str, info.sizes))}" if info.sizes else f"at most {info.size}"
        else:
            what = f"{allowed}: its embeddings cannot be cut"
        raise RequestError(
            f"dimensions is {dimensions}, but for this model it must be {what}.", param="dimensions"
        )
    return dimensions


def _cut(vector: Vector, size: int, normalized: bool) -> Vector:
    """The first `size` numbers, of length 1 again if they were, or are to be."""
    if size == len(vector) and not normalized:
        return vector
    part = vector[:size]
    length = float(np.linalg.norm(part))
    return part / np.float32(length) if length else part
