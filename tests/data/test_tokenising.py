import pytest

from basalt.data import tokenising
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.data.readers import Row
from basalt.data.tokenising import tokenised
from tests.tiny_lm import IMAGE_TOKEN_ID, make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer(), (TEMPLATES / "chatml.jinja").read_text(), IMAGE_TOKEN_ID, 5)


def about(answer: str) -> Row:
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    return Row(("a.png",), [{"role": "user", "content": content}, {"role": "assistant", "content": answer}])


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "MANY", 8)
    monkeypatch.setattr(tokenising, "CHUNK", 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})


@pytest.mark.usefixtures("in_processes")
def test_many_rows_come_in_order_as_one_by_one() -> None:
    rows = [about(f"Number {number}.") for number in range(20)]
    assert list(tokenised(rows, TOKENIZER)) == [(row, TOKENIZER.sample(row.messages)) for row in rows]


@pytest.mark.usefixtures("in_processes")
def test_what_is_wrong_is_told_as_one_by_one() -> None:
    rows = [about("A dog."), Row((), [{"role": "user", "content": "Hello!"}])] * 5
    with pytest.raises(ValueError, match="nothing to learn"):
        list(tokenised(rows, TOKENIZER))
