"""One OpenAI-compatible endpoint: who answers there, and one chat request to it with what can go wrong named."""

import asyncio
import email.utils
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from basalt import tracing

MODELS_SECONDS = 20.0
TOLD = 300  # characters of a server's own words in a message


class AskError(Exception):
    """The endpoint cannot be asked at all; the message says why."""


class Trouble(Exception):
    """One request brought no answer.

    Attributes:
        kind: in a few words, the same for the same cause, to be counted: "429", "timeout", "garbage", …
        again: whether to ask again may help.
        wait: seconds that the server asked to wait.
        busy: whether the server had too much to do, or seemed to.
    """

    def __init__(self, kind: str, message: str, *, again: bool = True, busy: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.again, self.busy, self.wait = kind, again, busy, wait


@dataclass(frozen=True)
class Reply:
    """What a server answered. Tokens are `None` where it did not count them."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    fingerprint: str | None


@dataclass(frozen=True)
class Served:
    """Which model answers at an endpoint, as far as it says."""

    model: str
    version: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked. `url` is written as for OpenAI's client, with its `/v1`; the key is never shown."""

    url: str
    model: str
    key: str = ""
    seconds: float = 120.0  # for one answer

    def client(self, connections: int) -> httpx.AsyncClient:
        """A client for the endpoint; proxies of the environment are used, but not to this machine.

        Raises:
            AskError: the URL is none.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AskError(f"{self.url!r} is no http(s) URL: an endpoint is written http://HOST:PORT/v1")
        return httpx.AsyncClient(
            base_url=self.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx.Timeout(self.seconds, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=parts.hostname not in ("127.0.0.1", "::1", "localhost"),
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"


async def version_of(client: httpx.AsyncClient, endpoint: Endpoint) -> str | None:
    """The version of the model, where the server's list of models tells one.

    Raises:
        AskError: nobody answers, the key is refused, or the model is not in the list.
    """
    try:
        response = await client.get("models", timeout=MODELS_SECONDS)
    except httpx.HTTPError as error:
        raise AskError(f"no server answers at {endpoint.url}: {error or type(error).__name__}") from error
    if response.status_code in (401, 403):
        raise AskError(f"{endpoint.url} refuses the API key ({response.status_code}): {_words(response)}")
    try:
        listed = {one["id"]: one for one in response.raise_for_status().json()["data"]}
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return None  # a server without the list may still answer
    if (found := listed.get(endpoint.model)) is None:
        if "@" in endpoint.model:  # NAME@VERSION says the version itself
            return endpoint.model.partition("@")[2]
        raise AskError(f"{endpoint.url} has no model {endpoint.model!r}; it has {', '.join(listed) or 'none'}")
    version = found.get("version")
    return version if isinstance(version, str) else None


async def chat(client: httpx.AsyncClient, body: bytes, seconds: float) -> Reply:
    """One chat completion, of a JSON body.

    Raises:
        Trouble: no answer.
    """
    try:
        async with asyncio.timeout(seconds):
            headers = {"Content-Type": "application/json", **tracing.headers()}
            response = await client.post("chat/completions", content=body, headers=headers)
    except (TimeoutError, httpx.TimeoutException) as error:
        raise Trouble("timeout", f"no answer within {seconds:g} s", busy=True) from error
    except httpx.HTTPError as error:
        raise Trouble("no connection", f"{type(error).__name__}: {error}", busy=True) from error
    status = response.status_code
    if status != 200:
        busy = status in (408, 429) or status >= 500
        message = f"the server answered {status}: {_words(response)}"
        raise Trouble(str(status), message, again=busy, busy=busy, wait=_wait(response))
    return _reply(response)


def _reply(response: httpx.Response) -> Reply:
    try:
        body = response.json()
        choice = body["choices"][0]
        message = choice["message"]
        text = message["content"] if message.get("content") is not None else message.get("refusal") or ""
        usage = body.get("usage") or {}
        if not isinstance(text, str) or not isinstance(usage, dict):
            raise TypeError("the content is no text")
        finish, fingerprint = choice.get("finish_reason"), body.get("system_fingerprint")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise Trouble("garbage", f"the answer is no chat completion: {response.text[:TOLD]!r}") from error
    return Reply(
        text=_storable(text),
        finish_reason=finish if isinstance(finish, str) else None,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def _storable(text: str) -> str:
    """Half surrogates and NUL, which no database takes, replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def _wait(response: httpx.Response) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _words(response: httpx.Response) -> str:
    """The message of an error in OpenAI's shape, or how the body begins."""
    try:
        return str(response.json()["error"]["message"])[:TOLD]
    except (ValueError, TypeError, KeyError, RecursionError):
        return " ".join(response.text[:TOLD].split()) or "nothing more"


def encode(model: str, messages: list[dict[str, Any]], decoding: dict[str, Any]) -> bytes:
    """The body of a chat request."""
    return json.dumps({"model": model, "messages": messages, **decoding}).encode()
