"""The models loaded in this process, by id.

Reading takes no lock, so that signal handlers may read at any time: what is
read is copied in one step of the interpreter. A model that was given an id is
kept until it is unloaded, since others may get it by its id. One whose id was
made up is not kept: it is unloaded when its last user drops it.
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
    from erllama.engine import ModelThread

log = logger("erllama")


class Reservation:
    """Takes an id for a model that is being loaded.

    Attributes:
        made_up: the id is not the user's.
    """

    made_up = False


_lock = threading.RLock()
_models: dict[str, Model | ReferenceType[Model] | Reservation] = {}
_dropped: WeakSet[ModelThread] = WeakSet()  # of models that nobody unloaded; they end by themselves
_serial = itertools.count(1)


def reserve(model_id: str | None, reservation: Reservation) -> str:
    """Take an id for a model about to be loaded; a fresh one for None. `give_up` undoes it at any time."""
    with _lock:
        if model_id is None:
            model_id = next(name for n in _serial if (name := f"model-{n}") not in _models)
            reservation.made_up = True
        elif not isinstance(model_id, str) or not model_id:
            raise OptionError(f"id={model_id!r}; give a name, or leave it out")
        if model_id in _models:
            raise AlreadyLoaded(f"a model is loaded as {model_id!r} already; unload it, or give another id")
        _models[model_id] = reservation
        return model_id


def add(model: Model, reservation: Reservation) -> None:
    with _lock:
        _models[model.id] = ref(model) if reservation.made_up else model


def give_up(reservation: Reservation) -> None:
    """Free an id whose model was not loaded. Idempotent."""
    with _lock:
        for model_id in [name for name, found in list(_models.items()) if found is reservation]:
            del _models[model_id]


def remove(model: Model) -> None:
    """Free the id of a model, unless another has it by now."""
    with _lock:
        found = _models.get(model.id)
        if found is model or (isinstance(found, ReferenceType) and found() in (model, None)):
            del _models[model.id]


def drop(model: Model, runner: ModelThread) -> None:
    """Forget a model that was dropped without unload(); it stops in the background."""
    _dropped.add(runner)
    remove(model)


def get_model(id: str) -> Model:
    """The model loaded under an id.

    Raises:
        ModelNotFound: none is.
    """
    model = _loaded(_models.get(id)) if isinstance(id, str) else None
    if model is None:
        loaded = ", ".join(repr(model.id) for model in list_models()) or "none"
        raise ModelNotFound(f"no model is loaded as {id!r}; loaded: {loaded}")
    return model


def list_models() -> list[Model]:
    """The models loaded in this process, in the order of their loading."""
    return [model for found in list(_models.values()) if (model := _loaded(found)) is not None]


def _loaded(found: Model | ReferenceType[Model] | Reservation | None) -> Model | None:
    if isinstance(found, ReferenceType):
        return found()
    return None if isinstance(found, Reservation) else found


def queue_depth() -> int:
    """Requests that are admitted, over all models of this process."""
    return sum(model.queue_depth for model in list_models())


def _after_fork_in_child() -> None:
    # The models run in the parent; the lock may have been taken there.
    global _lock
    _lock = threading.RLock()
    _models.clear()
    _dropped.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def unload_all() -> None:
    """Unload every model, at exit. One that fails is logged, and the rest are unloaded."""
    # Before the interpreter takes the machinery away that model threads need.
    for name, unload in [
        *((repr(model.id), model.unload) for model in list_models()),
        *(("that was dropped", runner.stop) for runner in list(_dropped)),
    ]:
        try:
            unload()
        except BaseException:  # of one model, or Ctrl-C while it ends: the others are unloaded all the same
            log.exception("model %s was not unloaded well at exit", name)
