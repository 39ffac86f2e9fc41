"""End a reply at a stop string. The string is reported, but it is not in the reply or the stream.

python examples/stop_sequences.py [model.gguf]
"""

from _model import model_or_demo

import erllama

PROMPT = "Once upon a time there was a small fox called"


def main() -> None:
    with erllama.load_model(model_or_demo()) as model:
        free = model.complete(PROMPT, max_tokens=24, temperature=0)
        print(f"without: {free.text!r}, ended by {free.finish_reason!r}")

        # A text that this model writes, regardless of token boundaries; and one that it might write.
        stops = [free.text[10:14], "\n\nUser:"]
        reply = model.complete(PROMPT, max_tokens=24, temperature=0, stop=stops)
        print(f"with {stops}: {reply.text!r}, ended by {reply.finish_reason!r} at {reply.stop_sequence!r}")
        print(f"sampled tokens: {len(reply.tokens)}, the last of them {model.detokenize(reply.tokens[-1:])!r}")

        pieces = []
        for event in model.stream(PROMPT, max_tokens=24, temperature=0, stop=stops):
            if isinstance(event, erllama.TextDelta):
                pieces.append(event.text)
            else:
                print(f"streamed: {pieces}, then {event.completion.stop_sequence!r} was found")


if __name__ == "__main__":
    main()
