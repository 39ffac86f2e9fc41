"""Query the state of a model, as a router does. The calls do not wait for a decode.

python examples/observe.py [model.gguf]
"""

import time

from _model import model_file

import erllama

SYSTEM = "You are a helpful assistant.\n" * 10


def show_state(when: str, model: erllama.Model) -> None:
    began = time.perf_counter()
    hit, info = model.last_cache_hit, model.info
    print(f"{when}: {model.phase}, {model.queue_depth} running, {model.pending} waiting")
    print(f"  {info.id} on {info.backend}: {info.n_seq_max} slots; {erllama.queue_depth()} running in all models")
    cached = model.cached_prefix(SYSTEM + "How deep is the sea?")
    print(f"  {cached} tokens of the next prompt are cached; the last hit was {hit.kind if hit else None}")
    print(f"  answered in {(time.perf_counter() - began) * 1e3:.2f} ms")


def main() -> None:
    with (
        model_file() as path,
        erllama.Cache() as cache,
        erllama.load_model(path, id="chat", cache=cache, n_seq_max=2) as model,
    ):
        show_state("before", model)
        model.prefill(SYSTEM)
        streams = [model.stream(f"{SYSTEM}Question {n}", max_tokens=1000, seed=n) for n in range(3)]
        for stream in streams[:2]:
            next(stream)
        show_state("busy", model)
        for stream in streams:
            stream.cancel()
            stream.result()
        show_state("after", model)


if __name__ == "__main__":
    main()
