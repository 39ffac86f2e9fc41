"""The files of a model that is split into parts."""

from __future__ import annotations

import re
from pathlib import Path

_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts(path: Path) -> list[Path]:
    """Return the files of a model: `path`, or all parts if its name is that of a part."""
    found = _SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def split_name(file_name: str) -> tuple[str, int, int]:
    """Return the stem of a GGUF file's name, the number of its part from 1, and the number of parts."""
    found = _SPLIT.fullmatch(file_name)
    if not found or not 1 <= int(found["part"]) <= int(found["count"]):
        return file_name[: -len(".gguf")] if file_name.lower().endswith(".gguf") else file_name, 1, 1
    return found["stem"], int(found["part"]), int(found["count"])
