"""Images uploaded to `/v1/files`, with OpenAI's client, and who may see them."""

import httpx
import openai
import pytest

from basalt.assistants import sha256
from basalt.object_store import image_key
from basalt.record.api_keys import create_key
from basalt.record.database import open_database
from tests.gateway.conftest import Stack
from tests.gateway.test_chat import error
from tests.tiny import picture


def shown(file_id: str) -> list[dict[str, object]]:
    part = {"type": "file", "file": {"file_id": file_id}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


def test_the_openai_client(stack: Stack):
    files = stack.client().files
    data = picture(400)
    uploaded = files.create(file=("../dog photo.png", data), purpose="vision")
    assert (uploaded.filename, uploaded.bytes, uploaded.purpose) == ("dog_photo.png", len(data), "vision")
    assert files.retrieve(uploaded.id) == uploaded
    assert files.content(uploaded.id).read() == data
    another = files.create(file=("cat.jpg", picture(401, format="JPEG")), purpose="user_data")
    assert [file.id for file in files.list(limit=2)][:2] == [another.id, uploaded.id]
    assert next(file.id for file in files.list(purpose="user_data", order="desc")) == another.id
    assert files.delete(uploaded.id).deleted
    for again in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError, match="upload it"):
            again(uploaded.id)


def test_a_chat_shows_a_file_as_it_would_the_bytes(stack: Stack):
    client, data = stack.client(), picture(402)
    file = client.files.create(file=("a.png", data), purpose="vision")
    client.chat.completions.create(model="one", messages=shown(file.id))  # type: ignore[arg-type]
    by_id = stack.llm.bodies[-1]["messages"][0]["content"][0]
    (stack.objects / image_key(sha256(data))).unlink()  # images are not kept for ever; files are
    client.chat.completions.create(model="one", messages=shown(file.id))  # type: ignore[arg-type]
    assert by_id["type"] == "image_embeds"
    assert stack.llm.bodies[-1]["messages"][0]["content"][0] == by_id


BAD = {
    "no image": ({"file": ("a.png", b"hello, this is text")}, {"purpose": "vision"}, 400, "not a JPEG"),
    "empty": ({"file": ("a.png", b"")}, {"purpose": "vision"}, 400, "empty"),
    "too large": ({"file": ("a.bmp", picture(1, size=(140, 140), format="BMP"))}, {"purpose": "vision"}, 413, "50,000"),
    "training data": ({"file": ("a.jsonl", b"{}")}, {"purpose": "fine-tune"}, 400, "trainer"),
    "no purpose": ({"file": ("a.png", picture(1))}, {}, 400, "purpose"),
    "no file": ({"data": ("a.png", picture(1))}, {"purpose": "vision"}, 400, "'file'"),
    "file a field": ({}, {"file": "a", "purpose": "vision"}, 400, "multipart"),
    "two files": ([("file", ("a", picture(1))), ("file", ("b", picture(2)))], {"purpose": "vision"}, 400, "Too many"),
    "huge": ({"file": ("a.png", bytes(500_000))}, {"purpose": "vision"}, 413, "400,000"),
}


@pytest.mark.parametrize(("files", "data", "status", "said"), BAD.values(), ids=BAD.keys())
def test_bad_uploads_are_told_what_is_wrong(stack: Stack, files, data, status: int, said: str):
    response = httpx.post(stack.url + "/v1/files", files=files, data=data, trust_env=False, timeout=120)
    assert response.status_code == status, response.text
    assert said in str(error(response)["message"])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"\r\n--x\r\nnothing"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x--"),
        (
            "multipart/form-data; boundary=x; charset=utf-7",
            b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n',
        ),
    ],
)
def test_broken_forms(stack: Stack, kind: str, body: bytes):
    response = httpx.post(stack.url + "/v1/files", content=body, headers={"Content-Type": kind}, trust_env=False)
    assert response.status_code == 400, response.text
    error(response)


def test_another_key_sees_nothing_of_it(start):
    stack = start(require_key=True)
    with open_database(f"sqlite:///{stack.vision.store.parent / 'basalt.db'}").begin() as session:
        mine, others = (create_key(session, name, ["chat"])[1] for name in ("mine", "others"))
    me, other = (stack.client().with_options(api_key=key) for key in (mine, others))
    file = me.files.create(file=("a.png", picture(403)), purpose="vision")
    assert [each.id for each in me.files.list()] == [file.id]
    assert not list(other.files.list())
    for forbidden in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            forbidden(file.id)
    with pytest.raises(openai.NotFoundError):
        other.files.list(after=file.id)
    with pytest.raises(openai.NotFoundError, match="upload it"):
        other.chat.completions.create(model="one", messages=shown(file.id))  # type: ignore[arg-type]
    me.chat.completions.create(model="one", messages=shown(file.id))  # type: ignore[arg-type]

    told = me.responses.create(model="one", input="hello")
    assert me.responses.retrieve(told.id).id == told.id
    for forbidden in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            forbidden(told.id)
    with pytest.raises(openai.BadRequestError, match="another's"):
        other.responses.create(model="one", input="hello", previous_response_id=told.id)
    item = told.output[0].id
    with pytest.raises(openai.NotFoundError):
        other.responses.create(model="one", input=[{"type": "item_reference", "id": item}])
    with pytest.raises(openai.AuthenticationError):
        me.with_options(api_key="bsk-none").responses.retrieve(told.id)
