"""The JSON of `/completion`: of a piece of a reply, and of its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from erllama._model.model import Model
from erllama._model.requests.options import CompletionOptions
from erllama.engine import Completion, TextDelta, TokenLogprobs
from erllama.server.conduct.bodies import Json
from erllama.server.llama_server.completion_body import CompletionBody
from erllama.server.llama_server.post_sampling import post_sampling_probabilities
from erllama.server.llama_server.settings import generation_settings
from erllama.server.models import ServedModel
from erllama.server.replies.prompts import Tokens
from erllama.server.replies.timings import reply_timings, timings

_LEAST = -9999.0  # for a token that cannot occur; JSON has no infinity
_NO_SLOT = -1  # requests have no slot of their own


@dataclass(slots=True)
class ReplyWriter:
    """Writes the JSON of one reply.

    Attributes:
        index: number of the reply among those of the request.
        prompt, prompt_text: token ids, int32, shape (n,), and their text.
        n_tokens: tokens of the reply so far.
        withheld: text that came without a token of its own; it goes out with the next piece.
        written: tokens whose probabilities were written.
        first_token: time of the first token, of `time.monotonic`; None before.
    """

    served: ServedModel
    body: CompletionBody
    options: CompletionOptions
    prompt: Tokens
    prompt_text: str
    index: int
    n_tokens: int = 0
    withheld: str = ""
    first_token: float | None = None
    written: list[int] = field(default_factory=list)

    def pieces(self, delta: TextDelta) -> list[Json]:
        """Return the JSON of a piece. With probabilities, each token has a JSON of its own."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        text, self.withheld = self.withheld + delta.text, ""
        if not delta.tokens:
            self.withheld = text
            return []
        if not self.body.n_top:
            return [self._piece(text, delta.tokens, ())]
        last = len(delta.tokens) - 1
        return [
            self._piece(text if at == last else "", (token,), delta.logprobs[at : at + 1])
            for at, token in enumerate(delta.tokens)
        ]

    def _piece(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json:
        self.n_tokens += len(tokens)
        values: Json = {
            "index": self.index,
            "content": text,
            "tokens": list(tokens),
            "stop": False,
            "id_slot": _NO_SLOT,
            "tokens_predicted": self.n_tokens,
            "tokens_evaluated": len(self.prompt),
        }
        if self.body.timings_per_token and self.first_token is not None:
            values["timings"] = reply_timings(self.n_tokens, (time.monotonic() - self.first_token) * 1000)
        if logprobs:
            values["completion_probabilities"] = self._probabilities(logprobs, self.written)
            self.written += tokens
        return values

    def end(self, completion: Completion, content: str) -> Json:
        """Return the JSON of the end of a reply.

        Args:
            content: the reply's text; of a stream, what is left of it.
        """
        text = completion.text
        values: Json = {
            "index": self.index,
            "content": content,
            "tokens": list(completion.tokens) if self.body.return_tokens and not self.body.stream else [],
            "id_slot": _NO_SLOT,
            "stop": True,
            "model": self.served.name,
            "tokens_predicted": len(completion.tokens),
            "tokens_evaluated": len(self.prompt),
            "generation_settings": self._settings(completion),
            "prompt": self.prompt_text,
            "has_new_line": "\n" in text,
            "truncated": completion.finish_reason == "context_full",
            "stop_type": _stop_type(completion),
            "stopping_word": completion.stop_sequence or "",
            "tokens_cached": len(completion.context_tokens),
            "timings": timings(completion),
        }
        if not self.body.stream and completion.logprobs:
            values["completion_probabilities"] = self._probabilities(completion.logprobs, [])
        return _choose_fields(values, self.body.response_fields)

    def _settings(self, completion: Completion) -> Json:
        body = self.body
        return generation_settings(self.served.model.adapters, self.options, completion.seed) | {
            "ignore_eos": body.ignore_eos,
            "stream": bool(body.stream),
            "n_probs": body.n_top,
            "timings_per_token": bool(body.timings_per_token),
            "post_sampling_probs": bool(body.post_sampling_probs),
        }

    def _probabilities(self, logprobs: Sequence[TokenLogprobs], before: Sequence[int]) -> list[Json]:
        """Return the probabilities of tokens.

        Args:
            before: the tokens of the reply before the first of them.
        """
        model = self.served.model
        if not self.body.post_sampling_probs:
            return [
                _token(model, each.token, "logprob", max(each.logprob, _LEAST))
                | {"top_logprobs": [_token(model, id, "logprob", max(value, _LEAST)) for id, value in each.top]}
                for each in logprobs
            ]
        found = post_sampling_probabilities(model, self.options, logprobs, [*self.prompt.tolist(), *before])
        return [
            _token(model, each.token, "prob", each.probability)
            | {"top_probs": [_token(model, id, "prob", value) for id, value in each.top[: self.body.n_top]]}
            for each in found
        ]


def _token(model: Model, token: int, name: str, value: float) -> Json:
    raw = model.token_bytes(token)
    return {"id": token, "token": raw.decode("utf-8", "ignore"), "bytes": list(raw), name: value}


def _stop_type(completion: Completion) -> str:
    if completion.finish_reason != "stop":
        return "limit"
    return "eos" if completion.stop_sequence is None else "word"


def _choose_fields(values: Json, names: Sequence[str] | None) -> Json:
    """Return the fields with these names; all of them for None or none.

    Args:
        names: a name with a slash is that of a field within a field.
    """
    if not names:
        return values
    chosen: Json = {}
    for name in names:
        value: object = values
        for part in name.split("/"):
            value = value.get(part, values) if isinstance(value, dict) else values
        if value is not values:
            chosen[name] = value
    return chosen
