"""The files in `deploy/`: the systemd unit, the container file, and the example of a configuration."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from erllama.cli.server.serve import serve
from erllama.server import llama_server
from erllama.server.settings.settings import CommandOptions, read_settings
from support.cli import Command
from support.paths import ROOT

DEPLOY = ROOT / "deploy"
# Settings that systemd 250 to 259 does not know, and ignores with a warning.
NEW_SETTINGS = {"RefreshOnReload"}


class Unit(configparser.RawConfigParser):
    """A unit file."""

    def __init__(self) -> None:
        super().__init__(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.read(DEPLOY / "erllama.service")

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a container file, with the lines of each joined."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def known_options(arguments: list[str]) -> None:
    """Check that `erllama serve` has the options of a command line."""
    assert arguments[1] == "serve"
    with click.Context(serve) as context:
        serve.make_parser(context).parse_args(arguments[2:])


@pytest.fixture
def configuration(tmp_path: Path, tiny_gguf: Path) -> Path:
    """The example, with directories of the test in place of those of a system."""
    text = (DEPLOY / "erllama.toml").read_text()
    for name in ("/var/cache/erllama", "/var/lib/erllama", "/srv/models"):
        assert name in text
        text = text.replace(f'"{name}', f'"{tmp_path}{name}')
    (tmp_path / "srv/models").mkdir(parents=True)
    shutil.copy(tiny_gguf, tmp_path / "srv/models/chat.gguf")
    path = tmp_path / "erllama.toml"
    path.write_text(text)
    return path


def test_the_example_configuration_is_valid(
    configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(tmp_path / "command", monkeypatch, capsys)
    result = command("serve", "--check", "--config", configuration)
    assert (result.status, result.err) == (0, "")
    settings = read_settings(CommandOptions(config=configuration))
    assert [(entry.id, entry.aliases) for entry in settings.models] == [("chat", ("*",))]


def test_the_unit_runs_the_command_with_options_that_it_has() -> None:
    service = Unit()["Service"]
    known_options(shlex.split(service["ExecStart"]))
    assert "/etc/erllama/erllama.toml" in service["ExecStart"]
    assert service["LoadCredential"].startswith("keys:")
    assert "${CREDENTIALS_DIRECTORY}/keys" in service["ExecStart"]
    assert service["ExecReload"].endswith("kill -HUP $MAINPID")


def test_the_unit_gives_the_service_the_directories_of_the_example() -> None:
    service = Unit()["Service"]
    settings = (DEPLOY / "erllama.toml").read_text()
    assert f'disk = "/var/cache/{service["CacheDirectory"]}"' in settings
    assert f'state_dir = "/var/lib/{service["StateDirectory"]}"' in settings
    assert service["ProtectSystem"] == "strict"


def test_the_unit_passes_the_check_of_systemd(tmp_path: Path) -> None:
    """Without systemd, check that each line is a setting of a section that systemd has."""
    unit = Unit()
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    assert all(re.fullmatch("[A-Z][A-Za-z]+", name) for section in unit.sections() for name in unit[section])
    if not (analyze := shutil.which("systemd-analyze")):
        return
    text = (DEPLOY / "erllama.service").read_text().replace("/opt/erllama/bin/erllama", sys.executable)
    path = tmp_path / "erllama.service"
    path.write_text(text)
    found = subprocess.run([analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    problems = [line for line in found.stderr.splitlines() if "erllama.service" in line]
    unknown = [re.search(r"Unknown key (?:name )?'(\w+)'", line) for line in problems]
    assert all(match and match[1] in NEW_SETTINGS for match in unknown), found.stderr


def test_the_container_copies_files_that_exist() -> None:
    for name, value in instructions("Containerfile"):
        if name == "COPY" and not value.startswith("--from="):
            *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources), value


def test_the_container_runs_the_command_as_its_own_user() -> None:
    found = dict(instructions("Containerfile"))
    assert set(found) <= {
        "FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL",
        "ENTRYPOINT",
    }  # fmt: skip
    assert found["USER"] == "erllama"
    known_options(json.loads(found["ENTRYPOINT"]))
    assert found["VOLUME"] in found["ENV"]
    assert f"{found['EXPOSE']}/health" in found["HEALTHCHECK"]
    (health,) = (each for each in llama_server.endpoints() if each.path == "/health")
    assert health.public
