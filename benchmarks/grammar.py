"""Grammar masks of logits: this library against libllama's grammar sampler."""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import AbsentError, Figure, Findings, Setup, Target, in_turn
from benchmarks.peer import compile_program, run_program
from erllama.engine.backends.llama import LlamaVocabulary
from erllama.engine.grammar.grammar import Grammar, GrammarCompiler
from erllama.engine.sampling.candidates import mask_logits
from erllama.llama_ffi import LlamaModel

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
# The same schema, as llama.cpp translates schemas to GBNF.
GBNF = r"""root ::= "{" ws name "," ws age "," ws "\"tags\"" ws ":" ws tags "," ws place "}" ws
name ::= "\"name\"" ws ":" ws string
age ::= "\"age\"" ws ":" ws integer
place ::= "\"address\"" ws ":" ws address
tags ::= "[" ws (string ("," ws string)*)? "]" ws
address ::= "{" ws "\"street\"" ws ":" ws string "," ws "\"city\"" ws ":" ws string "}" ws
integer ::= ("-"? ("0" | [1-9] [0-9]{0,15})) ws
string ::= "\"" char* "\"" ws
char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
ws ::= | " " | "\n" [ \t]{0,20}
"""
VALUE = {
    "name": "Ada Lovelace, Countess of Lovelace",
    "age": 36,
    "tags": ["mathematics", "computing", "naïve \u201cquotes\u201d"],
    "address": {"street": "12 St James's Square", "city": "London"},
}
N_VOCAB = 128_256  # the size that the target refers to
SEED = 1


def mask(setup: Setup) -> Findings:
    """Compare computing and applying the mask of a JSON schema at each token of an object."""
    path = setup.vocabulary
    if path is None:
        raise AbsentError("grammars: give --vocabulary, a GGUF with 128,256 tokens, such as Llama 3's")
    findings = Findings()
    with LlamaModel(path, vocab_only=True) as model, tempfile.TemporaryDirectory() as place:
        vocabulary = LlamaVocabulary(model.vocabulary)
        tokens = vocabulary.tokenize(json.dumps(VALUE, ensure_ascii=False), add_special=False)
        logits = np.random.default_rng(SEED).normal(0, 2.5, vocabulary.n_tokens).astype(np.float32)
        tokens.tofile(Path(place) / "tokens.i32")
        logits.tofile(Path(place) / "logits.f32")
        (Path(place) / "grammar.gbnf").write_text(GBNF)
        compile_program("peer_grammar", Path(place), setup.backend)
        began = time.perf_counter()
        compiler = GrammarCompiler(vocabulary)
        compiler.matcher(Grammar.regex("a"))
        trie = time.perf_counter() - began
        n_rounds = setup.of(10, 1)
        arguments = ["grammar.gbnf", "tokens.i32", "logits.f32", str(setup.of(3, 1))]
        command = ["./peer_grammar", str(path.resolve()), *arguments]
        shown = ["./peer_grammar", path.name, *arguments]
        for name, what, grammar in (
            ("mask", "a JSON schema's mask", Grammar.json_schema(SCHEMA)),
            ("mask-gbnf", "the same as GBNF", Grammar.gbnf(GBNF)),
        ):
            times: list[float] = []
            figure = Figure(
                f"{name}-{vocabulary.n_tokens}",
                f"{what} made and applied, {vocabulary.n_tokens:,} tokens",
                "libllama's grammar sampler",
                "us",
                *in_turn(
                    lambda grammar=grammar, times=times: _ours(  # type: ignore[misc]
                        compiler, grammar, tokens, logits, n_rounds, times
                    ),
                    lambda: _mean_microseconds(run_program(command, Path(place))),
                    setup.runs,
                ),
                Target("<=", 0.02) if name == "mask" and vocabulary.n_tokens >= N_VOCAB else None,
                ("mask_logits(logits, matcher.allowed())", shlex.join(shown)),
                [
                    f"the mean over the {len(tokens)} tokens of a JSON object, accepted one by one",
                    f"slowest mask: {max(times):.0f} us; the trie of the vocabulary, once: {trie:.2f} s",
                    f"with 8 rows: {8 * statistics.mean(times):.0f} us per tick",
                ],
            )
            findings.figures.append(figure)
    return findings


def _mean_microseconds(output: str) -> float:
    """Return the mean of the nanoseconds in the JSON output of a program, in microseconds."""
    return float(statistics.mean(json.loads(output)["nanoseconds"])) / 1e3


def _ours(
    compiler: GrammarCompiler,
    grammar: Grammar,
    tokens: NDArray[np.int32],
    logits: NDArray[np.float32],
    n_rounds: int,
    times: list[float],
) -> float:
    """Return the microseconds of a mask; append all of them to `times`."""
    found = []
    for _ in range(n_rounds):
        matcher = compiler.matcher(grammar)
        for token in tokens.tolist():
            began = time.perf_counter_ns()
            left = mask_logits(logits, matcher.allowed())
            found.append((time.perf_counter_ns() - began) / 1e3)
            if not np.isfinite(left[token]):
                raise SystemExit(f"the grammar does not allow token {token} of its own example")
            matcher.accept(token)
    times += found
    return statistics.mean(found)


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"mask": mask}
