"""List devices, inspect a model without its weights, and load it with options that change its KV.

python examples/load_options.py [model.gguf]
"""

from _model import model_file

import erllama

PROMPT = "The lighthouse keeper counts the ships that pass. " * 8


def main() -> None:
    for device in erllama.devices():
        print(f"{device.name}: {device.kind}, {device.description}, {device.total_bytes / 2**30:.1f} GiB")

    with model_file() as path:
        with erllama.load_model(path, vocab_only=True) as vocabulary:
            info = vocabulary.info
            print(f"{info.name}: {info.architecture}, {info.n_layer} layers, {info.file_bytes / 2**20:.1f} MiB")
            print(f"eos is {info.special_tokens['eos'].text!r}; {len(vocabulary.tokenize(PROMPT))} prompt tokens")
            try:
                vocabulary.complete(PROMPT)
            except erllama.VocabularyOnly as error:
                print(f"refused: {error}")

        own_base = float(str(info.n_ctx_train))  # any number would do to show an override
        choices: dict[str, dict[str, object]] = {
            "default": {},
            "default, again": {},
            "quantized KV": {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
            "another RoPE base": {"overrides": {f"{info.architecture}.rope.freq_base": own_base}},
            "YaRN": {"rope_scaling": "yarn", "rope_freq_scale": 0.5, "yarn_orig_ctx": 4096},
        }
        with erllama.Cache() as cache:
            for name, options in choices.items():
                with erllama.load_model(path, cache=cache, n_ctx=2048, **options) as model:
                    reply = model.complete(PROMPT, max_tokens=8, temperature=0)
                    print(f"{name}: {reply.cache.kind}, {model.info.kv_bytes / 2**20:.2f} MiB of KV")

        try:
            erllama.load_model(path, tensor_split=[3, 1], split_mode="none")
        except erllama.OptionError as error:
            print(f"refused: {error}")


if __name__ == "__main__":
    main()
