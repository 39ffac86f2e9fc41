"""The models in the stores of other programs are listed as they are, or reported as broken. Nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from erllama.models import LocalModel, local_models
from erllama.models.stores import walk
from support.model_stores import COMMIT, OllamaStore, add_to_hub_cache, empty_home

GGUF = b"GGUF" + bytes(60)
LIBRARY = "registry.ollama.ai/library"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    empty_home(tmp_path / "home", monkeypatch)
    return tmp_path / "home"


@pytest.fixture
def ollama(home: Path) -> OllamaStore:
    """An empty store at Ollama's default place."""
    return OllamaStore(home / ".ollama" / "models")


def listed() -> dict[str, LocalModel]:
    return {model.name: model for model in local_models()}


def snapshot(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*"))


def test_without_any_store_there_is_no_model() -> None:
    assert local_models() == []


# --- Ollama -------------------------------------------------------------------------------------


def test_models_of_ollama_have_the_names_that_ollama_shows(ollama: OllamaStore) -> None:
    digest = ollama.add(f"{LIBRARY}/llama3.2/3b", GGUF)
    ollama.add(f"{LIBRARY}/qwen/latest", GGUF + b"q")
    ollama.add("registry.ollama.ai/someone/own/v1", GGUF + b"o")
    ollama.add("hf.co/org/repo-GGUF/Q4_K_M", GGUF + b"h")
    before = snapshot(ollama.root)
    models = listed()
    assert set(models) == {"llama3.2:3b", "qwen:latest", "someone/own:v1", "hf.co/org/repo-GGUF:Q4_K_M"}
    model = models["llama3.2:3b"]
    assert model.path == ollama.root / "blobs" / digest.replace(":", "-")
    assert (model.store, model.n_bytes, model.problem) == ("ollama", len(GGUF), "")
    assert "qwen" in models["qwen:latest"].aliases, "as in Ollama, no tag means latest"
    assert snapshot(ollama.root) == before, "stores are only read"


def test_a_model_of_ollama_without_its_blob_is_broken(ollama: OllamaStore) -> None:
    digest = ollama.add(f"{LIBRARY}/gone/latest", GGUF)
    (ollama.root / "blobs" / digest.replace(":", "-")).unlink()
    assert listed()["gone:latest"].problem.endswith("is missing; run `ollama pull gone:latest`")


def test_a_blob_of_another_size_is_broken(ollama: OllamaStore) -> None:
    ollama.add(f"{LIBRARY}/short/latest", GGUF, size=1000)
    assert "has 64 bytes, and its manifest says 1000" in listed()["short:latest"].problem


def test_a_model_of_ollama_that_is_not_gguf_is_broken(ollama: OllamaStore) -> None:
    tensor = "application/vnd.ollama.image.tensor; name=x; dtype=bf16"
    ollama.manifest(f"{LIBRARY}/safe/latest", [{"mediaType": tensor, "digest": ollama.blob(b"t"), "size": 1}])
    ollama.manifest(f"{LIBRARY}/cloud/latest", None)
    ollama.add(f"{LIBRARY}/other/latest", b"PK\3\4 a zip file")
    ollama.add(f"{LIBRARY}/adapted/latest", GGUF, "adapter")
    models = listed()
    assert models["safe:latest"].problem == "it is not a GGUF model: its manifest lists safetensors"
    assert models["cloud:latest"].problem == "it is not a GGUF model: its manifest lists no file of a model"
    assert models["other:latest"].problem.endswith("is not a GGUF file")
    assert "adapter" in models["adapted:latest"].problem


def test_a_download_of_ollama_in_progress_is_broken(ollama: OllamaStore) -> None:
    blob = f"sha256-{'ab' * 32}"
    (ollama.root / "blobs" / f"{blob}-partial").write_bytes(GGUF)
    (ollama.root / "blobs" / f"{blob}-partial-0").write_text("{}")
    assert [(name, model.n_bytes) for name, model in listed().items()] == [(blob, 64)]
    assert "has not ended" in listed()[blob].problem


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../../etc/passwd",
        "sha256-" + "a" * 64,
        "sha256:" + "A" * 64,
        "",
        None,
        7,
        ["x"],
        "/etc/passwd",
    ],
    ids=str,
)
def test_a_digest_that_is_none_never_becomes_a_path(ollama: OllamaStore, digest: object) -> None:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1}
    manifest = ollama.manifest(f"{LIBRARY}/evil/latest", [layer])
    model = listed()["evil:latest"]
    assert model.problem == "its manifest has an invalid digest"
    assert model.path == manifest


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"layers": 7}', '{"layers": [7]}', '{"layers": [{}]}', "[" * 100_000, "\0" * 10],
    ids=range(9),
)
def test_a_manifest_that_is_none_is_broken(ollama: OllamaStore, text: str) -> None:
    ollama.manifest(f"{LIBRARY}/evil/latest", None, text)
    ollama.add(f"{LIBRARY}/good/latest", GGUF)
    models = listed()
    assert models["evil:latest"].problem == "its manifest cannot be read"
    assert models["good:latest"].problem == ""


def test_a_huge_manifest_or_a_pipe_is_not_read(ollama: OllamaStore) -> None:
    huge = ollama.manifest(f"{LIBRARY}/huge/latest", None)
    with huge.open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file
    os.mkfifo(ollama.root / "manifests" / LIBRARY / "huge" / "pipe")
    models = listed()
    assert models["huge:latest"].problem == models["huge:pipe"].problem == "its manifest cannot be read"


def test_the_variable_of_ollama_chooses_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OllamaStore(tmp_path / "elsewhere").add(f"{LIBRARY}/m/latest", GGUF)
    assert listed() == {}
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    assert set(listed()) == {"m:latest"}


# --- huggingface_hub ----------------------------------------------------------------------------


@pytest.fixture
def hub(home: Path) -> Path:
    """An empty cache at the default place of huggingface_hub."""
    return home / ".cache" / "huggingface" / "hub"


def test_models_of_the_hub_are_named_by_their_quantization(hub: Path) -> None:
    path = add_to_hub_cache(hub, "org/repo-GGUF", "Repo-3B-Q4_K_M.gguf", GGUF)
    add_to_hub_cache(hub, "org/repo-GGUF", "Repo-3B-Q8_0.gguf", GGUF + b"8")
    add_to_hub_cache(hub, "org/repo-GGUF", "mmproj-Repo-3B-F16.gguf", GGUF + b"p")
    add_to_hub_cache(hub, "org/one", "sub/only.gguf", GGUF + b"1")
    add_to_hub_cache(hub, "org/weights", "model.safetensors", b"{}")
    models = listed()
    assert set(models) == {"hf:org/repo-GGUF:Q4_K_M", "hf:org/repo-GGUF:Q8_0", "hf:org/one:sub/only"}
    model = models["hf:org/repo-GGUF:Q4_K_M"]
    assert (model.path, model.store, model.problem) == (path, "hugging face", "")
    assert {"org/repo-GGUF:Q4_K_M", "Repo-3B-Q4_K_M"} <= set(model.aliases)
    assert "hf:org/one" in models["hf:org/one:sub/only"].aliases, "the only model of a repository needs no tag"


def test_two_models_with_one_quantization_are_named_by_file(hub: Path) -> None:
    add_to_hub_cache(hub, "org/repo", "a-Q4_0.gguf", GGUF)
    add_to_hub_cache(hub, "org/repo", "b-Q4_0.gguf", GGUF + b"b")
    assert set(listed()) == {"hf:org/repo:a-Q4_0", "hf:org/repo:b-Q4_0"}


def test_links_may_lead_out_of_the_cache(hub: Path, tmp_path: Path) -> None:
    """huggingface_hub keeps blobs that several repositories share in a place of their own."""
    shared = tmp_path / "shared blob"
    shared.write_bytes(GGUF)
    path = add_to_hub_cache(hub, "org/repo", "m-Q4_0.gguf", b"")
    path.unlink()
    path.symlink_to(shared)
    model = listed()["hf:org/repo:Q4_0"]
    assert (model.problem, model.n_bytes) == ("", 64)


def test_a_dangling_link_is_broken(hub: Path) -> None:
    path = add_to_hub_cache(hub, "org/repo", "m-Q4_0.gguf", GGUF)
    path.resolve().unlink()
    assert "is missing" in listed()["hf:org/repo:Q4_0"].problem


def test_the_snapshot_of_main_comes_first(hub: Path) -> None:
    old = add_to_hub_cache(hub, "org/repo", "m-Q4_0.gguf", GGUF, "f" * 40, main=False)
    main = add_to_hub_cache(hub, "org/repo", "m-Q4_0.gguf", GGUF + b"new")
    os.utime(main.parent, (1, 1))
    assert [model.path for model in local_models()] == [main]
    main.resolve().unlink()
    assert listed()["hf:org/repo:Q4_0"].path == old, "an older one that is complete, rather than a broken one"


def test_a_download_from_the_hub_in_progress_is_broken(hub: Path) -> None:
    blobs = hub / "models--org--repo" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'a' * 64}.incomplete").write_bytes(GGUF)
    (blobs / f"{'b' * 64}.1a2b3c4d.incomplete").write_bytes(b"{}")
    (model,) = local_models()
    assert (model.name, model.n_bytes) == ("hf:org/repo", 64), "other files than models are of no interest"
    assert "has not ended; run `erllama pull hf:org/repo`" in model.problem


def test_the_parts_of_a_split_model_count_as_one(hub: Path) -> None:
    for part in (1, 2, 3):
        add_to_hub_cache(hub, "org/big", f"Q8_0/big-Q8_0-{part:05}-of-00003.gguf", GGUF + bytes([part]))
    (model,) = local_models()
    assert (model.name, model.n_bytes, model.problem) == ("hf:org/big:Q8_0", 3 * 65, "")
    assert model.path.name == "big-Q8_0-00001-of-00003.gguf"
    model.path.unlink()
    (model,) = local_models()
    assert model.problem == "it is split into 3 parts, and of these are missing: 1"


@pytest.mark.parametrize(
    ("variable", "inner"), [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")]
)
def test_the_variables_of_the_hub_choose_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, inner: str
) -> None:
    add_to_hub_cache(tmp_path / "elsewhere" / inner, "org/repo", "m-Q4_0.gguf", GGUF)
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert set(listed()) == {"hf:org/repo:Q4_0"}


# --- LM Studio, llama.cpp and own directories ---------------------------------------------------


def write(path: Path, content: bytes = GGUF) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_models_of_lm_studio_are_named_by_publisher_and_model(home: Path) -> None:
    root = home / ".lmstudio" / "models"
    path = write(root / "infra-ai" / "ocelot-v1" / "ocelot-v1-instruct-q4_0.gguf")
    write(root / "infra-ai" / "ocelot-v1" / "ocelot-v1-instruct-q8_0.gguf")
    write(root / "infra-ai" / "lynx" / "lynx.gguf")
    write(root / "infra-ai" / "lynx" / "downloading_new-q4_0.gguf.part")
    models = listed()
    assert models["infra-ai/ocelot-v1:Q4_0"].path == path
    assert models["infra-ai/lynx:lynx"].aliases == ("lynx", "infra-ai/lynx")
    assert "has not ended" in models["new-q4_0"].problem
    assert {model.store for model in models.values()} == {"lm studio"}
    assert len(models) == 4


def test_lm_studio_may_keep_models_elsewhere(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "downloads" / "p" / "m" / "m-Q6_K.gguf")
    write(tmp_path / "lm" / "settings.json", json.dumps({"downloadsFolder": str(tmp_path / "downloads")}).encode())
    (home / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'lm'}\n")
    assert set(listed()) == {"p/m:Q6_K"}


def test_models_of_llama_cpp_are_named_by_their_manifest(home: Path) -> None:
    root = home / ".cache" / "llama.cpp"
    write(root / "org_repo_m-Q4_K_M.gguf")
    manifest = {"ggufFile": {"rfilename": "m-Q4_K_M.gguf"}}
    write(root / "manifest=org=repo=latest.json", json.dumps(manifest).encode())
    write(root / "manifest=org=evil=x.json", b"[]")
    write(root / "other.gguf")
    write(root / "half.gguf.downloadInProgress")
    add_to_hub_cache(root, "org/new", "n-Q4_0.gguf", GGUF)
    models = listed()
    assert set(models) == {"hf:org/repo:latest", "other", "half", "hf:org/new:Q4_0"}
    assert "has not ended" in models["half"].problem
    assert {model.store for model in models.values()} == {"llama.cpp"}


def test_own_directories_are_searched_to_their_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one / "a.gguf")
    write(one / "deep" / "er" / "B.GGUF")
    write(two / "same.gguf")
    write(two / "sub" / "same.gguf")
    write(two / ".hidden" / "h.gguf")
    (two / "loop").symlink_to(two)
    monkeypatch.setenv("ERLLAMA_MODELS", f"{one}:{two}:{tmp_path / 'missing'}")
    assert [model.name for model in local_models()] == ["a", "B", "same", "sub/same"]
    assert [model.name for model in local_models([two])].count("same") == 1, "a directory counts once"


def test_files_that_are_no_models_are_broken(tmp_path: Path) -> None:
    write(tmp_path / "empty.gguf", b"")
    write(tmp_path / "text.gguf", b"hello")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    problems = {model.name: model.problem for model in local_models([tmp_path])}
    assert problems == {
        "empty": "empty.gguf is empty",
        "text": "text.gguf is not a GGUF file",
        "pipe": "pipe.gguf, is not a file",
        "folder": "folder.gguf, is not a file",
    }


def test_a_huge_directory_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.gguf")
    monkeypatch.setattr(walk, "MAX_ENTRIES", 20)
    assert len(local_models([tmp_path])) == 20


def test_the_first_store_has_the_name(home: Path, hub: Path, tmp_path: Path) -> None:
    pointer = add_to_hub_cache(hub, "org/repo", "m-Q4_0.gguf", GGUF)
    add_to_hub_cache(home / ".cache" / "llama.cpp", "org/repo", "m-Q4_0.gguf", GGUF, COMMIT)
    assert [(model.name, model.store) for model in local_models()] == [
        ("hf:org/repo:Q4_0", "hugging face"),
        ("hf:org/repo:Q4_0", "llama.cpp"),
    ]
    assert local_models()[0].path == pointer
