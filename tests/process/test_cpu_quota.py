"""The default number of threads under a real CPU quota, in a cgroup that the test makes where that is permitted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.subprocesses import must_run

PERIOD_US = 100_000
ROOT = Path("/sys/fs/cgroup")

CODE = """
    import os, sys
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
    import erllama
    path = sys.argv[2]
    with erllama.load_model(path, n_ctx=256) as chosen, erllama.load_model(path, n_ctx=256, n_threads=2) as given:
        reply = chosen.complete("Once upon a time", max_tokens=8, temperature=0)
        print(chosen.info.n_threads, given.info.n_threads, len(reply.tokens), chosen.info.threads_reason)
"""


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A cgroup with a quota of one core, of version 1 or 2."""
    name = f"erllama-test-{os.getpid()}"
    v1, v2 = ROOT / "cpu" / name, ROOT / name
    group = v1 if (ROOT / "cpu").is_dir() else v2
    try:
        group.mkdir()
        try:
            if group is v1:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US))
            else:
                (group / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    yield group
    with suppress(OSError):
        group.rmdir()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is available anyway")
def test_a_quota_of_one_core_leads_to_one_thread(one_core: Path, tiny_gguf: Path) -> None:
    chosen, given, n_tokens, *reason = must_run(CODE, one_core, tiny_gguf).split()
    assert (chosen, given, n_tokens) == ("1", "2", "8")
    assert "quota" in " ".join(reason)
