"""Constants of libllama under their names in llama-cpp-python, for the options of `Llama`."""

from __future__ import annotations

from typing import Final

LLAMA_DEFAULT_SEED: Final = 0xFFFFFFFF  # stands for a random seed

LLAMA_SPLIT_MODE_NONE: Final = 0
LLAMA_SPLIT_MODE_LAYER: Final = 1
LLAMA_SPLIT_MODE_ROW: Final = 2

LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED: Final = -1
LLAMA_ROPE_SCALING_TYPE_NONE: Final = 0
LLAMA_ROPE_SCALING_TYPE_LINEAR: Final = 1
LLAMA_ROPE_SCALING_TYPE_YARN: Final = 2

LLAMA_POOLING_TYPE_UNSPECIFIED: Final = -1
LLAMA_POOLING_TYPE_NONE: Final = 0
LLAMA_POOLING_TYPE_MEAN: Final = 1
LLAMA_POOLING_TYPE_CLS: Final = 2
LLAMA_POOLING_TYPE_LAST: Final = 3
LLAMA_POOLING_TYPE_RANK: Final = 4

LLAMA_ATTENTION_TYPE_UNSPECIFIED: Final = -1

GGML_TYPE_F32: Final = 0
GGML_TYPE_F16: Final = 1
GGML_TYPE_Q4_0: Final = 2
GGML_TYPE_Q4_1: Final = 3
GGML_TYPE_Q5_0: Final = 6
GGML_TYPE_Q5_1: Final = 7
GGML_TYPE_Q8_0: Final = 8
GGML_TYPE_IQ4_NL: Final = 20
GGML_TYPE_BF16: Final = 30
