"""Reads the keys of clients from a file or from the environment."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from erllama.errors import OptionError
from erllama.server.conduct.keys import ApiKey

VARIABLE = "ERLLAMA_API_KEY"
ENVIRONMENT: Mapping[str, str] = os.environ


def read_key_file(path: Path, **limits: object) -> list[ApiKey]:
    """Return the keys of a file: one on each line. Lines that are empty or begin with "#" have none.

    Args:
        limits: attributes of all of them, such as `models`. Without `name`, a key is named by its line.

    Raises:
        OptionError: the file has no key, or users other than its owner and its group can read or write it.
        OSError: the file cannot be read.
    """
    check_private(path)
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: byte {error.start} is not ASCII; HTTP headers carry ASCII") from None
    keys = []
    for number, line in enumerate(lines, 1):
        secret = line.strip()
        if secret and not secret.startswith("#"):
            keys.append(ApiKey(secret=secret, **{"name": f"{path.name}:{number}", **limits}))  # type: ignore[arg-type]
    if not keys:
        raise OptionError(f"{path} has no key; write one on each line")
    return keys


def read_key_variable(environment: Mapping[str, str] = ENVIRONMENT) -> list[ApiKey]:
    """Return the key in the variable ERLLAMA_API_KEY; an empty list if it is not set or empty."""
    secret = environment.get(VARIABLE, "").strip()
    return [ApiKey(secret=secret, name=VARIABLE)] if secret else []


def check_private(path: Path) -> None:
    """Raise OptionError if users other than the owner and the group of a file can read or write it.

    The group may: Kubernetes mounts secrets for a group.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o006:
        raise OptionError(f"{path} holds keys, and all users can read or write it; run: chmod o-rw {path}")
