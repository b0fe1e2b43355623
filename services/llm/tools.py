"""Tools for chat templates that do not write them: put into the messages as text, in Hermes' form.

vLLM's `hermes` parser reads the calls back from the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

PARSER = "hermes"  # vLLM's name of it

PREAMBLE = """You may call functions to answer the user. They are, with JSON schemas of their arguments:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments within tags:
<tool_call>
{{"name": NAME, "arguments": OBJECT}}
</tool_call>"""


def writes_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools itself."""
    return re.search(r"\btools\b", template) is not None


def as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The same conversation without tools: what they are in the first system message, calls in the assistant's words,
    results in the user's."""
    written: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = _around("<tool_response>\n", message.get("content"), "\n</tool_response>")
            if written and written[-1].get("tool_results"):  # of one round
                written[-1]["content"] = _joined(written[-1]["content"], result)
            else:
                written.append({"role": "user", "content": result, "tool_results": True})
        elif message.get("role") == "assistant" and message.get("tool_calls") is not None:
            written.append(_with_calls(message))
        else:
            written.append(dict(message))
    if tools:
        _describe(written, tools)
    return [{key: value for key, value in message.items() if key != "tool_results"} for message in written]


def _describe(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    preamble = PREAMBLE.format(tools=lines)
    if messages and messages[0].get("role") in ("system", "developer"):
        messages[0]["content"] = _around("", messages[0].get("content"), f"\n\n{preamble}")
    else:
        messages.insert(0, {"role": "system", "content": preamble})


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [_call(each["function"]) for each in message["tool_calls"]]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    said = message.get("content")
    return rest | {"content": _around("", said, ("\n" if said else "") + "\n".join(calls))}


def _call(function: Mapping[str, Any]) -> str:
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:  # a model's own, cut off: shown as it was written
        arguments = function["arguments"]
    call = json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _around(before: str, content: Any, after: str) -> Any:
    """A message's content, string or parts, with text around it."""
    if content is None or isinstance(content, str):
        return f"{before}{content or ''}{after}"
    return [*(_parts(before) if before else ()), *content, *_parts(after)]
