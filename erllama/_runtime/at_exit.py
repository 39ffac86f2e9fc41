"""What is done at the interpreter's exit: models are unloaded, then caches are written and closed.

Registered when the package is imported, and not when its modules are: functions
that a program registers with `atexit` later run first, and may use the models.
"""

from __future__ import annotations

import atexit
import logging
import sys

from erllama._runtime.imports import wait_for_imports

# A model writes to its cache while it is unloaded.
_ENDINGS = (("erllama._model.registry", "unload_all"), ("erllama.cache.store", "close_all"))


@atexit.register
def _end() -> None:
    try:
        wait_for_imports()
    except BaseException:  # a handler's, such as KeyboardInterrupt: what is there is ended all the same
        logging.getLogger("erllama").exception("an import was not waited for at exit")
    for module, name in _ENDINGS:
        # What was not imported has nothing to end.
        end = getattr(sys.modules.get(module), name, None)
        try:
            if end is not None:
                end()
        except BaseException:
            logging.getLogger("erllama").exception("%s did not end at exit", module)
