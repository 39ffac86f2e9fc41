"""The exit handler: unloads models, then flushes and closes caches.

`import erllama` registers it, before the modules that it closes are imported. `atexit` runs functions in reverse
order, so functions that a program registers later run first and can still use the models.
"""

from __future__ import annotations

import atexit
import logging
import sys

from erllama._runtime.imports import wait_for_imports

# In this order: a model writes to its cache while it is unloaded.
_EXIT_FUNCTIONS = (("erllama._model.registry", "unload_all"), ("erllama.cache.store", "close_all"))


@atexit.register
def _run_exit_functions() -> None:
    try:
        wait_for_imports()
    except BaseException:  # such as KeyboardInterrupt of a signal handler; the rest must still run
        logging.getLogger("erllama").exception("the wait for an import at exit was interrupted")
    for module, name in _EXIT_FUNCTIONS:
        # A module that was never imported has no model or cache to close.
        function = getattr(sys.modules.get(module), name, None)
        try:
            if function is not None:
                function()
        except BaseException:
            logging.getLogger("erllama").exception("%s.%s failed at exit", module, name)
