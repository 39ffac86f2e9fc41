"""The engine: runs requests on a model, from prompt tokens to replies.

The façade and the chats import its public names from here. `scheduling` runs requests in the model thread, `kv`
restores and saves KV, `requests` holds what callers submit and receive, `output` parses replies, `grammar` and
`sampling` choose tokens, and `backends` compute. Imports run from `scheduling` to `kv`, `requests`, `output`,
`sampling` and `grammar`. These packages know a backend only by its protocols. The engine imports the cache.
"""

from erllama.engine.adapters import AdapterBackend
from erllama.engine.backend import (
    Backend,
    Batch,
    BlockRestorer,
    Buffer,
    InfillTokens,
    LargestLogits,
    Limits,
    ModelFacts,
    PackedBlock,
    RecoverableBackend,
    RowSelector,
    SpecialToken,
    Vocabulary,
)
from erllama.engine.embedding import Embedder, EmbeddingBackend, EmbeddingLimits
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.metrics import EngineMetrics
from erllama.engine.output.phase_options import Markers, PhaseOptions
from erllama.engine.requests.request import (
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
from erllama.engine.requests.ticket import Ticket
from erllama.engine.sampling.candidates import Candidates
from erllama.engine.sampling.declaration import OrderedRowsStep, Step
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import Sampler, SamplerFactory, SamplingState, TokenLogprobs
from erllama.engine.scheduling.model_thread import ModelThread
from erllama.engine.scheduling.scheduler import Phase
from erllama.engine.speculation import Drafter, Drafts

__all__ = [
    "AdapterBackend",
    "Backend",
    "Batch",
    "BlockRestorer",
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
    "LargestLogits",
    "Limits",
    "Markers",
    "ModelFacts",
    "ModelThread",
    "OrderedRowsStep",
    "PackedBlock",
    "Phase",
    "PhaseOptions",
    "RecoverableBackend",
    "Request",
    "RequestOptions",
    "RowSelector",
    "Sampler",
    "SamplerFactory",
    "SamplingOptions",
    "SamplingState",
    "SpecialToken",
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
