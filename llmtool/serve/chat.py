"""POST /v1/chat/completions: messages through the chat template, whole or streamed, with tool calls."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtool.core.request import Grammar, SamplingParams
from llmtool.errors import RequestError
from llmtool.serve.context import ChunkTemplate, ServeContext, new_id
from llmtool.serve.generation import Answer, Delta, Generation, collect
from llmtool.serve.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from llmtool.serve.params import check_combination, requested_grammar, sampling_params
from llmtool.serve.protocol.chat import ChatRequest
from llmtool.serve.sse import EventStream, until_disconnect
from llmtool.serve.template import message_ends, render_prompt
from llmtool.serve.tools.choice import ToolUse
from llmtool.serve.tools.parser import CallArguments, CallStart, Event, Text


class ChatCall:
    """One call: `run` gives its response."""

    def __init__(self, context: ServeContext, body: ChatRequest, arrival: float) -> None:
        self._context = context
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._arrival = arrival
        self._names = TokenNames(context.tokenizer, bool(body.return_tokens_as_token_ids))
        self._n = body.n or 1
        self._tools = ToolUse.of(body)
        self._prompt: list[int] = []

    async def run(self, request: Request) -> Response:
        """Raises what a wrong request deserves (RequestError, QueueFull, ...), ClientGone."""
        context, body = self._context, self._body
        context.check_serving()
        context.check_model(body.model)
        context.check_generates()
        generation = await until_disconnect(request.receive, self._start())
        request.state.usage = generation.usage
        if body.stream:
            return EventStream(self._events(generation), generation.abort, context.send_timeout)
        return await until_disconnect(request.receive, self._whole(generation))

    async def _start(self) -> Generation:
        context, body = self._context, self._body
        check_combination(body, bool(body.logprobs))
        if body.stream and body.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed in a chat.", param="prompt_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs=true.", param="top_logprobs")
        forced = self._tools.grammar()
        grammar = forced or requested_grammar(body)
        params = self._params(grammar)
        await context.check_output_grammar(grammar, "tools" if forced else None)
        text = render_prompt(context.tokenizer, body, self._tools)
        # The template writes the special tokens itself.
        token_ids = await context.encode(
            text, bool(body.add_special_tokens), keep=body.truncate_prompt_tokens, param="messages"
        )
        self._prompt = context.fitted(token_ids, body, params.max_tokens, "messages")
        hints = message_ends(self._prompt, frozenset(context.engine.info.eos_token_ids))
        params = replace(params, cache_hints=hints)
        return await context.generate(self._id, [self._prompt], params, body, self._arrival)

    def _params(self, grammar: Grammar | None) -> SamplingParams:
        body = self._body
        return sampling_params(
            body,
            vocab_size=self._context.engine.info.vocab_size,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            grammar=grammar,
        )

    # -- whole ---------------------------------------------------------------------------------------------

    async def _whole(self, generation: Generation) -> Response:
        body = self._body
        try:
            answers = await collect(generation, self._n, body.best_of or self._n)
        finally:
            generation.abort()
        response: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._context.model_name,
            "choices": [self._choice(answer) for answer in answers],
            "usage": generation.usage.as_dict(),
        }
        if body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs(generation.prompt_logprobs[0], self._names)
        if body.return_token_ids:
            response["prompt_token_ids"] = self._prompt
        return JSONResponse(response)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        parser = self._tools.parser()
        if parser is None:
            content, calls = answer.text, list[dict[str, Any]]()
        else:
            content, calls = _assembled([*parser.feed(answer.text), *parser.finish()])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
            message["content"] = content.strip() or None
        if self._body.echo and self._body.messages[-1].role == "assistant":
            message["content"] = self._echo_text() + (message["content"] or "")
        choice: dict[str, Any] = {
            "index": answer.index,
            "message": message,
            "logprobs": {"content": chat_logprobs(answer.logprobs, self._names), "refusal": None}
            if self._body.logprobs
            else None,
            "finish_reason": self._tools.finish_reason(answer.finish_reason, len(calls)),
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _echo_text(self) -> str:
        content = self._body.messages[-1].content
        return content if isinstance(content, str) else "\n".join(part.text or "" for part in content or ())

    # -- streamed ------------------------------------------------------------------------------------------

    async def _events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        body = self._body
        chunks = ChunkTemplate(
            "chat.completion.chunk", self._id, self._created, self._context.model_name, body.include_usage
        )
        parsers = [self._tools.parser() for _ in range(self._n)]
        calls = [0] * self._n

        def chunk(
            index: int, delta: str, logprobs: str = "null", end: str = "null", extra: str = ""
        ) -> bytes:
            usage = generation.usage.as_dict() if body.continuous_usage else None
            return chunks.choice(
                f'{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {end}{extra}}}',
                usage,
            )

        for index in range(self._n):
            role = {"role": "assistant", "content": ""}
            if body.echo and body.messages[-1].role == "assistant":
                role["content"] = self._echo_text()
            extra = f', "prompt_token_ids": {json.dumps(self._prompt)}' if body.return_token_ids else ""
            yield chunk(index, json.dumps(role), extra=extra)
        async for delta in generation.deltas():
            parser = parsers[delta.index]
            logprobs, extra = self._details(delta)
            if parser is None:
                deltas = [f'{{"content": {json.dumps(delta.text)}}}'] if delta.text else []
            else:
                events = parser.feed(delta.text)
                if delta.finish_reason is not None:
                    events += parser.finish()
                calls[delta.index] += sum(isinstance(event, CallStart) for event in events)
                deltas = [_delta_json(event) for event in events]
            if not deltas and (extra or logprobs != "null"):
                deltas = ["{}"]
            for number, text in enumerate(deltas):  # logprobs and ids go with the first: once per token
                yield chunk(delta.index, text, *((logprobs, "null", extra) if number == 0 else ()))
            if delta.finish_reason is not None:
                end = json.dumps(self._tools.finish_reason(delta.finish_reason, calls[delta.index]))
                stop = (
                    f', "stop_reason": {json.dumps(delta.stop_reason)}'
                    if delta.stop_reason is not None
                    else ""
                )
                yield chunk(delta.index, "{}", end=end, extra=stop)
        if body.include_usage:
            yield chunks.usage(generation.usage.as_dict())

    def _details(self, delta: Delta) -> tuple[str, str]:
        """(logprobs, further fields) of a chunk, as JSON text."""
        logprobs, extra = "null", ""
        if self._body.logprobs and delta.logprobs:
            logprobs = json.dumps({"content": chat_logprobs(delta.logprobs, self._names), "refusal": None})
        if self._body.return_token_ids and delta.token_ids:
            extra = f', "token_ids": {json.dumps(list(delta.token_ids))}'
        return logprobs, extra


def _delta_json(event: Event) -> str:
    if isinstance(event, Text):
        return f'{{"content": {json.dumps(event.text)}}}'
    call: dict[str, Any] = {"index": event.index}
    if isinstance(event, CallStart):
        call |= {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": event.text}
    return json.dumps({"tool_calls": [call]})


def _assembled(events: list[Event]) -> tuple[str, list[dict[str, Any]]]:
    """(content, tool calls) of a whole answer."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, Text):
            content.append(event.text)
        elif isinstance(event, CallStart):
            calls.append(
                {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
            )
        elif isinstance(event, CallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    return "".join(content), calls
