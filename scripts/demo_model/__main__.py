"""Trains the demo model and writes its file. An interrupted run resumes at its last checkpoint."""

from __future__ import annotations

import argparse
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scripts.demo_model import conversations, gguf_file, rows, training
from scripts.demo_model.network import Shape, Weights, initial_weights

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
HELD_OUT_SEED = 2
DRILL_SEED = 3
DRILLS = 0.5  # share of the texts in the second part
N_STEPS = 2600
_EVERY = 50  # steps between checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_model", description=__doc__)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--out", type=Path, default=ROOT / "erllama" / "_data" / "demo.gguf")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build" / "demo-model.npz")
    arguments = parser.parse_args()
    words = conversations.learned_tokenizer()
    shape = Shape(n_vocab=len(words.tokens))

    def write(weights: Weights) -> None:
        arrays = {name: np.asarray(weight) for name, weight in weights.items()}
        gguf_file.write(arguments.out, arrays, shape, words, conversations.TEMPLATE, rows.WIDTHS[-1])

    evaluate = training.evaluation(shape, list(islice(rows.batches(words, HELD_OUT_SEED), 4)))
    start = _load_checkpoint(arguments.checkpoint, arguments.steps)
    start = start or training.Progress.begin(initial_weights(shape, SEED))
    # The second part has more drills. After a restart, batches that were used before are generated and skipped.
    n_first = int(training.STEADY * arguments.steps)
    parts = islice(rows.batches(words, SEED), n_first), rows.batches(words, DRILL_SEED, drills=DRILLS)
    batches = islice(chain(*parts), start.step, None)
    began = time.monotonic()
    for progress, cost in training.train(start, shape, batches, arguments.steps):
        if progress.step % 10 == 0:
            pace = (time.monotonic() - began) / (progress.step - start.step)
            left = pace * (arguments.steps - progress.step) / 60
            print(
                f"step {progress.step}: loss {cost:.3f}, {pace:.2f} s per step, {left:.0f} minutes left", flush=True
            )
        if progress.step % _EVERY == 0 or progress.step == arguments.steps:
            print(f"step {progress.step}: loss on held-out text {evaluate(progress.weights):.4f}", flush=True)
            _save_checkpoint(arguments.checkpoint, arguments.steps, progress)
            write(progress.weights)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def _save_checkpoint(path: Path, n_steps: int, progress: training.Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"weights": progress.weights, "first": progress.first, "second": progress.second}
    arrays: dict[str, Any] = {"step": progress.step, "n_steps": n_steps}
    for part, named in parts.items():
        arrays |= {f"{part}.{name}": np.asarray(array) for name, array in named.items()}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _load_checkpoint(path: Path, n_steps: int) -> training.Progress | None:
    """Return the checkpoint of an interrupted training, if `n_steps` steps would have reached the same state."""
    if not path.exists():
        return None
    with np.load(path) as kept:
        step, steps_then = int(kept["step"]), int(kept["n_steps"])
        if n_steps != steps_then and step > training.STEADY * min(n_steps, steps_then):
            return None
        parts: dict[str, Weights] = {"weights": {}, "first": {}, "second": {}}
        for key in kept.files:
            part, _, name = key.partition(".")
            if name:
                parts[part][name] = jax.numpy.asarray(kept[key])
        return training.Progress(step, **parts)


if __name__ == "__main__":
    main()
