"""Unstable prefixes: which headers are removed from prompts, and which changes of prompts are found."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from erllama.server.conduct.prefix_watch import PrefixChange, PrefixWatch
from erllama.server.replies.unstable_prefixes import drop_unstable_headers

HEADER = "x-anthropic-billing-header: cc_version=2.1.101.e51; cc_entrypoint=cli; cch=a5145;"
CLIENT = ("key", "model")
_rng = np.random.default_rng(7)


def tokens(n: int) -> NDArray[np.int32]:
    return _rng.integers(0, 30_000, n).astype(np.int32)


def joined(*parts: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate(parts)


@pytest.mark.parametrize("rest", ["", "\nBe brief.", "You are an agent.", "\n", " k = v"])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_billing_header_is_removed_from_a_text(role: str, rest: str) -> None:
    kept = drop_unstable_headers([{"role": role, "content": HEADER + rest}, {"role": "user", "content": "x"}])
    contents = [message["content"] for message in kept if message["role"] == role]
    assert contents == ([rest.strip()] if rest.strip() else [])


def test_the_billing_header_is_removed_from_blocks() -> None:
    block = {"type": "text", "text": "Be brief."}
    message = {"role": "system", "content": [{"type": "text", "text": HEADER}, block]}
    assert drop_unstable_headers([message]) == [{"role": "system", "content": [block]}]
    assert len(message["content"]) == 2  # the caller's message is unchanged


def test_a_header_in_a_new_form_is_removed_up_to_its_line_end() -> None:
    text = "x-anthropic-billing-header: {new} form\nBe brief."
    assert drop_unstable_headers([{"role": "system", "content": text}])[0]["content"] == "Be brief."


def test_other_messages_stay_the_same_objects() -> None:
    messages = [{"role": "user", "content": HEADER}, {"role": "system", "content": f"See {HEADER}"}]
    assert all(a is b for a, b in zip(drop_unstable_headers(messages), messages, strict=True))


def test_a_changed_beginning_is_found_with_its_position() -> None:
    watch, rest = PrefixWatch(), tokens(2000)
    start = tokens(20)
    assert watch.add(CLIENT, joined(start, tokens(5), rest)) is None
    changed = joined(start, tokens(7), rest, tokens(100))
    assert watch.add(CLIENT, changed) == PrefixChange(20, len(changed))


def test_tools_in_another_order_are_found() -> None:
    watch, system, tools = PrefixWatch(), tokens(50), [tokens(200) for _ in range(4)]
    watch.add(CLIENT, joined(system, *tools, tokens(40)))
    change = watch.add(CLIENT, joined(system, *reversed(tools), tokens(60)))
    assert change is not None
    assert change.at == 50


def test_a_conversation_that_grows_is_not_a_change() -> None:
    watch, prompt = PrefixWatch(), tokens(500)
    for _ in range(12):
        assert watch.add(CLIENT, joined(prompt, tokens(10))) is None  # the end of a prompt begins a reply
        prompt = joined(prompt, tokens(300))


def test_another_conversation_with_the_same_system_text_is_none() -> None:
    watch, system = PrefixWatch(), tokens(1000)
    for _ in range(12):
        assert watch.add(CLIENT, joined(system, tokens(400))) is None


def test_requests_between_do_not_hide_a_change() -> None:
    watch, rest = PrefixWatch(), tokens(1000)
    watch.add(CLIENT, joined(tokens(8), rest))
    watch.add(CLIENT, tokens(600))
    assert watch.add(CLIENT, joined(tokens(8), rest, tokens(50))) is not None


def test_clients_are_not_compared_with_each_other() -> None:
    watch, rest = PrefixWatch(), tokens(1000)
    watch.add(CLIENT, joined(tokens(8), rest))
    assert watch.add(("other", "model"), joined(tokens(8), rest)) is None
    assert watch.add(("key", "other"), joined(tokens(8), rest)) is None


def test_the_kept_prompts_are_bounded() -> None:
    watch = PrefixWatch()
    for client in range(40):
        for _ in range(3):
            watch.add((f"key {client}", "model"), tokens(30_000))
    kept = [prompt for prompts in watch._prompts.values() for prompt in prompts]
    assert 0 < sum(map(len, kept)) <= 1 << 20
    watch.add(CLIENT, tokens(3 << 20))
    assert len(watch._prompts) == 1
