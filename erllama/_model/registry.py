"""The models loaded in this process, by id.

Reads take no lock, so a signal handler can read at any time: a read copies the table in one step of the
interpreter. The registry keeps a model that the caller named until it is unloaded, because other code can look
it up by that id. It keeps only a weak reference to a model with a generated id, which is unloaded when its last
user drops it.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakSet, ref

from erllama._runtime.log import logger
from erllama.errors import AlreadyLoaded, ModelNotFound, OptionError

if TYPE_CHECKING:
    from erllama._model.model import Model
    from erllama._model.runner import ModelRunner

log = logger("erllama")


class IdReservation:
    """Reserves an id for a model that is being loaded.

    Attributes:
        generated: whether the registry generated the id.
    """

    generated = False


_lock = threading.RLock()
_models: dict[str, Model | ReferenceType[Model] | IdReservation] = {}
# Runners of models that were dropped without unload(). They are stopping in the background.
_dropped: WeakSet[ModelRunner] = WeakSet()
_serial_numbers = itertools.count(1)


def reserve(model_id: str | None, reservation: IdReservation) -> str:
    """Reserve an id for a model that is about to be loaded; generate one for None. `release` undoes it."""
    with _lock:
        if model_id is None:
            model_id = next(name for n in _serial_numbers if (name := f"model-{n}") not in _models)
            reservation.generated = True
        elif not isinstance(model_id, str) or not model_id:
            raise OptionError(f"id={model_id!r}; pass a name, or leave it out")
        if model_id in _models:
            raise AlreadyLoaded(f"a model is already loaded as {model_id!r}; unload it, or pass another id")
        _models[model_id] = reservation
        return model_id


def add(model: Model, reservation: IdReservation) -> None:
    """List a loaded model under its reserved id."""
    with _lock:
        _models[model.id] = ref(model) if reservation.generated else model


def release(reservation: IdReservation) -> None:
    """Free the id of a model that was not loaded. Idempotent."""
    with _lock:
        for model_id in [name for name, found in list(_models.items()) if found is reservation]:
            del _models[model_id]


def remove(model: Model) -> None:
    """Free the id of a model, unless another model has taken it."""
    with _lock:
        found = _models.get(model.id)
        if found is model or (isinstance(found, ReferenceType) and found() in (model, None)):
            del _models[model.id]


def remove_dropped(model: Model, runner: ModelRunner) -> None:
    """Free the id of a model that was dropped without unload(). Its runner stops in the background."""
    _dropped.add(runner)
    remove(model)


def get_model(id: str) -> Model:
    """Return the model that is loaded under an id.

    Raises:
        ModelNotFound: no model is loaded under this id.
    """
    model = _loaded(_models.get(id)) if isinstance(id, str) else None
    if model is None:
        loaded = ", ".join(repr(model.id) for model in list_models()) or "none"
        raise ModelNotFound(f"no model is loaded as {id!r}; loaded: {loaded}")
    return model


def list_models() -> list[Model]:
    """Return the models loaded in this process, in the order of loading."""
    return [model for found in list(_models.values()) if (model := _loaded(found)) is not None]


def _loaded(found: Model | ReferenceType[Model] | IdReservation | None) -> Model | None:
    if isinstance(found, ReferenceType):
        return found()
    return None if isinstance(found, IdReservation) else found


def queue_depth() -> int:
    """Return the number of admitted requests of all models in this process."""
    return sum(model.queue_depth for model in list_models())


def _after_fork_in_child() -> None:
    # The models run in the parent, and one of its threads may have held the lock.
    global _lock
    _lock = threading.RLock()
    _models.clear()
    _dropped.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def unload_all() -> None:
    """Unload every model at exit. Log a failure and unload the others."""
    # At exit, and not later: the interpreter then removes what model threads need.
    for name, unload in [
        *((repr(model.id), model.unload) for model in list_models()),
        *(("that was dropped", runner.stop) for runner in list(_dropped)),
    ]:
        try:
            unload()
        except BaseException:  # a model's failure, or Ctrl-C while it stops, must not keep the others loaded
            log.exception("model %s failed to unload at exit", name)
