"""The build's addition to libllama's attention finds exactly the cells that are not masked, in their order."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPTS = ROOT / "scripts"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "unmasked_cells.h"

int main() {
    std::mt19937 dice(1);
    const uint16_t values[] = {0xFC00, 0x0000, 0x8000, 0x7C00, 0xFBFF, 0xFE00, 0x3C00};
    for (int round = 0; round < 20000; round++) {
        const int64_t n = dice() % 120, begin = dice() % (n + 1), end = begin + dice() % (n - begin + 1);
        const unsigned rare = 1 + dice() % 30;
        const bool often = dice() % 2;
        // Exactly as long as declared: what reads beyond its end is found by the address sanitizer.
        std::vector<uint16_t> mask(n);
        for (auto &value : mask) value = (dice() % rare != 0) != often ? 0xFC00 : values[dice() % 7];
        char k[64], v[64];
        erl_unmasked_cells cells(mask.data(), begin, end, k, 0, 64, v, 0, 64);
        int64_t given = begin;
        for (int64_t cell = begin; cell <= end; cell++, given++) {
            if (cell < end && mask[cell] == 0xFC00) { given--; continue; }
            given = cells.next(given);
            if (given != cell) { std::printf("round %d: %d for %d\n", round, (int) given, (int) cell); return 1; }
        }
    }
    erl_unmasked_cells none(nullptr, 0, 10, nullptr, 0, 0, nullptr, 0, 0);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [[], ["-march=native"], ["-march=native", "-fsanitize=address,undefined"]])
def test_exactly_the_unmasked_cells_are_found(tmp_path: Path, flags: list[str]) -> None:
    source, program = tmp_path / "cells.cpp", tmp_path / "cells"
    source.write_text(PROGRAM)
    common = ["-std=c++17", "-O2", "-Wall", "-Werror", f"-I{SCRIPTS}"]
    command = [*COMPILER, *common, *flags, str(source), "-o", program]
    subprocess.run(command, check=True, timeout=120)
    finished = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
