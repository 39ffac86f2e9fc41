"""Paths of the repository, of the tests, and of the shared files beside the repository."""

from pathlib import Path

# The folder that child processes add to sys.path to import `support`.
TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# Real chat templates, tokenizers and traces. Tests that need them skip if they are absent.
SHARED = ROOT.parent / "shared"
