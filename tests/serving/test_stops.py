"""Stop strings: the end of a reply does not depend on token boundaries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.engine.output.stops import StopScanner
from support.examples import examples
from support.recording_backend import first_by_position, stops

letters = st.text("abc", max_size=12)


def scanned(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops)
    released = [scanner.feed(piece) for piece in pieces]
    return [*released, scanner.flush()], scanner.matched


@settings(max_examples=examples(250))
@given(st.lists(letters, max_size=8), stops)
def test_the_first_stop_string_wins_for_all_token_boundaries(pieces: list[str], stops: list[str]) -> None:
    released, matched = scanned(pieces, stops)
    assert ("".join(released), matched) == first_by_position("".join(pieces), stops)


@settings(max_examples=examples(250))
@given(st.lists(st.text("a \n", max_size=4), max_size=6), st.lists(st.text("a \n", min_size=1, max_size=3)))
def test_white_space_after_a_phase_matches_no_white_space_stop_string(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    scanner.begin()
    streamed = "".join([*map(scanner.feed, pieces), scanner.flush()])
    assert (streamed, scanner.matched) == first_by_position("".join(pieces), stops, behind=True)


@settings(max_examples=examples(125))
@given(letters, stops)
def test_only_text_that_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    streamed = ""
    for i, letter in enumerate(text):
        streamed += scanner.feed(letter)
        if scanner.matched is not None:
            break
        held = text[len(streamed) : i + 1]
        assert not held or any(
            stop.startswith(held) or (stop in held and any(s.startswith(held[0]) for s in stops)) for stop in stops
        )


def test_text_after_a_stop_string_is_ignored() -> None:
    released, matched = scanned(["one END two", " END"], ["END"])
    assert ("".join(released), matched) == ("one ", "END")


def test_without_stop_strings_all_text_passes_at_once() -> None:
    assert scanned(["a", "", "bc"], []) == (["a", "", "bc", ""], None)


def test_a_longer_stop_string_that_began_earlier_takes_precedence() -> None:
    scanner = StopScanner(["cd", "abcdef"])
    assert scanner.feed("abcd") == ""
    assert scanner.matched is None
    assert scanner.feed("x") == "ab"
    assert scanner.matched == "cd"
