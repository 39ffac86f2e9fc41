"""Starts the first process of a model, from the checked options of `load_model` and `load_backend`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from erllama._process.backend_factory import BackendFactory
from erllama._process.child_process import check_platform, library_version
from erllama._process.options import ProcessOptions
from erllama._process.protocol import messages as m
from erllama._process.remote_backend import ModelFile, RemoteBackend
from erllama._process.runner import ProcessRunner
from erllama.cache import Cache, Policy
from erllama.engine.scheduling.options import SchedulingOptions
from erllama.errors import OptionError
from erllama.events.options import KvEvents

if TYPE_CHECKING:
    from erllama.engine.backends.fingerprint import Fingerprint
    from erllama.engine.backends.llama_options import LlamaOptions

_LOGGERS = ("erllama", "erllama.cache", "erllama.engine", "erllama.process")
_LONGEST_HEARTBEAT = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Launch:
    """How the process of a model is started.

    Attributes:
        options: of the supervision.
        cache: of the parent. The process opens its directories.
        policy, scheduling, warmup: of the model.
        kv_events: where the process publishes events; None for a model that publishes none.
    """

    options: ProcessOptions
    cache: Cache
    policy: Policy
    scheduling: SchedulingOptions
    warmup: bool
    kv_events: KvEvents | None = None

    def gguf_model(
        self,
        file: Path,
        options: LlamaOptions,
        naming: Fingerprint,
        on_progress: Callable[[float], object] | None,
        id: str,
    ) -> tuple[ProcessRunner, RemoteBackend]:
        """Load a GGUF file in a process."""
        from erllama.engine.backends.llama_file import VocabularyFile, check_file

        check_platform()
        check_file(file)
        overrides = options.overrides or {}
        # The others have no effect on a vocabulary. The process checks all of them.
        own = {key: value for key, value in overrides.items() if key.startswith("tokenizer.")}
        vocabulary = VocabularyFile(file, replace(options, overrides=own or None))
        described = ModelFile(
            vocabulary.vocabulary,
            MappingProxyType({**vocabulary.metadata, **overrides}),
            vocabulary.chat_templates,
            vocabulary.close,
        )
        values = {field.name: getattr(options, field.name) for field in fields(options)}
        values["overrides"] = dict(overrides) or None
        model = m.GgufModel(
            os.fsencode(file.absolute()), json.dumps(values).encode(), naming.kind, naming.own_bytes
        )
        try:
            return self._start(model, id, described, on_progress)
        except BaseException:
            vocabulary.close()
            raise

    def custom_model(self, factory: BackendFactory, id: str) -> tuple[ProcessRunner, RemoteBackend]:
        """Make a custom backend in a process."""
        check_platform()
        if factory.backend is not None:
            raise OptionError(
                'process=True with a backend of this process; pass the function that makes it, "module:function", '
                "and its options"
            )
        model = m.CustomModel(factory.module, factory.function, factory.options)
        return self._start(model, id, None, None)

    def _start(
        self,
        model: m.GgufModel | m.CustomModel,
        id: str,
        file: ModelFile | None,
        on_progress: Callable[[float], object] | None,
    ) -> tuple[ProcessRunner, RemoteBackend]:
        sizes = self.scheduling
        start = m.Start(
            protocol=m.PROTOCOL,
            version=library_version(),
            id=id,
            model=model,
            cache=self.cache.share_with_process(),
            policy=asdict(self.policy),
            sizes=(sizes.n_seq_max, sizes.prefill_chunk_size, sizes.parked_cells, sizes.max_pending),
            warmup=self.warmup,
            log_levels={name: logging.getLogger(name).getEffectiveLevel() for name in _LOGGERS},
            python_path=tuple(sys.path),
            heartbeat_seconds=min(_LONGEST_HEARTBEAT, self.options.hang_timeout / 4),
            kv_events=None if self.kv_events is None else self.kv_events.with_ports(),
        )
        runner = ProcessRunner(
            start, self.options, self.cache, file, sizes.max_pending, self.policy.evict_save_timeout_ms / 1000
        )
        try:
            return runner, runner.wait_until_loaded(on_progress)
        except BaseException:
            runner.stop()
            raise
