"""Search by meaning: documents as vectors, the nearest to a question first.

    python embeddings.py [model.gguf]

Any GGUF model embeds; one that was trained for it finds what means the like. The
random one that is made here finds the text itself.
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
        vectors = model.embed(DOCUMENTS)  # float32, a row a document, each of length 1
        print(f"{len(vectors)} documents, {vectors.shape[1]} numbers each")
        near = vectors @ model.embed(question)[0]  # so this is the cosine
        for at in near.argsort()[::-1]:
            print(f"{near[at]:.2f}  {DOCUMENTS[at]!r}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        search(Path(sys.argv[1]), "how do I make tea?")
    else:
        with tempfile.TemporaryDirectory() as place:
            search(write_bert(Path(place) / "random.gguf", BertShape(n_embd=64)), DOCUMENTS[1])
