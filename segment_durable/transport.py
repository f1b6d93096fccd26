"""One POST over the network: a protocol of one method, and its implementation by requests."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import get_environ_proxies

__all__ = ["RequestsTransport", "Response", "Transport", "TransportError"]

MAX_ANSWER_BYTES = 64 << 10  # what of an answer is read; the rest is of no interest


@dataclass(frozen=True)
class Response:
    """An answer: its status, its headers (looked up in any case) and the first 64 KiB of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class TransportError(Exception):
    """There was no whole answer.  `kind` is "timeout", "dns", "certificate", "tls", "proxy" or "connection"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Transport(Protocol):
    """How the package reaches the network; used by one thread at a time."""

    def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Response:
        """Post `body` and return the answer, whatever its status; a redirect is an answer and not followed.

        `timeout` seconds bound the connecting, each wait for data, and the reading of the body as a whole.  Raises
        `TransportError` if there is no whole answer.
        """

    def close(self) -> None:
        """Close the connections; a later `post()` opens new ones."""


class RequestsTransport:
    """Posts by one keep-alive `requests.Session`.

    `proxies`: as requests takes them; `None` means those of the environment (`HTTPS_PROXY`, `NO_PROXY` and so on),
    which is read once for each URL: requests itself would read it and `~/.netrc` at every post, at half the price of
    the post, and would let a netrc entry replace our Authorization header.
    """

    def __init__(self, proxies: Mapping[str, str] | None = None) -> None:
        self._proxies = proxies
        self._session: requests.Session | None = None
        self._prepared: dict[str, tuple[requests.PreparedRequest, dict[str, str]]] = {}

    def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Response:
        session = self._session or self._open()
        prepared, proxies = self._prepare(url)
        request = prepared.copy()
        request.headers.update(headers)
        request.headers["Content-Length"] = str(len(body))
        request.body = body
        try:
            response = session.send(
                request, timeout=timeout, allow_redirects=False, stream=True, proxies=proxies, verify=session.verify
            )
            with response:
                answer = _read(response, time.monotonic() + timeout)
        except requests.RequestException as problem:
            raise _transport_error(problem) from problem
        except (OSError, ValueError) as problem:
            raise TransportError("connection", _words(problem)) from problem
        return Response(response.status_code, CaseInsensitiveDict(response.headers), answer)

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _open(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        adapter = HTTPAdapter(pool_connections=2, pool_maxsize=1, max_retries=0)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        self._session = session
        return session

    def _prepare(self, url: str) -> tuple[requests.PreparedRequest, dict[str, str]]:
        if url not in self._prepared:
            request = requests.PreparedRequest()
            request.prepare(method="POST", url=url, headers={"Accept": "application/json"})
            proxies = get_environ_proxies(url) if self._proxies is None else dict(self._proxies)
            self._prepared[url] = (request, proxies)
        return self._prepared[url]


def _read(response: requests.Response, deadline: float) -> bytes:
    answer = b""
    for chunk in response.iter_content(8192):
        answer += chunk
        if len(answer) >= MAX_ANSWER_BYTES:
            break
        if time.monotonic() > deadline:
            raise TransportError("timeout", "the answer did not end in time")
    return answer[:MAX_ANSWER_BYTES]


def _transport_error(problem: requests.RequestException) -> TransportError:
    text = repr(problem)
    if isinstance(problem, requests.exceptions.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in text or "CertificateError" in text or "doesn't match" in text:
            return TransportError("certificate", f"the host's certificate was not accepted: {_words(problem)}")
        return TransportError("tls", f"TLS failed: {_words(problem)}")
    if isinstance(problem, requests.exceptions.ProxyError):
        return TransportError("proxy", "the proxy can't be reached or refused")
    if isinstance(problem, requests.Timeout):
        step = "connecting" if isinstance(problem, requests.ConnectTimeout) else "waiting for the answer"
        return TransportError("timeout", f"timed out while {step}")
    if "NameResolutionError" in text or "gaierror" in text:
        return TransportError("dns", "the host's name can't be resolved")
    return TransportError("connection", _words(problem))


def _words(problem: BaseException) -> str:
    """The innermost cause in a few words; the outer ones repeat URLs, which may hold a proxy's password."""
    seen = {id(problem)}
    inner: BaseException | None = problem
    while inner is not None:
        problem = inner
        inner = next(
            (
                each
                for each in (*problem.args, getattr(problem, "reason", None), problem.__cause__, problem.__context__)
                if isinstance(each, BaseException) and id(each) not in seen
            ),
            None,
        )
        seen.add(id(inner))
    detail = getattr(problem, "verify_message", "") or getattr(problem, "strerror", "") or ""
    return f"{type(problem).__name__}{': ' if detail else ''}{detail}"
