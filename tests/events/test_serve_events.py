"""KV events of the server: the command's option, the configuration file, and addresses that two models share."""

from __future__ import annotations

from pathlib import Path

import pytest

import erllama
from erllama.server.models.entry import ModelEntry
from erllama.server.settings.mistakes import ConfigurationError
from erllama.server.settings.settings import CommandOptions, Settings, read_settings


def settings_of(folder: Path, text: str, **options: object) -> Settings:
    config = folder / "erllama.toml"
    config.write_text(text)
    return read_settings(CommandOptions(config=config, **options))  # type: ignore[arg-type]


def test_a_model_in_the_file_has_its_own_events(tmp_path: Path, tiny_gguf: Path) -> None:
    settings = settings_of(
        tmp_path,
        f"""
[[models]]
path = "{tiny_gguf}"
[models.kv_events]
address = "tcp://127.0.0.1:7001"
block_size = 64
""",
        load={"kv_events": "tcp://127.0.0.1:7101"},
    )
    events = erllama.KvEvents.of(settings.models[0].options["kv_events"])
    assert events == erllama.KvEvents("tcp://127.0.0.1:7001", block_size=64)


def test_two_models_need_two_addresses(tmp_path: Path, tiny_gguf: Path) -> None:
    models = [ModelEntry(path=tiny_gguf, name=name) for name in ("a", "b")]
    with pytest.raises(ConfigurationError, match=r"models 'a' and 'b' publish KV events at tcp://127.0.0.1:7001"):
        settings_of(tmp_path, "", models=models, load={"kv_events": "tcp://127.0.0.1:7001"})
    settings_of(tmp_path, "", models=models, load={"kv_events": "tcp://127.0.0.1:*"})


def test_the_next_port_of_another_model_is_taken(tmp_path: Path, tiny_gguf: Path) -> None:
    text = "".join(
        f'[[models]]\npath = "{tiny_gguf}"\nname = "{name}"\nkv_events = "tcp://127.0.0.1:{port}"\n'
        for name, port in (("a", 7001), ("b", 7002))
    )
    with pytest.raises(
        ConfigurationError, match=r"erllama.toml, line 8: .*publish KV events at tcp://127.0.0.1:7002"
    ):
        settings_of(tmp_path, text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"tcp://0.0.0.0:1"', "reached from other machines"),
        ("{ adress = 'x' }", "did you mean 'address'"),
        ("7", "pass an address"),
    ],
)
def test_a_wrong_option_has_its_line(tmp_path: Path, tiny_gguf: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"erllama.toml, line 3: .*{message}"):
        settings_of(tmp_path, f'[[models]]\npath = "{tiny_gguf}"\nkv_events = {value}\n')
