"""Runs requests: the model thread, its scheduler, sampling, and the backends' protocol."""

from erllama.engine.backend import Backend, Batch, Limits, Vocabulary
from erllama.engine.candidates import Candidates
from erllama.engine.grammar import Grammar
from erllama.engine.metrics import EngineMetrics
from erllama.engine.request import (
    CacheHit,
    Completion,
    Done,
    Event,
    Request,
    RequestOptions,
    TextDelta,
    Timings,
)
from erllama.engine.runner import Runner
from erllama.engine.sampling import Sampler, SamplerFactory, SamplingOptions, SamplingState, TokenLogprobs
from erllama.engine.scheduler import Phase
from erllama.engine.steps import Step
from erllama.engine.ticket import Ticket

__all__ = [
    "Backend",
    "Batch",
    "CacheHit",
    "Candidates",
    "Completion",
    "Done",
    "EngineMetrics",
    "Event",
    "Grammar",
    "Limits",
    "Phase",
    "Request",
    "RequestOptions",
    "Runner",
    "Sampler",
    "SamplerFactory",
    "SamplingOptions",
    "SamplingState",
    "Step",
    "TextDelta",
    "Ticket",
    "Timings",
    "TokenLogprobs",
    "Vocabulary",
]
