"""What ends a post, named: what the libraries raise, in a few words that hold no secret."""

from __future__ import annotations

import http.client
import sys
import traceback

import requests
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

__all__ = ["PROBLEMS", "TransportError", "let_go", "transport_error"]

# All that the libraries raise, which for an odd proxy URL may be a TypeError: but not what a signal handler raises, for
# a time limit say, while the answer is waited for.
PROBLEMS = (
    OSError,
    HTTPError,
    http.client.HTTPException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
)


class TransportError(Exception):
    """There was no whole answer.  `kind` is "timeout", "dns", "certificate", "tls", "proxy" or "connection"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def transport_error(problem: Exception) -> TransportError:
    """What one of `PROBLEMS` means."""
    text = repr(problem)
    if isinstance(problem, MaxRetryError) and problem.reason is not None:
        problem = problem.reason
    if isinstance(problem, (requests.exceptions.SSLError, SSLError)):
        if "CERTIFICATE_VERIFY_FAILED" in text or "CertificateError" in text or "doesn't match" in text:
            return TransportError("certificate", f"the host's certificate was not accepted: {_words(problem)}")
        return TransportError("tls", f"TLS failed: {_words(problem)}")
    if isinstance(problem, (ProxyError, requests.exceptions.ProxyError, requests.exceptions.InvalidProxyURL)):
        return TransportError("proxy", "the proxy can't be reached or refused")
    if isinstance(problem, requests.exceptions.InvalidSchema) and "SOCKS" in text:
        return TransportError("proxy", "a SOCKS proxy needs the package PySocks: pip install requests[socks]")
    if isinstance(problem, RecursionError) and "gevent" in sys.modules:
        return TransportError(
            "tls",
            "gevent patched ssl after it was imported: call gevent.monkey.patch_all() before anything is imported",
        )
    refused = isinstance(problem, NewConnectionError)  # which urllib3 derives from its time-out
    if isinstance(problem, (ConnectTimeoutError, ReadTimeoutError, TimeoutError)) and not refused:
        step = "connecting" if isinstance(problem, ConnectTimeoutError) else "waiting for the answer"
        return TransportError("timeout", f"timed out while {step}")
    if "NameResolutionError" in text or "gaierror" in text:
        return TransportError("dns", "the host's name can't be resolved")
    if type(problem) is OSError and "CA certificate bundle" in text:
        return TransportError("certificate", "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names a file that does not exist")
    return TransportError("connection", _words(problem))


def let_go(problem: BaseException | None) -> None:
    """Let go of what is in the frames of its traceback and of its causes'.

    Before Python 3.12 http.client leaves the answer of a proxy that makes no tunnel there, with its open socket.
    """
    while problem is not None:
        traceback.clear_frames(problem.__traceback__)
        problem = problem.__context__


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
