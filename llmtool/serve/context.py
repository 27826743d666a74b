"""What every route needs: engine, tokenizer, settings, metrics, and whether the server still takes requests."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmtool.config import ServerConfig
from llmtool.core.request import Grammar, SamplingParams
from llmtool.errors import EngineDead, RequestError
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.errors import ModelNotFound, ServerDraining
from llmtool.serve.generation import Generation, TextOptions
from llmtool.serve.metrics import ServerMetrics
from llmtool.serve.params import check_length, truncated
from llmtool.serve.ports import Engine
from llmtool.serve.protocol.common import GenerationFields

LONG_TEXT = 4096  # characters; tokenizing more than that would hold up everybody else's tokens


@dataclass(slots=True)
class ServeContext:
    """check_grammar: raises RequestError for a grammar that cannot be compiled; may take a second.

    send_timeout: seconds a client may leave a stream unread.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: ServerMetrics
    check_grammar: Callable[[Grammar], None]
    send_timeout: float = 30.0
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

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
        """Raises EngineDead or ServerDraining when no new work can be taken."""
        self.check_alive()
        if self.draining:
            raise ServerDraining("The server is shutting down.", "Send the request to another one.")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ModelNotFound(
                f"There is no model {name[:200]!r} here.",
                f"This server serves {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def fitted(self, token_ids: list[int], body: GenerationFields, param: str = "prompt") -> list[int]:
        """The prompt as the engine gets it: truncated if asked for, refused if it can never fit."""
        limit, vocab = self.engine.info.max_model_len, self.engine.info.vocab_size
        token_ids = truncated(token_ids, body.truncate_prompt_tokens, limit)
        check_length(len(token_ids), limit, param)
        if max(token_ids) >= vocab:
            raise RequestError(f"Token id {max(token_ids)} is not in the vocabulary of {vocab}.", param=param)
        return token_ids

    async def check_output_grammar(self, grammar: Grammar | None, param: str | None = None) -> None:
        """Raises RequestError; param: the field to blame, if not the usual one."""
        if grammar is None:
            return
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
    ) -> Generation:
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
