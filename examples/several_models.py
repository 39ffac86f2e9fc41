"""Use several models by name with one cache. They share no KV, unless they are the same file.

python examples/several_models.py [tiny.gguf [big.gguf]]
"""

from _model import model_file

import erllama


def main() -> None:
    prompt = "Summarise: the lamp is lit at dusk and put out at dawn."
    with model_file(1) as tiny, model_file(2) as big, erllama.Cache() as cache:
        erllama.load_model(tiny, id="tiny", cache=cache, n_ctx=1024)
        erllama.load_model(big, id="big", cache=cache, n_ctx=2048)
        for model in erllama.list_models():
            print(f"{model.id}: {model.n_ctx} cells, {model.info.description}")

        for name in ("tiny", "big", "tiny"):
            reply = erllama.get_model(name).complete(prompt, max_tokens=16, temperature=0)
            print(f"{name}: {reply.cache.kind}; {reply.text!r}")

        # The same file under another name finds the prompt that "tiny" computed.
        with erllama.load_model(tiny, id="tiny too", cache=cache, n_ctx=1024) as same:
            reply = same.complete(prompt, max_tokens=16, temperature=0)
            print(f"{same.id}: {reply.cache.kind} hit from {reply.cache.tier}; {reply.text!r}")

        for model in erllama.list_models():
            model.unload()
        print(f"loaded: {erllama.list_models()}; {cache.counters()['hits_exact']} exact hits")


if __name__ == "__main__":
    main()
