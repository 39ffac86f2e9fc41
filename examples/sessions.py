"""Continue a conversation turn by turn: with the key of the last reply, and with a session.

python examples/sessions.py [model.gguf]
"""

from _model import model_file

import erllama

QUESTIONS = ("\nUser: hello\nAssistant:", "\nUser: tell me a joke\nAssistant:", "\nUser: and another?\nAssistant:")


def by_key(model: erllama.Model) -> None:
    """Name the last reply in each turn. If its save is still running, the request waits for it."""
    context: list[int] = []
    key: bytes | None = None
    for question in QUESTIONS:
        # Token ids, not text: the same text can have other tokens than those that the model sampled.
        context += model.tokenize(question, add_special=not context).tolist()
        reply = model.complete(context, max_tokens=20, seed=1, parent_key=key)
        show("by key", reply)
        context, key = list(reply.context_tokens), reply.finish_key
        other_requests(model)
    print(f"hits_resume: {model.cache.counters()['hits_resume']}")


def by_session(model: erllama.Model) -> None:
    """Keep the context in its cells between the turns, while other requests run."""
    context: list[int] = []
    for question in QUESTIONS:
        context += model.tokenize(question, add_special=not context).tolist()
        reply = model.complete(context, max_tokens=20, seed=2, session_id="guide")
        show("session", reply)
        context = list(reply.context_tokens)
        other_requests(model)
    print(f"session ended: {model.end_session('guide')}; ended again: {model.end_session('guide')}")


def other_requests(model: erllama.Model) -> None:
    for n in range(3):
        model.complete(f"Request {n} of another user takes cells, too. " * 3, max_tokens=20, seed=n)


def show(how: str, reply: erllama.Completion) -> None:
    n_prompt = reply.n_prompt
    print(f"{how}: {reply.cache.tokens} of {n_prompt} prompt tokens from the cache; tier {reply.cache.tier}")


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
