"""A language model behind an OpenAI-compatible chat endpoint.

What was paid for is never lost, nor paid for twice: each reply is on the disk before it
is used, and the same question is answered from there. What is spent is limited.

Three environment variables say where to ask:

* ``FTLIB_ENDPOINT_URL``: up to the version, such as ``http://localhost:8000/v1``
* ``FTLIB_ENDPOINT_MODEL``: the model's name there
* ``FTLIB_ENDPOINT_KEY``: the key; none is sent if it is not set

.. code-block:: python

   from ftlib.clipr.endpoint import Budget, Endpoint

   model = Endpoint.from_environment("runs/replies.jsonl", Budget(calls=500))
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, NamedTuple

from ftlib.clipr.models import Choice, Usage, cut, estimated_tokens, votes

_SHOWN = 300  # characters of a server's answer in an error
_SECRET = 8  # characters of a key; a shorter one, like EMPTY, stands for no key
_MAY_PASS = (408, 409, 425, 429)  # statuses below 500 after which it helps to try again


class EndpointError(RuntimeError):
    """An endpoint gave no reply; the message says why and what had been spent."""


class BudgetSpentError(EndpointError):
    """What was asked could cost more than is left of the budget."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, by one :class:`Endpoint` object.

    Attributes:
        calls: requests, those that fail among them.
        tokens: read and written; a request that fails counts none.
    """

    calls: int = 1000
    tokens: int = 1_000_000


@dataclass(frozen=True)
class Patience:
    """How an endpoint is waited for.

    Attributes:
        timeout: seconds for the server to answer, and between parts of its answer.
        attempts: requests for one reply, at least 1.
        delay: seconds before the second attempt; twice as many before each further one.
            If the server names a time, that is waited for instead.
        longest_delay: seconds, the most that are waited.
    """

    timeout: float = 60.0
    attempts: int = 5
    delay: float = 1.0
    longest_delay: float = 60.0

    def before(self, attempt: int, asked: str | None) -> float:
        """Return the seconds to wait before an attempt, counted from 1.

        Args:
            attempt: the one that comes; there is no wait before the first.
            asked: the server's ``Retry-After``. A date in it is not read.
        """
        own = self.delay * 2 ** (attempt - 2)
        wanted = float(asked) if asked and asked.strip().isdecimal() else own
        return min(wanted, self.longest_delay)


class Asked(NamedTuple):
    """All that a reply depends on; ``settings`` as JSON holds them."""

    url: str
    model: str
    prompt: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 of it all."""
        text = json.dumps(self._asdict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Reply(NamedTuple):
    """A completion and what it took."""

    completion: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def usage(self) -> Usage:
        """As one call."""
        return Usage(1, self.prompt_tokens, self.completion_tokens, self.seconds)


class Endpoint:
    """Asks a server, at temperature 0.

    :meth:`score` gives votes: it asks for the reply and sees which option that names.
    Log-probabilities are not asked for, since many servers give none.

    Args:
        url: of the interface, up to its version; ``/chat/completions`` is added.
        model: its name at the server.
        key: sent as a bearer token. It is in no message, no file and no ``repr``.
        cache: JSON lines, one for each reply; made if it is not there.
        budget: what may be spent.
        patience: how long to wait and how often to try.
        extra: more fields of a request, such as a seed, or other values of them;
            ``None`` leaves a field out. Some servers want
            ``{"max_tokens": None, "max_completion_tokens": 2000}``.
        sleep: waits some seconds.

    Attributes:
        usage: of all that was asked, whether a reply came from the cache or not; so a
            run counts the same when it is repeated.
        paid: of what went to the server, with each attempt as a call.

    Raises:
        ValueError: the URL or the key cannot be used, or there would be no attempt.
        OSError: the cache cannot be written.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: Path | str,
        key: str | None = None,
        budget: Budget = Budget(),
        patience: Patience = Patience(),
        extra: Mapping[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if patience.attempts < 1:
            raise ValueError(f"attempts is {patience.attempts}: give 1 or more")
        self.url = _checked_url(url)
        self.model = model
        self.usage = Usage()
        self.paid = Usage()
        self.budget = budget
        self.patience = patience
        self.extra = dict(extra or {})
        self._key = _checked_key(key)
        self._sleep = sleep
        self._cache = ReplyCache(Path(cache))
        # A redirection would carry the key to another host.
        self._opener = urllib.request.build_opener(_NoRedirection)

    @classmethod
    def from_environment(
        cls,
        cache: Path | str,
        budget: Budget = Budget(),
        patience: Patience = Patience(),
        extra: Mapping[str, Any] | None = None,
    ) -> Endpoint:
        """Take URL, model and key from the environment.

        Raises:
            ValueError: URL or model is not set; else as :class:`Endpoint`.
        """
        url, model, key = (
            os.environ.get(f"FTLIB_ENDPOINT_{name}") for name in ("URL", "MODEL", "KEY")
        )
        if not url or not model:
            raise ValueError(
                "set FTLIB_ENDPOINT_URL (such as http://localhost:8000/v1) and"
                " FTLIB_ENDPOINT_MODEL, and FTLIB_ENDPOINT_KEY if the server wants one"
            )
        limits: dict[str, Any] = {"budget": budget, "patience": patience}
        return cls(url, model, cache=cache, key=key, extra=extra, **limits)

    def __repr__(self) -> str:
        return (
            f"Endpoint({self.url!r}, {self.model!r}, cache={str(self._cache.path)!r})"
        )

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()
    ) -> str:
        """Return the reply to a prompt, from the cache or from the server.

        Raises:
            BudgetSpentError: it could cost more than is left. Nothing was sent.
            EndpointError: the server refused, or no attempt brought a reply.
        """
        settings = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "stop": list(stop) or None,
            **self.extra,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        question = Asked(self.url, self.model, prompt, given)
        reply = self._cache.get(question)
        if reply is None:
            reply = self._ask(question, estimated_tokens(prompt) + max_tokens)
            self._cache.put(question, reply)
        self.usage.add(reply.usage)
        return cut(reply.completion, stop)

    def score(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Return :func:`ftlib.clipr.models.votes` of the reply, 16 tokens at most.

        Raises:
            EndpointError: as :meth:`complete`.
        """
        return votes(self.complete(prompt, max_tokens=16), options, self.usage)

    def score_all(self, questions: Sequence[Choice]) -> list[list[float]]:
        """:meth:`score` for many prompts, one after the other.

        Raises:
            EndpointError: as :meth:`complete`; the replies before it are kept.
        """
        return [self.score(*question) for question in questions]

    def _ask(self, question: Asked, expected: int) -> Reply:
        """Try until there is a reply, or no attempt is left."""
        message = {"role": "user", "content": question.prompt}
        body = {"model": self.model, "messages": [message], **question.settings}
        failure = _Failure("")
        for attempt in range(1, self.patience.attempts + 1):
            if attempt > 1:
                self._sleep(self.patience.before(attempt, failure.retry_after))
            self._check_budget(expected, failure)
            self.paid.calls += 1
            began = time.perf_counter()
            try:
                with self.paid.timed():
                    answer = self._post(body)
                reply = _read(answer, question.prompt, time.perf_counter() - began)
            except _Failure as error:
                failure = error
                if not error.may_pass:
                    break
                continue
            self.paid.add(Usage(0, reply.prompt_tokens, reply.completion_tokens))
            return reply
        raise EndpointError(
            f"{self.url} gave no reply after {attempt} attempts: {failure}."
            f" {self._spent()}"
        )

    def _check_budget(self, expected: int, failure: _Failure) -> None:
        left = self.budget.calls - self.paid.calls
        if left >= 1 and self.paid.tokens + expected <= self.budget.tokens:
            return
        before = f" The last attempt failed: {failure}." if str(failure) else ""
        raise BudgetSpentError(
            f"the budget is {self.budget.calls} calls and {self.budget.tokens} tokens,"
            f" and the next request may take {expected} tokens.{before}"
            f" {self._spent()} Raise the budget to go on"
        )

    def _spent(self) -> str:
        return (
            f"Spent: {self.paid.calls} calls, {self.paid.prompt_tokens} tokens read,"
            f" {self.paid.completion_tokens} written. Every reply is in"
            f" {self._cache.path}, and will not be asked for again"
        )

    def _post(self, body: Mapping[str, Any]) -> str:
        """Send a request and return what comes back, without the key.

        Raises:
            _Failure: there was no answer, or one that says it did not work.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(  # noqa: S310  # http and https only
            self.url, json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as answer:
                return self._text(answer)
        except urllib.error.HTTPError as error:
            with error:
                told = self._text(error)
            raise _Failure(
                f"status {error.code}: {told[:_SHOWN]!r}",
                may_pass=error.code >= 500 or error.code in _MAY_PASS,
                retry_after=error.headers.get("Retry-After"),
            ) from None
        except (OSError, http.client.HTTPException) as error:
            # Also a time-out, a closed connection, and half of an answer.
            told = self._without_key(str(error))
            raise _Failure(f"{type(error).__name__}: {told[:_SHOWN]}") from None

    def _text(self, answer: IO[bytes]) -> str:
        return self._without_key(answer.read().decode("utf-8", errors="replace"))

    def _without_key(self, text: str) -> str:
        """Take the key out of what a server says, for it may repeat it."""
        secret = len(self._key) >= _SECRET
        return text.replace(self._key, "[key]") if secret else text


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Leaves a redirection as it is: an answer with a status that is no success."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        """Follow nothing."""


class _Failure(Exception):  # noqa: N818
    """One attempt failed; ``may_pass`` if another one may not."""

    def __init__(
        self, why: str, *, may_pass: bool = True, retry_after: str | None = None
    ) -> None:
        super().__init__(why)
        self.may_pass = may_pass
        self.retry_after = retry_after


def _read(answer: str, prompt: str, seconds: float) -> Reply:
    """Take a reply out of an answer. A null, as after a refusal, is an empty text.

    Raises:
        _Failure: it is not of the form that it should have.
    """
    try:
        found = json.loads(answer)
        content = found["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Failure(
            f"the answer has no choices[0].message.content ({type(error).__name__}):"
            f" {answer[:_SHOWN]!r}"
        ) from None
    if not isinstance(content, str | None):
        raise _Failure(f"the reply is no text: {str(content)[:_SHOWN]!r}")
    # Half of a surrogate pair is JSON, and no text that could be written to a file.
    completion = (content or "").encode(errors="replace").decode()
    told = found.get("usage")
    counts = told if isinstance(told, dict) else {}
    return Reply(
        completion,
        _count(counts.get("prompt_tokens"), prompt),
        _count(counts.get("completion_tokens"), completion),
        seconds,
    )


def _count(told: Any, text: str) -> int:
    """Return the server's number of tokens, or an estimate where it tells none."""
    return told if isinstance(told, int) and told >= 0 else estimated_tokens(text)


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: what is here may be secret.
        raise ValueError(
            "the endpoint's URL has a user, a query or a fragment: give the plain URL,"
            " and the key in FTLIB_ENDPOINT_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"the endpoint's URL is {url!r}: give one like http://localhost:8000/v1"
        )
    return url.rstrip("/") + "/chat/completions"


def _checked_key(key: str | None) -> str:
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "the endpoint's key has a space, a line end or a character that is not"
            " ASCII: copy it again"
        )
    return key


class ReplyCache:
    """Replies in JSON lines, each added whole and at once.

    A line that cannot be read, such as one that was cut off when a machine went down,
    is left where it is and passed over.

    Args:
        path: of the file; made, with its folder, if it is not there.

    Attributes:
        path: of the file.
        damaged: lines that could not be read.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._replies: dict[str, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # better an error now than after the first reply
            pass
        content = path.read_bytes()
        for line in content.splitlines():
            self._load(line)
        self._separator = b"" if content[-1:] in (b"", b"\n") else b"\n"

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, question: Asked) -> Reply | None:
        """Return the reply to a question, if there is one."""
        return self._replies.get(question.key)

    def put(self, question: Asked, reply: Reply) -> None:
        """Keep a reply.

        Raises:
            OSError: the line could not be written. The reply is kept in memory.
        """
        self._replies[question.key] = reply
        row = {**question._asdict(), **reply._asdict()}
        line = self._separator + json.dumps(row).encode() + b"\n"
        # One write to a file opened for appending is not mixed with another process's.
        with self.path.open("ab", buffering=0) as file:
            self._separator = b"\n"
            if file.write(line) != len(line):
                raise OSError(f"{self.path}: only a part of a reply could be written")
            os.fsync(file.fileno())
        self._separator = b""

    def _load(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            question = Asked(*(row[name] for name in Asked._fields))
            reply = Reply(*(row[name] for name in Reply._fields))
            whole = isinstance(reply.completion, str) and reply.usage.tokens >= 0
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if whole:
            self._replies[question.key] = reply
        else:
            self.damaged += bool(line.strip())
