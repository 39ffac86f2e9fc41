"""Downloads from the Hugging Face hub: resumed, checked, and under the model's name only when they are right."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import erllama
from erllama.models import find_model, local_models, pull
from erllama.models.download.hub import pull_from_hub
from erllama.testing.models import write_llama
from support.hub_server import HubServer, serve_hub
from support.model_stores import COMMIT

CONTENT = b"GGUF" + random.Random(1).randbytes(500_000)
CHOICES = {
    "repo-Q4_K_M.gguf": CONTENT,
    "repo-Q8_0.gguf": CONTENT + b"8",
    "mmproj-F16.gguf": b"GGUF projector",
    "README.md": b"# A model",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server of one repository, as the endpoint of huggingface_hub; the cache is empty."""
    with serve_hub(CHOICES, tmp_path / "home", monkeypatch) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The directory of the repository in the cache."""
    return tmp_path / "home/.cache/huggingface/hub/models--org--repo"


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def file_requests(hub: HubServer) -> list[str | None]:
    return [wanted for _, path, wanted in hub.requests if "/resolve/" in path]


def test_a_model_is_downloaded_into_the_cache_of_the_hub(hub: HubServer, cache: Path) -> None:
    fractions: list[float] = []
    path = pull("hf:org/repo:Q8_0", on_progress=fractions.append)
    assert path == cache / "snapshots" / COMMIT / "repo-Q8_0.gguf"
    assert path.read_bytes() == CHOICES["repo-Q8_0.gguf"]
    assert path.is_symlink()
    assert (cache / "refs" / "main").read_text() == COMMIT
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert find_model("hf:org/repo:Q8_0").path == path
    # huggingface_hub itself finds it, and downloads nothing.
    found = huggingface_hub.try_to_load_from_cache("org/repo", "repo-Q8_0.gguf", cache_dir=cache.parent)
    assert found == str(path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hf:org/repo", "repo-Q4_K_M.gguf"),
        ("hf:org/repo:q8_0", "repo-Q8_0.gguf"),
        ("hf:org/repo:repo-Q8_0.gguf", "repo-Q8_0.gguf"),
        ("hf:org/repo:repo-Q8_0", "repo-Q8_0.gguf"),
        ("hf:org/repo:*8_0.gguf", "repo-Q8_0.gguf"),
    ],
)
def test_a_tag_a_file_or_a_pattern_chooses_the_model(hub: HubServer, name: str, file: str) -> None:
    assert pull(name).name == file


def test_a_model_that_is_there_is_not_downloaded_again(hub: HubServer) -> None:
    first = pull("hf:org/repo")
    hub.requests.clear()
    assert pull("hf:org/repo") == first
    assert file_requests(hub) == []


def test_a_damaged_model_is_downloaded_again(hub: HubServer) -> None:
    path = pull("hf:org/repo")
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_ten_interruptions_in_one_call_do_not_matter(hub: HubServer) -> None:
    hub.cuts = [40_000] * 10
    path = pull("hf:org/repo")
    assert path.read_bytes() == CONTENT
    wanted = file_requests(hub)
    assert len(wanted) == 11
    assert wanted[0] is None
    assert len(set(wanted)) == 11, "each request continues where the last one ended"


def test_ten_processes_that_end_in_between_do_not_matter(hub: HubServer, cache: Path) -> None:
    """Each call ends in the middle, as a process does that is killed, and the next one continues."""
    for step in range(1, 11):

        def kill(fraction: float, limit: float = step / 11) -> None:
            if fraction >= limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pull("hf:org/repo", on_progress=kill)
        assert not (cache / "snapshots").exists(), "an incomplete model has no name"
        (model,) = local_models()
        assert "its download has not ended" in model.problem
    hub.requests.clear()
    assert pull("hf:org/repo").read_bytes() == CONTENT
    (wanted,) = file_requests(hub)
    assert wanted is not None
    assert int(wanted.removeprefix("bytes=").removesuffix("-")) > len(CONTENT) * 0.9
    assert files_in(cache / "blobs") == [next((cache / "blobs").iterdir()).name]


def test_a_server_without_ranges_sends_the_file_again(hub: HubServer) -> None:
    hub.cuts, hub.ignores_ranges = [100_000], True
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_begun_again(hub: HubServer, cache: Path) -> None:
    pull("hf:org/repo")
    blob = next((cache / "blobs").iterdir())
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    with next((cache / "blobs").iterdir()).open("ab") as file:
        file.write(b"more")
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_a_wrong_digest_leaves_nothing_under_the_name(hub: HubServer, cache: Path) -> None:
    hub.digests["repo-Q4_K_M.gguf"] = "0" * 64
    with pytest.raises(erllama.DownloadError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}; it is deleted"):
        pull("hf:org/repo")
    assert files_in(cache) == []
    assert local_models() == []
    del hub.digests["repo-Q4_K_M.gguf"]
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_a_damaged_partial_file_is_found_by_its_digest(hub: HubServer, cache: Path) -> None:
    def stop(fraction: float) -> bool:
        return fraction < 0.5

    with pytest.raises(erllama.LoadCancelled, match="on_progress cancelled the download"):
        pull("hf:org/repo", on_progress=stop)
    (partial,) = (cache / "blobs").iterdir()
    partial.write_bytes(b"XXXX" + partial.read_bytes()[4:])
    with pytest.raises(erllama.DownloadError, match="it is deleted"):
        pull("hf:org/repo")
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_a_connection_that_brings_nothing_ends_with_an_error(hub: HubServer) -> None:
    hub.cuts = [100_000, *[0] * 5]
    with pytest.raises(erllama.DownloadError, match=r"97\.7 KiB of 488\.3 KiB are kept; the next"):
        pull("hf:org/repo")
    assert pull("hf:org/repo").read_bytes() == CONTENT


def test_a_second_process_does_not_write_the_same_file(hub: HubServer, cache: Path) -> None:
    errors: list[Exception] = []

    def pull_again(fraction: float) -> None:
        if 0.4 < fraction < 1.0 and not errors:
            try:
                pull("hf:org/repo")
            except erllama.DownloadError as error:
                errors.append(error)

    assert pull("hf:org/repo", on_progress=pull_again).read_bytes() == CONTENT
    assert "another process downloads" in str(errors[0])


def test_all_parts_of_a_split_model_are_downloaded(hub: HubServer) -> None:
    hub.files = {f"Q6_K/big-Q6_K-{part:05}-of-00003.gguf": CONTENT + bytes([part]) for part in (1, 2, 3)}
    hub.cuts = [1000, 1000]
    path = pull("hf:org/repo:Q6_K")
    assert path.name == "big-Q6_K-00001-of-00003.gguf"
    assert [each.read_bytes() for each in sorted(path.parent.iterdir())] == [
        CONTENT + bytes([part]) for part in (1, 2, 3)
    ]
    (model,) = local_models()
    assert (model.name, model.problem) == ("hf:org/repo:Q6_K", "")


def test_hostile_names_of_files_are_left_out(hub: HubServer, tmp_path: Path) -> None:
    lfs = {"sha256": "a" * 64, "size": 4, "pointerSize": 1}
    hostile = ["../../escape.gguf", "/tmp/escape.gguf", "a/../../b.gguf", "a\\..\\b.gguf", "./x.gguf"]
    hub.siblings = [{"rfilename": name, "size": 4, "lfs": lfs} for name in hostile]
    hub.siblings.append({"rfilename": "no-digest.gguf", "size": 4})
    hub.files = {"only.gguf": CONTENT}
    assert pull("hf:org/repo").name == "only.gguf", "the others are no candidates"
    assert not list(tmp_path.rglob("escape*"))


def test_a_choice_that_is_not_unique_lists_the_models(hub: HubServer) -> None:
    with pytest.raises(erllama.DownloadError, match="has no model with 'Q5_K_M'; choose one of Q4_K_M, Q8_0"):
        pull("hf:org/repo:Q5_K_M")
    del hub.files["repo-Q4_K_M.gguf"]
    hub.files["repo-Q6_K.gguf"] = CONTENT
    with pytest.raises(erllama.DownloadError, match="choose one of Q6_K, Q8_0"):
        pull("hf:org/repo")
    hub.files = {"model.safetensors": b"{}"}
    with pytest.raises(erllama.DownloadError, match="has no GGUF model"):
        pull("hf:org/repo")


def test_a_gated_repository_is_explained(hub: HubServer) -> None:
    hub.status, hub.error_code = 403, "GatedRepo"
    with pytest.raises(erllama.DownloadError, match=rf"is gated: .*{hub.url}/org/repo, then run `hf auth login`"):
        pull("hf:org/repo")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no repository org/repo at http.*, or it is private"),
        (404, "RevisionNotFound", "has no such revision"),
        (400, "", "the hub answers 400"),
        (503, "", "is not downloaded yet, and the hub cannot be reached: the hub answers 503"),
    ],
)
def test_errors_of_the_hub_are_explained(hub: HubServer, status: int, code: str, message: str) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(erllama.DownloadError, match=message):
        pull("hf:org/repo", revision="v1")


def test_offline_the_downloaded_model_is_found(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull("hf:org/repo")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("hf:org/repo") == pull("hf:org/repo:Q4_K_M") == path
    with pytest.raises(erllama.DownloadError, match="has no model with 'Q8_0'"):
        pull("hf:org/repo:Q8_0")
    with pytest.raises(erllama.DownloadError, match="is not downloaded yet, and the hub cannot be reached"):
        pull("hf:org/other")
    assert hub.requests == []


def test_without_a_network_the_downloaded_model_is_found(hub: HubServer) -> None:
    path = pull("hf:org/repo")
    hub.status = 503
    assert pull("hf:org/repo") == path


def test_the_token_goes_to_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull("hf:org/repo")
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("name", ["hf:org", "hf:", "hf:../x/y", "hf:org/..", "nothing", "org/repo", "", 7])
def test_what_cannot_be_downloaded_is_refused(hub: HubServer, name: object) -> None:
    with pytest.raises(erllama.OptionError):
        pull(name)  # type: ignore[arg-type]
    assert hub.requests == []


def test_without_huggingface_hub_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(erllama.MissingPackage, match=r"pip install 'erllama\[hub\]'"):
        pull("hf:org/repo")


def test_from_pretrained_downloads_and_loads(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {"tiny-F32.gguf": write_llama(tmp_path / "tiny.gguf").read_bytes()}
    with pytest.raises(erllama.OptionError, match="n_ctxx"):
        erllama.Model.from_pretrained("org/repo", n_ctxx=256)
    assert hub.requests == [], "options are checked before a download"
    with erllama.Model.from_pretrained("org/repo", filename="*F32.gguf", n_threads=1, n_ctx=256) as model:
        assert model.complete("a", max_tokens=2).tokens
    with erllama.Model.from_pretrained("org/repo", cache_dir=tmp_path / "elsewhere", vocab_only=True) as model:
        assert model.tokenize("a").size
    assert (tmp_path / "elsewhere" / "models--org--repo" / "refs" / "main").exists()


def test_the_command_takes_the_endpoint_and_the_mode(hub: HubServer, tmp_path: Path) -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "erllama", "pull", "hf:org/repo"],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            timeout=120,
            check=False,
        )

    done = run(HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    hub.requests.clear()
    assert run(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1").stdout == done.stdout
    assert hub.requests == []


# --- a directory of the user, and further files


def test_a_directory_gets_the_files_by_their_names(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.plain, hub.cuts = {"README.md"}, [40_000]
    here = tmp_path / "models here"
    path = pull_from_hub("org/repo", "*Q8_0*", local_dir=here, additional_files=["README*", "mmproj-F16.gguf"])
    assert path == here / "repo-Q8_0.gguf"
    assert files_in(here) == ["README.md", "mmproj-F16.gguf", "repo-Q8_0.gguf"]
    assert all((here / name).read_bytes() == CHOICES[name] for name in files_in(here))
    assert not cache.exists()
    hub.requests.clear()
    assert pull_from_hub("org/repo", "Q8_0", local_dir=here, additional_files=["README.md"]) == path
    assert file_requests(hub) == []
    hub.status = 503
    assert pull_from_hub("org/repo", "Q8_0", local_dir=here, additional_files=["README.md"]) == path
    with pytest.raises(erllama.DownloadError, match=r"no file of org/repo match '\*\.txt'"):
        pull_from_hub("org/repo", "Q8_0", local_dir=here, additional_files=["*.txt"])


def test_further_files_are_in_the_cache_as_the_hub_names_them(hub: HubServer, cache: Path) -> None:
    hub.plain = {"README.md"}
    pull_from_hub("org/repo", additional_files=["README.md"])
    found = huggingface_hub.try_to_load_from_cache("org/repo", "README.md", cache_dir=cache.parent)
    assert Path(str(found)).read_bytes() == CHOICES["README.md"]
    with pytest.raises(erllama.DownloadError, match="2 files of org/repo"):
        pull_from_hub("org/repo", additional_files=["repo-*"])


def test_a_file_of_the_user_stays_if_its_replacement_is_wrong(hub: HubServer, tmp_path: Path) -> None:
    hub.plain, hub.digests = {"README.md"}, {"README.md": "0" * 40}
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(erllama.DownloadError, match=r"has sha1 .*, expected 0000"):
        pull_from_hub("org/repo", local_dir=tmp_path, additional_files=["README.md"])
    assert (tmp_path / "README.md").read_text() == "mine"
    hub.digests = {}
    pull_from_hub("org/repo", local_dir=tmp_path, additional_files=["README.md"])
    assert (tmp_path / "README.md").read_bytes() == CHOICES["README.md"]
