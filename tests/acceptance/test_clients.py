"""The libraries people already have: litellm, instructor, langchain-openai and the `llm` command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import instructor
import litellm
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.acceptance.servers import BIN, RunningServer, openai_client

ASK: Any = [{"role": "user", "content": "Name three colours."}]


class Person(BaseModel):
    """A person in a text."""

    name: str = Field(max_length=16)
    age: int = Field(ge=0, le=120)
    role: Literal["pilot", "cook"]


@pytest.fixture(scope="module")
def server(exact_server: RunningServer) -> RunningServer:
    """In bfloat16 an answer may differ between a request alone and one in a batch."""
    return exact_server


@pytest.fixture(scope="module")
def said(exact_client: openai.OpenAI, server: RunningServer) -> str:
    """What the model says to ASK: what every client must hand on."""
    answer = exact_client.chat.completions.create(
        model=server.model, messages=ASK, temperature=0, max_tokens=12
    )
    return answer.choices[0].message.content or ""


# -- litellm ---------------------------------------------------------------------------------------------------


def lite(server: RunningServer, **more: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{server.model}",
        "api_base": server.api,
        "api_key": "none",
        "num_retries": 0,
        "timeout": 60,
        **more,
    }


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_completes(server: RunningServer, said: str, provider: str) -> None:
    answer = litellm.completion(
        **lite(
            server,
            model=f"{provider}/{server.model}",
            messages=ASK,
            temperature=0,
            max_tokens=12,
            logprobs=True,
        )
    )
    assert answer.choices[0].message.content == said
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert len(answer.choices[0].logprobs.content) == 12


def test_litellm_streams_with_usage(server: RunningServer, said: str) -> None:
    chunks = list(
        litellm.completion(
            **lite(
                server,
                messages=ASK,
                temperature=0,
                max_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert built.choices[0].message.content == said
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [12]


def test_litellm_completes_text(server: RunningServer) -> None:
    model = f"text-completion-openai/{server.model}"
    answer = litellm.text_completion(
        **lite(server, model=model, prompt="The capital of France is", temperature=0, max_tokens=2)
    )
    assert answer.choices[0].text.startswith(" Paris")


def test_litellm_maps_errors(server: RunningServer) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**lite(server, messages=[{"role": "user", "content": "word " * 9000}]))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**lite(server, model="openai/nothing", messages=ASK))
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**lite(server, messages=ASK, temperature=-1))


# -- instructor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor_extracts(server: RunningServer, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai_client(server), mode=mode)
    person = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Ann is a pilot of 31."}],
        response_model=Person,
        max_retries=0,
        temperature=0,
        max_tokens=120,
    )
    assert isinstance(person, Person)


def test_instructor_streams_partial_objects(server: RunningServer) -> None:
    client = instructor.from_openai(openai_client(server), mode=instructor.Mode.JSON_SCHEMA)
    stages = list(
        client.chat.completions.create_partial(
            model=server.model,
            messages=[{"role": "user", "content": "Ann is a pilot of 31."}],
            response_model=Person,
            max_retries=0,
            temperature=0,
            max_tokens=120,
        )
    )
    assert len(stages) > 2
    Person.model_validate(stages[-1].model_dump())


# -- langchain -------------------------------------------------------------------------------------------------


def chain(server: RunningServer, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=server.api,
        api_key="none",
        model=server.model,
        temperature=0,
        max_retries=0,
        timeout=60,
        **more,
    )


def test_langchain_invokes_batches_and_streams(server: RunningServer, said: str) -> None:
    model = chain(server, max_tokens=12, stream_usage=True)
    question = HumanMessage(ASK[0]["content"])
    answer = model.invoke([question])
    assert isinstance(answer, AIMessage) and answer.content == said
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    whole = None
    for chunk in model.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.content == said
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == 12
    answers = model.batch([[question], [SystemMessage("Be brief."), question]])
    assert answers[0].content == said and answers[1].content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_structured_output(server: RunningServer, method: Any) -> None:
    model = chain(server, max_tokens=120).with_structured_output(Person, method=method)
    assert isinstance(model.invoke("Ann is a pilot of 31."), Person)


def test_langchain_calls_tools(server: RunningServer) -> None:
    @tool
    def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    model = chain(server, max_tokens=120).bind_tools([weather], tool_choice="weather")
    question = HumanMessage("What is the weather in Rome?")
    answer = model.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Paris", "Rome")
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content.startswith("sunny")
    final = chain(server, max_tokens=8).invoke([question, answer, result])
    assert final.content


def test_langchain_completes_text(server: RunningServer) -> None:
    model = OpenAI(
        base_url=server.api,
        api_key="none",
        model=server.model,
        temperature=0,
        max_tokens=2,
        max_retries=0,
    )
    assert model.invoke("The capital of France is").startswith(" Paris")


# -- llm -------------------------------------------------------------------------------------------------------


def test_the_llm_command(server: RunningServer, said: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {server.model}\n  api_base: {server.api}\n  api_key_name: none\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"none": "none"}))
    # The package of the embedded model is a plugin of llm that wants llama-cpp-python.
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    options = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    for streaming in ([], ["--no-stream"]):
        done = subprocess.run(
            [BIN / "llm", "-m", "here", *options, *streaming, ASK[0]["content"]],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == said.strip()
