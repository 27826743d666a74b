"""A running server's ledger over real HTTP: the application of `serve` with an engine that has no model."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import uvicorn
from typer.testing import CliRunner

from llmtool.cli.app import app as cli
from llmtool.config import ServerConfig
from llmtool.errors import LLMToolError
from llmtool.memprofile.live import fetch
from llmtool.serve.app import create_app
from tests.serve.conftest import says
from tests.serve.fake import FakeEngine, tiny_tokenizer


@contextmanager
def served(config: ServerConfig) -> Iterator[str]:
    application = create_app(FakeEngine(says("hi")), tiny_tokenizer(), config)  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_ledger_of_a_running_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTOOL_API_KEY", raising=False)
    with served(ServerConfig()) as url:
        kv = fetch(url)["kv"]
        assert (
            sum(kv["parts"].values())
            == kv["arena"]
            == fetch(url.removeprefix("http://") + "/")["kv"]["arena"]
        )
        result = CliRunner().invoke(cli, ["memprofile", "--live", url])
        assert (
            result.exit_code == 0 and "KV memory of 1.00 KiB" in result.output and "cached" in result.output
        )
        result = CliRunner().invoke(cli, ["memprofile", "--live", url, "--json"])
        assert json.loads(result.stdout)["kv"] == kv


def test_a_key_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(ServerConfig(api_key="k")) as url:
        monkeypatch.delenv("LLMTOOL_API_KEY", raising=False)
        with pytest.raises(LLMToolError, match="401"):
            fetch(url)
        monkeypatch.setenv("LLMTOOL_API_KEY", "k")
        assert fetch(url)["model"] == "tiny"


@pytest.mark.parametrize(
    ("status", "body", "says"), [(404, "{}", "404"), (200, "[]", "no"), (200, "<", "cannot")]
)
def test_what_is_no_llmtool_server_is_named(status: int, body: str, says: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        with pytest.raises(LLMToolError, match=says):
            fetch(f"http://127.0.0.1:{other.server_port}")
