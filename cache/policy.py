"""What of a context is saved, and when: one `Policy` a model.

Memory that cannot be cut can be packed only the moment a block is complete, and
what follows a block needs it. There, full blocks are saved as they complete,
whatever the policy says, and it decides of the tails alone.

Every token's KV is stored once, whatever the policy; a policy keeps out what
is not worth its bytes. The defaults keep everything: a block that nobody asks
for again costs a write behind the request, and is the first to be evicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from erllama.checks import integer, reject_unknown
from erllama.errors import OptionError


@dataclass(frozen=True, slots=True)
class Policy:
    """When a model saves. All counts are tokens, but the last two.

    Attributes:
        min_tokens: contexts shorter than this are not saved, for whatever reason; their
            `finish_key` is None.
        cold_min_tokens: prompts shorter than this are not saved as they are read.
        cold_max_tokens: prompts longer than this are not saved as they are read, but when the
            request ends; None for no limit.
        continued_interval: while a reply is written, save its full blocks whenever that many tokens,
            and a block, are unsaved; 0 for only at its end.
        boundary_trim_tokens: leave that many tokens at a prompt's end out of what is saved as it is
            read. A text that is sent again with more after it often tokenizes otherwise at
            the seam; memory that cannot be cut then still resumes before it.
        boundary_align_tokens: after the trim, save as it is read only up to a multiple of this.
        session_resume_wait_ms: the longest that a request waits for the save of its parent, in milliseconds.
        evict_save_timeout_ms: the longest that `evict()` and `unload()` wait for the disk, in milliseconds.
    """

    min_tokens: int = 0
    cold_min_tokens: int = 0
    cold_max_tokens: int | None = None
    # A block of the default size: each is saved as it completes, and a crash loses less than one.
    continued_interval: int = 256
    boundary_trim_tokens: int = 0
    boundary_align_tokens: int = 1
    session_resume_wait_ms: int = 500
    # A hung disk must not hang them.
    evict_save_timeout_ms: int = 30_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cold_max_tokens" and value is None:
                continue
            least = 1 if field.name == "boundary_align_tokens" else 0
            object.__setattr__(self, field.name, integer(f"policy: {field.name}", value, least))
        if self.cold_max_tokens is not None and self.cold_max_tokens < self.cold_min_tokens:
            raise OptionError(
                f"policy: cold_max_tokens={self.cold_max_tokens} is below "
                f"cold_min_tokens={self.cold_min_tokens}; no prompt would be saved as it is read"
            )

    @classmethod
    def of(cls, value: object) -> Policy:
        """The policy that `value` stands for: a Policy, a mapping of its options, or None for the defaults.

        Raises:
            OptionError: none of these, or an option that is unknown or wrong.
        """
        if value is None:
            return cls()
        if isinstance(value, Policy):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(f"policy={value!r}; give an erllama.Policy, or a mapping of its options")
        options = {str(name): option for name, option in value.items()}
        known = [field.name for field in fields(cls)]
        reject_unknown({name: options[name] for name in options if name not in known}, known, "policy")
        return cls(**options)

    def cold_end(self, n_prompt: int) -> int:
        """How many of a prompt's tokens may be saved as they are read."""
        if n_prompt < max(self.cold_min_tokens, self.min_tokens):
            return 0
        if self.cold_max_tokens is not None and n_prompt > self.cold_max_tokens:
            return 0
        kept = max(n_prompt - self.boundary_trim_tokens, 0)
        return kept // self.boundary_align_tokens * self.boundary_align_tokens
