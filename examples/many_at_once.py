"""Run requests together, each with its own temperature and seed. Further requests wait in a queue.

python examples/many_at_once.py [model.gguf]
"""

from _model import model_file

import erllama


def main() -> None:
    with (
        model_file() as path,
        erllama.Cache() as cache,
        erllama.load_model(path, cache=cache, n_ctx=4096, n_seq_max=4, prefill_chunk_size=128) as model,
    ):
        streams = [
            model.stream(f"Worker {n} begins:", max_tokens=100, temperature=0.2 * n, seed=n) for n in range(6)
        ]
        for stream in streams[:4]:
            next(stream)  # the first piece shows that the request runs
        print(f"{model.queue_depth} running, {model.pending} waiting, first come, first served")

        for n, stream in enumerate(streams):
            reply = stream.result()
            print(f"worker {n}, seed {reply.seed}: {len(reply.tokens)} tokens, {reply.text[:40]!r}…")

        counts = model.metrics
        print(f"{counts.decoded_tokens} tokens in {counts.ticks} decodes; {model.pending} waiting")


if __name__ == "__main__":
    main()
