"""A response as it is being written: from a chat's answer, whole or in chunks, to OpenAI's object and its events."""

import json
import time
from collections.abc import Iterator
from typing import Any

from services.gateway.response_items import Item, item_id


class Draft:
    """One response.

    Args:
        response: OpenAI's object, with all that is known before the first word.
        first: the number of its first output item among its items, inputs counted.
    """

    def __init__(self, response: dict[str, Any], first: int) -> None:
        self.response, self._first = response, first
        self._number = 0  # of the next event
        self._open: Item | None = None  # the item being written
        self._call: int | None = None  # the number, among the chat's, of the call being written
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def take(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """A chunk of the chat's stream, or its whole answer (whose events nobody needs)."""
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            said = choice.get("delta") or choice.get("message") or {}
            logprobs = [_logprob(each) for each in (choice.get("logprobs") or {}).get("content") or ()]
            if text := said.get("content") or said.get("refusal"):
                yield from self._say(text, logprobs)
            for index, call in enumerate(said.get("tool_calls") or ()):
                yield from self._write_call(call.get("index", index), call)
            self._finish = choice.get("finish_reason") or self._finish

    def close(self) -> Iterator[bytes]:
        """After the last chunk; the response then is as it will be told."""
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish or "")
        status = "incomplete" if cut else "completed"
        yield from self._close_item(status)
        self.response |= {"status": status, "usage": _usage(self._usage)}
        if cut:
            self.response["incomplete_details"] = {"reason": cut}
        else:
            self.response["completed_at"] = int(time.time())

    def end(self) -> bytes:
        return self._event(f"response.{self.response['status']}", response=self.response)

    def fail(self, message: str) -> bytes:
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self.end()

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close_item("completed")
            yield from self._open_item({"type": "message", "role": "assistant", "content": []})
            assert self._open
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._part_event("response.content_part.added", part=part)
            self._open["content"].append(part)
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)

    def _write_call(self, index: int, call: dict[str, Any]) -> Iterator[bytes]:
        function = call.get("function") or {}
        if self._call != index:
            yield from self._close_item("completed")
            item = {"type": "function_call", "call_id": call.get("id"), "name": function.get("name"), "arguments": ""}
            yield from self._open_item(item)
            self._call = index
        assert self._open
        if arguments := function.get("arguments"):
            self._open["arguments"] += arguments
            yield self._item_event("response.function_call_arguments.delta", delta=arguments)

    def _open_item(self, item: Item) -> Iterator[bytes]:
        output = self.response["output"]
        name = item_id(item["type"], self.response["id"], self._first + len(output))
        self._open = {"id": name, "status": "in_progress", **item}
        output.append(self._open)
        yield self._event("response.output_item.added", output_index=len(output) - 1, item=self._open)

    def _close_item(self, status: str) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        if item["type"] == "message":
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._part_event("response.output_text.done", **done)
            yield self._part_event("response.content_part.done", part=part)
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._item_event("response.function_call_arguments.done", **done)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.response["output"]) - 1, item=item)
        self._open = self._call = None

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open
        index = len(self.response["output"]) - 1
        return self._event(kind, item_id=self._open["id"], output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n".encode()


def _logprob(given: dict[str, Any]) -> dict[str, Any]:
    def told(one: dict[str, Any]) -> dict[str, Any]:
        return {"token": one["token"], "logprob": one["logprob"], "bytes": one.get("bytes") or []}

    return told(given) | {"top_logprobs": [told(one) for one in given.get("top_logprobs") or ()]}


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    asked, answered = chat.get("prompt_tokens") or 0, chat.get("completion_tokens") or 0
    cached = (chat.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": asked + answered,
    }
