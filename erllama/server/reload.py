"""Reloads the settings of a running server: keys, models and pins change, and requests that run are not disturbed.

`Reloader.request` starts a reload, and SIGHUP calls it. Settings with a mistake change nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from erllama.errors import Error
from erllama.server.service_manager import report_ready, report_reloading
from erllama.server.settings.mistakes import ConfigurationError
from erllama.server.settings.settings import Settings
from erllama.server.state import Server

log = logging.getLogger("erllama.server.reload")


class Reloader:
    """Reloads the settings of one server. Used by its event loop.

    Args:
        server: whose keys, models and pins change.
        settings: those that it was started with.
        read: returns the settings as they are now. Called in a thread.
    """

    def __init__(self, server: Server, settings: Settings, read: Callable[[], Settings]) -> None:
        self._server, self._started_with, self._read = server, settings, read
        self._requested = False
        self._running: asyncio.Task[None] | None = None

    def request(self) -> None:
        """Reload, or reload once more when the reload that runs has ended: it may have read files before."""
        self._requested = True
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        report_reloading()
        try:
            while self._requested and not self._server.is_stopping:
                self._requested = False
                await self._reload()
        finally:
            report_ready()

    async def _reload(self) -> None:
        try:
            new = await asyncio.to_thread(self._read)
            self._started_with.listen.check_keys(bool(new.options.keys))  # the address stays the same
            self._server.models.reconfigure(new.models)  # raises OptionError before it changes anything
            self._server.options = replace(self._server.options, keys=new.options.keys)
            self._server.configured_pins.set(new.pins, self._server.models, has_keys=bool(new.options.keys))
        except Exception as error:
            self._server.metrics.count_reload(succeeded=False)
            for mistake in error.mistakes if isinstance(error, ConfigurationError) else [error]:
                log.error("not reloaded: %s", mistake, exc_info=not isinstance(error, Error | OSError))
            return
        self._server.metrics.count_reload(succeeded=True)
        changed = self._started_with.needing_restart(new)
        restart = f"; restart the server to change {', '.join(changed)}" if changed else ""
        log.info(
            "reloaded (models: %d, keys: %d, pins: %d)%s",
            len(new.models),
            len(new.options.keys),
            len(new.pins),
            restart,
        )
