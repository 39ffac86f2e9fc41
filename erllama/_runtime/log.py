"""Loggers that catch the errors of their handlers.

Every layer but `llama_ffi` takes its logger from here. Handlers are the user's code, and many records are logged in
threads that other threads wait for: a failing handler must not stop them.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """A logger that prints the errors of its handlers to stderr, as `logging` does for its own handlers."""

    def log(self, level: int, msg: object, *args: object, **kwargs: object) -> None:
        if not self.logger.isEnabledFor(level):
            return
        try:
            # stacklevel=2: the record names the caller, not this method.
            self.logger.log(level, msg, *args, **{"stacklevel": 2, **kwargs})  # type: ignore[arg-type]
        except Exception:
            _print_error()
        except BaseException:
            # In the main thread it may be Ctrl-C. In other threads it cannot be, and must not end the thread.
            if threading.current_thread() is threading.main_thread():
                raise
            _print_error()


def _print_error() -> None:
    if logging.raiseExceptions:
        with suppress(Exception):
            print("--- A logging handler of erllama's log failed ---", file=sys.stderr)  # noqa: T201
            traceback.print_exc()


def logger(name: str) -> _Logger:
    """Return the logger with a name, such as "erllama.cache"."""
    return _Logger(logging.getLogger(name))
