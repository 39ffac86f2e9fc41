"""Stream a reply and cancel it from outside: with a thread, and with asyncio.

python examples/streaming.py [model.gguf]
"""

import asyncio
import threading

from _model import model_file

import erllama

PROMPT = "Once upon a time"
SECONDS = 0.1  # until the reply is cancelled


def in_a_thread(model: erllama.Model) -> None:
    with model.stream(PROMPT, temperature=0) as stream:
        for n, event in enumerate(stream):
            if n == 0:
                threading.Timer(SECONDS, stream.cancel).start()
            show("stream", event)


async def in_asyncio(model: erllama.Model) -> None:
    async with model.astream(PROMPT, temperature=0) as stream:
        asyncio.get_running_loop().call_later(SECONDS, stream.cancel)
        async for event in stream:
            show("astream", event)


def show(name: str, event: erllama.Event) -> None:
    if isinstance(event, erllama.TextDelta):
        print(event.text, end="", flush=True)
    else:
        # The last event. It has the complete reply, also after a cancel.
        reply = event.completion
        print(f"\n{name}: {reply.finish_reason} after {len(reply.tokens)} tokens")


def main() -> None:
    with model_file() as path, erllama.load_model(path) as model:
        in_a_thread(model)
        asyncio.run(in_asyncio(model))


if __name__ == "__main__":
    main()
