"""Constrain replies: with GBNF, a JSON schema, and a regular expression.

python examples/structured_output.py [model.gguf]
"""

from __future__ import annotations

import json

from _model import model_or_demo

import erllama

NUMBER = r"""
root  ::= "{" ws "\"n\":" ws digit "}"
digit ::= [0-9]
ws    ::= [ \t\n]{0,3}
"""
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Paris"]},
        "celsius": {"type": "integer", "minimum": -40, "maximum": 50},
    },
    "required": ["city", "celsius"],
    "additionalProperties": False,
}


def main() -> None:
    with erllama.load_model(model_or_demo()) as model:
        reply = model.complete("Reply with JSON: ", max_tokens=32, grammar=NUMBER, seed=1)
        print(f"GBNF:        {json.loads(reply.text)}")
        reply = model.complete("The weather, as JSON: ", max_tokens=200, json_schema=WEATHER, seed=1)
        print(f"JSON schema: {json.loads(reply.text)}")
        reply = model.complete("A date: ", max_tokens=32, regex="[0-9]{4}-[01][0-9]-[0-3][0-9]", seed=1)
        print(f"regex:       {reply.text}")


if __name__ == "__main__":
    main()
