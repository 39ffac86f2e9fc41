"""Turns the events of a reply into content blocks, in the order in which the model wrote them."""

from __future__ import annotations

from typing import Literal

from erllama.engine import Event, TextDelta, ThinkingDelta, ThinkingEnd, ToolCall, ToolCallEnd
from erllama.server.anthropic.signatures import ThoughtSigner, encode_signature
from erllama.server.conduct.bodies import Json


class BlockWriter:
    """Writes the blocks of one reply. One is open at a time.

    Args:
        hides_thinking: write signatures without the thoughts. The client returns the thoughts within them.

    Attributes:
        content: the blocks that ended, as a whole message has them.
    """

    def __init__(self, signer: ThoughtSigner, *, hides_thinking: bool) -> None:
        self._signer, self._hides = signer, hides_thinking
        self.content: list[Json] = []
        self._open: Literal["text", "thinking"] | None = None
        self._pieces: list[str] = []  # of the open block
        self._thinking = ""  # of the whole reply

    def feed(self, event: Event) -> list[Json]:
        """Return the stream's events for an event of the engine."""
        match event:
            case TextDelta(text=text) if text:
                return self._add("text", text)
            case ThinkingDelta(text=text) if text:
                return self._add("thinking", text)
            case ThinkingEnd(signature=signature) if self._open == "thinking":
                return self._close(signature)
            case ToolCallEnd(calls=calls, error=None):
                return [*self._close(), *(written for call in calls for written in self._write_call(call))]
            case ToolCallEnd(full=full):  # the text is not a call; it is part of the reply where the model wrote it
                return self._add("text", full.decode("utf-8", "replace"))
        return []

    def finish(self) -> list[Json]:
        """Return the stream's events for the end of the reply."""
        return self._close()

    def _add(self, kind: Literal["text", "thinking"], text: str) -> list[Json]:
        events = []
        if self._open != kind:
            events += self._close()
            self._open = kind
            empty = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
            events.append(self._start({"type": kind, **empty}))
        self._pieces.append(text)
        if kind == "text" or not self._hides:
            events.append(self._delta({"type": f"{kind}_delta", kind: text}))
        return events

    def _close(self, signature: bytes | None = None) -> list[Json]:
        """End the open block, if there is one.

        Args:
            signature: the engine's, of the reply's thinking; None for a thought that was cut short.
        """
        kind, text = self._open, "".join(self._pieces)
        self._open, self._pieces = None, []
        if kind is None:
            return []
        if kind == "text":
            return [self._end({"type": "text", "text": text})]
        self._thinking += text
        signed = encode_signature(signature or self._signer.sign(self._thinking), text if self._hides else "")
        events = [self._delta({"type": "signature_delta", "signature": signed})]
        shown = "" if self._hides else text
        return [*events, self._end({"type": "thinking", "thinking": shown, "signature": signed})]

    def _write_call(self, call: ToolCall) -> list[Json]:
        block = {"type": "tool_use", "id": call.id, "name": call.name}
        return [
            self._start({**block, "input": {}}),
            self._delta({"type": "input_json_delta", "partial_json": call.arguments_json}),
            self._end({**block, "input": call.arguments}),
        ]

    def _start(self, block: Json) -> Json:
        return {"type": "content_block_start", "index": len(self.content), "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self.content), "delta": delta}

    def _end(self, block: Json) -> Json:
        self.content.append(block)
        return {"type": "content_block_stop", "index": len(self.content) - 1}
