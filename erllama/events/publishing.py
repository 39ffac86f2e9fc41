"""Starts the publisher of a model, if it has one. The loader calls it, in the process that runs the model."""

from __future__ import annotations

from collections.abc import Mapping

from erllama.cache import Cache
from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.adapters import Adapters
from erllama.engine.kv.prefix_cache import prompt_namespace
from erllama.events.options import KvEvents
from erllama.events.publisher import Publisher


def start_publisher(
    options: KvEvents | None,
    cache: Cache,
    name: str,
    namespace: Mapping[str, NamespaceValue],
    *,
    wait_for_address: bool = False,
) -> Publisher | None:
    """Start publishing the blocks of a model; return None without options.

    Args:
        namespace: of the model's backend.
        wait_for_address: as of `Publisher`.

    Raises:
        MissingPackage, OptionError, EventsError: as of `Publisher`.
    """
    if options is None:
        return None
    unsalted = prompt_namespace(namespace, None, ())
    return Publisher(options, cache, name, unsalted, wait_for_address=wait_for_address)


def follow_adapters(
    publisher: Publisher | None, adapters: Adapters, namespace: Mapping[str, NamespaceValue]
) -> None:
    """Publish the blocks of the adapters in effect, whenever they change.

    Args:
        namespace: of the model's backend.
    """
    if publisher is not None:
        adapters.on_change = lambda current: publisher.use_namespace(prompt_namespace(namespace, None, current))
