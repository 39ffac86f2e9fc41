"""Mutations of model files, and the loop in which a child process loads the mutants.

A mutant differs from a file that libllama loads in one to three places: the type
or the shape of tensors, the value or the type of hyperparameters, the name of
the architecture. `try_files` loads one after another in this process, computes
with those that load, and names each in a journal before it touches it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gguf import Keys

import erllama
from support.gguf import editable_gguf
from support.gguf.editable_gguf import ARRAY, BOOL, F32, I32, U32, EditableGGUF

_INTEGERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 100, 255, 256, 512, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e-6, 1e6, 1e30, 3e38, -1e30, math.inf, -math.inf, math.nan)


def mutant(bases: Sequence[EditableGGUF], seed: int, hyperparameters: Sequence[str]) -> tuple[EditableGGUF, str]:
    """Return a mutant of one of `bases`, and a description of the changes.

    Args:
        bases: files that load.
        seed: draws the base and the changes.
        hyperparameters: names to add if a file lacks them, without the architecture.
    """
    dice = random.Random(seed)
    file = dice.choice(bases).copy()
    changes = [f"{file.architecture}:"]
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        change = dice.choices(_CHANGES, _WEIGHTS)[0]
        changes.append(change(file, dice, hyperparameters))
    return file, " ".join(changes)


def _tensors(file: EditableGGUF, dice: random.Random) -> list[str]:
    """Return the name of a tensor, or the names of its role in all layers."""
    name = dice.choice(list(file.tensors))
    role = name.split(".", 2)[-1]
    return [other for other in file.tensors if other.split(".", 2)[-1] == role] if dice.random() < 0.5 else [name]


def _retype(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    names, kind = _tensors(file, dice), dice.choice(list(editable_gguf.BLOCKS))
    if dice.random() < 0.5:  # more often a type that fits
        fitting = [k for k, (n, _) in editable_gguf.BLOCKS.items() if file.tensors[names[0]].shape[0] % n == 0]
        kind = dice.choice(fitting)
    for name in names:
        file.tensors[name].kind = kind
    return f"{names[0]} (of {len(names)}) is {editable_gguf.TYPE_NAMES[kind]};"


def _retype_alike(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    """Change the type of all vectors or of all matrices, as a bad conversion does."""
    vectors, kind = dice.random() < 0.5, dice.choice(list(editable_gguf.BLOCKS))
    for tensor in file.tensors.values():
        if (len(tensor.shape) == 1) == vectors and tensor.shape[0] % editable_gguf.BLOCKS[kind][0] == 0:
            tensor.kind = kind
    return f"all {'vectors' if vectors else 'matrices'} are {editable_gguf.TYPE_NAMES[kind]};"


def _reshape(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    names = _tensors(file, dice)
    before = list(file.tensors[names[0]].shape)
    shape = list(before)
    at = dice.randrange(len(shape))
    choice = dice.randrange(7)
    if choice == 0:
        shape.reverse()
    elif choice == 1:
        shape.append(dice.choice((1, 2, 3)))
    elif choice == 2 and len(shape) > 1:
        shape.pop(at)
    elif choice == 3:
        shape[at] = dice.choice((0, 1, 2**31, 2**40, 2**62))
    elif choice == 4:
        shape[at] += dice.choice((-1, 1, 32, -32))
    else:
        shape[at] = max(shape[at] * dice.choice((2, 3)) // dice.choice((1, 4)), 0)
    for name in names:
        file.tensors[name].shape = [max(size, 0) for size in shape]
    return f"{names[0]} (of {len(names)}) of shape {before} has {shape};"


def _drop(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    names = _tensors(file, dice)
    for name in names:
        if len(file.tensors) > 1:
            del file.tensors[name]
    return f"{names[0]} (of {len(names)}) is missing;"


def _keys(file: EditableGGUF) -> list[str]:
    prefix = f"{file.architecture}."
    return [key for key in file.metadata if key.startswith(prefix)]


def _drawn(dice: random.Random, kind: int, before: object) -> object:
    if kind == F32:
        return dice.choice(_REALS)
    if kind == BOOL:
        return dice.random() < 0.5
    if isinstance(before, int) and dice.random() < 0.5:
        near = (before + 1, before - 1, before * 2, before // 2, before * 3, before + 32)
        value = dice.choice(near)
    else:
        value = dice.choice(_INTEGERS)
    return max(min(value, 2**31 - 1), -(2**31)) if kind == I32 else max(0, min(value, 2**32 - 1))


def _revalue(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    key = dice.choice(_keys(file))
    kind, before = file.metadata[key]
    if kind not in (U32, I32, F32, BOOL):
        if kind != ARRAY:
            return f"{key} stays;"
        item_kind, items = before  # type: ignore[misc]
        at = dice.randrange(len(items) or 1)
        after: object = (item_kind, [*items[:at], _drawn(dice, item_kind, None), *items[at + 1 :]])
    elif dice.random() < 0.15:
        kind, after = ARRAY, (kind, [_drawn(dice, kind, before) for _ in range(dice.choice((0, 1, 2, 2, 3, 600)))])
    else:
        after = _drawn(dice, kind, before)
    file.metadata[key] = (kind, after)
    return f"{key}={str(after)[:80]} instead of {str(before)[:40]};"


def _retype_key(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    key, kind = dice.choice(_keys(file)), dice.choice((U32, I32, F32, BOOL))
    file.metadata[key] = (kind, _drawn(dice, kind, None))
    return f"{key}={file.metadata[key]};"


def _add_key(file: EditableGGUF, dice: random.Random, hyperparameters: Sequence[str]) -> str:
    name = dice.choice(hyperparameters)
    real = any(
        part in name for part in ("eps", "scal", "softcap", "factor", "freq", "bias", "clamp", "beta", "alpha")
    )
    kind = dice.choice((F32,) * 4 + (U32,) if real else (U32,) * 6 + (I32, BOOL))
    if name.endswith(("hidden_activation", "scaling.type")):
        value: tuple[int, object] = (8, dice.choice(("none", "linear", "yarn", "longrope", "silu", "x")))
    elif name.endswith(("sections", "pattern", "layers", "ratios", "types", "mapping")) and dice.random() < 0.7:
        item = BOOL if re.search("recurrent|pattern", name) and dice.random() < 0.5 else dice.choice((U32, I32))
        value = (ARRAY, (item, [_drawn(dice, item, 4) for _ in range(dice.choice((1, 2, 3, 4)))]))
    else:
        value = (kind, _drawn(dice, kind, 4))
    file.metadata[f"{file.architecture}.{name}"] = value
    return f"{name}={value} is new;"


def _drop_key(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    key = dice.choice(_keys(file))
    del file.metadata[key]
    if not _keys(file):
        file.metadata[key] = (U32, 2)
    return f"{key} is missing;"


def _rename(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    before, after = file.architecture, dice.choice(ARCHITECTURES)
    file.metadata = {
        f"{after}.{key.removeprefix(before + '.')}" if key.startswith(f"{before}.") else key: value
        for key, value in file.metadata.items()
    }
    file.metadata["general.architecture"] = (8, after)
    return f"renamed to {after};"


def _tokenizer(file: EditableGGUF, dice: random.Random, _: Sequence[str]) -> str:
    keys = [k for k, (kind, _) in file.metadata.items() if k.startswith("tokenizer.") and kind in (U32, I32, BOOL)]
    if not keys:
        return "no tokenizer;"
    key = dice.choice(keys)
    kind, before = file.metadata[key]
    file.metadata[key] = (kind, _drawn(dice, kind, before))
    return f"{key}={file.metadata[key][1]};"


_Change = Callable[[EditableGGUF, random.Random, Sequence[str]], str]
_CHANGES: tuple[_Change, ...] = (
    _retype, _retype_alike, _reshape, _drop, _revalue, _retype_key, _add_key, _drop_key, _rename, _tokenizer,
)  # fmt: skip
_WEIGHTS = (25, 6, 12, 3, 30, 3, 15, 2, 3, 2)
ARCHITECTURES = (
    "llama", "gemma2", "gemma3", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3next", "mamba", "lfm2", "bert",
    "deepseek2", "stablelm", "granitehybrid", "rwkv7", "falcon-h1", "gpt-oss", "command-r",
)  # fmt: skip
# Without the architecture, as gguf names them.
HYPERPARAMETERS = tuple(
    sorted(
        value.removeprefix("{arch}.")
        for group in vars(Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    )
)


def compute(path: Path, n_threads: int) -> None:
    """Load a file; prefill, decode, pack, drop, restore and decode again, or embed.

    Raises:
        erllama.Error: One of these is refused.
    """
    import numpy as np

    from erllama.engine import Batch
    from erllama.engine.backends.llama import LlamaBackend, LlamaOptions

    def batch(first: int, n: int) -> Batch:
        row = np.arange(n, dtype=np.int32)
        return Batch(row % 50 + 3, row + first, np.zeros(n, np.int32), np.ones(n, np.int8))

    backend = LlamaBackend(path, LlamaOptions(n_ctx=256, n_threads=n_threads, n_sequences=2), "mutant")
    try:
        if not backend.limits.can_generate:
            embedder = backend.embedder()
            try:
                embedder.embed([np.arange(3, 12, dtype=np.int32)], embedder.limits.pooling)
            finally:
                embedder.close()
            return
        backend.decode(batch(0, 9))
        backend.decode(batch(9, 1))
        payload = backend.pack(0, 0, 10)
        backend.drop(0)
        backend.restore(0, 0, 10, memoryview(payload))
        backend.decode(batch(10, 1))
    finally:
        backend.close()


def try_files(
    bases: Sequence[EditableGGUF],
    seeds: Sequence[int],
    hyperparameters: Sequence[str],
    path: Path,
    say: Callable[[str], None],
) -> None:
    """Try the mutants of `seeds` in order. Writes the name of each before and its outcome after."""
    for seed in seeds:
        file, changes = mutant(bases, seed, hyperparameters)
        file.write(path, seed)
        say(f"seed {seed}: {changes}")
        try:
            compute(path, 2 if seed % 8 == 0 else 1)
            say("computed")
        except erllama.Error as error:
            say(f"refused: {error}".replace("\n", " "))
