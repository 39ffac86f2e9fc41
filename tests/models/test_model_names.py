"""A name means one model, everywhere: exactly, or as the only beginning; otherwise an error lists candidates."""

from __future__ import annotations

from pathlib import Path

import pytest

import erllama
from erllama.models import find_model
from erllama.models.names import has_model, model_path
from erllama.testing.models import write_llama
from support.cli import Command
from support.model_stores import OllamaStore, add_to_hub_cache, empty_home

GGUF = b"GGUF" + bytes(60)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three models, and no other store."""
    empty_home(tmp_path / "home", monkeypatch)
    models = tmp_path / "models"
    models.mkdir()
    for name in ("SmolLM2-135M-Q4_1", "SmolLM2-360M-Q8_0", "tiny"):
        (models / f"{name}.gguf").write_bytes(GGUF)
    monkeypatch.setenv("ERLLAMA_MODELS", str(models))
    monkeypatch.chdir(tmp_path)
    return models


@pytest.fixture
def erllama_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command `erllama` in this process."""
    return Command(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["tiny", "TINY", "ti", "t"])
def test_a_name_is_exact_or_a_unique_beginning(directory: Path, name: str) -> None:
    assert find_model(name).path == model_path(name) == directory / "tiny.gguf"


def test_an_exact_name_wins_over_a_longer_one(directory: Path) -> None:
    (directory / "tiny-2.gguf").write_bytes(GGUF)
    assert find_model("tiny").name == "tiny"
    assert find_model("tiny-").name == "tiny-2"


def test_a_name_that_begins_several_models_lists_them() -> None:
    with pytest.raises(erllama.ModelNameError, match="several models begin with 'smol'") as caught:
        find_model("smol")
    assert caught.value.candidates == ("SmolLM2-135M-Q4_1", "SmolLM2-360M-Q8_0")
    assert all(name in str(caught.value) for name in caught.value.candidates)


def test_one_file_under_two_names_is_one_model(directory: Path) -> None:
    (directory / "tiny-again.gguf").symlink_to(directory / "tiny.gguf")
    assert find_model("tin").path.resolve() == directory / "tiny.gguf"


def test_an_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(erllama.ModelNameError, match=r"did you mean SmolLM2-360M-Q8_0, SmolLM2-135M-Q4_1\?"):
        find_model("smollm-360m-q8")
    with pytest.raises(erllama.ModelNameError, match="`erllama pull gemma3` downloads it"):
        find_model("gemma3")  # is in the catalogue


def test_a_name_of_the_hub_that_is_not_here_says_how_to_get_it() -> None:
    with pytest.raises(erllama.ModelNameError, match=r"`erllama pull hf:org/repo:Q4_K_M` downloads it"):
        model_path("hf:org/repo:Q4_K_M")


def test_a_broken_model_says_what_is_wrong(directory: Path) -> None:
    (directory / "tiny.gguf").write_bytes(b"")
    with pytest.raises(erllama.ModelNameError, match=r"'tiny' \(directory\) cannot be loaded: tiny\.gguf is"):
        find_model("tiny")


def test_names_of_the_stores_are_accepted(tmp_path: Path) -> None:
    OllamaStore(tmp_path / "home" / ".ollama" / "models").add("registry.ollama.ai/library/llama3.2/3b", GGUF)
    pointer = add_to_hub_cache(tmp_path / "home/.cache/huggingface/hub", "org/repo", "m-Q4_K_M.gguf", GGUF)
    for name in ("llama3.2:3b", "llama3.2", "ollama:llama3.2:3b"):
        assert model_path(name).name.startswith("sha256-")
    for name in ("hf:org/repo:Q4_K_M", "hf:org/repo:q4_k_m", "org/repo", "hf:org/repo:m-Q4_K_M"):
        assert model_path(name) == pointer, "the link keeps the name that the parts of a split model need"


def test_a_path_always_wins(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(GGUF)
    assert model_path("tiny") == Path("tiny")
    assert model_path(Path("no such file")) == Path("no such file"), "a Path is never a name"
    (tmp_path / "smollm2-135m-q4_1").mkdir()
    assert model_path("smollm2-135m-q4_1").is_file(), "a directory is no model, and hides none"
    for text in ("tiny.gguf", "./tiny-2", "../tiny-2", "/tiny-2", "~/tiny-2"):
        assert model_path(text) == Path(text).expanduser()


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\0b", "x" * 5000, "hf:" + "../" * 20, "%s", "\x1b[31m"])
def test_a_hostile_name_is_refused(name: str) -> None:
    with pytest.raises(erllama.ModelLoadError):
        erllama.load_model(name)


@pytest.mark.parametrize("value", ["", 7, None, b"tiny"])
def test_what_is_no_name_is_refused(value: object) -> None:
    with pytest.raises(erllama.OptionError, match="pass the path of a GGUF file, or the name of a model"):
        erllama.load_model(value)  # type: ignore[arg-type]


def test_a_model_is_loaded_by_its_name(directory: Path) -> None:
    write_llama(directory / "real.gguf")
    with erllama.load_model("real", n_threads=1, n_ctx=256) as model:
        assert model.complete("a", max_tokens=2).tokens


def test_commands_accept_names(directory: Path, erllama_command: Command) -> None:
    write_llama(directory / "real.gguf")
    assert "architecture:    llama" in erllama_command("info", "rea").out
    for arguments in (("real", "hello"), ("-m", "rea", "hello")):
        done = erllama_command("run", *arguments, "-n", "2", "--threads", "1", "--stats")
        assert done.status == 0, done.err
    done = erllama_command("info", "smol")
    assert (done.status, done.out) == (1, "")
    assert "several models begin with 'smol'" in done.err


def test_only_a_whole_name_begins_a_prompt() -> None:
    assert has_model("Tiny")
    assert not has_model("tin"), "`erllama run tin soldiers` has a prompt of two words"


def test_the_list_shows_what_fits_and_what_is_broken(directory: Path, erllama_command: Command) -> None:
    write_llama(directory / "real.gguf")
    done = erllama_command("models")
    assert done.out.splitlines()[0].split() == ["name", "size", "weights", "context", "template", "fits", "store"]
    (row,) = done.out.splitlines()[1:]
    assert row.split()[0] == "real"
    assert row.split()[3:] == ["F32", "32,768", "no", "yes", "directory"]
    assert "3 models cannot be loaded; `erllama models --broken` lists the reasons" in done.err
    assert "tiny" in erllama_command("models", "--broken").out
    assert '"needed_bytes"' in erllama_command("models", "real", "--json").out
    assert "There are no models" in erllama_command("models", "nothing").out


def test_the_server_accepts_names(directory: Path, tmp_path: Path) -> None:
    from erllama.cli.server.served_models import parse_model
    from erllama.server.settings.configuration import read_configuration

    write_llama(directory / "real.gguf")
    entry = parse_model("rea", on_request=True)
    assert (entry.path, entry.id) == (directory / "real.gguf", "rea")
    assert parse_model("chat,gpt=real", on_request=True).names == [("name", "chat"), ("aliases", "gpt")]
    assert parse_model(str(directory / "real.gguf"), on_request=True).id == "real"
    others = tmp_path / "conf" / "others"
    others.mkdir(parents=True)
    write_llama(others / "mine.gguf")
    config = tmp_path / "conf" / "erllama.toml"
    config.write_text(
        '[server]\nmodel_dirs = ["others"]\n[[models]]\npath = "mine"\n[[models]]\npath = "others/mine.gguf"\n'
        'name = "second"\n[[models]]\npath = "nothing"\n'
    )
    found = read_configuration(config)
    assert [(model.path, model.id) for model in found.models] == [
        (others / "mine.gguf", "mine"),
        (others / "mine.gguf", "second"),
    ]
    (mistake,) = found.mistakes
    assert mistake.line == 9
    assert "'nothing' is neither a file nor the name of a model" in str(mistake)
