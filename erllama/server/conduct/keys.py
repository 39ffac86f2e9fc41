"""Keys of clients, and what each key may do.

A client sends its key as `Authorization: Bearer KEY` or as `x-api-key: KEY`. If it sends both, as some do with a
placeholder in one of them, either may be the key. Keys are compared in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from erllama.checks import integer
from erllama.errors import OptionError
from erllama.server.conduct.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key and its limits.

    Attributes:
        secret: the text that clients send. Not part of the repr.
        name: for logs and metrics.
        cache_salt: separates the cached KV of its requests from that of other keys; None to share.
        requests_per_minute, tokens_per_minute: limits; None for none. Tokens are those that were computed: of
            replies, and of prompts as far as the cache does not have them.
        models: names of the models that it may use; None for all.
    """

    secret: str = field(repr=False)
    name: str = "key"
    cache_salt: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.secret, str) or not self.secret or not self.secret.isascii():
            raise OptionError(f"the key {self.name!r} is empty or not ASCII; HTTP headers carry ASCII")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)

    def check_names(self, known: Sequence[str]) -> None:
        """Raise OptionError if the key has a model that does not exist: its client could use no model."""
        for name in self.models or ():
            if name not in known:
                raise OptionError(
                    f"the key {self.name!r} has the model {name!r}; the server has {', '.join(known)}"
                )


def combined_salt(of_key: str | None, requested: str | None) -> str | None:
    """Return the salt of a request with a key: the key's and the requested one, each of which separates.

    The length of the key's salt comes first, so that no request can spell the salt of another key.
    """
    if of_key is None and requested is None:
        return None
    return f"{len(of_key or '')}:{of_key or ''}{requested or ''}"


def find_key(headers: Mapping[str, str], keys: Sequence[ApiKey]) -> ApiKey | None:
    """Return the key that a request has; None if the server has no keys.

    Raises:
        ApiError: the server has keys, and the request has none of them.
    """
    if not keys:
        return None
    sent = [headers.get("x-api-key") or ""]
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        sent.append(value.strip())
    found = None
    for key in keys:  # all of them: the time must not tell which one is similar
        for each in sent:
            if hmac.compare_digest(key.secret.encode(), each.encode("utf-8", "replace")):
                found = key
    if found is None:
        how = "send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
        raise ApiError(
            "authentication", f"{'the key is wrong' if any(sent) else 'a key is needed'}; {how}", "invalid_api_key"
        )
    return found
