"""What every route needs: engine, tokenizer, settings, metrics, and whether the server still takes requests."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from llmtool.config import ServerConfig
from llmtool.core.request import Grammar, SamplingParams
from llmtool.errors import EngineDead, NoReplica, RequestError, RequestTooLong
from llmtool.models.tokenizer import LONG_TEXT, Tokenizer
from llmtool.serve.errors import ModelNotFound, ServerDraining
from llmtool.serve.generation import Generation, TextOptions
from llmtool.serve.metrics import ServerMetrics
from llmtool.serve.params import check_length, check_prompt_logprobs, truncated
from llmtool.serve.ports import Engine
from llmtool.serve.protocol.common import GenerationFields
from llmtool.serve.structured import GrammarChecker

TOKENIZING_THREADS = 2  # a long text takes a core for seconds: more of them would starve the engine


@dataclass(slots=True)
class ServeContext:
    """check_grammar: raises RequestError for a grammar that cannot be compiled; may take a second.

    send_timeout: seconds a client may leave a stream unread.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: ServerMetrics
    check_grammar: GrammarChecker
    send_timeout: float = 30.0
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENIZING_THREADS, "tokenize")
    )

    @property
    def model_name(self) -> str:
        return self.engine.info.served_model_name

    def check_alive(self) -> None:
        """Raises EngineDead; what happened inside is for the log, not for clients."""
        if self.engine.dead is not None:
            raise EngineDead(
                "The engine is dead: nothing can be served.", "Restart the server; its log says why."
            )

    def check_serving(self) -> None:
        """Raises EngineDead, NoReplica or ServerDraining when no new work can be taken."""
        self.check_alive()
        fleet = self.engine.fleet
        if fleet is not None and not fleet.up:
            raise NoReplica(
                f"None of {len(fleet.replicas)} replicas is up, they are being restarted.",
                "Send the request to another server, or again.",
                retry_after=5.0,
            )
        if self.draining:
            raise ServerDraining("The server is shutting down.", "Send the request to another one.")

    def check_model(self, name: str | None) -> None:
        if name and name != self.model_name:  # an empty one is the default, as vLLM takes it
            raise ModelNotFound(
                f"There is no model {name[:200]!r} here.",
                f"This server serves {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_generates(self) -> None:
        """Raises RequestError where the model is an encoder."""
        pooling = self.engine.info.pooling
        if pooling is not None:
            route = "/v1/embeddings" if pooling.task == "embed" else "/v1/classify"
            raise RequestError(
                f"{self.model_name} is an encoder: it generates no text.", f"Use {route}, or serve a decoder."
            )

    async def encode(
        self, text: str, add_special_tokens: bool, *, keep: int | None = None, param: str = "prompt"
    ) -> list[int]:
        """The tokens of `text`. keep: truncate_prompt_tokens, what will be left of them.

        Raises RequestTooLong for text that cannot fit whatever its tokens are, before it is tokenized.
        """
        if len(text) < LONG_TEXT:
            await asyncio.sleep(0)  # between many short prompts the others get their turn
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        text = self._bounded(text, keep, param)
        work = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, work)

    def _bounded(self, text: str, keep: int | None, param: str) -> str:
        """As much of the end of `text` as can matter; refused if it all does and that is too much."""
        max_model_len, longest = self.engine.info.max_model_len, self.tokenizer.longest_token
        most = max_model_len * longest
        if len(text) <= most:
            return text
        if keep is None:
            raise RequestTooLong(
                f"This model's maximum context length is {max_model_len} tokens of at most {longest} characters, "
                f"the prompt alone has {len(text)} characters.",
                "Shorten it, or set truncate_prompt_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        return text[-most:]

    def fitted(
        self, token_ids: list[int], body: GenerationFields, max_tokens: int | None, param: str = "prompt"
    ) -> list[int]:
        """The prompt as the engine gets it: truncated if asked for, refused if it can never fit."""
        limit, vocab = self.engine.info.max_model_len, self.engine.info.vocab_size
        token_ids = truncated(token_ids, body.truncate_prompt_tokens, limit, max_tokens or 1)
        check_length(len(token_ids), limit, param)
        if max(token_ids) >= vocab:
            raise RequestError(f"Token id {max(token_ids)} is not in the vocabulary of {vocab}.", param=param)
        return token_ids

    async def check_output_grammar(self, grammar: Grammar | None, param: str | None = None) -> None:
        """Raises RequestError; param: the field to blame, if not the usual one."""
        if grammar is None:
            return
        if grammar.kind == "lark" and not self.config.allow_lark:
            raise RequestError(
                "This server takes no lark grammars from clients.",
                "Start the server with --allow-lark.",
                param="structured_outputs",
            )
        try:
            await asyncio.to_thread(self.check_grammar, grammar)
        except RequestError as e:
            e.param = param or e.param
            raise

    async def generate(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: GenerationFields,
        arrival: float,
    ) -> Generation:
        """arrival: when the HTTP request came, by time.monotonic()."""
        check_prompt_logprobs(sum(map(len, prompts)), params.prompt_logprobs)
        options = TextOptions(
            stop=body.stop_strings,
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        return await Generation.start(
            self.engine,
            self.tokenizer,
            self.metrics,
            request_id,
            prompts,
            params,
            options,
            arrival,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


class ChunkTemplate:
    """Server-sent chunks of one response whose constant part is serialised once.

    With 500 streams of 20 tokens/s a chunk must cost microseconds: the head is fixed, and the choice is the only
    part that is written anew.
    """

    def __init__(
        self, object_name: str, request_id: str, created: int, model: str, include_usage: bool
    ) -> None:
        head = {"id": request_id, "object": object_name, "created": created, "model": model}
        self._head = f"data: {json.dumps(head)[:-1]}, "
        self._usage = ', "usage": null' if include_usage else ""

    def choice(self, choice: str, usage: dict[str, object] | None = None) -> bytes:
        """choice: the JSON text of the one choice."""
        tail = f', "usage": {json.dumps(usage)}' if usage is not None else self._usage
        return f'{self._head}"choices": [{choice}]{tail}}}\n\n'.encode()

    def usage(self, usage: dict[str, object]) -> bytes:
        return f'{self._head}"choices": [], "usage": {json.dumps(usage)}}}\n\n'.encode()
