"""The HTTP application: routes, their documentation, middleware. Everything it needs is handed in."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtool.config import ServerConfig
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.chat import ChatCall
from llmtool.serve.completions import CompletionCall
from llmtool.serve.context import ServeContext
from llmtool.serve.errors import add_error_handlers, documented, envelope
from llmtool.serve.logs import RequestLog
from llmtool.serve.metrics import ServerMetrics
from llmtool.serve.middleware import ApiKey, BodyLimit, HeadAsGet, RequestId
from llmtool.serve.pooling import PoolingCall
from llmtool.serve.ports import Engine
from llmtool.serve.protocol.chat import ChatRequest, ChatResponse
from llmtool.serve.protocol.completions import CompletionRequest, CompletionResponse
from llmtool.serve.protocol.pooling import (
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from llmtool.serve.protocol.service import (
    DetokenizeRequest,
    DetokenizeResponse,
    KVMemory,
    Memory,
    ModelCard,
    ModelList,
    Replica,
    Status,
    TokenizeRequest,
    TokenizeResponse,
    Version,
)
from llmtool.serve.sse import ClientGone
from llmtool.serve.structured import GrammarChecker
from llmtool.serve.tokens import detokenize, tokenize
from llmtool.version import __version__

CLIENT_CLOSED = 499  # nginx's number; nobody reads it but the access log
_SSE: dict[str, Any] = {
    "description": "The answer, or with stream=true its chunks.",
    "content": {"text/event-stream": {}},
}


def create_app(
    engine: Engine, tokenizer: Tokenizer, config: ServerConfig, *, send_timeout: float = 30.0
) -> FastAPI:
    """The application over a started engine. `app.state.context` is its `ServeContext`.

    send_timeout: seconds a client may leave a stream unread before it is dropped.
    """
    info = engine.info
    context = ServeContext(
        engine=engine,
        tokenizer=tokenizer,
        config=config,
        metrics=ServerMetrics(engine, config.metrics_compat),
        check_grammar=GrammarChecker(tokenizer, info.vocab_size, info.eos_token_ids),
        send_timeout=send_timeout,
    )
    app = FastAPI(
        title="llmtool serve", version=__version__, description="An OpenAI-compatible server of one model."
    )
    app.state.context = context
    app.router.route_class = JsonRoute
    _add_generation(app, context)
    _add_pooling(app, context)
    _add_tokens(app, context)
    _add_service(app, context)
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    add_error_handlers(app)
    app.add_exception_handler(ClientGone, _on_client_gone)
    # The last one added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_key:
        app.add_middleware(ApiKey, key=config.api_key)
    app.add_middleware(RequestLog)
    app.add_middleware(RequestId)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own validation errors: ours are 400s in OpenAI's envelope."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
    assert app.openapi_schema is not None
    return app.openapi_schema


class StrictJsonRequest(Request):
    """Bodies are parsed by pydantic's parser: UTF-8 only, bounded depth, no NaN, and errors that say where."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as e:
                raise HTTPException(400, f"The body is not valid JSON: {e}.") from None
        return self._json


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return handle


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return JSONResponse(envelope(CLIENT_CLOSED, "The client closed the connection."), CLIENT_CLOSED)


def _add_generation(app: FastAPI, context: ServeContext) -> None:
    errors = documented(400, 401, 404, 413, 415, 429, 502, 503)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": CompletionResponse, **_SSE}, **errors},
        tags=["OpenAI"],
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await CompletionCall(context, body, request.state.arrival).run(request)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatResponse, **_SSE}, **errors},
        tags=["OpenAI"],
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        return await ChatCall(context, body, request.state.arrival).run(request)

    @app.get("/v1/models", responses=documented(401), tags=["OpenAI"])
    async def list_models() -> ModelList:
        return ModelList(data=[_card(context)])

    @app.get("/v1/models/{model:path}", responses=documented(401, 404), tags=["OpenAI"])
    async def show_model(model: str) -> ModelCard:
        context.check_model(model)
        return _card(context)


def _add_pooling(app: FastAPI, context: ServeContext) -> None:
    errors = documented(400, 401, 404, 413, 415, 429, 502, 503)

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": EmbeddingResponse}, **errors},
        tags=["OpenAI"],
    )
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        return await PoolingCall(context, body, request).embed(body)

    @app.post(
        "/v1/classify",
        response_model=None,
        responses={200: {"model": ClassifyResponse}, **errors},
        tags=["encoders"],
    )
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """The label of each text, and the probabilities of all."""
        return await PoolingCall(context, body, request).classify(body)

    @app.post(
        "/v1/score",
        response_model=None,
        responses={200: {"model": ScoreResponse}, **errors},
        tags=["encoders"],
    )
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How well texts fit: a cross-encoder's score, or the cosine of their embeddings."""
        return await PoolingCall(context, body, request).score(body)

    @app.post(
        "/v1/rerank",
        response_model=None,
        responses={200: {"model": RerankResponse}, **errors},
        tags=["encoders"],
    )
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Documents by how well they fit the query, best first."""
        return await PoolingCall(context, body, request).rerank(body)


def _card(context: ServeContext) -> ModelCard:
    info = context.engine.info
    return ModelCard(
        id=context.model_name, created=context.created, root=info.model, max_model_len=info.max_model_len
    )


def _add_tokens(app: FastAPI, context: ServeContext) -> None:
    errors = documented(400, 401, 404, 413, 415)

    @app.post("/tokenize", responses=errors, response_model_exclude_none=True, tags=["tokens"])
    async def tokenize_text(body: TokenizeRequest) -> TokenizeResponse:
        return await tokenize(context, body)

    @app.post("/detokenize", responses=errors, tags=["tokens"])
    async def detokenize_tokens(body: DetokenizeRequest) -> DetokenizeResponse:
        return await detokenize(context, body)


def _status(context: ServeContext, status: str) -> Status:
    fleet = context.engine.fleet
    if fleet is None:
        return Status(status=status)
    replicas = [
        Replica(number=r.number, role=r.role, state=r.state, restarts=r.restarts) for r in fleet.replicas
    ]
    return Status(status=status if fleet.up == len(replicas) else "degraded", replicas=replicas)


def _add_service(app: FastAPI, context: ServeContext) -> None:
    @app.get("/health", responses=documented(503), tags=["operations"], response_model_exclude_none=True)
    async def health() -> Status:
        """503 once the engine is dead: restart this server. Of several replicas, once all are and stay so."""
        context.check_alive()
        return _status(context, "ok")

    @app.get("/ready", responses=documented(503), tags=["operations"], response_model_exclude_none=True)
    async def ready() -> Status:
        """503 while the server drains, the engine is dead or no replica is up: send requests elsewhere."""
        context.check_serving()
        return _status(context, "ready")

    @app.get("/version", tags=["operations"])
    async def version() -> Version:
        return Version(version=__version__)

    @app.get("/memory", responses=documented(401, 503), tags=["operations"])
    async def memory() -> Memory:
        """Where the KV memory's bytes are now; `llmtool memprofile --live` reads it."""
        engine = context.engine
        view, stats = await engine.memory(), engine.stats
        return Memory(
            model=engine.info.served_model_name,
            weight_bytes=engine.info.weight_bytes,
            kv=KVMemory.model_validate(asdict(view)),
            running=stats.num_running,
            waiting=stats.num_waiting,
            preemptions=stats.preemptions,
            hit_rate=stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
        )

    @app.get(
        "/metrics", response_model=None, tags=["operations"], responses={200: {"content": {"text/plain": {}}}}
    )
    async def metrics() -> Response:
        return Response(context.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
