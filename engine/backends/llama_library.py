"""The binding of libllama for the modules of the llama backend.

The only module that imports `llama_ffi`. Without the binding, the import raises an error that says how to build it.
`translate_errors` converts the binding's errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from erllama._runtime.printing import printable
from erllama.errors import AdapterLoadError, BackendError, LibraryNotBuilt, ModelLoadError, PromptError

try:
    from erllama import llama_ffi as llama_ffi
except ImportError as error:
    raise LibraryNotBuilt(
        f"the binding of libllama is missing ({error}); build it with `make setup` in a checkout, "
        "or install erllama with pip, which builds it"
    ) from error


def _make_printable(record: logging.LogRecord) -> bool:
    """Make a line of libllama's log printable, since it may quote a model's metadata."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


logging.getLogger("erllama.llama").addFilter(_make_printable)

MAX_SEQUENCES = llama_ffi.max_sequences() - 1  # one is the scratch sequence


def devices() -> list[llama_ffi.Device]:
    """Return the devices that libllama can compute on, including the CPU.

    Raises:
        BackendError: libllama cannot start, for example in a process forked from one that had started it.
    """
    with translate_errors(BackendError):
        return llama_ffi.devices()


@contextmanager
def translate_errors(
    kind: type[AdapterLoadError | BackendError | ModelLoadError | PromptError], context: str = ""
) -> Iterator[None]:
    """Raise `kind` for the binding's errors."""
    try:
        yield
    except llama_ffi.LlamaError as error:
        raise kind(f"{context}: {error}" if context else str(error)) from error
