"""Search documents by meaning: the nearest embedding is the first result.

    python examples/embeddings.py [model.gguf]

Every GGUF model can embed. A model trained for it finds texts with a similar meaning.
The generated model with random weights only finds the same text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import erllama
from erllama.testing.bert import BertShape, write_bert

DOCUMENTS = [
    "a bridge crosses the river",
    "a kettle is for boiling water",
    "the moon goes round the earth",
    "bread is made of flour",
]


def search(path: Path, question: str) -> None:
    with erllama.load_model(path) as model:
        vectors = model.embed(DOCUMENTS)  # float32, one row per document, each of length 1
        print(f"{len(vectors)} documents, {vectors.shape[1]} dimensions")
        near = vectors @ model.embed(question)[0]  # the cosine, since all vectors have length 1
        for at in near.argsort()[::-1]:
            print(f"{near[at]:.2f}  {DOCUMENTS[at]!r}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        search(Path(sys.argv[1]), "how do I make tea?")
    else:
        with tempfile.TemporaryDirectory() as place:
            search(write_bert(Path(place) / "random.gguf", BertShape(n_embd=64)), DOCUMENTS[1])
