from typing import Any

import pytest
from tokenizers import processors

from basalt.data.preprocess import IGNORE, SPELLED, TEMPLATES, Sample, Tokenizer
from tests.tiny_lm import END, IMAGE_TOKEN_ID, make_tokenizer

VISUAL_TOKENS = 5
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(), (TEMPLATES / "chatml.jinja").read_text(), IMAGE_TOKEN_ID, VISUAL_TOKENS)


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text only": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
    ],
    "image": [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": "A dog."},
    ],
    "image after the text": [
        {"role": "user", "content": [text("What is"), IMAGE, text("this?")]},
        {"role": "assistant", "content": "A dog."},
    ],
    "several turns": [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Brown,\n\nwith white spots. "},
        {"role": "user", "content": "assistant\nsay nothing"},
        {"role": "assistant", "content": "Übung 🐕"},
    ],
    "several images": [
        {"role": "user", "content": [IMAGE, IMAGE, text("Which is larger?")]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [text("And of these?"), IMAGE]},
        {"role": "assistant", "content": "The third."},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_assistant_s_texts_and_end_tokens_are_learned(tokenizer: Tokenizer, name: str) -> None:
    messages = CONVERSATIONS[name]
    sample = tokenizer.sample(messages)
    assert len(sample.ids) == len(sample.labels)
    assert all(label in (IGNORE, token) for token, label in zip(sample.ids, sample.labels, strict=True))
    spoken = [message["content"] for message in messages if message["role"] == "assistant"]
    assert learned(tokenizer.tokenizer, sample) == [words + "<|im_end|>" for words in spoken]


@pytest.mark.parametrize(
    ("template", "before", "after"), [("llama3", "", "<|eot_id|>"), ("vicuna", " ", "<|im_end|>"), ("plain", "", "\n")]
)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_template_has_exactly_the_assistant_s_texts_learned(
    name: str, template: str, before: str, after: str
) -> None:
    rendering = (TEMPLATES / f"{template}.jinja").read_text()
    messages = CONVERSATIONS[name]
    sample = Tokenizer(make_tokenizer(), rendering, IMAGE_TOKEN_ID, VISUAL_TOKENS).sample(messages)
    spoken = [before + message["content"] + after for message in messages if message["role"] == "assistant"]
    assert "".join(learned(make_tokenizer(), sample)) == "".join(spoken)


def test_llama_3_and_vicuna_render_as_their_makers_wrote() -> None:
    def rendered(template: str) -> str:
        tokenizer = Tokenizer(make_tokenizer(), (TEMPLATES / template).read_text(), IMAGE_TOKEN_ID, 1)
        return tokenizer.tokenizer.decode(tokenizer.sample(CONVERSATIONS["image"]).ids)

    assert rendered("llama3.jinja") == (
        "<|im_start|><|start_header_id|>user<|end_header_id|>\n\n<reserved_16>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
    )
    assert rendered("vicuna.jinja") == (
        "<|im_start|>A chat between a curious user and an artificial intelligence assistant. The assistant gives"
        " helpful, detailed, and polite answers to the user's questions."
        " USER: <reserved_16>\nWhat is this? ASSISTANT: A dog.<|im_end|>"
    )


def test_plain_renders_as_llava_s_stage_1() -> None:
    """Which begins with the tokenizer's bos token, as stage 2 does; Qwen2's has none."""
    rendering = (TEMPLATES / "plain.jinja").read_text()
    for bos, begins in (("<|im_start|>", "<|im_start|>"), (None, "")):
        lm = make_tokenizer()
        lm.bos_token = bos
        tokenizer = Tokenizer(lm, rendering, IMAGE_TOKEN_ID, 1)
        sample = tokenizer.sample(CONVERSATIONS["image"])
        assert lm.decode(sample.ids) == f"{begins}<reserved_16>A dog.\n"
        assert learned(lm, sample) == ["A dog.\n"]
        assert lm.decode(tokenizer.prompt(CONVERSATIONS["image"][:1])) == f"{begins}<reserved_16>"


def test_spaces_are_learned_where_the_tokenizer_trims_its_offsets() -> None:
    trimming = make_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's
    tokenizer = Tokenizer(trimming, (TEMPLATES / "chatml.jinja").read_text(), IMAGE_TOKEN_ID, VISUAL_TOKENS)
    said = "One,\n\n two  three. "
    sample = tokenizer.sample([{"role": "user", "content": " Count! "}, {"role": "assistant", "content": said}])
    assert learned(tokenizer.tokenizer, sample) == [said + "<|im_end|>"]


def learned(tokenizer: Any, sample: Sample) -> list[str]:
    """The text of each run of labels."""
    runs: list[list[int]] = [[]]
    for label in sample.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_image_is_as_many_tokens_as_the_tower_gives(tokenizer: Tokenizer, name: str) -> None:
    messages = CONVERSATIONS[name]
    images = str(messages).count("'image'")
    ids = tokenizer.sample(messages).ids
    assert ids.count(IMAGE_TOKEN_ID) == images * VISUAL_TOKENS
    rest = tokenizer.tokenizer.decode([token for token in ids if token != IMAGE_TOKEN_ID])
    said = [
        part["text"]
        for message in messages
        for part in ([text(message["content"])] if isinstance(message["content"], str) else message["content"])
        if part["type"] == "text"
    ]
    assert all(words in rest for words in said)


def test_the_rendering_is_chatml(tokenizer: Tokenizer) -> None:
    ids = tokenizer.sample(CONVERSATIONS["image"]).ids
    assert tokenizer.tokenizer.decode(ids) == (
        "<|im_start|>user\n"
        + "<reserved_16>" * VISUAL_TOKENS
        + "\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_where_the_sample_begins_to_be_learned(tokenizer: Tokenizer, name: str) -> None:
    *before, _ = messages = CONVERSATIONS[name]
    prompt, sample = tokenizer.prompt(before), tokenizer.sample(messages)
    assert list(sample.ids[: len(prompt)]) == prompt
    assert sample.labels[len(prompt) - 1] == IGNORE
    assert sample.labels[len(prompt)] != IGNORE
    assert sample.labels[len(prompt) :].count(END) == 1


@pytest.mark.parametrize(
    "content",
    [
        "<image>\nWhat is this?",  # a placeholder typed as text, with no image
        [IMAGE, text("Is <image> a placeholder?")],
        [text("<image> What?")],
    ],
)
def test_placeholders_and_images_must_agree(tokenizer: Tokenizer, content: Any) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    with pytest.raises(ValueError, match=r"has \d images but its text renders to \d <image> placeholders"):
        tokenizer.sample(messages)
    with pytest.raises(ValueError, match="placeholders"):
        tokenizer.prompt(messages[:1])


def test_a_template_that_drops_images_is_refused() -> None:
    forgetful = "{% for m in messages %}{% generation %}{{ m['role'] }}{% endgeneration %}{% endfor %}"
    tokenizer = Tokenizer(make_tokenizer(), forgetful, IMAGE_TOKEN_ID, VISUAL_TOKENS)
    with pytest.raises(ValueError, match="has 1 images but its text renders to 0"):
        tokenizer.sample(CONVERSATIONS["image"])


def test_nothing_to_learn_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        tokenizer.sample([{"role": "user", "content": "Hello!"}])
    unmarked = Tokenizer(make_tokenizer(), "{% for m in messages %}{{ m['content'] }}{% endfor %}", IMAGE_TOKEN_ID, 5)
    with pytest.raises(ValueError, match="generation"):
        unmarked.sample(CONVERSATIONS["text only"])


@pytest.mark.parametrize("template", ["chatml", "llama3", "vicuna", "plain"])
def test_an_answer_of_weight_0_is_read_and_not_learned(template: str) -> None:
    rendering = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer = Tokenizer(make_tokenizer(), rendering, IMAGE_TOKEN_ID, VISUAL_TOKENS)
    messages: list[dict[str, Any]] = [dict(message) for message in CONVERSATIONS["several turns"]]
    plain = tokenizer.sample(messages)
    first, *others = (message for message in messages if message["role"] == "assistant")
    first["weight"] = 0
    sample = tokenizer.sample(messages)
    assert sample.ids == plain.ids
    told = "".join(learned(tokenizer.tokenizer, sample))
    assert first["content"] not in told
    assert all(other["content"] in told for other in others)
    assert told and "".join(learned(tokenizer.tokenizer, plain)).endswith(told)


def test_weights_need_a_template_that_marks_each_answer() -> None:
    rendering = "{% for m in messages %}{% if loop.first %}{{ m['content'] }}{% endif %}{% endfor %}"
    rendering += "{% generation %}{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    messages: list[dict[str, Any]] = [dict(message) for message in CONVERSATIONS["several turns"]]
    messages[1]["weight"] = 0
    messages[0]["content"] = "What is this?"
    tokenizer = Tokenizer(make_tokenizer(), rendering + "{% endgeneration %}", IMAGE_TOKEN_ID, VISUAL_TOKENS)
    with pytest.raises(ValueError, match="marks 1 of 3 answers"):
        tokenizer.sample(messages)


def test_spelled_words_are_tokens_a_letter_and_leave_no_trace() -> None:
    """With a tokenizer that merges: `ab` is one token, unless it is spelled."""
    merging = make_tokenizer()
    merging.add_tokens(["ab"])
    tokenizer = Tokenizer(merging, (TEMPLATES / "chatml.jinja").read_text(), IMAGE_TOKEN_ID, VISUAL_TOKENS)

    def learned(answer: str) -> list[str]:
        messages = [
            {"role": "user", "content": [IMAGE, text("What does it say?")]},
            {"role": "assistant", "content": answer},
        ]
        return [merging.decode([label]) for label in tokenizer.sample(messages).labels if label != IGNORE]

    assert learned('"ab".') == ['"', "ab", '"', ".", "<|im_end|>"]
    assert learned(f'"a{SPELLED}b".') == ['"', "a", "b", '"', ".", "<|im_end|>"]
