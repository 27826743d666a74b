"""Chat templates: Jinja from a model's files, rendered in a sandbox with the names transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtool.errors import ModelError, RequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """One model's template. special_tokens: {"bos_token": "<s>", ...}, which templates refer to by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ModelError(
                f"The chat template has a syntax error in line {e.lineno}: {e.message}.",
                "Give another one with --chat-template.",
            ) from e

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text. messages and tools are plain JSON values; variables go to the template as they are.

        Raises RequestError when the template refuses the messages or cannot read them.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{"documents": None, **self._special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            # What a template trips over is the caller's message: content that is a list, a role it does not know.
            raise RequestError(f"The chat template refuses these messages: {e}", param="messages") from e


def read_template(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A model's templates by name; the usual one is "default". config: its tokenizer_config.json.

    The file chat_template.jinja wins over chat_template.json, and that over the key in the configuration.
    """
    declared = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates |= {str(item["name"]): str(item["template"]) for item in declared}
    legacy = directory / "chat_template.json"
    if legacy.is_file():
        templates["default"] = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    single = directory / "chat_template.jinja"
    if single.is_file():
        templates["default"] = single.read_text(encoding="utf-8")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's tokens for training; for a prompt its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012 (its type is the base class's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
