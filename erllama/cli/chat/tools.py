"""`erllama chat --tools`: the functions of a Python file as tools, each call confirmed by the user."""

from __future__ import annotations

import importlib.util
import inspect
import signal
import sys
import termios
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from erllama._runtime.printing import json_text, one_line
from erllama.chat.functions import FunctionTools
from erllama.cli.console import print_dimmed, write_reply
from erllama.errors import Error, OptionError

Function = Callable[..., object]

_MODULE = "erllama_chat_tools"


class CallRefused(Error):  # noqa: N818 - its name is a part of the message
    """The user did not confirm a call. The model reads the message."""


def load_functions(path: Path) -> list[Function]:
    """Run a Python file, and return its functions that become tools.

    These are the functions that the file defines, that have a docstring, and whose names do not begin with "_".

    Raises:
        OptionError: the file cannot be run, has no such function, or one has a parameter without a type that JSON
            can express.
    """
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"--tools {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any exception of the user's file
        raise OptionError(f"--tools {path}: {type(error).__name__}: {error}") from None
    functions: list[Function] = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == _MODULE
        and value.__name__ == name
        and value.__doc__
        and not name.startswith("_")
    ]
    if not functions:
        raise OptionError(f"--tools {path} defines no function with a docstring; add one")
    FunctionTools(functions).reject_async()
    return functions


class Confirmation:
    """Asks before each call of a function, until the user allows all calls of it."""

    def __init__(self) -> None:
        self._always: set[str] = set()

    def confirmed(self, function: Function) -> Function:
        """Return a function that asks, and then calls `function` or raises `CallRefused`.

        Ctrl-C at the question and during the call ends the run: it raises KeyboardInterrupt.
        """

        @wraps(function)
        def confirmed(**arguments: object) -> object:
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                if not self._ask(function.__name__, arguments):
                    raise CallRefused("the user refused this call")
                return function(**arguments)
            finally:
                signal.signal(signal.SIGINT, before)

        return confirmed

    def _ask(self, name: str, arguments: dict[str, object]) -> bool:
        # All of the call is shown: a shortened one could hide what it does.
        call = ", ".join(f"{key}={json_text(value)}" for key, value in arguments.items())
        print_dimmed(one_line(f"{name}({call})"))
        if name in self._always:
            return True
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)  # keys pressed earlier do not confirm
        write_reply("run it? [y]es, [n]o, [a]ll calls of this function: ")
        answer = sys.stdin.readline().strip().lower()
        if answer in ("a", "all"):
            self._always.add(name)
        return answer in ("y", "yes", "a", "all")
