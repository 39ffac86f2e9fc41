"""A backend that ends its process on order: for the tests of models in processes of their own.

`make` is the function of `load_backend("support.deadly_backend:make", options, process=True)`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Batch
from support.resumption import LikelyStub

POISON = 7  # a token that ends the process whenever it is computed
DEATHS = ("segv", "abort", "assertion", "memory", "exit", "hang", "kill")


_LEAK = 300 << 20
_leaked: list[NDArray[np.float64]] = []


class DeadlyStub(LikelyStub):
    """A stub that looks for an order before each decode: a file with the name of a death, which it removes.

    Args:
        orders: where the file is; None for no orders.
        poisoned: whether the token POISON is deadly.
        slow: seconds that each decode takes longer.
    """

    def __init__(
        self, orders: str | None = None, *, poisoned: bool = False, slow: float = 0.0, **options: object
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._orders = None if orders is None else Path(orders)
        self._poisoned, self._slow = poisoned, slow

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if self._poisoned and POISON in batch.tokens:
            die("segv")
        if self._orders is not None and self._orders.exists():
            death = self._orders.read_text()
            self._orders.unlink()
            die(death)
            if death == "broken":
                self._break()
        if self._slow:
            time.sleep(self._slow)
        return super().decode(batch)

    def _break(self) -> None:
        """Fail in a way from which the model thread cannot recover."""

        def fail(*_: object) -> None:
            raise SystemError("the memory of the model is damaged")

        self.clear = self.drop = fail  # type: ignore[method-assign, assignment]
        fail()


def make(**options: object) -> DeadlyStub:
    """Make the backend, once the file `hold` does not exist."""
    hold = options.pop("hold", None)
    while hold is not None and Path(str(hold)).exists():
        time.sleep(0.05)
    return DeadlyStub(**options)  # type: ignore[arg-type]


def die(death: str) -> None:
    """End this process."""
    if death == "segv":
        ctypes.string_at(0)
    elif death == "abort":
        os.abort()
    elif death == "assertion":
        _fail_assertion()
    elif death == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
        # As a C++ program does: no memory, and no handler.
        if ctypes.CDLL(None).malloc(ctypes.c_size_t(1 << 40)) == 0:
            os.abort()
    elif death == "exit":
        logging.getLogger("erllama.engine").addHandler(_ExitHandler())
        logging.getLogger("erllama.engine").error("a handler of the log ends the process")
    elif death == "hang":
        time.sleep(3600)
    elif death == "kill":
        os.kill(os.getpid(), 9)
    elif death == "print":
        os.write(1, b"printed by the process\n")
        logging.getLogger("erllama.engine").warning("logged by the process")
    elif death == "leak":
        _leaked.append(np.ones(_LEAK // 8))


class _ExitHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        os._exit(3)


def _fail_assertion() -> None:
    """Fail an assertion of ggml, in a thread in which nothing catches it."""
    import threading

    from erllama import llama_ffi

    library = next(Path(llama_ffi.__file__).parent.glob("libggml-base.so*"))
    ggml = ctypes.CDLL(str(library))
    thread = threading.Thread(
        target=lambda: ggml.ggml_abort(b"support/deadly_backend.py", 1, b"GGML_ASSERT(%s) failed", b"false")
    )
    thread.start()
    thread.join()
