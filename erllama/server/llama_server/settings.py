"""`generation_settings`: the options of a reply as llama-server reports them, in its answers and in `/props`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erllama._model.adapters import Adapter
from erllama.engine import SamplingOptions
from erllama.engine.sampling.options import DECLARED, SAMPLERS
from erllama.server.conduct.bodies import Json

# llama-server's names of the steps of a sampler chain where they differ from ours, and ours.
STEP_NAMES: Mapping[str, str] = {"typ_p": "typical_p"}
_LLAMA_NAMES = {ours: theirs for theirs, ours in STEP_NAMES.items()}

# What the engine does not have, with the values by which llama-server says so.
_ABSENT: Json = {
    "adaptive_target": -1.0,
    "adaptive_decay": 0.0,
    "n_keep": 0,
    "n_discard": 0,
    "chat_format": "Content-only",
    "reasoning_format": "none",
    "reasoning_in_content": False,
    "generation_prompt": "",
    "speculative.types": "none",
    "backend_sampling": False,
}


def generation_settings(
    adapters: Sequence[Adapter], options: Mapping[str, object], seed: int | None = None
) -> Json:
    """Return the settings of a reply.

    Args:
        adapters: of the model.
        options: of `Model.complete`, those that were set.
        seed: of the reply; None for that of `options`, or -1, which is llama-server's number for a random one.
    """
    of_sampling = {name: value for name, value in options.items() if name in SamplingOptions.__dataclass_fields__}
    checked = SamplingOptions(**of_sampling)  # type: ignore[arg-type]
    if seed is None:
        seed = -1 if checked.seed is None else checked.seed
    settings: Json = {"seed": seed} | {name: option.of(checked) for name, option in DECLARED.items()}
    limit = options.get("max_tokens")
    grammar = options.get("grammar")
    settings |= {
        "max_tokens": -1 if limit is None else limit,
        "n_predict": -1 if limit is None else limit,
        "samplers": [_LLAMA_NAMES.get(str(step), str(step)) for step in checked.samplers],
        "stop": _texts(options.get("stop")),
        "grammar": grammar if isinstance(grammar, str) else "",
        "logit_bias": [{"bias": bias, "token": token} for token, bias in (checked.logit_bias or {}).items()],
        "lora": [{"id": id, "scale": adapter.scale} for id, adapter in enumerate(adapters)],
    }
    return settings | _ABSENT


def _texts(value: object) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def sampler_names(value: str | Sequence[str]) -> list[str]:
    """Return the steps that a client asks for, by our names. Unknown ones are left out, as llama-server does.

    Args:
        value: llama-server's names, or the letters that its command takes.
    """
    if isinstance(value, str):
        value = [_LETTERS.get(letter, "") for letter in value]
    names = [STEP_NAMES.get(name, name) for name in value]
    return [name for name in names if name in SAMPLERS]


_LETTERS: Mapping[str, str] = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typical_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
}
