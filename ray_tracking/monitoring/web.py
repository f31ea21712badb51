"""One question to a web server. In: a URL. Out: the HTTP status, or why there is none.
Never raises for a bad server."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping

TIMEOUT_SECONDS = 3.0


def ask(url: str, headers: Mapping[str, str] | None = None, timeout: float = TIMEOUT_SECONDS) -> tuple[int | None, str]:
    """(status, "") of a GET, or (None, reason). Loopback addresses are asked directly,
    others through the proxy that is set."""
    try:
        request = urllib.request.Request(url, headers=dict(headers or {}))
        handlers = [urllib.request.ProxyHandler({})] if _is_loopback(request.host) else []
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            return int(answer.status), ""
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError as error:
        return None, str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, str(error) or type(error).__name__


def _is_loopback(host: str) -> bool:
    return host.rpartition(":")[0] in ("localhost", "[::1]") or host.startswith("127.") or host == "localhost"
