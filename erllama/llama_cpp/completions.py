"""Completions of text in llama-cpp-python's form: whole, or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from erllama._model.model import Model
from erllama.engine import Done, TextDelta, TokenLogprobs, Vocabulary
from erllama.engine.requests.request import FinishReason
from erllama.llama_cpp.llama_types import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    CreateCompletionResponse,
)
from erllama.llama_cpp.sampling import StopWatch


class TextCompletion:
    """One completion, which runs when its result is requested.

    Args:
        name: the model's name in the result.
        ids: tokens of the prompt.
        options: options of `Model.complete`.
        before: text that the whole result has before the reply.
        offset: number of characters before the reply, for the offsets of its tokens.
        watch: the stopping criteria; None without any.
        on_end: called with the tokens of the reply.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        ids: Sequence[int],
        options: dict[str, Any],
        *,
        before: str = "",
        offset: int = 0,
        watch: StopWatch | None = None,
        on_end: Callable[[Sequence[int]], None],
    ) -> None:
        self._model, self._name, self._ids, self._options = model, name, ids, options
        self._before, self._offset = before, offset
        self._watch, self._on_end = watch, on_end
        self._id, self._created = f"cmpl-{uuid.uuid4()}", int(time.time())
        self._tokens: Sequence[int] = ()
        self._finish_reason: Literal["stop", "length"] = "stop"

    def whole(self) -> CreateCompletionResponse:
        """Run the completion and return it."""
        logprobs: Sequence[TokenLogprobs]
        if self._watch is None:
            completion = self._model.complete(self._ids, **self._options)
            text, logprobs = _readable(completion.text), completion.logprobs or ()
            self._end(completion.tokens, finish_reason(completion.finish_reason))
        else:
            pieces = list(self._pieces())
            text = "".join(piece for piece, _ in pieces)
            logprobs = [each for _, of_piece in pieces for each in of_piece]
        n_prompt, n_reply = len(self._ids), len(self._tokens)
        usage: CompletionUsage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_reply,
            "total_tokens": n_prompt + n_reply,
        }
        result = self._chunk(self._before + text, self._logprobs(logprobs, self._offset), self._finish_reason)
        return {**result, "usage": usage}

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """Run the completion and yield its chunks. The last one has no text, and the finish reason."""
        offset = self._offset
        for text, logprobs in self._pieces():
            if text or logprobs:
                yield self._chunk(text, self._logprobs(logprobs, offset), None)
                offset += len(text)
        yield self._chunk("", None, self._finish_reason)

    def _pieces(self) -> Iterator[tuple[str, Sequence[TokenLogprobs]]]:
        """Yield the texts of the reply, with the log-probabilities of their tokens."""
        tokens: list[int] = []
        text = ""
        with self._model.stream(self._ids, **self._options) as stream:
            for event in stream:
                if isinstance(event, Done):
                    self._end(event.completion.tokens, finish_reason(event.completion.finish_reason))
                elif isinstance(event, TextDelta):
                    n_left = self._n_allowed(len(tokens))
                    if n_left is not None and len(event.tokens) >= n_left:
                        tokens += event.tokens[:n_left]
                        whole = decode(self._model._vocabulary, tokens)
                        yield whole[len(text) :], event.logprobs[:n_left]
                        self._end(tokens, "stop")
                        return
                    tokens += event.tokens
                    piece = _readable(event.text)
                    text += piece
                    yield piece, event.logprobs

    def _n_allowed(self, n_read: int) -> int | None:
        """Return how many further tokens the stopping criteria allow; None without a limit."""
        if self._watch is None or self._watch.stop_at is None:
            return None
        return self._watch.stop_at - len(self._ids) - n_read

    def _end(self, tokens: Sequence[int], reason: Literal["stop", "length"]) -> None:
        self._tokens, self._finish_reason = tokens, reason
        self._on_end(tokens)

    def _logprobs(self, logprobs: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs | None:
        if self._options.get("logprobs") is None:
            return None
        return completion_logprobs(self._model, logprobs, offset)

    def _chunk(
        self, text: str, logprobs: CompletionLogprobs | None, reason: Literal["stop", "length"] | None
    ) -> CreateCompletionResponse:
        choice: CompletionChoice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
            "choices": [choice],
        }


def finish_reason(reason: FinishReason) -> Literal["stop", "length"]:
    """Return a finish reason of erllama as llama-cpp-python's."""
    return "length" if reason in ("length", "context_full") else "stop"


def decode(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special tokens and incomplete characters."""
    return b"".join(map(vocabulary.piece, tokens)).decode("utf-8", "ignore")


def _readable(text: str) -> str:
    """Return a text without the characters that stand for bytes that are not UTF-8, as llama-cpp-python does."""
    return text.replace("\ufffd", "")


def token_text(model: Model, token: int) -> str:
    """Return the text of one token, also of a special one."""
    return model.token_bytes(token).decode("utf-8", "ignore")


def completion_logprobs(model: Model, logprobs: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
    """Return log-probabilities in the form of completions.

    Args:
        offset: number of characters before the first token.
    """
    found: CompletionLogprobs = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for each in logprobs:
        text = token_text(model, each.token)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(each.logprob)
        tops = {token_text(model, token): logprob for token, logprob in each.top}
        found["top_logprobs"].append({**tops, text: each.logprob})
        offset += len(text)
    return found
