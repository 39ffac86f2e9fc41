"""`erllama cache`: lists, checks, prunes, exports and imports stored blocks while other processes use them."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Cache, namespace_key
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks import kvc as kvc_format
from support.cli import Command, CommandResult, write_replying_model
from support.paths import TESTS
from support.storage.blocks import SIZE, blocks_of

ONE = ("--threads", "1")
OTHER = namespace_key({"model": "b"})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def fill(root: Path, *contexts: Sequence[int], namespace: bytes | None = None) -> None:
    """Store contexts, each token 100 bytes."""
    with Cache(ram=0, disk=root, block_size=SIZE) as cache:
        for tokens in contexts:
            ids = np.array(tokens, np.int32)
            for block in blocks_of(ids) if namespace is None else blocks_of(ids, namespace):
                cache.save(block, block.key * (block.n_tokens * 100 // 32))


def files_of(run: Command) -> list[Path]:
    return sorted((run.directory / "blocks").iterdir())


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


A, B, C = range(40), [*range(32), 99, 98], range(200, 220)  # A and B share two blocks; C shares none


# --- output -------------------------------------------------------------------------------------------


def test_stored_blocks_are_listed_by_namespace_and_by_context(run: Command) -> None:
    fill(run.directory, A, B)
    fill(run.directory, C, namespace=OTHER)
    (stats,) = run("cache", "stats", "--json").json
    assert (stats["contexts"], stats["blocks"], stats["tokens"]) == (3, 6, 32 + 8 + 2 + 20)
    assert stats["bytes"] == sum(path.stat().st_size for path in files_of(run))
    assert [each["blocks"] for each in stats["namespaces"]] == [2, 4]
    plain = run("cache", "stats").out
    assert OTHER.hex()[:16] in plain
    assert "6 blocks, 62 tokens" in plain
    contexts = run("cache", "ls", "--json").json
    assert sorted(context["tokens"] for context in contexts) == [20, 34, 40]
    assert contexts[0]["namespace"] == OTHER.hex()
    assert all(context["complete"] for context in contexts)
    lines = run("cache", "ls", "--limit", 1).out.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:2] == [contexts[0]["context"][:16], OTHER.hex()[:16]]


def test_an_empty_directory_is_reported_and_not_created(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("cache", "stats")
    assert found.status == 1
    assert "holds no cache" in found.err
    assert not run.directory.exists()
    monkeypatch.delenv("ERLLAMA_CACHE_DIR")
    monkeypatch.setattr("erllama.cli.cache.directories.default_directories", lambda: [run.directory])
    found = run("cache", "ls", "--json")
    assert (found.status, found.json) == (0, [])
    assert "does not exist yet" in found.err


def test_an_unusable_directory_is_reported_in_one_line(run: Command) -> None:
    fill(run.directory, A)
    (run.directory / "notes.txt").write_text("somebody else's")
    run.directory.chmod(0o755)
    for command in (["stats"], ["verify"], ["gc"], ["evict", "--all"], ["export", "-"]):
        found = run("cache", *command)
        assert found.status == 1
        assert "chmod 700" in found.err


# --- checked and repaired -----------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_and_repaired(run: Command) -> None:
    fill(run.directory, A, C)
    assert run("cache", "verify").out == "5 blocks checked, 0 problems\n"
    flip(files_of(run)[0], -1)
    found = run("cache", "verify")
    assert found.status == 1
    assert f"{files_of(run)[0]}: the payload's checksum does not match" in found.out
    report = run("cache", "verify", "--json")
    assert report.status == 1
    assert [problem["location"] for problem in report.json["problems"]] == [str(files_of(run)[0])]
    assert len(files_of(run)) == 5
    repaired = run("cache", "verify", "--repair")
    assert repaired.status == 0
    assert "1 problem, repaired" in repaired.out
    assert len(list((run.directory / "damaged").iterdir())) == 1
    assert run("cache", "verify").status == 0


def test_files_of_dead_processes_and_unreachable_blocks_are_removed(run: Command) -> None:
    fill(run.directory, A, C)
    (run.directory / "partial" / "0123456789abcdef-0.kvc").write_bytes(b"half")
    first = blocks_of(np.array(A, np.int32))[0]
    (run.directory / "blocks" / f"{first.key.hex()}.kvc").unlink()
    (done,) = run("cache", "gc", "--json").json
    assert (done["leftovers"], done["removed_blocks"]) == (1, 2)
    assert run("cache", "gc").out.count(" 0 ") >= 2
    assert list((run.directory / "partial").iterdir()) == []
    assert run("cache", "stats", "--json").json[0]["tokens"] == len(C)


# --- thinned out ------------------------------------------------------------------------------------------


def left(run: Command) -> list[int]:
    return sorted(context["tokens"] for context in run("cache", "ls", "--json").json)


def test_a_namespace_is_evicted_by_a_prefix_of_its_name(run: Command) -> None:
    fill(run.directory, A)
    fill(run.directory, C, namespace=OTHER)
    assert run("cache", "evict", "--namespace", "").status == 1
    assert "no namespace starts with 'zz'" in run("cache", "evict", "-n", "zz").err
    assert run("cache", "evict", "-n", OTHER.hex()[:8], "--json").json["removed_blocks"] == 2
    assert left(run) == [40]


def test_evicting_by_age_keeps_blocks_that_others_follow(run: Command) -> None:
    fill(run.directory, A, C)
    with CacheFiles(run.directory) as files, files._tier._using() as index, index.transaction():
        index.db.execute("UPDATE blocks SET last_used = last_used - ?", [2 * 3600 * 10**9])
    fill(run.directory, B)
    assert run("cache", "evict", "--older-than", "3h").out == "0 blocks removed, 0 B\n"
    assert run("cache", "evict", "--older-than", "1h").status == 0
    assert left(run) == [34]  # its first two blocks are as old as the evicted ones


def test_a_directory_is_reduced_to_a_size_oldest_first(run: Command) -> None:
    fill(run.directory, A)
    fill(run.directory, C)
    size = run("cache", "stats", "--json").json[0]["bytes"]
    run("cache", "evict", "--to-size", size)
    assert left(run) == [20, 40]
    run("cache", "evict", "--to-size", 3000)
    assert left(run) == [20]
    run("cache", "gc", "--quota", "1KB")
    assert left(run) == []


def test_evict_all_removes_every_trace_of_prompts(run: Command, tmp_path: Path) -> None:
    model = write_replying_model(tmp_path / "says.gguf", "Yes.")
    run("chat", model, *ONE, stdin="Is it?\nSure?\n")
    (run.directory / "damaged" / "1-x.kvc").write_bytes(b"x")
    assert run("cache", "evict", "--all").status == 0
    assert files_of(run) == []
    assert list((run.directory / "damaged").iterdir()) == []
    with CacheFiles(run.directory) as files, files._tier._using() as index:
        assert index.db.execute("SELECT count(*) FROM text_pieces").fetchone() == (0,)
    assert "none cached" in run("chat", model, "--stats", *ONE, stdin="Is it?").err


def test_evict_requires_a_selection(run: Command) -> None:
    fill(run.directory, A)
    for options in ([], ["--all", "--older-than", "1d"], ["--older-than", "soon"], ["--to-size", "-1"]):
        assert run("cache", "evict", *options).status == 2
    assert left(run) == [40]


# --- carried elsewhere ------------------------------------------------------------------------------------


def test_an_imported_archive_serves_prompts_in_another_directory(run: Command, tmp_path: Path) -> None:
    model, archive, there = (
        write_replying_model(tmp_path / "says.gguf", "Yes."),
        tmp_path / "a.tar",
        tmp_path / "there",
    )
    run("run", model, "Is it? " * 40, *ONE)
    done = run("cache", "export", archive, "--json").json
    assert archive.stat().st_mode & 0o777 == 0o600
    assert done["blocks"] == len(files_of(run)) > 1
    brought = run("cache", "import", archive, "--dir", there)
    assert brought.out.startswith(f"{done['blocks']} blocks stored")
    assert f"{done['blocks']} already present" in run("cache", "import", archive, "--dir", there).out
    reply = run("run", model, "Is it? " * 40, "--json", "--cache-dir", there, *ONE).json
    assert (reply["cache"]["kind"], reply["cache"]["tier"]) == ("exact", "disk")
    assert run("cache", "verify", "--dir", there).status == 0


def test_archives_can_be_piped(run: Command, tmp_path: Path) -> None:
    fill(run.directory, A)
    fill(run.directory, C, namespace=OTHER)
    out = run.in_subprocess("cache", "export", "-", "--namespace", OTHER.hex())
    assert out.returncode == 0
    there = tmp_path / "there"
    brought = run.in_subprocess("cache", "import", "-", "--dir", there, stdin=out.stdout)
    assert brought.stdout.startswith(b"2 blocks stored")
    assert [
        each["namespace"] for each in run("cache", "stats", "--json", "--dir", there).json[0]["namespaces"]
    ] == [OTHER.hex()]


def test_damaged_blocks_and_their_successors_are_not_exported(run: Command, tmp_path: Path) -> None:
    fill(run.directory, A, C)
    first = blocks_of(np.array(A, np.int32))[0]
    flip(run.directory / "blocks" / f"{first.key.hex()}.kvc", -1)
    done = run("cache", "export", tmp_path / "a.tar", "--json")
    assert done.json["blocks"] == 2
    assert len(done.json["left_out"]) == 3
    assert "the payload's checksum does not match" in done.err


def imported(run: Command, tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> CommandResult:
    """Import an archive that holds one valid block and then these members."""
    block = blocks_of(np.array(C, np.int32))[0]
    payload = memoryview(b"x" * 100)
    good = bytes(kvc_format.encode_header(block, payload)) + payload
    archive = tmp_path / "hostile.tar"
    with tarfile.open(archive, "w") as tar:
        for member, content in [(named(f"blocks/{block.key.hex()}.kvc"), good), *members]:
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))
    return run("cache", "import", archive, "--dir", tmp_path / "there")


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


KEY = "ab" * 32


@pytest.mark.parametrize(
    ("member", "content"),
    [
        (named("../../../tmp/evil"), b"x"),
        (named(f"/blocks/{KEY}.kvc"), b"x"),
        (named(f"blocks/../{KEY}.kvc"), b"x"),
        (named(f"blocks/{KEY}.kvc/x"), b"x"),
        (named(f"blocks/{KEY.upper()}.kvc"), b"x"),
        (named("index.db"), b"x"),
        (named("blocks", tarfile.DIRTYPE), b""),
        (named(f"blocks/{KEY}.kvc", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (named(f"blocks/{KEY}.kvc", tarfile.LNKTYPE, "/etc/passwd"), b""),
        (named(f"blocks/{KEY}.kvc", tarfile.FIFOTYPE), b""),
        (named(f"blocks/{KEY}.kvc", tarfile.CHRTYPE), b""),
        (named(f"blocks/{KEY}.kvc"), b""),
    ],
)
def test_an_archive_of_other_files_is_refused_and_stores_nothing(
    run: Command, tmp_path: Path, member: tarfile.TarInfo, content: bytes
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    found = imported(run, tmp_path, (member, content))
    assert found.status == 1
    assert found.err.startswith("erllama: ")
    assert len(found.err.splitlines()) == 1
    assert not list((tmp_path / "there" / "blocks").iterdir())
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.name for path in new} <= {"hostile.tar", "index.db", "index.db-wal", "index.db-shm"}


def test_invalid_blocks_of_an_archive_are_refused_alone(run: Command, tmp_path: Path) -> None:
    block = blocks_of(np.array(A, np.int32))[0]
    payload = memoryview(b"y" * 100)
    whole = bytes(kvc_format.encode_header(block, payload)) + payload
    name = f"blocks/{block.key.hex()}.kvc"
    bad = [whole[:-1], whole + b"z", whole[:-1] + b"z", whole[:100] + b"z" + whole[101:], b"z" * 1000, whole[:50]]
    found = imported(
        run, tmp_path, (named(f"blocks/{KEY}.kvc"), whole), *[(named(name), content) for content in bad]
    )
    assert found.status == 1
    assert len(found.err.splitlines()) == 1 + len(bad)
    assert all("refused" in line for line in found.err.splitlines())
    assert found.out.startswith("1 block stored")
    assert run("cache", "verify", "--dir", tmp_path / "there").out == "1 block checked, 0 problems\n"


def test_a_truncated_or_invalid_archive_is_refused(run: Command, tmp_path: Path) -> None:
    fill(run.directory, A)
    run("cache", "export", tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    huge = named(f"blocks/{KEY}.kvc", size=1 << 40)
    lying = huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024
    for content in (b"", b"no tar" * 500, whole[:1000], whole[:4000], lying, b"\0" * 10240):
        (tmp_path / "b.tar").write_bytes(content)
        found = run("cache", "import", tmp_path / "b.tar", "--dir", tmp_path / "there")
        assert (found.status, found.err.startswith("erllama: ")) == (1, True), content[:20]
        assert "bug in erllama" not in found.err
    for content in (whole[:4000], lying):
        piped = run.in_subprocess("cache", "import", "-", "--dir", tmp_path / "there", stdin=content)
        assert (piped.returncode, piped.stderr.startswith(b"erllama: ")) == (1, True)
        assert b"bug in erllama" not in piped.stderr
    assert run("cache", "verify", "--dir", tmp_path / "there").status == 0


def test_a_failed_export_leaves_no_file(run: Command, tmp_path: Path) -> None:
    fill(run.directory, A)
    (tmp_path / "no").mkdir()
    assert run("cache", "export", tmp_path / "no" / "such" / "a.tar").status == 1
    assert run("cache", "export", tmp_path / "no").status == 1
    assert list((tmp_path / "no").iterdir()) == []
    assert list(tmp_path.glob(".*")) == []


# --- beside who uses it -----------------------------------------------------------------------------------


WORKING = """
    import random, sys, time
    import numpy as np
    from pathlib import Path
    from support.storage.blocks import SIZE, blocks_of
    from erllama.cache import Cache

    dice, end = random.Random(int(sys.argv[2])), time.monotonic() + 3
    n_found = 0
    with Cache(ram=0, disk=Path(sys.argv[1]), block_size=SIZE) as cache:
        print("ready", flush=True)
        while time.monotonic() < end:
            head = dice.randrange(6)
            tokens = np.array([head] * 20 + [dice.randrange(3) for _ in range(dice.randrange(40))], np.int32)
            for block in blocks_of(tokens):
                cache.save(block, block.key * 50)
            cache.flush()
            with cache.lookup(block.namespace, tokens) as match:
                for block in match.blocks:
                    loaded = cache.load(block)
                    n_found += loaded is not None
                    assert loaded is None or bytes(loaded.payload) == block.key * 50
        counters = cache.counters()
    print(n_found, counters["corrupt_files"], counters["faults"], counters["disk_errors"])
"""


def test_a_directory_can_be_maintained_while_processes_use_it(run: Command, tmp_path: Path) -> None:
    code = textwrap.dedent(WORKING)
    command = [sys.executable, "-c", code, str(run.directory)]
    environment = {"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin"}
    pipes: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]  # type: ignore[call-overload]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n", worker.stderr.read()
    archive = tmp_path / "a.tar"
    n_rounds = 0
    while any(worker.poll() is None for worker in workers):
        n_rounds += 1
        for step in (
            ["export", archive],
            ["evict", "--to-size", "20KB"],
            ["import", archive],
            ["gc", "--quota", "60KB"],
            ["evict", "--older-than", "1s"],
            ["ls"],
        ):
            found = run("cache", *step)
            # If no block is stored at that moment, the archive is empty.
            assert found.status == 0 or "the archive is empty" in found.err, (step, found)
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        n_found, *wrong = map(int, out.split())
        assert n_found > 0
        assert wrong == [0, 0, 0], err
    assert n_rounds > 1
    run("cache", "gc")
    found = run("cache", "verify")
    assert (found.status, found.err) == (0, ""), found.out
