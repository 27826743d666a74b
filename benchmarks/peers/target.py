"""A contender that runs: requests go in, records come out, the same whether it is a server or a library."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import NAME, Contender
from benchmarks.peers.process import Process
from benchmarks.peers.workload import Load
from llmtool.bench.client import ClientOptions, HttpBackend
from llmtool.bench.load import run_load
from llmtool.bench.run import run_blocking
from llmtool.errors import LLMToolError
from llmtool.models.tokenizer import Tokenizer
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest

START_LIMIT = (
    1800.0  # seconds from the command to its first token; the first start of some compiles for minutes
)
RUN_LIMIT = 900.0  # seconds for one load


class ContenderFailed(LLMToolError):
    """It did not start, or ended, or refused what all others take."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """records: one per request, in order. duration: seconds from the first sent to the last token."""

    records: list[RequestRecord]
    duration: float

    def check(self) -> None:
        """Raises ContenderFailed unless every request brought exactly the tokens that were asked for."""
        for record in self.records:
            if not record.success:
                raise ContenderFailed(f"A request failed: {record.error}")
            if record.max_tokens is not None and record.output_tokens != record.max_tokens:
                raise ContenderFailed(
                    f"A request for {record.max_tokens} tokens brought {record.output_tokens}."
                )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Target:
    """`with Target(contender, tokenizer, log) as t: t.first_token(request); t.run(load)`."""

    def __init__(self, contender: Contender, tokenizer: Tokenizer, log: Path) -> None:
        self.contender = contender
        self._tokenizer = tokenizer
        self._port = 0 if contender.driver else free_port()
        self.command = contender.command(self._port)
        try:
            self.process = Process(self.command, contender.environment(), log, pipes=contender.driver)
        except OSError as e:
            raise ContenderFailed(f"{contender.name} cannot be started: {e}.") from None

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stop()

    def first_token(self, request: BenchRequest) -> float:
        """Seconds from the start of the command to the first token of its first request."""
        if self.contender.driver:
            self._read(START_LIMIT)  # ready
            sent = time.perf_counter() - self.process.started
            record = self._exchange([request], [0.0])[0]
            if not record.success:
                raise ContenderFailed(f"{self.contender.name}: the first request failed: {record.error}")
            return sent + record.start + record.ttft
        return run_blocking(self._poll(request))

    async def _poll(self, request: BenchRequest) -> float:
        error = ""
        async with self._backend() as backend:
            while (waited := time.perf_counter() - self.process.started) < START_LIMIT:
                self._must_live()
                record = RequestRecord(max_tokens=request.max_tokens)
                await backend.generate(request, record)
                if record.success:
                    return record.start + record.ttft - self.process.started
                error = record.error
                # Often enough to be exact for one that starts in seconds, rarely for one that takes minutes.
                await asyncio.sleep(0.02 if waited < 10 else 0.2)
        raise ContenderFailed(f"{self.contender.name} gave no token within {START_LIMIT:g} s: {error}")

    def run(self, load: Load) -> Outcome:
        """All requests of `load` at their moments; every one must succeed (see Outcome.check)."""
        if not self.contender.driver:
            outcome = run_blocking(self._run_http(load))
        elif load.concurrency == 1:
            started = time.perf_counter()
            records = [self._exchange([request], [0.0])[0] for request in load.requests]
            outcome = Outcome(records, time.perf_counter() - started)
        else:
            records = self._exchange(load.requests, load.offsets)
            first = min((r.start for r in records), default=0.0)
            outcome = Outcome(records, max((r.start + r.e2e for r in records), default=first) - first)
        self._must_live()
        outcome.check()
        return outcome

    async def _run_http(self, load: Load) -> Outcome:
        async with self._backend() as backend:
            done = await run_load(backend, load.requests, load.offsets, load.concurrency)
        return Outcome(done.records, done.duration)

    def _backend(self) -> HttpBackend:
        fields = {"temperature": 0, "ignore_eos": True}
        return HttpBackend(
            ClientOptions(
                f"http://127.0.0.1:{self._port}", NAME, fields=fields, timeout=RUN_LIMIT, keep_text=True
            )
        )

    def _exchange(self, requests: Sequence[BenchRequest], offsets: Sequence[float]) -> list[RequestRecord]:
        """One line to the driver and its answer."""
        asked = [
            {"at": at, "prompt": list(r.token_ids or ()), "max_tokens": r.max_tokens}
            for r, at in zip(requests, offsets, strict=True)
        ]
        stdin = self.process.popen.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"requests": asked}) + "\n")
            stdin.flush()
        except OSError:
            self._must_live()
            raise
        answer = self._read(RUN_LIMIT)
        if "error" in answer:
            raise ContenderFailed(f"{self.contender.name}: {answer['error']}")
        return [
            self._record(i, r, given)
            for i, (r, given) in enumerate(zip(requests, answer["records"], strict=True))
        ]

    def _record(self, index: int, request: BenchRequest, given: dict[str, Any]) -> RequestRecord:
        done = RequestRecord(
            index, given["start"], given["ttft"], e2e=given["e2e"], prompt_tokens=request.prompt_len or 0,
            output_tokens=given["output_tokens"], success=True, counted=True,
        )  # fmt: skip
        return replace(done, max_tokens=request.max_tokens, text=self._tokenizer.decode(given["tokens"]))

    def _read(self, limit: float) -> dict[str, Any]:
        stdout = self.process.popen.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], limit)[0]:
            raise ContenderFailed(f"{self.contender.name} gave no answer within {limit:g} s.")
        line = stdout.readline()
        if not line:
            self.process.popen.wait()
            self._must_live()
        return dict(json.loads(line))

    def _must_live(self) -> None:
        if not self.process.alive:
            raise ContenderFailed(
                f"{self.contender.name} ended ({self.process.popen.returncode}): {self.process.tail()}",
                f"Its log: {self.process.log}",
            )
