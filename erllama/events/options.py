"""`KvEvents`: where a model publishes its KV events, and how."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from erllama.cache.sizes import parse_bytes
from erllama.checks import boolean, encodable, integer, reject_unknown, shown
from erllama.errors import OptionError

DEFAULT_ADDRESS = "tcp://127.0.0.1:5557"
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[^:/\[\]\s]+):(\d{1,5}|\*)")
# Paths of UNIX sockets have at most 108 bytes, with the byte that ends them.
_LONGEST_PATH = 107
_SMALLEST_BLOCK = 4
# Every replica has all blocks of a bucket, so they do not tell replicas apart, and there may be very many.
_SHARED_TIER = "remote"
_LARGEST_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class KvEvents:
    """Where a model publishes its KV events, and how.

    The events have the tokens of cached prompts, and neither socket asks for a key. Only loopback addresses and
    UNIX sockets are accepted, unless `trusted_network` is set.

    Attributes:
        address: address of the PUB socket, which routers subscribe to: "tcp://HOST:PORT" or "ipc://PATH".
        replay_address: address of the ROUTER socket, which sends events again. None for the port after that of
            `address`, or its path with ".replay".
        block_size: tokens per block of the events; a divisor of the cache's block size. The routers must know it.
        topic: the first frame of each message.
        tiers: names of the cache's tiers to report; None for all but the remote tier, which all replicas share.
        replay_batches: maximum number of batches that are kept for replays. A snapshot replaces older ones.
        replay_bytes: maximum bytes of those batches.
        max_pending: maximum number of changes that wait for the publisher. Beyond it, all blocks are announced
            again.
        trusted_network: accept addresses that other machines can reach.
    """

    address: str = DEFAULT_ADDRESS
    replay_address: str | None = None
    block_size: int = 16
    topic: str = ""
    tiers: tuple[str, ...] | None = None
    replay_batches: int = 10_000
    replay_bytes: str | int = "64MiB"
    max_pending: int = 100_000
    trusted_network: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        boolean("kv_events: trusted_network", self.trusted_network)
        self._check_address("address", self.address)
        if self.replay_address is not None:
            self._check_address("replay_address", self.replay_address)
            if self.replay_address == self.address:
                raise OptionError(
                    f"kv_events: replay_address={shown(self.replay_address)} is the address of the events, too; "
                    "pass another port, or leave it out"
                )
        put(self, "block_size", integer("kv_events: block_size", self.block_size, _SMALLEST_BLOCK, _LARGEST_BLOCK))
        if not isinstance(self.topic, str):
            raise OptionError(f"kv_events: topic must be a text, not {shown(self.topic)}")
        encodable("kv_events: topic", self.topic)
        if self.tiers is not None:
            put(self, "tiers", _tier_names(self.tiers))
        put(self, "replay_batches", integer("kv_events: replay_batches", self.replay_batches, 1))
        put(
            self, "replay_bytes", integer("kv_events: replay_bytes", parse_bytes("replay_bytes", self.replay_bytes))
        )
        put(self, "max_pending", integer("kv_events: max_pending", self.max_pending, 1))

    @classmethod
    def of(cls, value: object) -> KvEvents | None:
        """Return the options that `value` stands for; None for a model that publishes no events.

        Args:
            value: None or False, True for the defaults, an address, a KvEvents, or a mapping of its options.

        Raises:
            OptionError: `value` is of another type, or an option is unknown or invalid.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, KvEvents):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise OptionError(
                f"kv_events={shown(value)}; pass an address such as {DEFAULT_ADDRESS!r}, an erllama.KvEvents, or a "
                "mapping of its options"
            )
        options = {str(name): option for name, option in value.items()}
        known = [field.name for field in fields(cls)]
        reject_unknown({name: options[name] for name in options if name not in known}, known, "kv_events")
        return cls(**options)

    def check_block_size(self, block_size: int) -> None:
        """Raise OptionError unless the events' block size divides that of the cache."""
        if block_size % self.block_size:
            divisors = [n for n in (16, 32, 64, 128, 256) if block_size % n == 0]
            raise OptionError(
                f"kv_events: block_size={self.block_size} does not divide the cache's block size, {block_size}; "
                f"pass one of {', '.join(map(str, divisors)) or block_size}"
            )

    def reports(self, tier: str) -> bool:
        """Return whether the blocks of the tier with a name are reported."""
        return tier != _SHARED_TIER if self.tiers is None else tier in self.tiers

    @property
    def addresses(self) -> tuple[str, str]:
        """The addresses of the PUB socket and of the ROUTER socket."""
        return self.address, self.replay_address or next_address(self.address)

    def with_ports(self) -> KvEvents:
        """Return the same options with ports that are free now, instead of 0 and *.

        A model's process keeps them when it is replaced.
        """
        address, replay_address = self.addresses
        return replace(self, address=_with_port(address), replay_address=_with_port(replay_address))

    def _check_address(self, name: str, address: object) -> None:
        remedy = f"pass an address such as {DEFAULT_ADDRESS!r}, or 'ipc:///run/erllama/events'"
        if not isinstance(address, str):
            raise OptionError(f"kv_events: {name}={shown(address)}; {remedy}")
        encodable(f"kv_events: {name}", address)
        if address.startswith("ipc://"):
            path = address.removeprefix("ipc://")
            if not path or len(path.encode()) + len(".replay") > _LONGEST_PATH or "\0" in path:
                raise OptionError(
                    f"kv_events: {name}={shown(address)}; the path must have 1 to {_LONGEST_PATH - 7} bytes"
                )
            return
        match = _TCP.fullmatch(address)
        if match is None:
            raise OptionError(f"kv_events: {name}={shown(address)}; {remedy}")
        host, port = match.groups()
        if port != "*" and int(port) > 65535:
            raise OptionError(f"kv_events: {name}={shown(address)}; ports are 0 to 65535")
        if not self.trusted_network and not _is_loopback(host):
            raise OptionError(
                f"kv_events: {name}={shown(address)} can be reached from other machines, and the events have the "
                "tokens of prompts; pass a loopback address such as 127.0.0.1, or trusted_network=True if all "
                "machines that reach it may read them"
            )


def next_address(address: str) -> str:
    """Return the default address of replays for the address of events."""
    if address.startswith("ipc://"):
        return f"{address}.replay"
    host, _, port = address.rpartition(":")
    if port in ("*", "0"):
        return f"{host}:*"
    if int(port) == 65535:
        raise OptionError(f"kv_events: address={address!r} has no next port for replays; pass a replay_address")
    return f"{host}:{int(port) + 1}"


def _with_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    if address.startswith("ipc://") or port not in ("*", "0"):
        return address
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return f"{host}:{free.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in ("lo", "lo0")  # ZeroMQ binds to interfaces by name


def _tier_names(tiers: object) -> tuple[str, ...]:
    if isinstance(tiers, str) or not isinstance(tiers, list | tuple | set | frozenset):
        raise OptionError(f"kv_events: tiers={shown(tiers)}; pass a list of names such as ['live', 'ram', 'disk']")
    names = tuple(tiers)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise OptionError(f"kv_events: tiers has {shown(name)}; pass names such as 'ram' and 'disk'")
    if not names:
        raise OptionError("kv_events: tiers is empty; pass at least one name, or leave it out")
    return names
