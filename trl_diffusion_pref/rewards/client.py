"""Posts JSON to a server, again where that can help."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


# "Too many requests" and what servers answer while they start, restart or are overloaded.
_PASSING = (408, 429, 500, 502, 503, 504)
_SHOWN = 300


class ServerError(Exception):
    """A server did not answer as it should; the message names it."""


def check_url(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ValueError: It is not of HTTP.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ValueError(f"url={url!r}; it must begin with http:// or https://")
    return url.rstrip("/")


def post_json(
    url: str, body: Mapping[str, Any], *, headers: Mapping[str, str], timeout: float, retries: int, wait: float
) -> Any:
    """Posts JSON and reads the JSON that comes back.

    Args:
        url, body, headers: Of the request.
        timeout: Seconds without an answer until an attempt has failed.
        retries: Attempts after the first one, where the server cannot be reached, does not answer in time, or says
            that the reason may pass.
        wait: Seconds before the first of them; doubled each time.

    Raises:
        ServerError: No attempt succeeded, the server refused the request, or the answer is not JSON.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST"
    )
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer = response.read()
            break
        except urllib.error.HTTPError as error:
            problem = f"answered {error.code} {error.reason}: {_shown(error.read())}"
            if error.code not in _PASSING:
                raise ServerError(f"{url} {problem}") from error
            failure: Exception = error
        # Connection refused or lost, unknown host, and time-outs of both kinds.
        except (OSError, ValueError) as error:
            problem = f"cannot be reached ({getattr(error, 'reason', error) or type(error).__name__})"
            failure = error
        if attempt == retries:
            raise ServerError(f"{url} {problem}, {retries + 1} times") from failure
        time.sleep(wait * 2**attempt)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ServerError(f"{url} answered something that is not JSON: {_shown(answer)}") from error


def _shown(answer: bytes) -> str:
    text = answer.decode(errors="replace").strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
