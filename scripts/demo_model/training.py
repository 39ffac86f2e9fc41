"""Training: Muon for the matrices of the layers, Adam for embeddings and norms.

The rate decays to zero at the end.

Muon (Keller Jordan, 2024; scaled as in "Muon is Scalable for LLM Training",
arXiv:2502.16982) steps along the orthogonal matrix nearest to the momentum. It
learns this text in about half of the steps that Adam alone takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from scripts.demo_model.network import Shape, Weights, loss
from scripts.demo_model.rows import Batch

MUON_RATE = 5e-3
ADAM_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARM_UP = 20  # steps
STEADY = 0.57  # share of all steps with a constant rate; until then, the steps do not depend on their total number
# Coefficients of the quintic iteration whose fixed point is an orthogonal matrix; five rounds are close enough.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of training: the number of steps, the weights, and the moments of their gradients."""

    step: int
    weights: Weights
    first: Weights
    second: Weights

    @classmethod
    def begin(cls, weights: Weights) -> Progress:
        zeros = {name: jnp.zeros_like(weight) for name, weight in weights.items()}
        return cls(0, weights, zeros, zeros)


def train(
    progress: Progress, shape: Shape, batches: Iterator[Batch], n_steps: int
) -> Iterator[tuple[Progress, float]]:
    """Yield the state and the loss of each step up to `n_steps`, where the rate reaches zero."""
    for batch in batches:
        if progress.step >= n_steps:
            return
        falling = (1.0 - progress.step / n_steps) / (1.0 - STEADY)
        rate = min(1.0, (progress.step + 1) / WARM_UP, falling)
        weights, first, second, cost = _step(
            shape, progress.weights, progress.first, progress.second, rate, progress.step + 1,
            batch.tokens, batch.segments, batch.worth,
        )  # fmt: skip
        progress = Progress(progress.step + 1, weights, first, second)
        yield progress, float(cost)


def evaluation(shape: Shape, batches: list[Batch]) -> Callable[[Weights], float]:
    """Return a function that computes the mean loss of weights on held-out batches."""
    cost = jax.jit(partial(_cost, shape))
    return lambda weights: sum(float(cost(weights, b.tokens, b.segments, b.worth)) for b in batches) / len(batches)


def _cost(shape: Shape, weights: Weights, tokens: jax.Array, segments: jax.Array, worth: jax.Array) -> jax.Array:
    return loss(weights, shape, tokens, segments, worth)


@partial(jax.jit, static_argnums=0)
def _step(
    shape: Shape,
    weights: Weights,
    first: Weights,
    second: Weights,
    rate: jax.Array,
    step: jax.Array,
    tokens: jax.Array,
    segments: jax.Array,
    worth: jax.Array,
) -> tuple[Weights, Weights, Weights, jax.Array]:
    cost, gradients = jax.value_and_grad(loss)(weights, shape, tokens, segments, worth)
    stepped, firsts, seconds = {}, {}, {}
    for name, weight in weights.items():
        gradient = gradients[name]
        if weight.ndim == 3:
            firsts[name] = 0.95 * first[name] + gradient
            seconds[name] = second[name]
            direction = _orthogonal(gradient + 0.95 * firsts[name]) * (0.2 * max(weight.shape[1:]) ** 0.5)
            stepped[name] = weight - rate * MUON_RATE * (direction + WEIGHT_DECAY * weight)
        else:
            firsts[name] = 0.9 * first[name] + 0.1 * gradient
            seconds[name] = 0.98 * second[name] + 0.02 * gradient**2
            mean, square = firsts[name] / (1 - 0.9**step), seconds[name] / (1 - 0.98**step)
            stepped[name] = weight - rate * ADAM_RATE * mean / (jnp.sqrt(square) + 1e-8)
    return stepped, firsts, seconds, cost


def _orthogonal(matrices: jax.Array) -> jax.Array:
    """Return approximately the nearest orthogonal matrix to each of (layers, outputs, inputs)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.swapaxes(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    result: jax.Array = x.swapaxes(1, 2) if tall else x
    return result
