"""The ledger of a running llmtool server, from its /memory."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from llmtool.errors import LLMToolError, UsageError

TIMEOUT = 10.0  # seconds


def fetch(url: str) -> dict[str, Any]:
    """The server's ledger. LLMTOOL_API_KEY, where it is set, goes along as a bearer token. Raises UsageError for an
    address that is none, LLMToolError where nothing answers as llmtool does."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"{url!r} is no address of a server.", "Give one like http://127.0.0.1:8000.")
    address = f"{parts.scheme}://{parts.netloc}/memory"
    key = os.environ.get("LLMTOOL_API_KEY")
    request = Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            data = json.load(answer)
    except HTTPError as e:
        remedy = "Set LLMTOOL_API_KEY." if e.code == 401 else "Is it an llmtool server of this version?"
        raise LLMToolError(f"{address} answers {e.code}.", remedy) from None
    except (URLError, OSError, ValueError) as e:
        reason = getattr(e, "reason", None) or e
        raise LLMToolError(f"{address} cannot be read: {reason}.", "Is the server up?") from None
    if not isinstance(data, dict) or "kv" not in data:
        raise LLMToolError(f"{address} is not an llmtool server's ledger.", "Is it a server of this version?")
    return data
