"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from llmtool.errors import RequestError
from llmtool.models.tokenizer import LONG_TEXT
from llmtool.serve.context import ServeContext
from llmtool.serve.logprobs import TokenNames
from llmtool.serve.protocol.chat import ChatRequest
from llmtool.serve.protocol.service import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from llmtool.serve.template import render_prompt
from llmtool.serve.tools.choice import ToolUse


async def tokenize(context: ServeContext, body: TokenizeRequest) -> TokenizeResponse:
    """A text's tokens, or those of a conversation as chat completions would see it."""
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either prompt or messages.", param="prompt")
    if body.prompt is not None:
        token_ids = await context.encode(body.prompt, body.add_special_tokens is not False)
    else:
        assert body.messages is not None
        chat = ChatRequest(
            messages=body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        text = render_prompt(context.tokenizer, chat, ToolUse.of(chat))
        token_ids = await context.encode(text, bool(body.add_special_tokens), param="messages")
    names = TokenNames(context.tokenizer)
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=context.engine.info.max_model_len,
        tokens=token_ids,
        token_strs=[names(token) for token in token_ids] if body.return_token_strs else None,
    )


async def detokenize(context: ServeContext, body: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    context.check_model(body.model)
    vocab = context.engine.info.vocab_size
    if body.tokens and max(body.tokens) >= vocab:
        raise RequestError(
            f"Token id {max(body.tokens)} is not in the vocabulary of {vocab}.", param="tokens"
        )
    if len(body.tokens) < LONG_TEXT:
        return DetokenizeResponse(prompt=context.tokenizer.decode(body.tokens, skip_special_tokens=False))
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
