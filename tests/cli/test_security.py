"""Promises of SECURITY.md that no other test checks: no network, no other program, no access for others."""

from __future__ import annotations

from pathlib import Path

from support.subprocesses import run_python


def test_a_model_and_a_cache_touch_no_network_and_run_no_program(tiny_gguf: Path, tmp_path: Path) -> None:
    """As far as Python's audit hooks report."""
    finished = run_python(
        """
        import sys

        touched = []
        watched = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen",
                   "os.system", "os.exec", "pickle.find_class")
        sys.addaudithook(lambda event, _: touched.append(event) if event in watched else None)

        import asyncio
        import erllama, erllama.metrics

        with erllama.Cache(disk=sys.argv[1], pressure=True) as cache:
            with erllama.load_model(sys.argv[2], cache=cache, n_ctx=512, n_threads=1) as model:
                model.complete("hello", max_tokens=4)
                model.chat([{"role": "user", "content": "hello"}], max_tokens=4)
                model.complete("x", json_schema={"type": "boolean"}, max_tokens=4)
                model.embed(["hello"])
                asyncio.run(model.acomplete("hello", max_tokens=4))
        print(touched)
        """,
        str(tmp_path / "prompts"),
        str(tiny_gguf),
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "[]\n"
    files = [path for path in (tmp_path / "prompts").rglob("*") if not path.is_dir()]
    assert any(path.suffix == ".kvc" for path in files)
    for path in [tmp_path / "prompts", *(tmp_path / "prompts").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
