"""What a chat request's tools and tool_choice mean for the prompt, the grammar, the parser and the ending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmtool.core.request import Grammar
from llmtool.errors import RequestError
from llmtool.serve.protocol.chat import ChatRequest, NamedToolChoice, Tool
from llmtool.serve.tools.grammar import named_grammar, required_grammar
from llmtool.serve.tools.parser import NamedCallParser, ToolCallParser
from llmtool.serve.tools.prompt import template_tools

Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """mode none: tools are not shown to the model and text is left alone."""

    mode: Mode
    tools: tuple[Tool, ...] = ()  # with mode named: the one
    parallel: bool = True

    @classmethod
    def of(cls, body: ChatRequest) -> ToolUse:
        """Raises RequestError for a choice that the tools do not allow."""
        tools, choice = tuple(body.tools or ()), body.tool_choice
        if not tools:
            if choice in (None, "none", "auto"):
                return cls("none")
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise RequestError("Two tools have the same name.", param="tools")
        parallel = body.parallel_tool_calls is not False
        if isinstance(choice, NamedToolChoice):
            if choice.function.name not in names:
                raise RequestError(
                    f"tool_choice names {choice.function.name!r}, which is not one of the tools.",
                    param="tool_choice",
                )
            return cls("named", (tools[names.index(choice.function.name)],), parallel)
        if choice in ("none", "required"):
            return cls("none" if choice == "none" else "required", tools, parallel)
        # Output that a constraint shapes is the answer itself, even where it looks like a call.
        constrained = body.structured_outputs is not None or (
            body.response_format is not None and body.response_format.type != "text"
        )
        return cls("none" if constrained else "auto", tools, parallel)

    def shown(self) -> list[dict[str, Any]]:
        """The tools as the chat template gets them."""
        return [] if self.mode == "none" else template_tools(self.tools)

    def grammar(self) -> Grammar | None:
        if self.mode == "named":
            return named_grammar(self.tools[0].function)
        if self.mode == "required":
            return required_grammar([tool.function for tool in self.tools], self.parallel)
        return None

    def parser(self) -> ToolCallParser | NamedCallParser | None:
        """A new one per answer; None where text is only text."""
        if self.mode == "none":
            return None
        if self.mode == "named":
            return NamedCallParser(self.tools[0].function.name)
        return ToolCallParser(
            {tool.function.name for tool in self.tools}, self.parallel, forced=self.mode == "required"
        )

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """OpenAI's: tool_calls when the model chose to call; a call that was forced by name ends with stop."""
        return "tool_calls" if reason == "stop" and num_calls and self.mode != "named" else reason
