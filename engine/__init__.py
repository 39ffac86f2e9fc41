"""Runs requests: the model thread, its scheduler, sampling, and the backends' protocol."""

from erllama.engine.adapters import AdapterBackend
from erllama.engine.backend import Backend, Batch, Buffer, InfillTokens, Limits, ModelFacts, NotedToken, Vocabulary
from erllama.engine.candidates import Candidates
from erllama.engine.embedding import Embedder, EmbeddingBackend, EmbeddingLimits
from erllama.engine.grammar import Grammar
from erllama.engine.metrics import EngineMetrics
from erllama.engine.phases import Markers, PhaseOptions
from erllama.engine.request import (
    CacheDelta,
    CacheHit,
    Completion,
    Delta,
    Done,
    Event,
    Request,
    RequestOptions,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    Timings,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
)
from erllama.engine.runner import Runner
from erllama.engine.sampling import Sampler, SamplerFactory, SamplingOptions, SamplingState, TokenLogprobs
from erllama.engine.scheduler import Phase
from erllama.engine.speculation import Drafter, Drafts
from erllama.engine.steps import Step
from erllama.engine.ticket import Ticket

__all__ = [
    "AdapterBackend",
    "Backend",
    "Batch",
    "Buffer",
    "CacheDelta",
    "CacheHit",
    "Candidates",
    "Completion",
    "Delta",
    "Done",
    "Drafter",
    "Drafts",
    "Embedder",
    "EmbeddingBackend",
    "EmbeddingLimits",
    "EngineMetrics",
    "Event",
    "Grammar",
    "InfillTokens",
    "Limits",
    "Markers",
    "ModelFacts",
    "NotedToken",
    "Phase",
    "PhaseOptions",
    "Request",
    "RequestOptions",
    "Runner",
    "Sampler",
    "SamplerFactory",
    "SamplingOptions",
    "SamplingState",
    "Step",
    "TextDelta",
    "ThinkingDelta",
    "ThinkingEnd",
    "Ticket",
    "Timings",
    "TokenLogprobs",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnd",
    "Vocabulary",
]
