"""The adapters that a model's process has loaded, so that the next one loads them again."""

from __future__ import annotations

from pathlib import Path

from erllama._process.protocol import messages as m


class AdapterFiles:
    """The files of loaded adapters by their number, and the calls that load them into a new process.

    Not thread-safe, except `add` and `remove`.
    """

    def __init__(self) -> None:
        self._files: dict[int, tuple[Path, str]] = {}
        self._loading: dict[int, int] = {}  # the adapters that a new process loads, by call
        self._loaded: list[int] = []  # the adapters that it has

    def add(self, adapter: int, path: Path, digest: str) -> None:
        """Add an adapter: its number, its file, and the SHA-256 of its content in hex."""
        self._files[adapter] = path, digest

    def remove(self, adapter: int) -> None:
        """Remove an adapter that is freed."""
        self._files.pop(adapter, None)

    def begin_loading(self, first_call: int) -> list[m.LoadAdapter]:
        """Return the calls that load all adapters into a new process, numbered from `first_call`."""
        self._loaded = []
        files = list(self._files.items())  # other threads add to it
        self._loading = {first_call + i: adapter for i, (adapter, _) in enumerate(files)}
        return [
            m.LoadAdapter(call, adapter, str(path), digest)
            for call, (adapter, (path, digest)) in zip(self._loading, files, strict=True)
        ]

    def is_loading(self, call: int) -> bool:
        """Whether a call loads an adapter into a new process."""
        return call in self._loading

    def finish_loading(self, call: int) -> None:
        """Note that such a call was answered."""
        self._loaded.append(self._loading.pop(call))

    @property
    def complete(self) -> bool:
        """Whether all such calls were answered."""
        return not self._loading

    def freed_meanwhile(self) -> list[int]:
        """Return the adapters that were freed while a new process loaded them."""
        return [adapter for adapter in self._loaded if adapter not in self._files]

    def process_ended(self) -> None:
        """Forget the calls of a process that has ended."""
        self._loading = {}
