"""Errors in the model thread, as the callers of requests receive them."""

from __future__ import annotations

from erllama._runtime.log import logger
from erllama.errors import BackendError, Error

log = logger("erllama.engine")


def wrap_error(error: BaseException) -> Error:
    """Return an error of this library for any exception in the model thread, SystemExit included.

    Interrupts are meant for other threads, and a request must not end this one.
    """
    if isinstance(error, Error):
        return error
    log.error("a request failed unexpectedly", exc_info=error)
    failure = BackendError(f"the request failed unexpectedly: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
