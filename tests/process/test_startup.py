"""Imports on first use: `import erllama`, `--version` and `--help` are quick; every public name is available."""

from __future__ import annotations

import ast
import json
import pickle
import sys
import textwrap
from pathlib import Path

import pytest

import erllama
from erllama.cli.main import LazyCommand, root
from support.subprocesses import must_run, run_python

SOURCE = ast.parse(Path(erllama.__file__).read_text())
# Modules of the standard library that are slow to import and not needed.
SLOW = {"asyncio", "sqlite3", "ssl", "importlib.metadata", "multiprocessing", "http.client", "email.message"}

# The modules that `import erllama` may load.
FIRST = {
    "erllama",
    "erllama._runtime",
    "erllama._runtime.at_exit",
    "erllama._runtime.imports",
    "erllama._runtime.jobs",
}

# Prints the modules that a piece of code imports.
_IMPORTED = """
    import sys
    before = set(sys.modules)
    {}
    print(*sorted(set(sys.modules) - before))
    """


def imported_by(code: str) -> set[str]:
    return set(must_run(_IMPORTED.format(code)).splitlines()[-1].split())


def foreign(modules: set[str]) -> set[str]:
    """Return the packages among modules that are neither in the standard library nor ours."""
    tops = {name.partition(".")[0] for name in modules}
    return {name for name in tops - sys.stdlib_module_names if not name.startswith(("erllama", "__editable__"))}


# --- import ---------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_submodule() -> None:
    found = imported_by("import erllama")
    assert foreign(found) == set()
    assert {name for name in found if name.startswith("erllama")} == FIRST
    assert found & SLOW == set()


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_import_no_command_and_no_model(option: str) -> None:
    found = imported_by(f"from erllama.__main__ import main; main([{option!r}])")
    assert foreign(found) <= {"click"}
    ours = {name for name in found if name.startswith("erllama")}
    assert ours <= FIRST | {
        "erllama.__main__",
        "erllama._runtime.printing",
        "erllama.cli",
        "erllama.cli.console",
        "erllama.cli.main",
    }
    assert found & SLOW == set()


def test_error_classes_are_available_without_the_engine() -> None:
    assert foreign(imported_by("from erllama import Error, OptionError, PromptTooLong")) == set()


# --- the names ------------------------------------------------------------------------------------------


def test_every_public_name_exists_and_is_listed() -> None:
    assert set(erllama.__all__) <= set(dir(erllama))
    code = "from erllama import *; import erllama; print(*(name for name in erllama.__all__ if name in globals()))"
    assert must_run(code).split() == erllama.__all__


def test_type_checkers_and_python_agree_on_public_names() -> None:
    checked: dict[str, set[str]] = {}
    for node in SOURCE.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                assert line.module is not None
                checked[line.module] = {each.name for each in line.names}
    assert checked == {module: set(names) for module, names in erllama._NAMES_BY_MODULE.items()}
    assert set().union(*checked.values()) | {"__version__"} == set(erllama.__all__)
    assert erllama.__all__ == sorted(erllama.__all__)


def test_a_type_checker_rejects_unknown_names() -> None:
    (hidden,) = [
        node for node in SOURCE.body if isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING"
    ]
    defined = {node.name for node in ast.walk(SOURCE) if isinstance(node, ast.FunctionDef)}
    assert defined == {node.name for node in hidden.body if isinstance(node, ast.FunctionDef)}


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'erllama' has no attribute 'load_modle'") as caught:
        erllama.load_modle  # type: ignore[attr-defined]  # noqa: B018
    assert caught.value.name == "load_modle"
    assert caught.value.obj is erllama
    assert not hasattr(erllama, "__path_to_nowhere__")
    with pytest.raises(ImportError, match="cannot import name 'Modle'"):
        exec("from erllama import Modle")
    finished = run_python("import erllama; erllama.load_modle")
    assert "Did you mean: 'load_model'?" in finished.stderr


def test_subpackages_are_available_without_their_own_import() -> None:
    code = "import erllama; print(*(getattr(erllama, n).__name__ for n in ('errors', 'cache', 'chat', 'engine')))"
    assert must_run(code).split() == ["erllama.errors", "erllama.cache", "erllama.chat", "erllama.engine"]


def test_any_name_can_be_the_first() -> None:
    """Imports between modules run in one direction, so any module can be imported first."""
    code = """
        import os, sys
        import cffi, jinja2, llguidance, numpy, platformdirs, psutil, sqlite_utils, watchdog.observers, xxhash
        import erllama

        for module, names in erllama._NAMES_BY_MODULE.items():
            child = os.fork()
            if not child:
                getattr(erllama, names[0])
                os._exit(0)
            print(module, os.waitpid(child, 0)[1])
        """
    found = must_run(code).splitlines()
    assert found == [f"{module} 0" for module in erllama._NAMES_BY_MODULE]


def test_concurrent_first_uses_get_the_same_objects() -> None:
    code = """
        import sys, threading
        import erllama

        sys.setswitchinterval(1e-5)
        names, found, barrier = erllama.__all__, [], threading.Barrier(12)

        def use(first):
            barrier.wait()
            found.append({name: getattr(erllama, name) for name in names[first:] + names[:first]})

        threads = [threading.Thread(target=use, args=(i * 6,)) for i in range(12)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        assert len(found) == 12, "some thread hangs, or failed"
        assert all(each == found[0] for each in found)
        """
    must_run(code)


def test_values_unpickle_in_a_fresh_process() -> None:
    values = [erllama.OptionError("x"), erllama.Policy(min_tokens=7), erllama.Timings, erllama.Grammar]
    code = """
        import pickle, sys
        error, policy, timings, grammar = pickle.loads(bytes.fromhex(sys.argv[1]))
        import erllama
        assert type(error) is erllama.OptionError and policy == erllama.Policy(min_tokens=7)
        assert (timings, grammar) == (erllama.Timings, erllama.Grammar)
        """
    assert run_python(code, pickle.dumps(values).hex()).stderr == ""


def test_a_failed_import_raises_each_time_and_can_succeed_later() -> None:
    code = """
        import sys
        import erllama

        sys.modules["numpy"] = None
        for _ in range(2):
            try:
                erllama.Model
            except ImportError as error:
                assert error.name == "numpy", error
            else:
                raise SystemExit("no error")
        del sys.modules["numpy"]
        assert erllama.Model.__name__ == "Model"
        """
    must_run(code)


# --- signal handlers during the first use --------------------------------------------------------------

# Sends a signal during an import, and waits until its handler runs.
_SIGNAL_DURING = """
    import os, signal, sys, threading, time
    import erllama

    began = threading.Event()

    class Sender:
        name = {!r}
        def find_spec(self, name, path=None, target=None):
            if name == self.name:
                self.name = None
                os.kill(os.getpid(), signal.SIGUSR1)
                assert began.wait(120)
                time.sleep(0.1)

    sys.meta_path.insert(0, Sender())
    """


def run_with_signal(module: str, code: str) -> list[str]:
    return must_run(textwrap.dedent(_SIGNAL_DURING.format(module)) + textwrap.dedent(code)).splitlines()


@pytest.mark.parametrize("module", ["erllama._model.registry", "erllama.errors", "erllama.cache.store", "numpy"])
@pytest.mark.parametrize("use", ["erllama.load_model", "from erllama import load_model"])
def test_a_handler_can_use_a_name_during_the_first_use_of_another(module: str, use: str) -> None:
    code = f"""
        found = []
        def handle(*_):
            began.set()
            found.append(erllama.list_models())
        signal.signal(signal.SIGUSR1, handle)
        {use}
        print(found)
        """
    assert run_with_signal(module, code) == ["[[]]"]


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.linalg", "erllama.cache.store"])
def test_an_interrupted_first_use_leaves_every_name_usable(module: str) -> None:
    code = """
        def handle(*_):
            began.set()
            raise KeyboardInterrupt
        signal.signal(signal.SIGUSR1, handle)
        try:
            erllama.load_model
        except KeyboardInterrupt:
            print("interrupted")
        for name in erllama.__all__:
            getattr(erllama, name)
        from erllama.engine.backends.stub import StubBackend
        with erllama.load_backend(StubBackend(eog_bias=-100)) as model:
            print(len(model.complete([5, 6], max_tokens=2).tokens))
        """
    assert run_with_signal(module, code) == ["interrupted", "2"]


def test_a_process_forked_after_an_interrupted_first_use_can_use_the_names() -> None:
    code = """
        def handle(*_):
            began.set()
            raise KeyboardInterrupt
        signal.signal(signal.SIGUSR1, handle)
        try:
            erllama.load_model
        except KeyboardInterrupt:
            pass
        child = os.fork()
        if not child:
            signal.alarm(30)
            os._exit(len(erllama.list_models()))
        print(os.waitpid(child, 0)[1])
        """
    assert run_with_signal("erllama.cache.store", code) == ["0"]


def test_a_module_may_use_a_name_while_it_is_imported(tmp_path: Path) -> None:
    """Importing our modules may need a module whose import lock the main thread holds."""
    (tmp_path / "user.py").write_text("import erllama\nerllama.load_model\n")
    code = """
        import sys

        class Needing:
            def find_spec(self, name, path=None, target=None):
                if name == "erllama._model.load":
                    import user

        sys.meta_path.insert(0, Needing())
        sys.path.insert(0, sys.argv[1])
        import user
        print(user.erllama.load_model.__name__)
        """
    assert must_run(code, tmp_path) == "load_model\n"


def test_names_are_available_if_no_thread_can_start() -> None:
    code = """
        import _thread
        import erllama

        def refuse(*_):
            raise RuntimeError("can't start new thread")
        _thread.start_new_thread = refuse
        print(erllama.OptionError.__name__, erllama.list_models())
        """
    assert must_run(code) == "OptionError []\n"


# --- the exit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["", "erllama.list_models()"])
def test_exit_functions_of_a_program_can_use_its_models(first: str, tmp_path: Path) -> None:
    code = f"""
        import atexit, sys
        import erllama
        {first}

        def at_exit():
            print(len(model.complete([7] * 40, max_tokens=2).tokens))
            assert not cache.disk_error

        atexit.register(at_exit)
        from erllama.engine.backends.stub import StubBackend

        class Telling(StubBackend):
            def close(self):
                print("model closed")

        class Told(erllama.Cache):
            def close(self):
                super().close()
                print("cache closed")

        cache = Told(disk=sys.argv[1], block_size=16)
        model = erllama.load_backend(Telling(eog_bias=-100), id="kept", cache=cache)
        """
    assert must_run(code, tmp_path / "kv").split("\n") == ["2", "model closed", "cache closed", ""]
    with erllama.Cache(disk=tmp_path / "kv", block_size=16) as cache:
        assert cache.rows()


# --- the command ----------------------------------------------------------------------------------------


def test_the_table_of_commands_matches_the_commands() -> None:
    for name, later in root.commands.items():
        assert isinstance(later, LazyCommand)
        command = later.load()
        assert command.name == name
        assert command.hidden == later.hidden
        if not later.hidden:
            assert later.get_short_help_str(200) == command.get_short_help_str(200)


# --- what is logged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_is_set_up", [False, True])
def test_the_library_prints_no_logs_by_default(tmp_path: Path, logging_is_set_up: bool) -> None:
    code = """
        import json, logging, sys
        if json.loads(sys.argv[2]):
            logging.basicConfig()
        import erllama

        with erllama.Cache(disk=sys.argv[1]) as cache:
            pass
        with open(sys.argv[1] + "/index.db", "r+b") as index:
            index.write(b"no database")
        with erllama.Cache(disk=sys.argv[1]) as cache:
            pass
        for name in ("erllama", "erllama.cache", "erllama.engine", "erllama.llama"):
            logging.getLogger(name).error("of %s", name)
        """
    finished = run_python(code, tmp_path / "kv", json.dumps(logging_is_set_up))
    assert (finished.returncode, finished.stdout) == (0, "")
    if logging_is_set_up:
        assert "WARNING:erllama.cache:" in finished.stderr
        assert "ERROR:erllama.engine:of erllama.engine" in finished.stderr
    else:
        assert finished.stderr == ""
