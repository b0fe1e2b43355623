"""Every form of record, as rows or as a reason why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.readers import Row, Unusable, read_rows
from basalt.data.readers.rows import FIELDS, MALFORMED, MISMATCH, NOTHING_TO_LEARN, Record, rows_of

PROMPTS = ["Describe the image.", "What is shown?"]
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def said(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(fields: Any) -> list[Row | Unusable]:
    return list(rows_of(Record("row 0", fields), PROMPTS[0]))


def row(fields: Any) -> Row:
    (found,) = rows(fields)
    assert isinstance(found, Row)
    return found


def test_llava() -> None:
    conversation = turns("<image>\nWhat is it?", " A dog. ", "Sure?", "Yes.")
    found = row({"id": 7, "image": "x.jpg", "conversations": conversation})
    assert found.images == ("x.jpg",)
    assert found.where == "row 0"
    assert found.messages == [*said([IMAGE, text("What is it?")], "A dog."), *said("Sure?", "Yes.")]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("What is it?\n<image>", [text("What is it?"), IMAGE]),
        ("What is\n<image>\nhere?", [text("What is"), IMAGE, text("here?")]),
        ("<image>", [IMAGE]),
    ],
)
def test_llava_s_placeholder_may_stand_anywhere(value: str, parts: list[dict[str, str]]) -> None:
    assert row({"image": "x.jpg", "conversations": turns(value, "A dog.")}).messages[0]["content"] == parts


def test_llava_s_other_spellings() -> None:
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "<image>"},
        {"from": "assistant", "value": "A dog."},
    ]
    found = row({"image": ["x.jpg"], "conversations": conversation})
    assert found.images == ("x.jpg",)
    assert found.messages == [{"role": "system", "content": "Be brief."}, *said([IMAGE], "A dog.")]


def test_llava_with_several_images() -> None:
    conversation = turns("<image>\n<image>\nWhich is larger?", "The first.", "And than <image>?", "The last.")
    found = row({"image": ["x.jpg", "y.jpg", "z.jpg"], "conversations": conversation})
    assert found.images == ("x.jpg", "y.jpg", "z.jpg")
    shown = [part for message in found.messages if isinstance(message["content"], list) for part in message["content"]]
    assert shown.count(IMAGE) == 3


@pytest.mark.parametrize("extra", [{}, {"image": None}, {"image": ""}, {"image": []}, {"images": []}])
def test_rows_without_an_image(extra: dict[str, Any]) -> None:
    assert row({**extra, "conversations": turns("Hello!", "Hi.")}) == Row((), said("Hello!", "Hi."))


def test_an_empty_answer_among_others_is_read_and_not_learned() -> None:
    _, empty, _, spoken = row({"conversations": turns("Hello!", " ", "Hello?", "Hi.")}).messages
    assert empty == {"role": "assistant", "content": "", "weight": 0}
    assert spoken == {"role": "assistant", "content": "Hi."}


def test_openai_messages() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x.jpg", "detail": "low"}}, text("What is it?")]
    messages = [{"role": "developer", "content": "Be brief."}, *said(parts, "A dog."), *said([text("Sure?")], "Yes.")]
    found = row({"messages": messages})
    assert found.images == ("x.jpg",)
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        *said([IMAGE, text("What is it?")], "A dog."),
        *said("Sure?", "Yes."),
    ]


def test_openai_s_weight_0_is_kept_for_the_template() -> None:
    messages = [*said("Hello!", "What?"), *said("Hello!", "Hi.")]
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    assert row({"messages": messages}).messages == [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "What?", "weight": 0},
        *said("Hello!", "Hi."),
    ]


def test_messages_with_their_images_beside_them() -> None:
    for question in ("<image>What is it?", [{"type": "image", "text": None}, text("What is it?")]):
        found = row({"images": ["x.jpg"], "messages": said(question, "A dog.")})
        assert found == Row(("x.jpg",), said([IMAGE, text("What is it?")], "A dog."))


def test_texts_of_the_cauldron_show_their_images_first() -> None:
    texts = [{"user": "Which?", "assistant": "A dog.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    found = row({"images": ["x.jpg", "y.jpg"], "texts": texts})
    assert found.images == ("x.jpg", "y.jpg")
    assert found.messages == [*said([IMAGE, IMAGE, text("Which?")], "A dog."), *said("Sure?", "Yes.")]


def test_questions_with_an_answer() -> None:
    found = row({"image": "image3.png", "question": "how many chairs are there ?", "answer": 2})
    assert found == Row(("image3.png",), said([IMAGE, text("how many chairs are there ?")], "2"))
    marked = row({"image": "x.jpg", "question": "Look: <image>", "answer": "A dog."})
    assert marked.messages[0]["content"] == [text("Look:"), IMAGE]


@pytest.mark.parametrize("named", [{"captions": ["a dog ."]}, {"caption": "a dog ."}, {"caption": ["a dog .", ""]}])
def test_captions(named: dict[str, Any]) -> None:
    assert row({"image": "x.jpg", **named}) == Row(("x.jpg",), said([IMAGE, text(PROMPTS[0])], "A dog."))


def test_captions_answer_the_prompts_in_turn(tmp_path: Path) -> None:
    records = [
        {"image": "a.jpg", "captions": ["a dog runs .", "Dogs , running !"]},
        {"image": "b.jpg", "captions": ["A cat."]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = [row for row in read_rows(path, PROMPTS) if isinstance(row, Row)]
    assert [(*row.images, row.messages[0]["content"][1]["text"], row.messages[1]["content"]) for row in found] == [
        ("a.jpg", PROMPTS[0], "A dog runs."),
        ("a.jpg", PROMPTS[0], "Dogs, running!"),
        ("b.jpg", PROMPTS[1], "A cat."),
    ]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A dog.", **fields}]}


def url(where: Any) -> dict[str, Any]:
    return {"messages": said([{"type": "image_url", "image_url": where}], "A dog.")}


@pytest.mark.parametrize(
    ("record", "reason", "says"),
    [
        (
            {"image": "x.jpg", "conversations": turns("What?", "A dog.")},
            MISMATCH,
            "0 <image> placeholders for 1 images",
        ),
        ({"conversations": turns("<image>\nWhat?", "A dog.")}, MISMATCH, "1 <image> placeholders for 0 images"),
        ({"image": ["x", "y"], "conversations": turns("<image>", "A dog.")}, MISMATCH, "1 <image> placeholders for 2"),
        ({"images": ["x.jpg"], "messages": said("What?", "A dog.")}, MISMATCH, "0 <image> placeholders for 1"),
        ({"image": [1], "conversations": turns("<image>", "A dog.")}, "neither a name nor a list", "[1]"),
        ({"image": 7, "conversations": turns("<image>", "A dog.")}, "neither a name nor a list", "7"),
        ({"conversations": turns("What?", " ")}, NOTHING_TO_LEARN, "1 assistant turns, all empty"),
        ({"conversations": turns("What?")}, NOTHING_TO_LEARN, "0 assistant turns"),
        ({"conversations": []}, NOTHING_TO_LEARN, "0 assistant turns"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, MALFORMED, "'from' (human or gpt)"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, MALFORMED, "'from' (human or gpt)"),
        ({"conversations": [{"from": "human", "value": None}]}, MALFORMED, "'value' of text"),
        ({"conversations": ["Hi"]}, MALFORMED, "'Hi'"),
        ({"conversations": "Hi"}, MALFORMED, "a list is expected"),
        ({"conversations": turns("Draw!", "<image>")}, "not the user's", "Picture"),
        ({"conversations": turns("Half a \ud83d", "Yes.")}, "not valid Unicode", "\\ud83d"),
        ({"image": "x.jpg", "text": "A dog."}, "has none of conversations", "['image', 'text']"),
        ({"captions": ["A dog."]}, "without an 'image'", "A dog."),
        ({"question": "What?", "answer": "A dog."}, "without an 'image'", "What?"),
        ({"image": "x.jpg", "question": "What?", "answer": None}, MALFORMED, "None"),
        ({"image": "x.jpg", "captions": []}, NOTHING_TO_LEARN, "no caption"),
        ({"image": "x.jpg", "captions": ["A dog.", 7]}, MALFORMED, "7"),
        ({"images": ["x.jpg"], "texts": ["A dog."]}, MALFORMED, "'A dog.'"),
        (message(weight=0), NOTHING_TO_LEARN, "weight 0"),
        (message(weight=0.5), "'weight' is neither 0 nor 1", "0.5"),
        (message(tool_calls=[{"id": "x"}]), "tool calls", "x"),
        ({**message(), "tools": [{"type": "function"}]}, "tool calls", "tools"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "tool calls", "7"),
        (message(content=None), MALFORMED, "None"),
        (message(content=[{"type": "refusal", "refusal": "No."}]), "neither text nor image_url", "refusal"),
        (url({"url": "https://example.org/x.jpg"}), "web address: give it as a data: URL or a file", "example"),
        (url({"url": "data:image/png;base64,AAAA"}), "only .jsonl may hold", "data:"),
        (url({"link": "x.jpg"}), MALFORMED, "needs a 'url'"),
        ("x.jpg", "not an object", "str"),
    ],
)
def test_what_gives_no_row_is_told_with_its_reason(record: Any, reason: str, says: str) -> None:
    (found,) = rows(record)
    assert isinstance(found, Unusable)
    assert found.where == "row 0"
    assert reason in found.reason
    assert says in found.found


# Any JSON, with the words that mean something here more often than chance would have them.
WORDS = st.sampled_from([*FIELDS, "from", "value", "role", "content", "type", "text", "image_url", "url", "weight"])
TEXTS = (
    st.sampled_from(["human", "gpt", "user", "assistant", "<image>", "<image>\nWhat?", "x.jpg", "data:,"]) | st.text()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=400)
@given(JSON | st.dictionaries(WORDS, JSON, max_size=4))
def test_no_record_stops_the_reading(record: Any) -> None:
    found = rows(record)
    assert found
    for one in found:
        if isinstance(one, Row):
            shown = sum(part == IMAGE for message in one.messages for part in message["content"])
            assert shown == len(one.images)
            assert any(message["role"] == "assistant" and "weight" not in message for message in one.messages)
        else:
            assert one.reason
