"""Runs requests: the model thread, slices, sampling, and the backends' protocol."""

from erllama.engine.backend import Backend, Batch, Limits, Vocabulary
from erllama.engine.request import (
    CacheHit,
    Completion,
    Done,
    Event,
    Request,
    RequestOptions,
    TextDelta,
    Ticket,
    Timings,
)
from erllama.engine.runner import Phase, Runner
from erllama.engine.sampling import Sampler, SamplingOptions

__all__ = [
    "Backend",
    "Batch",
    "CacheHit",
    "Completion",
    "Done",
    "Event",
    "Limits",
    "Phase",
    "Request",
    "RequestOptions",
    "Runner",
    "Sampler",
    "SamplingOptions",
    "TextDelta",
    "Ticket",
    "Timings",
    "Vocabulary",
]
