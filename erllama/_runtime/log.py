"""Loggers of this library: one whose handler fails disturbs no work.

A leaf module: every layer but `llama_ffi` takes its logger from here. Handlers
are the user's code, and many records are logged by threads that others wait for.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """A logger that prints what its handlers raise to stderr, as `logging` does for its own handlers."""

    def log(self, level: int, msg: object, *args: object, **kwargs: object) -> None:
        if not self.logger.isEnabledFor(level):
            return
        try:
            # Two: the record names the caller, not this method.
            self.logger.log(level, msg, *args, **{"stacklevel": 2, **kwargs})  # type: ignore[arg-type]
        except Exception:
            _print()
        except BaseException:
            # In the main thread it may be Ctrl-C. No other thread is interrupted, or may end, by a handler.
            if threading.current_thread() is threading.main_thread():
                raise
            _print()


def _print() -> None:
    if logging.raiseExceptions:
        with suppress(Exception):
            print("--- A logging handler of erllama's log failed ---", file=sys.stderr)  # noqa: T201
            traceback.print_exc()


def logger(name: str) -> _Logger:
    """Return the library's logger of a name, such as "erllama.cache"."""
    return _Logger(logging.getLogger(name))
