"""llmtool: make language models cheap to serve, and prove it.

Names are handed on lazily, so importing a part (``llmtool.core``, ``llmtool.sim``) never imports torch.
"""

from __future__ import annotations

from llmtool.version import __version__

_LAZY = {
    "AotExecutor": "llmtool.runtime.aot.executor",
    "AsyncEngine": "llmtool.runtime.async_engine",
    "Engine": "llmtool.core.engine",
}
__all__ = ["AotExecutor", "AsyncEngine", "Engine", "__version__"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llmtool' has no attribute {name!r}")
