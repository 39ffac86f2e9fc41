"""The save policy of a model: which parts of a context are saved, and when.

The KV of every token is stored once, under every policy. A policy excludes blocks that are not worth their bytes.
The defaults save everything: a block that is never requested again costs a write in the background, and is evicted
first.

Memory that cannot be cut can be packed only at the moment when a block is complete, and later blocks need earlier
ones. For such memory, full blocks are saved when they are complete, under every policy, and the policy
applies only to the shorter blocks at the end. The engine asks the policy; the cache does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from erllama.checks import integer, reject_unknown
from erllama.errors import OptionError


@dataclass(frozen=True, slots=True)
class Policy:
    """When a model saves. All values are numbers of tokens, except for the last two.

    Attributes:
        min_tokens: contexts shorter than this are never saved; their `finish_key` is None.
        cold_min_tokens: prompts shorter than this are not saved during prefill.
        cold_max_tokens: prompts longer than this are not saved during prefill, but when the request ends; None for
            no limit.
        continued_interval: during generation, save full blocks whenever that many tokens, and at least a block, are
            unsaved; 0 to save only at the end.
        boundary_trim_tokens: number of tokens at the end of a prompt that are not saved during prefill. A text that
            is sent again with more text after it often has other tokens where the two join. Memory that cannot be
            cut can then still resume before that place.
        boundary_align_tokens: after the trim, save during prefill only up to a multiple of this.
        session_resume_wait_ms: the longest time that a request waits for the save of its parent, in milliseconds.
        evict_save_timeout_ms: the longest time that `evict()` and `unload()` wait for the disk, in milliseconds.
    """

    min_tokens: int = 0
    cold_min_tokens: int = 0
    cold_max_tokens: int | None = None
    # The default block size: each block is saved when it is complete, and a crash loses less than one block.
    continued_interval: int = 256
    boundary_trim_tokens: int = 0
    boundary_align_tokens: int = 1
    session_resume_wait_ms: int = 500
    # A limit, because `evict()` and `unload()` must not hang if the disk does.
    evict_save_timeout_ms: int = 30_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cold_max_tokens" and value is None:
                continue
            minimum = 1 if field.name == "boundary_align_tokens" else 0
            object.__setattr__(self, field.name, integer(f"policy: {field.name}", value, minimum))
        if self.cold_max_tokens is not None and self.cold_max_tokens < self.cold_min_tokens:
            raise OptionError(
                f"policy: cold_max_tokens={self.cold_max_tokens} is below "
                f"cold_min_tokens={self.cold_min_tokens}; no prompt would be saved during prefill"
            )

    @classmethod
    def of(cls, value: object) -> Policy:
        """Return the policy that `value` stands for: a Policy, a mapping of its options, or None for the defaults.

        Raises:
            OptionError: `value` is of another type, or an option is unknown or invalid.
        """
        if value is None:
            return cls()
        if isinstance(value, Policy):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(f"policy={value!r}; pass an erllama.Policy, or a mapping of its options")
        options = {str(name): option for name, option in value.items()}
        known = [field.name for field in fields(cls)]
        reject_unknown({name: options[name] for name in options if name not in known}, known, "policy")
        return cls(**options)

    def cold_end(self, n_prompt: int) -> int:
        """Return how many tokens of a prompt may be saved during prefill."""
        if n_prompt < max(self.cold_min_tokens, self.min_tokens):
            return 0
        if self.cold_max_tokens is not None and n_prompt > self.cold_max_tokens:
            return 0
        kept = max(n_prompt - self.boundary_trim_tokens, 0)
        return kept // self.boundary_align_tokens * self.boundary_align_tokens
