import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError, ImageSource, Row, read_rows

PROMPTS = ["Describe the image.", "What is shown?"]


def rows_of(tmp_path: Path, name: str, records: Any) -> list[Row]:
    path = tmp_path / name
    lines = "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
    path.write_text(lines, encoding="utf-8")
    return list(read_rows(path, PROMPTS))


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def test_llava_json(tmp_path: Path) -> None:
    conversation = turns("<image>\nWhat is it?", " A dog. ", "Sure?", "Yes.")
    (row,) = rows_of(tmp_path, "a.json", [{"id": 7, "image": "x.jpg", "conversations": conversation}])
    assert row.images == ("x.jpg",)
    assert row.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]


def test_llava_json_may_put_the_image_last(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "a.json", [{"image": "x.jpg", "conversations": turns("What is it?\n<image>", "A dog.")}])
    assert row.messages[0]["content"] == [{"type": "text", "text": "What is it?"}, {"type": "image"}]


def test_llava_json_s_other_spellings(tmp_path: Path) -> None:
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "<image>"},
        {"from": "assistant", "value": "A dog."},
    ]
    (row,) = rows_of(tmp_path, "a.json", [{"image": ["x.jpg"], "conversations": conversation}])
    assert row.images == ("x.jpg",)
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    assert row.messages[1]["content"] == [{"type": "image"}]


def test_llava_json_with_several_images(tmp_path: Path) -> None:
    conversation = turns("<image>\n<image>\nWhich is larger?", "The first.", "And than <image>?", "The last.")
    (row,) = rows_of(tmp_path, "a.json", [{"image": ["x.jpg", "y.jpg", "z.jpg"], "conversations": conversation}])
    assert row.images == ("x.jpg", "y.jpg", "z.jpg")
    shown = [part for message in row.messages if isinstance(message["content"], list) for part in message["content"]]
    assert shown.count({"type": "image"}) == 3


def test_rows_without_an_image(tmp_path: Path) -> None:
    for extra in ({}, {"image": None}, {"image": []}):
        (row,) = rows_of(tmp_path, "a.json", [{**extra, "conversations": turns("Hello!", "Hi.")}])
        assert row == Row((), [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}])


def test_captions_answer_the_prompts_in_turn(tmp_path: Path) -> None:
    records = [
        {"image": "a.jpg", "captions": ["a dog runs .", "Dogs , running !"]},
        {"image": "b.jpg", "captions": ["A cat."]},
    ]
    rows = rows_of(tmp_path, "a.jsonl", records)
    said = [(*row.images, row.messages[0]["content"][1]["text"], row.messages[1]["content"]) for row in rows]
    assert said == [
        ("a.jpg", PROMPTS[0], "A dog runs."),
        ("a.jpg", PROMPTS[0], "Dogs, running!"),
        ("b.jpg", PROMPTS[1], "A cat."),
    ]
    assert all(row.messages[0]["content"][0] == {"type": "image"} for row in rows)


def test_questions_with_an_answer(tmp_path: Path) -> None:
    records = [{"image": "image3.png", "question": "how many chairs are there ?", "answer": 2}]
    (row,) = rows_of(tmp_path, "a.jsonl", records)
    assert row.images == ("image3.png",)
    assert row.messages[0]["content"][1]["text"] == "how many chairs are there ?"
    assert row.messages[1] == {"role": "assistant", "content": "2"}


def test_blank_lines_are_nothing_and_text_is_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\n{"image": "ä.jpg", "captions": ["Ein Hündchen"]}\n\n'.encode())
    (row,) = read_rows(path, PROMPTS)
    assert row.images == ("ä.jpg",)
    assert row.messages[1]["content"] == "Ein Hündchen"


GOOD = {"image": "x.jpg", "conversations": turns("<image>\nWhat?", "A dog.")}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"image": "x.jpg", "conversations": turns("What?", "A dog.")}, "0 <image> placeholders for 1 images"),
        ({"conversations": turns("<image>\nWhat?", "A dog.")}, "1 <image> placeholders for 0 images"),
        ({"image": "x.jpg", "conversations": turns("<image><image>", "A dog.")}, "2 <image> placeholders for 1"),
        (
            {"image": ["x.jpg", "y.jpg"], "conversations": turns("<image>", "A dog.")},
            "1 <image> placeholders for 2 images",
        ),
        ({"image": [1], "conversations": turns("<image>", "A dog.")}, "name of a picture or a list of names"),
        ({"image": 7, "conversations": turns("<image>", "A dog.")}, "name of a picture or a list of names"),
        ({"image": "x.jpg", "conversations": [{"from": "robot", "value": "Hi"}]}, "'from' .human or gpt."),
        ({"image": "x.jpg", "conversations": [{"from": "human", "value": None}]}, "'value' of text"),
        ({"image": "x.jpg", "text": "A dog."}, "none of 'conversations', 'captions' or 'question'"),
        ({"captions": ["A dog."]}, "'image'"),
        ({"question": "What?", "answer": "A dog."}, "'image'"),
        ("x.jpg", "expected an object, found str"),
    ],
)
def test_errors_name_file_and_row(tmp_path: Path, record: Any, says: str) -> None:
    for name in ("bad.json", "bad.jsonl"):
        with pytest.raises(DataError, match=rf"{name}, row 1: .*{says}"):
            rows_of(tmp_path, name, [GOOD, record])


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '[{"image": '), ("a.jsonl", '{"image": "x"}\n{"im'), ("a.json", "")]
)
def test_broken_json_names_the_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        list(read_rows(tmp_path / name, PROMPTS))


def test_json_must_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a list of rows, found dict"):
        rows_of(tmp_path, "a.json", GOOD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_bytes(b"secret")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"first")
    (folder / "deep" / "b.jpg").write_bytes(b"second")
    return folder


def test_images_of_a_folder(folder: Path) -> None:
    source = ImageSource(folder)
    assert source.read("a.jpg") == b"first"
    assert source.read("deep/b.jpg") == b"second"


@pytest.mark.parametrize("prefix", [".", ""])
def test_images_of_a_tar(folder: Path, prefix: str) -> None:
    path = folder.parent / "images.tar"
    with tarfile.open(path, "w") as archive:
        for file in ("a.jpg", "deep/b.jpg"):
            archive.add(folder / file, f"{prefix}/{file}" if prefix else file)
    source = ImageSource(path)
    assert source.read("a.jpg") == b"first"
    assert source.read("deep/b.jpg") == b"second"
    with pytest.raises(DataError, match=r"images\.tar holds no image 'c\.jpg'"):
        source.read("c.jpg")


@pytest.mark.parametrize("name", ["../secret.txt", "deep/../../secret.txt", "missing.jpg", "deep", ""])
def test_nothing_outside_the_folder_is_read(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read(name)
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read(str(folder.parent / "secret.txt"))


def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "link.jpg").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read("link.jpg")


def test_a_source_must_be_a_folder_or_a_tar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a tar"):
        ImageSource(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("not a tar, only text")
    with pytest.raises(DataError, match=r"a\.txt"):
        ImageSource(tmp_path / "a.txt")
