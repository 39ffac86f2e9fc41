"""Stop strings: where a reply ends does not depend on where its tokens end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.engine.output.stops import StopScanner
from support.recording_backend import first_by_position, stops

letters = st.text("abc", max_size=12)


def scanned(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops)
    released = [scanner.feed(piece) for piece in pieces]
    return [*released, scanner.flush()], scanner.matched


@settings(max_examples=1000)
@given(st.lists(letters, max_size=8), stops)
def test_the_first_stop_string_by_position_ends_the_text_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    released, matched = scanned(pieces, stops)
    assert ("".join(released), matched) == first_by_position("".join(pieces), stops)


@settings(max_examples=1000)
@given(st.lists(st.text("a \n", max_size=4), max_size=6), st.lists(st.text("a \n", min_size=1, max_size=3)))
def test_white_space_behind_a_phase_is_no_place_for_a_stop_string_of_it_alone(
    pieces: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    scanner.begin()
    said = "".join([*map(scanner.feed, pieces), scanner.flush()])
    assert (said, scanner.matched) == first_by_position("".join(pieces), stops, behind=True)


@settings(max_examples=500)
@given(letters, stops)
def test_no_more_is_held_back_than_may_be_part_of_a_stop_string(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    said = ""
    for i, letter in enumerate(text):
        said += scanner.feed(letter)
        if scanner.matched is not None:
            break
        held = text[len(said) : i + 1]
        assert not held or any(
            stop.startswith(held) or (stop in held and any(s.startswith(held[0]) for s in stops)) for stop in stops
        )


def test_what_came_after_is_not_looked_at() -> None:
    released, matched = scanned(["one END two", " END"], ["END"])
    assert ("".join(released), matched) == ("one ", "END")


def test_without_stop_strings_all_text_passes_at_once() -> None:
    assert scanned(["a", "", "bc"], []) == (["a", "", "bc", ""], None)


def test_a_longer_one_that_began_before_is_waited_for() -> None:
    scanner = StopScanner(["cd", "abcdef"])
    assert scanner.feed("abcd") == ""
    assert scanner.matched is None
    assert scanner.feed("x") == "ab"
    assert scanner.matched == "cd"
