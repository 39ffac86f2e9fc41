"""Functions that make custom backends, by name: `load_backend("module:function", options)`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from erllama.checks import shown
from erllama.engine import Backend
from erllama.errors import Error, ModelLoadError, OptionError

_MEMBERS = sorted(name for name in vars(Backend) if not name.startswith("_"))


@dataclass(frozen=True, slots=True)
class BackendFactory:
    """Makes a backend: by calling a function, or from a backend that exists.

    Attributes:
        module, function: the function; empty for a backend that exists.
        options: the function's keyword arguments, as JSON.
        backend: the backend that exists; None otherwise.
    """

    module: str
    function: str
    options: bytes = b"{}"
    backend: Backend | None = None

    @classmethod
    def of(cls, backend: object, options: object) -> BackendFactory:
        """Return the factory that the arguments of `load_backend` stand for.

        Raises:
            OptionError: they are not a backend, or not the name and the options of a function.
        """
        if not isinstance(backend, str):
            if options is not None:
                raise OptionError(
                    'options beside a backend that exists; pass the name of a function, "module:function", or '
                    "leave options out"
                )
            return cls("", "", backend=_checked(backend, shown(backend)))
        module, colon, function = backend.partition(":")
        if not colon or not module or not function:
            raise OptionError(f'backend={shown(backend)}; pass a backend, or "module:function"')
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options={shown(options)}; pass a mapping of the function's keyword arguments")
        try:
            text = json.dumps(dict(options or {}), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"options cannot be sent to another process as JSON: {error}") from None
        return cls(module, function, text.encode())

    @property
    def name(self) -> str:
        """The function, for messages."""
        return f"{self.module}:{self.function}"

    def make(self) -> Backend:
        """Make the backend.

        Raises:
            OptionError: there is no such function, or it returns no backend.
            ModelLoadError: it raised an exception that is not of this library.
        """
        if self.backend is not None:
            return self.backend
        try:
            found: object = importlib.import_module(self.module)
            for name in self.function.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise OptionError(
                f"{self.name} cannot be imported: {error}; pass a module that is on the Python path"
            ) from error
        if not callable(found):
            raise OptionError(f"{self.name} is not callable; pass a function that returns a backend")
        try:
            backend: object = found(**json.loads(self.options))
        except Error:
            raise
        except Exception as error:
            raise ModelLoadError(f"{self.name} raised {type(error).__name__}: {error}") from error
        return _checked(backend, f"what {self.name} returned")


def _checked(backend: object, name: str) -> Backend:
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        raise OptionError(f"{name} is not a backend: it lacks {', '.join(missing)}")
    return backend  # type: ignore[return-value]
