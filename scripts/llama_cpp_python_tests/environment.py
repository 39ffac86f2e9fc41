"""Installs the libraries that use llama-cpp-python into this environment, without llama-cpp-python itself.

    python scripts/llama_cpp_python_tests/environment.py VENV

VENV is the environment that erllama is installed in; its packages become importable here, too.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("langchain-community", "llama-index-core", "llm", "scipy", "pytest", "huggingface_hub")
# Their requirement llama-cpp-python is what the drop-in takes the place of.
WITHOUT_DEPENDENCIES = ("llama-index-llms-llama-cpp", "llm-gguf", "httpx")


def main(venv: Path) -> None:
    """Install the packages, and add those of another environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "-q", "install"]
    subprocess.run([*pip, *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    other = venv / packages.relative_to(sys.prefix)
    (packages / "zz_erllama.pth").write_text(f"import site; site.addsitedir({str(other)!r})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
