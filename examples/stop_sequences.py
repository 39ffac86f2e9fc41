"""A reply that ends at a text: which is neither in the reply nor streamed, and is told.

python examples/stop_sequences.py [model.gguf]
"""

from _model import model_or_demo

import erllama

PROMPT = "Once upon a time there was a small fox called"


def main() -> None:
    with erllama.load_model(model_or_demo()) as model:
        free = model.complete(PROMPT, max_tokens=24, temperature=0)
        print(f"without: {free.text!r}, ended by {free.finish_reason!r}")

        # Something that this model does say, wherever its tokens begin and end; and something that it may.
        stops = [free.text[10:14], "\n\nUser:"]
        reply = model.complete(PROMPT, max_tokens=24, temperature=0, stop=stops)
        print(f"with {stops}: {reply.text!r}, ended by {reply.finish_reason!r} at {reply.stop_sequence!r}")
        print(f"tokens drawn: {len(reply.tokens)}, the last of them {model.detokenize(reply.tokens[-1:])!r}")

        pieces = []
        for event in model.stream(PROMPT, max_tokens=24, temperature=0, stop=stops):
            if isinstance(event, erllama.TextDelta):
                pieces.append(event.text)
            else:
                print(f"streamed: {pieces}, then {event.completion.stop_sequence!r} was found")


if __name__ == "__main__":
    main()
