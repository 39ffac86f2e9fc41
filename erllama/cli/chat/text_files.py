"""Text files that the user names: `/file` adds them to a message, and `/load` and `/resume` read conversations.

Such a file may be anything: huge, binary, a pipe that never ends. `read_text_file` refuses all of these.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from erllama.errors import OptionError

# 2 MiB of English are about 500,000 tokens. A conversation is as long as many files.
MOST_BYTES_OF_FILE = 2 << 20
MOST_BYTES_OF_CONVERSATION = 32 << 20


def read_text_file(path: Path, most_bytes: int) -> str:
    """Return the text of a file.

    Raises:
        OptionError: it is not a regular file, has more than `most_bytes`, or is not UTF-8 text.
        OSError: the file cannot be read.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OptionError(f"{path} is not a regular file; pass a text file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        raise OptionError(f"{path} has more than {most_bytes >> 20} MiB, the limit; pass a part of it")
    if b"\0" in content:
        raise OptionError(f"{path} is not text: it has a zero byte")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def quoted_file(path: Path, text: str) -> str:
    """Return the text of a file as a part of a message: under its name, in a code fence that it cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    end = "" if text.endswith("\n") or not text else "\n"
    return f"{path.name}:\n{fence}\n{text}{end}{fence}\n\n"
