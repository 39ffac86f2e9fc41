"""Pins of one model: the tokens of a prefix found, computed into the cache, and protected there.

`Model` delegates to `PinRequests`. The prefix is computed as any prompt is, with all checks of its blocks, and
`Cache.pin_prefix` protects its blocks.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.chats import ChatRequests
from erllama._model.requests.completions import CompletionRequests
from erllama._model.requests.options import PinOptions, PrefillOptions, TemplateOptions, pin_options, pin_ttl
from erllama._model.requests.prompts import PromptReader
from erllama._model.runner import ModelRunner
from erllama._types import Messages, Prompt
from erllama.cache import Cache, Pin
from erllama.cache.blocks.keys import common_prefix, token_bytes
from erllama.cache.blocks.pins import PrefixNotStored, check_pin_name
from erllama.engine import Backend, Ticket
from erllama.engine.kv.prefix_cache import prompt_namespace
from erllama.errors import ChatError, OptionError, PinError

# How a prefix that is not stored is computed, in order: False with the KV that the context's cells have, True in an
# empty context. If the cells have KV that is not stored any more, only the second one stores it.
_ATTEMPTS = (False, True)
_PROBES = ("a", "0")  # two messages that may follow; their prompts differ where their texts begin


class _Plan(NamedTuple):
    """A prefix to pin: its tokens, int32, shape (n,), and the checked options of its pin."""

    ids: NDArray[np.int32]
    namespace: bytes
    name: str
    ttl: float | None
    share: float
    prefill: PrefillOptions


class PinRequests:
    """Pins prefixes of one model. Thread-safe.

    The argument `where` of the methods is the name of the public method, for error messages. `owner` is the model,
    which stays loaded until its request ends.

    Args:
        id: the model's id.
    """

    def __init__(
        self,
        backend: Backend,
        id: str,
        cache: Cache,
        runner: ModelRunner,
        prompts: PromptReader,
        requests: CompletionRequests,
        chat_requests: ChatRequests,
    ) -> None:
        self._id, self._cache, self._runner, self._backend = id, cache, runner, backend
        self._prompts, self._requests, self._chat_requests = prompts, requests, chat_requests

    def run(self, prompt: Prompt | Messages, options: PinOptions, owner: object) -> Pin:
        """Compute a prefix, unless it is stored, and pin it."""
        plan = self._plan(prompt, options, "pin")
        for anew in _ATTEMPTS:
            try:
                return self._store(plan)
            except PrefixNotStored:
                reply = self._requests.run(self._ticket(plan, owner, anew=anew))
            if not reply.cache.tokens:  # the context was empty, so the other attempt would do the same
                break
        return self._store(plan)

    async def run_async(self, prompt: Prompt | Messages, options: PinOptions, owner: object) -> Pin:
        """`run` for asyncio."""
        # Rendering templates and writing files would block the event loop.
        plan = await asyncio.to_thread(self._plan, prompt, options, "apin")
        for anew in _ATTEMPTS:
            try:
                return await asyncio.to_thread(self._store, plan)
            except PrefixNotStored:
                reply = await self._requests.run_async(self._ticket(plan, owner, anew=anew))
            if not reply.cache.tokens:
                break
        return await asyncio.to_thread(self._store, plan)

    async def pin_computed(
        self,
        ids: NDArray[np.int32],
        options: PinOptions,
        owner: object,
        *,
        share: float,
        count: Callable[[int], object],
    ) -> Pin:
        """Pin a prefix of a prompt that a request has just computed.

        The request has stored the whole prefix, so nothing is computed. Memory that cannot be cut is the exception:
        the request has stored it at other positions only, and the end of the prefix is computed once.

        Args:
            ids: the prefix, token ids, int32, shape (n,).
            share: as of `Cache.pin_prefix`.
            count: called with the number of tokens that were computed, if any.
        """
        plan = await asyncio.to_thread(self._plan, ids, options, "apin", share)
        try:
            return await asyncio.to_thread(self._store, plan)
        except PrefixNotStored:
            if self._backend.limits.can_trim:
                raise
        reply = await self._requests.run_async(self._ticket(plan, owner, anew=False))
        count(reply.n_prompt - reply.cache.tokens)
        return await asyncio.to_thread(self._store, plan)

    # --- planning

    def _plan(self, prompt: object, options: PinOptions, where: str, share: float = 1.0) -> _Plan:
        self._prompts.check_generates()
        own, template = pin_options(options, where)
        salt = self._requests.salt(cast(str | None, own.get("cache_salt")))
        namespace = self._requests.namespace(salt)
        ids = self._prompts.ids(self._tokens(prompt, template, salt, where))
        name = own.get("name")
        ttl = None if own.get("ttl") is None else pin_ttl(own["ttl"])
        if name is None:
            name = f"prefix-{hashlib.sha256(namespace + token_bytes(ids)).hexdigest()[:16]}"
        prefill: PrefillOptions = {"cache_salt": salt, "timeout": cast(float | None, own.get("timeout"))}
        return _Plan(ids, namespace, check_pin_name(name), ttl, share, prefill)

    def _tokens(self, prompt: object, template: TemplateOptions, salt: str | None, where: str) -> Prompt:
        """Return a prompt without messages: text, or token ids."""
        if not _is_conversation(prompt):
            for name in template:
                raise OptionError(f"{where}: {name} has an effect on messages only; pass messages, or leave it out")
            return cast(Prompt, prompt)
        messages = cast(Messages, prompt)
        if messages[-1].get("role") in ("user", "tool") or template.get("continue_final_message"):
            return self._chat_requests.prompt_ids(messages, template, True, salt)
        return self._before_next_message(messages, template, salt)

    def _before_next_message(
        self, messages: Messages, template: TemplateOptions, salt: str | None
    ) -> NDArray[np.int32]:
        """Return the tokens that every prompt has in which a user's message follows the messages.

        Templates render the end of a conversation in many ways, and some refuse one without a user's message.
        Tokens at the end may also depend on the text that follows. Two prompts show which ones do not.
        """
        prompts = [
            self._chat_requests.prompt_ids([*messages, {"role": "user", "content": probe}], template, True, salt)
            for probe in _PROBES
        ]
        n_shared = common_prefix(*prompts)
        if not n_shared:
            raise ChatError("the chat template renders no token that does not depend on the next message")
        return prompts[0][:n_shared]

    # --- computing and storing

    def _ticket(self, plan: _Plan, owner: object, *, anew: bool) -> Ticket:
        """Return the ticket of a prefix's computation; `anew`: in an empty context."""
        options: PrefillOptions = {**plan.prefill, "reproducible": True} if anew else plan.prefill
        return self._requests.ticket(plan.ids, self._requests.prefill_options(options, "pin"), owner)

    def _store(self, plan: _Plan) -> Pin:
        if problem := self._runner.cache_problem:
            raise PinError(f"the prefix cannot be pinned, because the cache is not used: {problem}")
        return self._cache.pin_prefix(
            plan.namespace,
            plan.ids,
            name=plan.name,
            model=self._id,
            model_key=prompt_namespace(self._backend.namespace, None, ()),
            expires=None if plan.ttl is None else time.time() + plan.ttl,
            whole=not self._backend.limits.can_trim,
            share=plan.share,
        )


def _is_conversation(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
