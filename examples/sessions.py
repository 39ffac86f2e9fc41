"""A conversation, turn by turn: by the key of the reply before, and by a session that keeps its cells.

python examples/sessions.py [model.gguf]
"""

from _model import model_file

import erllama

QUESTIONS = ("\nUser: hello\nAssistant:", "\nUser: tell me a joke\nAssistant:", "\nUser: and another?\nAssistant:")


def by_key(model: erllama.Model) -> None:
    """Each turn names the reply that it goes on from; where that is still being saved, it waits for it."""
    context: list[int] = []
    key: bytes | None = None
    for question in QUESTIONS:
        # Ids, not text: what the model wrote need not be spelled as it would be read.
        context += model.tokenize(question, add_special=not context).tolist()
        reply = model.complete(context, max_tokens=20, seed=1, parent_key=key)
        show("by key", reply)
        context, key = list(reply.context_tokens), reply.finish_key
        somebody_else(model)
    print(f"hits_resume: {model.cache.counters()['hits_resume']}")


def by_session(model: erllama.Model) -> None:
    """The context stays in its cells between the turns, whoever else comes meanwhile."""
    context: list[int] = []
    for question in QUESTIONS:
        context += model.tokenize(question, add_special=not context).tolist()
        reply = model.complete(context, max_tokens=20, seed=2, session_id="guide")
        show("session", reply)
        context = list(reply.context_tokens)
        somebody_else(model)
    print(f"was kept: {model.end_session('guide')}; is kept: {model.end_session('guide')}")


def somebody_else(model: erllama.Model) -> None:
    for n in range(3):
        model.complete(f"Who asks {n} other things takes cells, too. " * 3, max_tokens=20, seed=n)


def show(how: str, reply: erllama.Completion) -> None:
    n_prompt = len(reply.context_tokens) - len(reply.tokens)
    print(f"{how}: {reply.cache.tokens} of {n_prompt} prompt tokens were warm; tier {reply.cache.tier}")


def main() -> None:
    with (
        model_file() as path,
        erllama.Cache() as cache,
        erllama.load_model(path, cache=cache, n_ctx=1024, parked_cells=64) as model,
    ):
        by_key(model)
        by_session(model)


if __name__ == "__main__":
    main()
