"""Optional packages: without one, what needs it raises an ImportError with the pip command, and all else works."""

from __future__ import annotations

import pickle

import pytest

import erllama
from support.subprocesses import must_run

# Optional package, code that needs it, and the extra that installs it.
NEEDS = [
    ("prometheus_client", "import erllama.metrics", "'erllama[metrics]'"),
    ("pynvml", "erllama.Cache(pressure='nvidia')", "'erllama[nvidia]'"),
    ("gguf", "from erllama.testing import models; models.write_mamba('x.gguf')", "'erllama[models]'"),
    ("gguf", "from erllama.testing import bert; bert.write_bert('x.gguf')", "'erllama[models]'"),
    ("gguf", "from erllama.testing import scripted; scripted.write_scripted('x.gguf', {})", "'erllama[models]'"),
    ("hypothesis", "from erllama.testing import CacheMachine", "'erllama[testing]'"),
    ("hypothesis", "from erllama.testing import BackendMachine", "'erllama[testing]'"),
]


@pytest.mark.parametrize(("package", "code", "extra"), NEEDS)
def test_a_missing_package_is_an_import_error_that_names_its_extra(package: str, code: str, extra: str) -> None:
    found = must_run(
        f"""
        import sys
        import erllama

        sys.modules[{package!r}] = None
        try:
            {code}
        except ImportError as error:
            assert isinstance(error, erllama.MissingPackage), error
            assert isinstance(error, erllama.Error)
            print(error.name, error)
        """
    )
    assert found.startswith(f"{package} ")
    assert f"pip install {extra}" in found


def test_a_missing_package_error_can_be_pickled() -> None:
    error = erllama.MissingPackage("x needs y: pip install y", name="y")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), copy.name) == (erllama.MissingPackage, "x needs y: pip install y", "y")
