"""What repeats the declarations of the sampler steps agrees with them: the signature of a request and the page."""

from __future__ import annotations

from dataclasses import fields

import pytest

from erllama._model.requests.options import CompletionOptions
from erllama.engine import SamplingOptions
from erllama.engine.sampling.declaration import ChainStep, Option
from erllama.engine.sampling.options import DECLARED, SAMPLERS
from erllama.engine.sampling.steps import CHAIN
from erllama.errors import OptionError
from support.doc_pages import tables

_TYPES = {int: "int", float: "float", tuple: "Sequence[str]"}


def row(step: type[ChainStep]) -> list[str]:
    """The row of a step in docs/sampling.md."""
    options = [option for option in step.declared_options() if not option.shared]
    return [f"`{step.name}`", ", ".join(map(written, options)), step.summary]


def written(option: Option[object]) -> str:
    default = option.default
    if isinstance(default, tuple):
        texts = ", ".join(f"'{text}'" if '"' in text else '"' + text.replace("\n", "\\n") + '"' for text in default)
        return f"`{option.name}=({texts})`"
    return f"`{option.name}={default!r}`"


def test_the_table_of_the_chain_is_that_of_the_declarations() -> None:
    expected = [row(step) for step in CHAIN]
    found = [cells for cells in tables("docs/sampling.md")["The chain"] if cells[0]]
    assert found == expected, "\n".join(f"| {' | '.join(cells)} |" for cells in expected)


def test_the_signature_of_a_request_has_every_declared_option() -> None:
    annotations = CompletionOptions.__annotations__
    own = {field.name for field in fields(SamplingOptions)} - DECLARED.keys()
    assert own == {"seed", "logit_bias", "banned_tokens", "samplers"}
    for name, option in DECLARED.items():
        assert name in annotations, f"add {name} to CompletionOptions"
        annotation = annotations[name]
        assert getattr(annotation, "__forward_arg__", annotation) == _TYPES[type(option.default)], name


def test_names_of_steps_are_distinct_and_options_are_declared_once() -> None:
    assert len(set(SAMPLERS)) == len(CHAIN)
    declared = [option for step in CHAIN for option in step.declared_options() if not option.shared]
    assert len({option.name for option in declared}) == len(declared)


@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_range_is_checked(name: str) -> None:
    option = DECLARED[name]
    for limit, beyond in ((option.minimum, -1), (option.maximum, 1)):
        if limit is None:
            continue
        inside, outside = type(option.default)(limit), type(option.default)(limit + beyond)  # type: ignore[call-arg]
        assert option.checked(inside) == limit
        with pytest.raises(OptionError, match=name):
            SamplingOptions(**{name: outside})
