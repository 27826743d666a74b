"""Errors a user can cause: one sentence, a remedy, an exit code (and an HTTP status where a server reports it).

``assert`` is for our own invariants; everything that bad input can trigger is one of these.
"""

from __future__ import annotations


class LLMToolError(Exception):
    """Base of all errors shown to a user.

    message: one sentence that says what is wrong, with the number that matters.
    remedy: what to do about it, or "".
    """

    exit_code = 1
    http_status = 500
    kind = "internal_error"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross the engine's process boundary: keep every field, not only args.
        return (_rebuild, (type(self), self.__dict__ | {"message": self.message, "remedy": self.remedy}))


def _rebuild(cls: type[LLMToolError], state: dict[str, object]) -> LLMToolError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class UsageError(LLMToolError):
    """A flag, file or argument that makes no sense."""

    exit_code = 2
    http_status = 400
    kind = "invalid_request_error"


class ModelError(LLMToolError):
    """A model that cannot be found, read or run."""

    exit_code = 1
    http_status = 404
    kind = "model_error"


class ThresholdMissed(LLMToolError):
    """A measured figure misses the threshold the user asked for."""

    exit_code = 3


class InfeasibleError(LLMToolError):
    """What was asked for cannot fit: memory, budget, constraint."""

    exit_code = 4
    http_status = 400
    kind = "invalid_request_error"


class RequestError(LLMToolError):
    """A request the server refuses: a 4xx with a sentence. ``param`` names the field at fault."""

    exit_code = 2
    http_status = 400
    kind = "invalid_request_error"

    def __init__(
        self, message: str, remedy: str = "", param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, remedy)
        self.param = param
        self.code = code


class RequestTooLong(RequestError):
    """The request can never fit: longer than the context or than all KV pages together."""


class QueueFull(LLMToolError):
    """Too many requests wait already; ``retry_after`` seconds is the server's advice."""

    http_status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, remedy: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, remedy)
        self.retry_after = retry_after


class EngineDead(LLMToolError):
    """The engine process ended or failed; nothing can be served any more."""

    http_status = 503
    kind = "service_unavailable"


class ReplicaLost(EngineDead):
    """One engine of several died with this request on it; the others serve on."""


class KVLost(LLMToolError):
    """Keys and values did not get from one engine to another; they are computed again."""


class NoReplica(QueueFull):
    """Every engine of several is down for now; ``retry_after`` seconds is when one may be back."""

    http_status = 503
    kind = "service_unavailable"
