"""The demo model's network: llama's architecture as libllama computes it, in jax.

Weights of one kind are stacked over layers, so the model is a tree of ten arrays;
`gguf_file` separates them again. Matrices are (outputs, inputs), as in GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Weights = dict[str, jax.Array]

ROPE_BASE = 10000.0
RMS_EPSILON = 1e-5
CHUNK = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes. The rows of every matrix are multiples of a Q8_0 block, 32 elements."""

    n_vocab: int
    n_layer: int = 6
    n_embd: int = 160
    n_ff: int = 416
    n_head: int = 4
    n_head_kv: int = 2

    @property
    def n_dim(self) -> int:
        return self.n_embd // self.n_head


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Return random initial weights. Those that add to the residual stream are small, as in GPT-2."""
    n_kv = shape.n_head_kv * shape.n_dim
    small = (2 * shape.n_layer) ** -0.5
    matrices = {
        "attn_q": (shape.n_embd, shape.n_embd, 1.0),
        "attn_k": (n_kv, shape.n_embd, 1.0),
        "attn_v": (n_kv, shape.n_embd, 1.0),
        "attn_output": (shape.n_embd, shape.n_embd, small),
        "ffn_gate": (shape.n_ff, shape.n_embd, 1.0),
        "ffn_up": (shape.n_ff, shape.n_embd, 1.0),
        "ffn_down": (shape.n_embd, shape.n_ff, small),
    }
    keys = jax.random.split(jax.random.key(seed), len(matrices) + 1)
    weights = {
        name: jax.random.normal(key, (shape.n_layer, n_out, n_in)) * gain * n_in**-0.5
        for key, (name, (n_out, n_in, gain)) in zip(keys[1:], matrices.items(), strict=True)
    }
    weights["attn_norm"] = weights["ffn_norm"] = jnp.ones((shape.n_layer, shape.n_embd))
    weights["output_norm"] = jnp.ones(shape.n_embd)
    weights["token_embd"] = jax.random.normal(keys[0], (shape.n_vocab, shape.n_embd)) * 0.02
    return weights


def logits(weights: Weights, shape: Shape, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Return the logits of the next tokens.

    Args:
        tokens: (rows, positions).
        segments: (rows, positions), the number of each token's text. A token attends only to its own text.

    Returns:
        (rows, positions, n_vocab).
    """
    n_rows, n_tokens = tokens.shape
    angles = _angles(n_tokens, shape.n_dim)

    def heads(h: jax.Array, matrix: jax.Array) -> jax.Array:
        return (h @ matrix.T).reshape(n_rows, n_tokens, -1, shape.n_dim).transpose(0, 2, 1, 3)

    x = weights["token_embd"][tokens]
    for i in range(shape.n_layer):
        h = _norm(x, weights["attn_norm"][i])
        q = _rotate(heads(h, weights["attn_q"][i]), angles)
        k = _rotate(heads(h, weights["attn_k"][i]), angles)
        v = heads(h, weights["attn_v"][i])
        k, v = (jnp.repeat(each, shape.n_head // shape.n_head_kv, axis=1) for each in (k, v))
        mixed = _attend(q, k, v, segments).transpose(0, 2, 1, 3)
        x = x + mixed.reshape(n_rows, n_tokens, -1) @ weights["attn_output"][i].T
        h = _norm(x, weights["ffn_norm"][i])
        gated = jax.nn.silu(h @ weights["ffn_gate"][i].T) * (h @ weights["ffn_up"][i].T)
        x = x + gated @ weights["ffn_down"][i].T
    return _norm(x, weights["output_norm"]) @ weights["token_embd"].T


def loss(weights: Weights, shape: Shape, tokens: jax.Array, segments: jax.Array, worth: jax.Array) -> jax.Array:
    """Return the mean loss of the tokens, weighted by `worth`, (rows, positions)."""
    predicted = jax.nn.log_softmax(logits(weights, shape, tokens, segments)[:, :-1])
    costs = -jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = worth[:, 1:] * (segments[:, 1:] == segments[:, :-1])
    return (costs * counted).sum() / jnp.maximum(counted.sum(), 1.0)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Compute causal attention within segments, one chunk of positions at a time, without later positions."""
    chunks = []
    for start in range(0, q.shape[2], CHUNK):
        end = min(start + CHUNK, q.shape[2])
        before = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        seen = before & (segments[:, start:end, None] == segments[:, None, :end])
        scores = q[:, :, start:end] @ k[:, :, :end].swapaxes(2, 3) * q.shape[3] ** -0.5
        chunks.append(jax.nn.softmax(jnp.where(seen[:, None], scores, -1e9)) @ v[:, :, :end])
    return jnp.concatenate(chunks, axis=2)


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + RMS_EPSILON) * weight


def _angles(n_tokens: int, n_dim: int) -> tuple[jax.Array, jax.Array]:
    turns = jnp.arange(n_tokens)[:, None] * ROPE_BASE ** (-jnp.arange(0, n_dim, 2) / n_dim)
    return jnp.cos(turns), jnp.sin(turns)


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply RoPE to (rows, heads, positions, n_dim), rotating halves together; `gguf_file` interleaves them."""
    cosine, sine = angles
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
