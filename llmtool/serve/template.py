"""A chat request as the text of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from llmtool.errors import RequestError
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.protocol.chat import ChatRequest
from llmtool.serve.tools.choice import ToolUse
from llmtool.serve.tools.prompt import spelled_out, template_messages, with_instructions, without_calls

HINTS = 4  # of either kind that one prompt gives the prefix cache
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

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        return tokenizer.render_chat(messages, tools, generate, **kwargs)

    text = render(messages, shown or None)
    # What the template drops, the model must still hear of.
    if shown and text == render(messages):
        messages = with_instructions(messages, shown)
        text = render(messages)
    elif _drops_calls(partial(render, tools=shown or None), messages, text):
        messages = spelled_out(messages)
        text = render(messages, shown or None)
    return _until_final_message(text, messages[-1]["content"]) if continued else text


def message_ends(token_ids: Sequence[int], end_tokens: Collection[int]) -> tuple[int, ...]:
    """Lengths of the prompt's prefixes that end with a message: where other chats part from this one, and where it
    goes on. The first ones (a system prompt's) and the newest of them; templates that end messages with no
    token of their own have none."""
    ends = [at + 1 for at, token in enumerate(token_ids) if token in end_tokens]
    return tuple(ends if len(ends) <= 2 * HINTS else ends[:HINTS] + ends[-HINTS:])


def _drops_calls(
    render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]], text: str
) -> bool:
    """Whether calls or their results are missing in `text`, the template's rendering of `messages`."""
    shorter = [without_calls(messages), [m for m in messages if m["role"] != "tool"]]
    try:
        return any(fewer and fewer != messages and text == render(fewer) for fewer in shorter)
    except RequestError:  # it insists on what was left out
        return False


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
