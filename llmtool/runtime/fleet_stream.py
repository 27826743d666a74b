"""One request's outputs, whichever engines of a fleet make them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from llmtool.core.request import FinishReason, RequestTimes, SamplingParams, SequenceOutput
from llmtool.errors import EngineDead, KVLost, ReplicaLost
from llmtool.runtime.async_engine import AsyncEngine, RequestStream
from llmtool.runtime.replica import Replica

RETRIES = 2  # times that a request is moved: one that kills engines must not kill them all
TRANSFER_SECONDS = 30.0  # after which KV under way is given up, and computed again

Ask = Callable[[AsyncEngine], Awaitable[RequestStream]]


class Placer(Protocol):
    """What a stream needs of its fleet."""

    async def place(
        self, stream: FleetStream, retry: bool = False, at: Replica | None = None
    ) -> RequestStream: ...

    def choose(self, stream: FleetStream) -> Replica | None:
        """Where it would be placed now."""
        ...

    def count_lost(self) -> None: ...

    def count_transfer(self, nbytes: int, seconds: float) -> None:
        """nbytes: 0 of one that failed."""
        ...

    def between(self, stream: FleetStream, is_between: bool) -> None:
        """It is on its way from one engine to another, and on none."""
        ...


class FleetStream:
    """`async for` it once. role: of the engines that it should go to. replica: the one that has it, or had it
    last."""

    def __init__(
        self, fleet: Placer, request_id: str, role: str, prompt: Sequence[int], salt: str, ask: Ask
    ) -> None:
        self.request_id = request_id
        self.role = role
        self.prompt = prompt
        self.salt = salt
        self.ask = ask
        self.retries = 0
        self.replica: Replica | None = None
        self.inner: RequestStream | None = None  # None while it is moved
        self._fleet = fleet
        self._given = False  # the engine that has it has given something
        self._aborted: set[int | None] = set()

    def __aiter__(self) -> FleetStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        while True:
            assert self.inner is not None, "iterated by one task"
            try:
                output = await anext(self.inner)
            except EngineDead as error:
                await self._move(error)
            else:
                self._given = True
                return output

    async def _move(self, error: EngineDead) -> None:
        """To another engine. Raises ReplicaLost where that cannot be."""
        self.inner = None
        if self._given or None in self._aborted or self.retries >= RETRIES:
            self._fleet.count_lost()
            why = "had begun its answer" if self._given else f"was tried {self.retries + 1} times"
            raise ReplicaLost(
                f"The engine that served this request died, and the request {why}.", "Send it again."
            ) from error
        self.retries += 1
        self._take_up(await self._fleet.place(self, retry=True))

    def _take_up(self, inner: RequestStream) -> None:
        self.inner = inner
        for index in self._aborted:
            inner.abort(index)

    def abort(self, index: int | None = None) -> None:
        """As of RequestStream."""
        self._aborted.add(index)
        if self.inner is not None:
            self.inner.abort(index)


class SplitStream(FleetStream):
    """A request whose prompt runs on a prefill engine, up to the first token, and whose rest on a decode engine,
    with the KV sent between them (DistServe, 2401.09670). Where it does not arrive it is computed again, and no
    token is another one for it.
    """

    def __init__(
        self,
        fleet: Placer,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int,
        salt: str,
    ) -> None:
        self._ask = self._asking(request_id, prompt, params, priority, salt)
        super().__init__(
            fleet, request_id, "prefill", prompt, salt, lambda engine: self._ask(engine, True, (), False)
        )
        self._first: SequenceOutput | None = None  # the prefill engine's last, and only, output
        self._source: AsyncEngine | None = None  # where its KV waits to be sent

    @staticmethod
    def _asking(
        request_id: str, prompt: Sequence[int], params: SamplingParams, priority: int, salt: str
    ) -> Callable[[AsyncEngine, bool, Sequence[int], bool], Awaitable[RequestStream]]:
        def ask(
            engine: AsyncEngine, handoff: bool, given: Sequence[int], moved: bool
        ) -> Awaitable[RequestStream]:
            return engine.add(
                request_id,
                prompt,
                params,
                priority=priority,
                cache_salt=salt,
                handoff=handoff,
                given=given,
                moved=moved,
            )

        return ask

    async def __anext__(self) -> SequenceOutput:
        if self._source is not None and (end := await self._hand_over(self._source)):
            return end
        output = await super().__anext__()
        if self._first is not None:
            return self._joined(self._first, output)
        if output.finish_reason is FinishReason.LENGTH:
            self._first = output
            self._source = self.replica.engine if self.replica is not None else None
            self._fleet.between(self, True)
            # To whoever listens it is an answer like any other, and goes on.
            return replace(output, finish_reason=None, times=None)
        return output

    async def _hand_over(self, source: AsyncEngine) -> SequenceOutput | None:
        """To a decode engine. Returns an output where the request ends instead."""
        self._source, first = None, self._first
        assert first is not None
        given, engine = tuple(first.token_ids), None
        try:
            if self._aborted:
                source.drop_kv(self.request_id)
                return replace(first, token_ids=(), finish_reason=FinishReason.ABORT, logprobs=())
            self.role = "decode"
            target = self._fleet.choose(self)
            engine = None if target is None else target.taking
            moved = target is not None and engine is not None and await self._send(source, engine, target)
            if not moved:
                source.drop_kv(self.request_id)
            self.ask = lambda other: self._ask(other, False, given, moved and other is engine)
            self._given = False
            self._take_up(await self._fleet.place(self, retry=False, at=target))
            if moved and self.replica is not target and engine is not None:
                engine.drop_kv(self.request_id)
        except BaseException:  # also a cancellation: whoever listened has left
            for side in (source, engine):
                if side is not None:
                    side.drop_kv(self.request_id)
            raise
        finally:
            self._fleet.between(self, False)
        return None

    async def _send(self, source: AsyncEngine, target: AsyncEngine, replica: Replica) -> bool:
        """Whether the KV has arrived. replica: the target's, which counts it among its load meanwhile."""
        loop = asyncio.get_running_loop()
        address, started = target.info.kv_address, loop.time()
        if target is source or address is None:
            return False
        replica.incoming += 1
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                nbytes = await source.send_kv(self.request_id, address)
        except (KVLost, EngineDead, TimeoutError):
            self._fleet.count_transfer(0, loop.time() - started)
            return False
        finally:
            replica.incoming -= 1
        self._fleet.count_transfer(nbytes, loop.time() - started)
        return True

    @staticmethod
    def _joined(first: SequenceOutput, output: SequenceOutput) -> SequenceOutput:
        """What the decode engine says, with what only the prefill engine knew."""
        if output.finish_reason is None:
            return output
        output.num_prompt_tokens, output.num_cached_tokens = first.num_prompt_tokens, first.num_cached_tokens
        output.cumulative_logprob += first.cumulative_logprob
        if output.times is not None and first.times is not None:
            t = first.times
            output.times = RequestTimes(t.arrival, t.first_scheduled, t.first_token, output.times.finished)
        return output

    def abort(self, index: int | None = None) -> None:
        super().abort(index)
        if self._source is not None:  # perhaps nobody asks for its next output any more
            self._source.drop_kv(self.request_id)
            self._fleet.between(self, False)
