"""POST /v1/completions: prompts as text or token ids, whole or streamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtool.errors import RequestError
from llmtool.serve.context import ChunkTemplate, ServeContext, new_id
from llmtool.serve.generation import Answer, Delta, Generation, collect
from llmtool.serve.logprobs import TextOffsets, TokenNames, completion_logprobs, prompt_logprobs
from llmtool.serve.params import check_combination, requested_grammar, sampling_params
from llmtool.serve.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from llmtool.serve.sse import EventStream, until_disconnect


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: as given, or decoded from the ids when it is echoed."""

    token_ids: list[int]
    text: str


class CompletionCall:
    """One call: `run` gives its response."""

    def __init__(self, context: ServeContext, body: CompletionRequest, arrival: float) -> None:
        self._context = context
        self._body = body
        self._id = new_id("cmpl")
        self._created = int(time.time())
        self._arrival = arrival
        self._names = TokenNames(context.tokenizer, bool(body.return_tokens_as_token_ids))
        self._prompts: list[Prompt] = []
        self._n = body.n or 1

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
        check_combination(body, body.logprobs is not None)
        if body.suffix:
            raise RequestError("suffix is not supported: this model only continues text.", param="suffix")
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise RequestError("max_tokens must be at least 1 (0 is allowed with echo).", param="max_tokens")
        wanted = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            wanted = max(body.logprobs, wanted or 0)
        grammar = requested_grammar(body)
        params = sampling_params(
            body,
            vocab_size=context.engine.info.vocab_size,
            max_tokens=max(1, max_tokens),  # 0: the engine computes the prompt and its token is dropped
            logprobs=body.logprobs,
            prompt_logprobs=wanted,
            grammar=grammar,
        )
        await context.check_output_grammar(grammar)
        self._prompts = [await self._prompt(given, params.max_tokens) for given in _given_prompts(body)]
        prompts = [p.token_ids for p in self._prompts]
        return await context.generate(self._id, prompts, params, body, self._arrival)

    async def _prompt(self, given: str | list[int], max_tokens: int | None) -> Prompt:
        body, context = self._body, self._context
        if isinstance(given, str):
            token_ids = await context.encode(
                given, body.add_special_tokens is not False, keep=body.truncate_prompt_tokens
            )
        else:
            token_ids = given
        fitted = context.fitted(token_ids, body, max_tokens)
        if not body.echo:
            return Prompt(fitted, "")
        if isinstance(given, str) and len(fitted) == len(token_ids):
            return Prompt(fitted, given)
        return Prompt(
            fitted,
            context.tokenizer.decode(fitted, skip_special_tokens=body.skip_special_tokens is not False),
        )

    @property
    def _only_prompt(self) -> bool:
        return self._body.max_tokens == 0

    # -- whole ---------------------------------------------------------------------------------------------

    async def _whole(self, generation: Generation) -> Response:
        try:
            answers = await collect(generation, self._n, self._body.best_of or self._n)
        finally:
            generation.abort()
        if self._only_prompt:
            generation.usage.completion_tokens = 0
        return JSONResponse(
            {
                "id": self._id,
                "object": "text_completion",
                "created": self._created,
                "model": self._context.model_name,
                "choices": [self._choice(answer, generation) for answer in answers],
                "usage": generation.usage.as_dict(),
            }
        )

    def _choice(self, answer: Answer, generation: Generation) -> dict[str, Any]:
        body, number = self._body, answer.index // self._n
        prompt = self._prompts[number]
        if self._only_prompt:
            answer = Answer(answer.index, finish_reason="length")
        choice: dict[str, Any] = {
            "index": answer.index,
            "text": prompt.text + answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if body.logprobs is not None:
            ids, entries = _echoed(prompt, generation.prompt_logprobs[number]) if body.echo else ([], [])
            choice["logprobs"] = completion_logprobs(
                [*ids, *answer.token_ids], [*entries, *answer.logprobs], self._names
            )
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(generation.prompt_logprobs[number], self._names)
        if body.return_token_ids:
            choice |= {"token_ids": answer.token_ids, "prompt_token_ids": prompt.token_ids}
        return choice

    # -- streamed ------------------------------------------------------------------------------------------

    async def _events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        body = self._body
        chunks = ChunkTemplate(
            "text_completion", self._id, self._created, self._context.model_name, body.include_usage
        )
        offsets: dict[int, TextOffsets] = {}  # by answer
        async for delta in generation.deltas():
            first = delta.index not in offsets
            offsets.setdefault(delta.index, TextOffsets(self._names))
            if self._only_prompt:
                generation.usage.completion_tokens = 0
                delta = Delta(delta.index, "", (), finish_reason="length")
            choice = self._chunk(delta, generation, first, offsets)
            if choice is not None:
                usage = generation.usage.as_dict() if body.continuous_usage else None
                yield chunks.choice(choice, usage)
        if body.include_usage:
            yield chunks.usage(generation.usage.as_dict())

    def _chunk(
        self, delta: Delta, generation: Generation, first: bool, offsets: dict[int, TextOffsets]
    ) -> str | None:
        """The choice of one chunk as JSON text; None when there is nothing to say yet."""
        body, number = self._body, delta.index // self._n
        text, extra = delta.text, ""
        ids: Sequence[int] = delta.token_ids
        entries: Sequence[Any] = delta.logprobs
        if first and body.echo:
            text = self._prompts[number].text + text
        if body.logprobs is not None:
            if first and body.echo:
                prompt_ids, prompt_entries = _echoed(
                    self._prompts[number], generation.prompt_logprobs[number]
                )
                ids, entries = [*prompt_ids, *ids], [*prompt_entries, *entries]
            shaped = completion_logprobs(ids, entries, self._names, offsets[delta.index])
            logprobs = json.dumps(shaped)
        else:
            logprobs = "null"
        if first and body.prompt_logprobs is not None:
            rows = prompt_logprobs(generation.prompt_logprobs[number], self._names)
            extra += f', "prompt_logprobs": {json.dumps(rows)}'
        if body.return_token_ids:
            extra += f', "token_ids": {json.dumps(list(delta.token_ids))}'
            if first:
                extra += f', "prompt_token_ids": {json.dumps(self._prompts[number].token_ids)}'
        if not (text or extra or delta.finish_reason or body.logprobs is not None):
            return None  # text held back: half a character, or what may become a stop string
        end = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        if delta.stop_reason is not None:
            extra += f', "stop_reason": {json.dumps(delta.stop_reason)}'
        said = f'"text": {json.dumps(text)}, "logprobs": {logprobs}'
        return f'{{"index": {delta.index}, {said}, "finish_reason": {end}{extra}}}'


def _given_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The four shapes of `prompt` as a list of prompts."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _echoed(prompt: Prompt, entries: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The prompt's tokens with their logprobs; the first has none."""
    return prompt.token_ids, list(entries) if entries else [None] * len(prompt.token_ids)
