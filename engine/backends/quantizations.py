"""Names of the types in which files store their weights, from the header of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from erllama.engine.backends.llama_library import llama_ffi

# libllama's names of the commonest types of weights, by the number that files have.
_NAMES: Mapping[object, str] = {
    0: "all F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K - Medium",
    11: "Q3_K - Small",
    12: "Q3_K - Medium",
    13: "Q3_K - Large",
    14: "Q4_K - Small",
    15: "Q4_K - Medium",
    16: "Q5_K - Small",
    17: "Q5_K - Medium",
    18: "Q6_K",
    25: "IQ4_NL - 4.5 bpw",
    30: "IQ4_XS - 4.25 bpw",
    32: "BF16",
}
# Number of a file by that of the commonest type of its tensors: libllama takes it if the file has none.
_FILE_TYPES = {
    0: 0,
    1: 1,
    2: 2,
    3: 3,
    6: 8,
    7: 9,
    8: 7,
    10: 10,
    11: 12,
    12: 15,
    13: 17,
    14: 18,
    20: 25,
    23: 30,
    30: 32,
}
_SIZES = {"Small": "_S", "Medium": "_M", "Large": "_L"}


def quantization_of(metadata: Mapping[str, object], tensors: Iterable[llama_ffi.Tensor]) -> str:
    """Return how most weights of a file are stored, in libllama's words; "" if the number is not a common one."""
    number = metadata.get("general.file_type")
    if number is None:
        types = Counter(tensor.ggml_type for tensor in tensors)
        number = _FILE_TYPES.get(types.most_common(1)[0][0]) if types else None
    return _NAMES.get(number, "")


def short_quantization(name: str) -> str:
    """Return the name that file names use, such as "Q4_K_M", for libllama's "Q4_K - Medium"."""
    kind, _, size = name.removeprefix("all ").partition(" - ")
    return kind + _SIZES.get(size, "")
