"""A chat request as the text of its prompt."""

from __future__ import annotations

from typing import Any

from llmtool.errors import RequestError
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.protocol.chat import ChatRequest
from llmtool.serve.tools.choice import ToolUse
from llmtool.serve.tools.prompt import template_messages, with_instructions

_OURS = frozenset(
    {
        "self",
        "messages",
        "tools",
        "add_generation_prompt",
        "chat_template",
        "tokenize",
        "continue_final_message",
    }
)


def render_prompt(tokenizer: Tokenizer, body: ChatRequest, tools: ToolUse) -> str:
    """Raises RequestError where messages and template do not go together."""
    continued = bool(body.continue_final_message)
    generate = body.add_generation_prompt is not False and not continued
    if continued and body.messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of the assistant.", param="continue_final_message"
        )
    kwargs = dict(body.chat_template_kwargs or {})
    for key in sorted(_OURS & kwargs.keys()):
        raise RequestError(f"chat_template_kwargs may not set {key}.", param="chat_template_kwargs")
    if body.documents is not None:
        kwargs.setdefault("documents", body.documents)
    messages: list[dict[str, Any]] = template_messages(body.messages)
    shown = tools.shown()
    text = tokenizer.render_chat(messages, shown or None, generate, **kwargs)
    if shown and text == tokenizer.render_chat(messages, None, generate, **kwargs):
        # The template drops the tools: the model must still hear of them.
        messages = with_instructions(messages, shown)
        text = tokenizer.render_chat(messages, None, generate, **kwargs)
    return _until_final_message(text, messages[-1]["content"]) if continued else text


def _until_final_message(text: str, content: str) -> str:
    """The prompt cut after the last message's content, so that the answer goes on from there."""
    content = content.strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not keep the last message's text.",
            param="continue_final_message",
        )
    return text[: at + len(content)]
