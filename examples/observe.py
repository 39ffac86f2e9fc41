"""What a router asks a model before it sends work there; the answers wait for no decode.

python examples/observe.py [model.gguf]
"""

import time

from _model import model_file

import erllama

SYSTEM = "You are a helpful assistant.\n" * 10


def look(when: str, model: erllama.Model) -> None:
    began = time.perf_counter()
    hit, info = model.last_cache_hit, model.info
    print(f"{when}: {model.phase}, {model.queue_depth} run, {model.pending} wait")
    print(f"  {info.id} on {info.backend}: {info.n_seq_max} at once; {erllama.queue_depth()} run in all models")
    warm = model.cached_prefix(SYSTEM + "How deep is the sea?")
    print(f"  {warm} tokens of the next prompt are cached; the last one's hit was {hit.kind if hit else None}")
    print(f"  asked in {(time.perf_counter() - began) * 1e3:.2f} ms")


def main() -> None:
    with (
        model_file() as path,
        erllama.Cache() as cache,
        erllama.load_model(path, id="chat", cache=cache, n_seq_max=2) as model,
    ):
        look("before", model)
        model.prefill(SYSTEM)
        streams = [model.stream(f"{SYSTEM}Question {n}", max_tokens=1000, seed=n) for n in range(3)]
        for stream in streams[:2]:
            next(stream)
        look("at work", model)
        for stream in streams:
            stream.cancel()
            stream.result()
        look("after", model)


if __name__ == "__main__":
    main()
