"""A forked child works, regardless of what other threads of its parent did at the fork."""

from __future__ import annotations

from pathlib import Path

from support.subprocesses import must_run


def test_a_child_forked_while_grammars_compile_can_compile() -> None:
    printed = must_run(
        """
        import itertools, os, signal, threading, warnings
        warnings.simplefilter("ignore")
        from erllama import Grammar
        from erllama.engine.grammar import llguidance_adapter

        Grammar.regex("a")
        usual = threading.stack_size()
        def compile_for_ever():
            for n in itertools.count():
                Grammar.json_schema({"enum": [f"word {n} {i}" for i in range(300)]})

        for _ in range(2):
            threading.Thread(target=compile_for_ever, daemon=True).start()
        for _ in range(12):
            while not llguidance_adapter._stack_size.locked():  # in the midst of it
                pass
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                assert Grammar.regex("b+").accepts("bb")
                assert not Grammar.gbnf('root ::= "x" | "y"').accepts("z")
                assert Grammar.json_schema({"type": "integer"}).accepts("12")
                assert threading.stack_size() == usual
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print("whole", flush=True)
        os._exit(0)
        """,
        timeout=300,
    )
    assert printed == "whole\n"


def test_a_child_forked_while_models_load_can_load() -> None:
    printed = must_run(
        """
        import os, signal, threading, warnings
        warnings.simplefilter("ignore")
        import erllama
        import erllama.metrics
        from erllama._model import load as _load
        from erllama._model import registry as _registry
        from erllama.engine.backends.stub import StubBackend

        held, forked = threading.Event(), threading.Event()
        def hold():
            with _registry._lock, _load._shared_cache_lock, erllama.metrics._lock:
                held.set()
                forked.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            with erllama.load_backend(StubBackend()) as model:
                model.complete("x", max_tokens=2)
            erllama.metrics.register()
            os._exit(0)
        forked.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print("whole")
        """
    )
    assert printed == "whole\n"


def test_a_child_can_close_a_context_whose_threads_only_the_parent_has(tiny_gguf: Path) -> None:
    printed = must_run(
        """
        import os, signal, sys, warnings
        import numpy as np
        from pathlib import Path
        warnings.simplefilter("ignore")
        from erllama.llama_ffi import LlamaContext, LlamaModel

        model = LlamaModel(Path(sys.argv[1]))
        context = LlamaContext(model, n_ctx=256, n_threads=2, n_threads_batch=2)
        row = np.zeros(1, np.int32)
        context.decode(row, row, row, np.ones(1, np.int8))
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            context.close()
            model.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        context.close()
        print("closed")
        """,
        tiny_gguf,
        timeout=120,
    )
    assert printed == "closed\n"
