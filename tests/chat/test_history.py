"""Tokens of a continued conversation: those that were computed, followed by those of the new text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.chat.history import History
from erllama.engine import Vocabulary
from support.examples import examples
from support.paths import SHARED
from support.scripted_backend import EOG, PieceVocabulary

NAMESPACE = b"n" * 32
VOCABULARIES = SHARED / "vocab"
WORDS = [
    "hello", " there", "  ", "\n", "\n\n", "é", "日本", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>",
    "<|im_start|>", "user", "'s", "123", "🙂", " \t", "\x02", "<0x41>", " ", "a",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)


class SpacedVocabulary(PieceVocabulary):
    """Puts a space before a text and before text that follows a special token, as SentencePiece does."""

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        rest = source.encode() if isinstance(source, str) else bytes(source)
        names = {name.encode(): id for name, id in self.special.items()} | {b"<|end|>": EOG}
        ids: list[int] = []
        while rest:
            ends = [at for name in names if parse_special and (at := rest.find(name)) >= 0]
            text, rest = rest[: min(ends, default=len(rest))], rest[min(ends, default=len(rest)) :]
            if text:
                ids += super().tokenize(b" " + text, parse_special=False).tolist()
            if rest:
                name = next(name for name in names if rest.startswith(name))
                ids.append(names[name])
                rest = rest[len(name) :]
        return np.array(ids, np.int32)


SPACED = SpacedVocabulary(["he", "llo", " hello", " there", "  "], ["<s>"])


@pytest.fixture(scope="module", params=["spelled", "spaced", "qwen2", "llama-bpe", "llama-spm"])
def vocabulary(request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    own: dict[str, Vocabulary] = {"spelled": PieceVocabulary(["he", "llo", "hello"], ["<s>"]), "spaced": SPACED}
    if request.param in own:
        yield own[request.param]
        return
    path = VOCABULARIES / f"ggml-vocab-{request.param}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is missing")
    with erllama.load_model(path, vocab_only=True) as model:
        yield model._backend.vocabulary


@pytest.fixture
def history(vocabulary: Vocabulary) -> Iterator[History]:
    with erllama.Cache() as cache:
        yield History(vocabulary, cache)


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def test_new_text_is_tokenized_as_within_the_whole_text(vocabulary: Vocabulary) -> None:
    n = 0

    @settings(max_examples=examples(100), deadline=None)
    @given(TEXTS, TEXTS)
    @example("hello</s>", "hello")
    @example("hello<s>", "hello")
    @example("hello<|end|>", " hello")
    @example("hello ", "there")
    def check(before: str, after: str) -> None:
        nonlocal n
        n += 1
        namespace = n.to_bytes(32, "big")
        known = history.tokens(namespace, before, as_text=True)
        history.remember(namespace, before.encode(), known.tolist())
        got = history.tokens(namespace, before + after, as_text=False).tolist()
        whole = history.tokens(namespace, before + after, as_text=True).tolist()
        assert got[: len(known)] == known.tolist()
        assert history.spell_out(got) == history.spell_out(whole)
        if not vocabulary.piece(
            int(known[-1])
        ):  # a special token, at which texts are cut before they are tokenized
            assert got == whole

    with erllama.Cache() as cache:
        history = History(vocabulary, cache)
        check()


def test_a_text_that_continues_a_context_keeps_its_tokens(vocabulary: Vocabulary) -> None:
    @settings(max_examples=examples(100), deadline=None)
    @given(TEXTS, TEXTS)
    @example("hello</s>hello", "!")
    @example("hello<|end|>hello", "!")
    def check(before: str, after: str) -> None:
        context = history.tokens(NAMESPACE, before, as_text=True)
        whole = history.tokens(NAMESPACE, before + after, as_text=True)
        got = history.continue_context(context, before + after)
        if got is None:
            assert len(context) == 1, "a BOS alone does not identify a conversation"
            return
        assert got[: len(context)].tolist() == context.tolist()
        assert history.spell_out(got.tolist()) == history.spell_out(whole.tolist())

    with erllama.Cache() as cache:
        history = History(vocabulary, cache)
        check()


def test_a_text_that_continues_no_context_is_tokenized_alone(history: History) -> None:
    context = history.tokens(NAMESPACE, "Once upon", as_text=True)
    assert history.continue_context(context, "Another text") is None
    assert history.continue_context(context, "") is None
    assert history.continue_context(ids(), "Another text") is None
    long = history.tokens(NAMESPACE, "hello there " * 20, as_text=True)
    assert history.continue_context(long, "hello there " * 10) is None


def test_a_leading_space_of_the_text_is_kept() -> None:
    with erllama.Cache() as cache:
        history = History(SPACED, cache)
        plain, spaced = (history.tokens(NAMESPACE, text, as_text=True) for text in ("hello there", " hello there"))
        assert history.continue_context(plain, " hello there!") is None
        assert history.continue_context(spaced, "hello there!") is None


@pytest.mark.parametrize("text", ["café!", "日本語", "🙂 ok"])
def test_a_context_cut_within_a_character_continues_from_before_it(
    vocabulary: Vocabulary, history: History, text: str
) -> None:
    """Byte tokens can be cut at places where the text cannot."""
    first = history.tokens(NAMESPACE, "", as_text=True).tolist()
    by_byte = {history.spell_out([id]): id for id in range(min(515, vocabulary.n_tokens))}
    raw = ("Q: aaa " + text).encode()
    if not all(raw[i : i + 1] in by_byte for i in range(len(raw))):
        pytest.skip("the first tokens of the vocabulary are not single bytes")
    for n in range(8, len(raw)):
        context = ids(*first, *(by_byte[raw[i : i + 1]] for i in range(n)))
        got = history.continue_context(context, raw.decode())
        assert got is not None
        assert history.spell_out(got.tolist()).lstrip().endswith(raw)


def test_stored_tokens_outside_the_vocabulary_are_not_used() -> None:
    vocabulary = PieceVocabulary()
    with erllama.Cache() as cache:
        history = History(vocabulary, cache)
        for tokens in ([vocabulary.n_tokens], [-1], []):
            history.remember(NAMESPACE, b"hel", tokens)
            assert history.tokens(NAMESPACE, "hello", as_text=False).tolist() == list(b"hello")
        history.remember(NAMESPACE, "é".encode()[:1], [7])
        assert history.tokens(NAMESPACE, "é", as_text=False).tolist() == list("é".encode())
        history.remember(NAMESPACE, b"hel", [1, 2])
        assert history.tokens(NAMESPACE, "hello", as_text=False).tolist() == [1, 2, *b"lo"]


def remembered(reply: list[int], text: str, *, cut: bool = False, stop: str | None = None) -> list[int]:
    """Return the tokens of a later text, after a reply to the prompt "Q" with the tokens of its bytes plus 1000."""
    with erllama.Cache() as cache:
        history = History(PieceVocabulary(["abc", "END", "DEND!"], ["<s>"]), cache)
        history.remember_reply(NAMESPACE, "Q", [0x51], reply, cut=cut, stop=stop)
        return history.tokens(NAMESPACE, "Q" + text, as_text=False).tolist()[1:]


def test_a_reply_is_replayed_with_its_own_tokens() -> None:
    assert remembered([*b"abc"], "abc!") == [*b"abc!"]
    assert remembered([], "abc!") == [257, 0x21]


@pytest.mark.parametrize(("cut", "found"), [(True, True), (False, False)])
def test_a_cut_reply_is_recognized_without_its_trailing_white_space(cut: bool, found: bool) -> None:
    assert remembered([*b"abc \n"], "abc!", cut=cut) == ([*b"abc!"] if found else [257, 0x21])


@pytest.mark.parametrize("reply", [[*b"abcEND"], [*b"abc", 258], [*b"abcEN", 259]])
def test_a_stop_string_is_not_remembered(reply: list[int]) -> None:
    assert remembered(reply, "abc!", stop="END", cut=True) == [*b"abc!"]


def test_an_incomplete_character_is_not_remembered() -> None:
    assert remembered([*b"abc", 0xC3], "abcé") == [*b"abc", *"é".encode()]
    assert remembered([0xC3], "é") == [*"é".encode()]


def test_a_spelled_out_special_token_differs_from_the_token_itself() -> None:
    assert remembered([*b"abc<s>abc"], "abc<s>abc") == [257, 260, 257], "the text equals that of the token"
    assert remembered([*b"abc", 260, *b"abc"], "abc<s>abc") == [*b"abc", 260, *b"abc"]
