"""The configuration of a fleet: mistakes are found before anything starts."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import erllama
import erllama.fleet
from erllama.fleet import FleetConfig
from support.paths import ROOT

PAGE = ROOT / "docs" / "fleet" / "ray.md"


def blocks(language: str) -> list[str]:
    """Return the blocks of code in the documentation of fleets."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_the_configuration_in_the_documentation_is_valid(tmp_path: Path):
    file = tmp_path / "fleet.toml"
    file.write_text(blocks("toml")[0])
    config = FleetConfig.of_file(file)
    assert (config.id, config.max_replicas, config.slots) == ("chat", 8, 8)
    assert config.cache_options(3)["disk"] == "/var/cache/erllama/3"
    assert config.replica_resources == {"num_cpus": 8, "num_gpus": 1}


def test_the_documentation_lists_every_option():
    table = PAGE.read_text().split("## Options")[1].split("## Python")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "| `" in line)))
    assert named == {field.name for field in fields(FleetConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a model"),
        ({"model": ""}, "pass the path"),
        ({"model": "m.gguf", "replica": 3}, "did you mean 'replicas'"),
        ({"model": "m.gguf", "replicas": 0}, "at least 1"),
        ({"model": "m.gguf", "replicas": 3, "max_replicas": 5}, "a fixed number"),
        ({"model": "m.gguf", "min_replicas": 5, "max_replicas": 3}, "is below min_replicas"),
        ({"model": "m.gguf", "min_replicas": 2}, "with max_replicas only"),
        ({"model": "m.gguf", "target_requests": 2}, "with max_replicas only"),
        ({"model": "m.gguf", "policy": "prefixes"}, "did you mean 'prefix'"),
        ({"model": "m.gguf", "weight": -1}, "at least 0"),
        ({"model": "m.gguf", "drain": "soon"}, "pass seconds"),
        ({"model": "m.gguf", "report_interval": 0}, "at least 50ms"),
        ({"model": "m.gguf", "options": {"id": "x"}}, "pass name of the fleet"),
        ({"model": "m.gguf", "options": {"process": True}}, "a fleet sets it itself"),
        ({"model": "m.gguf", "options": {"kv_events": True}}, "pass kv_events of the fleet"),
        ({"model": "m.gguf", "options": [1]}, "must be a mapping"),
        ({"model": "m.gguf", "options": {"n_seq_max": 0}}, "n_seq_max"),
        ({"model": "m.gguf", "options": {"n_ctx": "fit"}}, "pass a number of tokens"),
        ({"model": "m.gguf", "cache": {"disk": "/c/{node}"}}, 'the only field of a directory is "{rank}"'),
        ({"model": "m.gguf", "kv_events": "yes"}, "must be True or False"),
    ],
)
def test_a_mistake_is_named(options: dict[str, object], message: str):
    with pytest.raises(erllama.OptionError, match=re.escape(message)):
        FleetConfig.of(options)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path):
    file = tmp_path / "fleet.toml"
    for text, message in (("model = 1", "pass the path"), ("model =", "is not TOML"), ("mode = 'x'", "'model'")):
        file.write_text(text)
        with pytest.raises(erllama.OptionError, match=message) as caught:
            FleetConfig.of_file(file)
        assert str(file) in str(caught.value)
    with pytest.raises(erllama.OptionError, match="cannot be read"):
        FleetConfig.of_file(tmp_path / "missing.toml")


def test_directories_have_the_number_of_the_replica():
    config = FleetConfig(
        model="m.gguf", cache={"disk": {"/a/{rank}": "1GiB", "/b/{rank}": "2GiB"}, "ram_file": ["/c"]}
    )
    assert config.cache_options(2) == {"disk": {"/a/2": "1GiB", "/b/2": "2GiB"}, "ram_file": ["/c"]}


def test_replicas_whose_kv_does_not_outlive_them_read_a_part_of_the_file():
    assert FleetConfig(model="m.gguf").model_options()["fingerprint"] == "gguf_chunked"
    for tier in ("disk", "ram_file", "remote"):
        assert "fingerprint" not in FleetConfig(model="m.gguf", cache={tier: "/c"}).model_options()
    chosen = FleetConfig(model="m.gguf", options={"fingerprint": "safe"})
    assert chosen.model_options()["fingerprint"] == "safe"


def test_without_ray_the_error_names_the_package():
    # The environment of the tests has no Ray.
    with pytest.raises(erllama.MissingPackage, match=r"pip install 'erllama\[ray\]'"):
        erllama.fleet.build({"model": "m.gguf"})
    with pytest.raises(erllama.MissingPackage, match=r"pip install 'erllama\[ray\]'"):
        erllama.fleet.app({"model": "m.gguf"})


def test_options_are_checked_before_ray_is_imported():
    with pytest.raises(erllama.OptionError, match="did you mean"):
        erllama.fleet.build({"model": "m.gguf", "replica": 3})
