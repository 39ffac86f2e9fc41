"""Models with wrong tensors or hyperparameters are refused by name, and the process survives.

What is computed runs in children, on two threads where an assertion on either
would end the process. `make fuzz` tries 10,000 mutants.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from gguf import MODEL_ARCH_NAMES

import erllama
from erllama import llama_ffi
from erllama.testing.bert import write_bert
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba
from support.gguf import editable_gguf
from support.gguf.architectures import minimal_model, with_optional_tensors
from support.gguf.editable_gguf import F32, U32, EditableGGUF
from support.paths import TESTS
from support.subprocesses import must_run, run_python

_HERE = TESTS
_KINDS = {name: kind for kind, name in editable_gguf.TYPE_NAMES.items()}
_TRY = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
import erllama
from support.gguf.mutations import compute
for path in sorted(Path(sys.argv[2]).glob("*.gguf")):
    print(path.stem, flush=True, end=": ")
    try:
        compute(path, 2)
        print("computed")
    except erllama.Error as error:
        print(str(error).replace("\\n", " "))
"""


def outcomes(place: Path) -> dict[str, str]:
    """Try each file in `place` in one child. Returns each name with "computed" or the error."""
    lines = must_run(_TRY, _HERE, place, timeout=300).splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> EditableGGUF:
    return editable_gguf.read(write_llama(tmp_path_factory.mktemp("llama") / "llama.gguf"))


def retyped(file: EditableGGUF, name: str, kind: str) -> EditableGGUF:
    changed = file.copy()
    changed.tensors[name].kind = _KINDS[kind]
    return changed


def with_value(file: EditableGGUF, name: str, kind: int, value: object) -> EditableGGUF:
    changed = file.copy()
    changed.metadata[f"{file.architecture}.{name}"] = (kind, value)
    return changed


def test_weight_types_that_ggml_cannot_multiply_are_refused(llama: EditableGGUF, tmp_path: Path) -> None:
    roles = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight", "token_embd.weight")
    for role in roles:
        for kind in ("I8", "I16", "I32", "I64", "F64"):
            retyped(llama, role, kind).write(tmp_path / f"{role}={kind}.gguf")
    found = outcomes(tmp_path)
    assert len(found) == len(roles) * 5
    for stem, outcome in found.items():
        role, _, kind = stem.partition("=")
        assert f"tensor {role!r} has type {kind.lower()}; it must have another type" in outcome


def test_norms_in_half_precision_are_refused(llama: EditableGGUF, tmp_path: Path) -> None:
    for role in ("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight", "output_norm.weight"):
        for kind in ("F16", "BF16", "Q8_0"):
            retyped(llama, role, kind).write(tmp_path / f"{role}={kind}.gguf")
    for stem, outcome in outcomes(tmp_path).items():
        role, _, kind = stem.partition("=")
        assert f"tensor {role!r} has type" in outcome, kind
        assert "it must be f32" in outcome


def test_weight_types_that_ggml_multiplies_are_accepted(llama: EditableGGUF, tmp_path: Path) -> None:
    wide = llama.copy()
    kinds = [
        name
        for name, kind in _KINDS.items()
        if name not in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
        and 64 % editable_gguf.BLOCKS[kind][0] == 0
    ]
    assert len(kinds) >= 10
    for kind in kinds:
        changed = wide.copy()
        for name, tensor in changed.tensors.items():
            if len(tensor.shape) == 2 and not name.startswith("token_embd"):
                tensor.kind = _KINDS[kind]
        changed.write(tmp_path / f"{kind}.gguf")
    assert outcomes(tmp_path) == dict.fromkeys(sorted(kinds), "computed")


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("attention.layer_norm_rms_epsilon", F32, -1.0),
        ("attention.layer_norm_rms_epsilon", F32, float("nan")),
        ("attention.layer_norm_rms_epsilon", F32, float("inf")),
        ("rope.freq_base", F32, float("nan")),
        ("block_count", U32, 513),
        ("expert_count", U32, 2**31),
    ],
)
def test_hyperparameters_out_of_range_are_refused(
    llama: EditableGGUF, tmp_path: Path, name: str, kind: int, value: float
) -> None:
    with_value(llama, name, kind, value).write(tmp_path / "wrong.gguf")
    outcome = outcomes(tmp_path)["wrong"]
    assert f"llama.{name} is {value}; it must be" in outcome


def test_hyperparameters_used_as_divisors_must_not_be_zero(tmp_path: Path) -> None:
    made = minimal_model("qwen3next", tmp_path)
    assert made is not None
    base = with_optional_tensors(made)
    place = tmp_path / "files"
    place.mkdir()
    base.write(place / "whole.gguf")
    with_value(base, "full_attention_interval", U32, 0).write(place / "interval.gguf")
    experts = base.copy()
    for name in ("expert_count", "expert_used_count", "expert_feed_forward_length"):
        experts.metadata.pop(f"qwen3next.{name}", None)
    experts.write(place / "experts.gguf")
    found = outcomes(place)
    assert found["whole"] == "computed"
    assert "qwen3next.full_attention_interval is 0; it must be 1 to" in found["interval"]
    assert "expert_used_count" in found["experts"]


def test_state_space_models_without_groups_or_heads_are_refused(tmp_path: Path) -> None:
    """libllama divides by both while loading or building the graph. The process must survive."""
    base = minimal_model("mamba2", tmp_path)
    assert base is not None
    place = tmp_path / "files"
    place.mkdir()
    base.write(place / "whole.gguf")
    inner, state, heads, groups = (
        int(str(base.metadata[f"mamba2.ssm.{name}"][1]))
        for name in ("inner_size", "state_size", "time_step_rank", "group_count")
    )
    for name, n_heads, n_groups in (("time_step_rank", 0, groups), ("group_count", heads, 0)):
        changed = with_value(base, f"ssm.{name}", U32, 0)
        convolved = inner + 2 * n_groups * state
        for tensor_name, tensor in changed.tensors.items():  # the shapes that libllama then expects
            role = tensor_name.split(".", 2)[-1]
            if role == "ssm_in.weight":
                tensor.shape = [64, inner + convolved + n_heads]
            elif role.startswith("ssm_conv1d"):
                tensor.shape[-1] = convolved
            elif role in ("ssm_dt.bias", "ssm_a", "ssm_d"):
                tensor.shape[-1] = n_heads
        changed.write(place / f"{name}.gguf")
    found = outcomes(place)
    assert found.pop("whole") == "computed"
    for name, outcome in found.items():
        assert f"mamba2.ssm.{name} is 0; it must be 1 to" in outcome
    assert len(found) == 2


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(
            (each, "group_count")
            for each in ("granitehybrid", "nemotron_h_moe", "falcon-h1", "qwen3next", "qwen35")
        ),
        *((each, "time_step_rank") for each in ("granitehybrid", "nemotron_h", "plamo2", "qwen35moe")),
    ],
)
def test_state_space_values_are_checked_where_layers_use_them(architecture: str, name: str) -> None:
    """Converters write a dense granite model with 0 groups and 0 heads and without such a layer."""
    metadata = {"general.architecture": architecture, f"{architecture}.ssm.{name}": 0}
    gate, out = (llama_ffi.Tensor(f"blk.0.{role}.weight", 0, 4, 0, (1,)) for role in ("attn_gate", "ssm_out"))
    llama_ffi.check_tensors(metadata, [gate])
    with pytest.raises(llama_ffi.LlamaError, match=rf"{architecture}\.ssm\.{name} is 0; it must be 1 to"):
        llama_ffi.check_tensors(metadata, [out])


_SAVE = """
import ctypes, sys
from pathlib import Path
from erllama import llama_ffi
from erllama.llama_ffi.library import ffi
model = llama_ffi.LlamaModel(sys.argv[1])
library = ctypes.CDLL(str(next(Path(llama_ffi.__file__).parent.glob("libllama.*"))))
library.llama_model_save_to_file.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
library.llama_model_save_to_file(int(ffi.cast("uintptr_t", model._handle.pointer)), sys.argv[2].encode())
"""


def test_models_saved_by_libllama_load(llama: EditableGGUF, tmp_path: Path) -> None:
    """libllama writes every hyperparameter that it knows, with 0 for those that the model lacks."""
    place = tmp_path / "saved"
    place.mkdir()
    llama.write(tmp_path / "llama.gguf")
    bases = {"llama": tmp_path / "llama.gguf", "mamba": write_mamba(tmp_path / "mamba.gguf")}
    bases["lfm2"] = write_lfm2(tmp_path / "lfm2.gguf")
    for name, path in bases.items():
        must_run(_SAVE, path, place / f"{name}.gguf")
    saved = llama_ffi.check_header(place / "llama.gguf").metadata
    assert saved["llama.rope.scaling.factor"] == saved["llama.wkv.head_size"] == 0
    assert llama_ffi.check_header(place / "mamba.gguf").metadata["mamba.rope.dimension_count"] == 0
    assert outcomes(place) == dict.fromkeys(sorted(bases), "computed")


def test_a_saved_model_with_attention_needs_heads() -> None:
    """State sizes of 0 do not make it a model without attention."""
    metadata = {"general.architecture": "phimoe", "phimoe.ssm.state_size": 0, "phimoe.attention.head_count": 0}
    with pytest.raises(llama_ffi.LlamaError, match="head_count is 0; it must be 1 to"):
        llama_ffi.check_hyperparameters(metadata)


@pytest.mark.parametrize("value", [1e-40, -1.0, float("nan")])
def test_a_rope_scale_is_absent_or_in_range(value: float) -> None:
    metadata = {"general.architecture": "llama", "llama.rope.scaling.factor": value}
    with pytest.raises(llama_ffi.LlamaError, match="it must be 0 or 1e-09 to 1e"):
        llama_ffi.check_hyperparameters(metadata)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("grovemoe", "experts_per_group"),
        ("rwkv7", "wkv.head_size"),
        ("kimi-linear", "kda.head_dim"),
        ("deepseek4", "attention.output_group_count"),
        ("lfm2moe", "shortconv.l_cache"),
        ("wavtokenizer-dec", "attention.group_norm_groups"),
    ],
)
def test_architecture_specific_values_are_checked_for_them_only(architecture: str, name: str) -> None:
    llama_ffi.check_hyperparameters({"general.architecture": "llama", f"llama.{name}": 0})
    stated = {"expert_used_count": 2, name: 0}
    metadata = {f"{architecture}.{key}": value for key, value in stated.items()}
    with pytest.raises(llama_ffi.LlamaError, match=rf"{architecture}\.{name} is 0; it must be 1 to"):
        llama_ffi.check_hyperparameters({"general.architecture": architecture, **metadata})


@pytest.mark.parametrize("value", ["two", ["two"]])
def test_text_in_place_of_a_number_is_refused(value: object) -> None:
    metadata = {"general.architecture": "qwen3moe", "qwen3moe.expert_used_count": value, "qwen3moe.ssm.x": value}
    with pytest.raises(llama_ffi.LlamaError, match="libllama divides by the former"):
        llama_ffi.check_hyperparameters(metadata)


def test_missing_weights_that_a_graph_needs_are_refused(tmp_path: Path) -> None:
    made = minimal_model("phi3", tmp_path)
    assert made is not None
    place = tmp_path / "files"
    place.mkdir()
    made.write(place / "lacking.gguf")
    with_optional_tensors(made).write(place / "whole.gguf")
    found = outcomes(place)
    assert found["whole"] == "computed"
    assert "'blk.0.attn_qkv.weight' or 'blk.0.attn_q.weight' is missing" in found["lacking"]


def test_graph_faults_are_found_before_computing(tmp_path: Path) -> None:
    """Files that load but hold an operation that ggml cannot compute, tried on several threads."""
    base = editable_gguf.read(write_gemma3(tmp_path / "gemma3.gguf"))
    place = tmp_path / "files"
    place.mkdir()
    with_value(base, "rope.dimension_count", U32, 32).write(place / "wider than a head.gguf")
    with_value(base, "rope.dimension_count", U32, 7).write(place / "odd.gguf")
    for stem, outcome in outcomes(place).items():
        assert "the context cannot be created: ggml cannot compute" in outcome, stem
        assert "it needs an even number of dimensions within a head" in outcome


# --- the fuzz ---------------------------------------------------------------------------------------

_FUZZ = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from support.gguf import editable_gguf
from support.gguf.mutations import HYPERPARAMETERS, try_files
first, last, place = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
bases = [editable_gguf.read(path) for path in sorted(place.glob("*.base"))]
with open(place / "journal", "a") as journal:
    def say(line):
        journal.write(line + "\\n")
        journal.flush()
    try_files(bases, range(first, last), HYPERPARAMETERS, place / f"mutant-{first}.gguf", say)
"""
_BATCH = 250
_FEW = ("gemma2", "phi3", "qwen2moe")
# Waiting threads must not take the processor from working ones, because batches run side by side.
_PATIENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def _bases(place: Path, architectures: Sequence[str]) -> None:
    written: list[Callable[[Path], Path]] = [write_llama, write_gemma3, write_mamba, write_lfm2, write_bert]
    for number, write in enumerate(written):
        write(place / f"{number}.base")
    for architecture in architectures:
        made = minimal_model(architecture, place)
        if made is not None:
            with_optional_tensors(made).write(place / f"{architecture}.base")


def _batch(first: int, last: int, place: Path) -> str:
    """Try mutants in a child process. Returns what killed it and at which mutant, or an empty text."""
    command = [sys.executable, "-c", _FUZZ, str(_HERE), str(first), str(last), str(place)]
    finished = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **_PATIENT}
    )
    if finished.returncode == 0:
        return ""
    mutants = [line for line in (place / "journal").read_text().splitlines() if line.startswith("seed ")]
    return f"exit {finished.returncode} at {mutants[-1] if mutants else 'none'}\n{finished.stderr[-2000:]}"


def test_no_mutant_ends_the_process(tmp_path: Path) -> None:
    """Mutants of types, shapes, hyperparameters and architectures: each is refused or computes."""
    n = int(os.environ.get("ERLLAMA_FUZZ_N", "30"))
    first = int(os.environ.get("ERLLAMA_FUZZ_FIRST", "0"))
    _bases(tmp_path, _FEW if n < 1000 else list(MODEL_ARCH_NAMES.values()))
    deaths = [
        death
        for begin in range(first, first + n, _BATCH)
        if (death := _batch(begin, min(begin + _BATCH, first + n), tmp_path))
    ]
    assert not deaths, "\n".join(deaths)
    lines = (tmp_path / "journal").read_text().splitlines()
    computed, refused = lines.count("computed"), sum(line.startswith("refused") for line in lines)
    assert computed + refused == n
    assert computed > n // 10
    assert refused > n // 4


# --- an assertion in the midst of a computation -----------------------------------------------------

_UNCHECKED = """
#include <string>
struct llama_context;
std::string graph_problem(llama_context *) { return ""; }
"""
_ASSERT = """
import sys
import numpy as np
from erllama import llama_ffi

def decode(context, n):
    row = np.arange(n, dtype=np.int32)
    context.decode(row % 50 + 3, row, np.zeros(n, np.int32), np.ones(n, np.int8))

for _ in range(3):
    for path in sys.argv[1:]:
        model = llama_ffi.LlamaModel(path)
        context = llama_ffi.LlamaContext(model, n_ctx=256, n_threads=2, n_threads_batch=2)
        for _ in range(2):
            try:
                decode(context, 30)
                print("computed")
            except llama_ffi.DecodeError as error:
                print("unsupported types" in str(error), "earlier computation" in str(error))
            context.cut(0, 0)
        context.close()
        model.close()
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="preloads a library that the test builds"
)
def test_an_assertion_failure_on_all_threads_is_survived(llama: EditableGGUF, tmp_path: Path) -> None:
    """Without the graph check, an assertion fails. It becomes an error, and other models continue."""
    (tmp_path / "unchecked.cpp").write_text(_UNCHECKED)
    library = tmp_path / "unchecked.so"
    subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "unchecked.cpp", "-o", library], check=True)
    retyped(llama, "blk.0.ffn_norm.weight", "F16").write(tmp_path / "bad.gguf")
    llama.write(tmp_path / "good.gguf")
    paths = (tmp_path / "bad.gguf", tmp_path / "good.gguf")
    finished = run_python(_ASSERT, *paths, environment={"LD_PRELOAD": str(library)})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["True False", "False True", "computed", "computed"] * 3


_FREES = (
    _UNCHECKED
    + """
#include <cstdio>
struct llama_adapter_lora;
extern "C" void llama_adapter_lora_free(llama_adapter_lora *) { puts("freed"); fflush(stdout); }
"""
)
_ADAPTERS = """
import sys
import numpy as np
from erllama import llama_ffi

bad, good, lora = sys.argv[1:]
broken, whole = llama_ffi.LlamaModel(bad), llama_ffi.LlamaModel(good)
adapters = [llama_ffi.LlamaAdapter(model, lora) for model in (broken, whole)]
context = llama_ffi.LlamaContext(broken, n_ctx=256, n_threads=1, n_threads_batch=1)
row = np.arange(30, dtype=np.int32)
try:
    context.decode(row + 3, row, np.zeros(30, np.int32), np.ones(30, np.int8))
except llama_ffi.DecodeError:
    print("failed", flush=True)
for name, adapter in zip(("broken", "whole"), adapters):
    print(name, flush=True)
    adapter.close()
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="preloads a library that the test builds"
)
def test_a_failed_model_keeps_only_its_own_adapters(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
    """A failed computation may still use the adapters of its model. Those of other models are freed."""
    (tmp_path / "frees.cpp").write_text(_FREES)
    library = tmp_path / "frees.so"
    subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "frees.cpp", "-o", library], check=True)
    retyped(editable_gguf.read(tiny_gguf), "blk.0.ffn_norm.weight", "F16").write(tmp_path / "bad.gguf")
    paths = (tmp_path / "bad.gguf", tiny_gguf, loras[0])
    finished = run_python(_ADAPTERS, *paths, environment={"LD_PRELOAD": str(library)})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["failed", "broken", "whole", "freed"]


def test_learned_positions_limit_the_context(tmp_path: Path) -> None:
    file = minimal_model("gpt2", tmp_path)
    assert file is not None
    path = tmp_path / "model.gguf"
    file.write(path)
    with erllama.load_model(path, n_ctx=1024, n_threads=1) as model:
        assert model.n_ctx == 512
        with pytest.raises(erllama.PromptTooLong):
            model.complete([5] * 600, max_tokens=1)
        reply = model.complete([5] * 500, max_tokens=50, banned_tokens=range(5))  # no end token
        assert (reply.finish_reason, len(reply.context_tokens)) == ("context_full", 513)
