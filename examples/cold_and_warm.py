"""A small benchmark: prompts without a cache, from RAM and from disk; and four agents on one prompt.

python examples/cold_and_warm.py [model.gguf]

The times are times to the first token. `make bench` compares with other tools and takes half an hour.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from _model import model_file

import erllama

STORY = "The keeper climbs the stairs, lights the lamp, and writes down every ship, its course and hour. "
LENGTHS = (256, 512, 1024)
RUNS = 3
N_AGENTS = 4


def first_token_ms(reply: erllama.Completion) -> float:
    return (reply.timings.restore + reply.timings.prefill) * 1e3


def matrix(path: Path) -> None:
    print("tokens   cold ms    ram ms   disk ms   cold / disk")
    for n_tokens in LENGTHS:
        times: dict[str, list[float]] = {"cold": [], "ram": [], "disk": []}
        for _ in range(RUNS):
            with tempfile.TemporaryDirectory() as place:
                with erllama.Cache(disk=place) as cache, erllama.load_model(path, cache=cache) as model:
                    prompt = model.tokenize(STORY * 100)[:n_tokens]
                    times["cold"].append(ask(model, prompt, "cold"))
                    model.evict()  # otherwise the request would reuse the cells of the first one
                    times["ram"].append(ask(model, prompt, "exact"))
                with erllama.Cache(disk=place) as cache, erllama.load_model(path, cache=cache) as model:
                    times["disk"].append(ask(model, prompt, "exact"))
        cold, ram, disk = (median(times[how]) for how in ("cold", "ram", "disk"))
        print(f"{n_tokens:6} {cold:9.1f} {ram:9.1f} {disk:9.1f} {cold / disk:13.1f}")


def ask(model: erllama.Model, prompt: object, kind: str) -> float:
    reply = model.complete(prompt, max_tokens=1, temperature=0)  # type: ignore[arg-type]
    assert reply.cache.kind == kind, reply.cache
    return first_token_ms(reply)


def agents(path: Path) -> None:
    with erllama.Cache() as cache, erllama.load_model(path, cache=cache, n_seq_max=N_AGENTS) as model:
        system = model.tokenize(STORY * 100)[: LENGTHS[-1]].tolist()
        tails = [model.tokenize(f"Agent {n} asks.", add_special=False).tolist() for n in range(N_AGENTS)]
        with ThreadPoolExecutor(N_AGENTS) as pool:
            replies = list(
                pool.map(lambda tail: model.complete([*system, *tail], max_tokens=8, temperature=0), tails)
            )
        slowest = max(reply.timings.queued * 1e3 + first_token_ms(reply) for reply in replies)
        counts = model.metrics
        print(
            f"{N_AGENTS} agents: {counts.prompt_tokens} prompt tokens, {counts.prefilled_tokens} computed; "
            f"the last agent has its first token after {slowest:.1f} ms"
        )


def main() -> None:
    with model_file() as path:
        matrix(path)
        agents(path)


if __name__ == "__main__":
    main()
