"""`LlamaGrammar`: a grammar that replies follow, checked when it is made."""

from __future__ import annotations

from pathlib import Path

from erllama.engine import Grammar


class LlamaGrammar:
    """A grammar. Make it with `from_string`, `from_file` or `from_json_schema`.

    Attributes:
        grammar: the grammar as erllama takes it.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of a GBNF text.

        Raises:
            GrammarError: the text is not a grammar.
        """
        return cls(Grammar.gbnf(grammar))

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of a GBNF file.

        Raises:
            OSError: the file cannot be read.
            GrammarError: its text is not a grammar.
        """
        return cls.from_string(Path(file).read_text(encoding="utf-8"), verbose)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of the JSON texts that match a schema, which is JSON text itself.

        Raises:
            GrammarError: the schema is invalid, or has a keyword that cannot be enforced.
        """
        return cls(Grammar.json_schema(json_schema))
