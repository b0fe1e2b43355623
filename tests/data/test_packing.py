import random
from collections import Counter
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.grouping import Group, fill_rows, group_samples
from basalt.data.packing import PREFIX, Packed, pack
from basalt.data.preprocess import IGNORE, Sample

LENGTH = 40
PAD = 0
IMAGE = 16  # four tokens for each image

Found = list[tuple[tuple[str, ...], Sample]]


@st.composite
def samples(draw: st.DrawFn) -> Found:
    """Conversations, many about few images; those of an image begin alike, as far as they please.

    Some ask before they show, some show two images, some a second one in a later turn.
    """
    rng = random.Random(draw(st.integers(0, 2**32)))
    found: Found = []
    for _ in range(draw(st.integers(1, 12))):
        images = rng.choice([(), ("a",), ("b",), ("c",), ("a", "b")])
        ids = [rng.randint(200, 203)] * rng.choice([0, 0, 0, 2]) if images else []
        later = images[1:] if rng.random() < 0.5 else ()
        for image in images[: len(images) - len(later)]:
            ids += [*[IMAGE] * 4, *[ord(image)] * rng.choice([0, 3])]
        labels = [IGNORE] * len(ids)
        for turn in range(rng.randint(1, 3)):
            asked = [rng.randint(200, 210) for _ in range(rng.randint(1, 6))]
            said = [rng.randint(300, 310) for _ in range(rng.randint(1, 8))]
            shown = [IMAGE] * 4 if turn == 1 and later else []
            ids += asked + shown + said
            labels += [IGNORE] * (len(asked) + len(shown)) + said
            later = () if shown else later
        found.append((images[: len(images) - len(later)], Sample(ids, labels)))
    return found


def packed(found: Found) -> tuple[Packed, list[list[Group]], Found]:
    """Those that fit into a row."""
    kept = [(images, sample) for images, sample in found if len(sample.ids) <= LENGTH]
    groups = group_samples(kept, LENGTH, IMAGE)
    rows = fill_rows(groups, LENGTH, random.Random(0))
    return pack(rows, LENGTH, PAD, IMAGE), rows, kept


def histories(batch: Packed) -> list[tuple[int, ...]]:
    """The tokens that each learned token's place sees, the place itself last."""
    visible, ids = batch.attention_mask()[:, 0].flatten(0, 1).tolist(), batch.ids.tolist()
    return [
        tuple(token for token, seen in zip(ids[flat // LENGTH], visible[flat], strict=True) if seen)
        for flat in batch.segments.learned[batch.source].tolist()
    ]


@settings(deadline=None, max_examples=60)
@given(samples())
def test_every_learned_token_appears_once_after_its_whole_conversation(found: Found) -> None:
    batch, rows, kept = packed(found)
    expected = Counter(
        (tuple(sample.ids[:i]), label) for _, sample in kept for i, label in enumerate(sample.labels) if label != IGNORE
    )
    learned = Counter(zip(histories(batch), batch.target.tolist(), strict=True))
    assert learned == expected
    assert sum(group.supervised() for row in rows for group in row) == len(batch.target)


@settings(deadline=None, max_examples=60)
@given(samples())
def test_nothing_is_cut_and_nothing_is_longer_than_a_row(found: Found) -> None:
    batch, rows, kept = packed(found)
    assert all(sum(map(len, row)) <= LENGTH for row in rows)
    whole = Counter(
        (group.images, tuple(group.prefix + branch.ids)) for row in rows for group in row for branch in group.branches
    )
    assert whole == Counter((images, tuple(sample.ids)) for images, sample in kept)
    assert batch.images == [name for row in rows for group in row for name in group.images]
    assert int((batch.ids == IMAGE).sum()) == batch.image_tokens == 4 * len(batch.images)


@settings(deadline=None, max_examples=60)
@given(samples())
def test_a_token_sees_its_conversation_alone_and_counts_its_positions(found: Found) -> None:
    batch, _, _ = packed(found)
    mask = batch.attention_mask()
    assert mask.shape == (len(batch.ids), 1, LENGTH, LENGTH)
    assert not mask.triu(1).any()
    real = batch.groups >= 0
    assert (batch.ids[~real] == PAD).all()
    # It sees as many tokens as its position says, itself among them.
    assert torch.equal(mask[:, 0].sum(-1)[real], batch.positions[real] + 1)
    group, branch = batch.groups, batch.branches
    allowed = (group[:, :, None] == group[:, None, :]) & (
        (branch[:, None, :] == PREFIX) | (branch[:, None, :] == branch[:, :, None])
    )
    assert not (mask[:, 0] & ~allowed).any()


@settings(deadline=None, max_examples=60)
@given(samples())
def test_segments_say_what_the_mask_says(found: Found) -> None:
    batch, _, _ = packed(found)
    said = batch.segments
    mask, real = batch.attention_mask()[:, 0].flatten(0, 1), (batch.groups >= 0).flatten()
    assert sum(said.lengths) == len(real)
    assert said.longest_query == max(said.lengths, default=0)
    assert said.longest_keys == max(said.key_ends.diff().tolist(), default=0)
    ends = zip(said.query_ends.tolist(), said.key_ends.tolist(), strict=True)
    for (query, key), (query_end, key_end) in pairwise(ends):
        keys, queries = said.keys[key:key_end], range(query, query_end)
        for number, flat in enumerate(queries):
            if real[flat]:
                row = flat // LENGTH * LENGTH
                seen = (mask[flat].nonzero().flatten() + row).tolist()
                assert keys[: len(keys) - len(queries) + number + 1].tolist() == seen


def test_an_image_s_questions_share_its_tokens() -> None:
    def ask(image: str, question: int) -> tuple[tuple[str, ...], Sample]:
        return (image,), Sample([16, 16, 16, 16, 5, question, 300, 301], [IGNORE] * 6 + [300, 301])

    asked = [ask("a", 200), ask("b", 201), ask("a", 202), ask("a", 200)]
    groups = group_samples(asked, LENGTH, IMAGE)
    shared = [(group.images, len(group.prefix), len(group.branches)) for group in groups]
    assert shared == [(("a",), 5, 3), (("b",), 6, 1)]
    batch = pack([groups], LENGTH, PAD)
    assert batch.images == ["a", "b"]
    assert int((batch.ids == 16).sum()) == 8
    assert len(batch.target) == 8


def test_a_question_before_its_image_shares_only_with_its_like() -> None:
    def ask(question: int, answer: int) -> tuple[tuple[str, ...], Sample]:
        return ("a",), Sample([question, 16, 16, 16, 16, answer], [IGNORE] * 5 + [answer])

    groups = group_samples([ask(200, 300), ask(201, 301), ask(200, 302)], LENGTH, IMAGE)
    assert [(group.prefix[0], len(group.branches)) for group in groups] == [(200, 2), (201, 1)]
    batch = pack([groups], LENGTH, PAD)
    assert batch.images == ["a", "a"]
    assert int((batch.ids == IMAGE).sum()) == 8


def test_the_last_token_of_a_shared_beginning_predicts_for_each_branch() -> None:
    alike = [(("a",), Sample([16, 5, answer, 2], [IGNORE, IGNORE, answer, 2])) for answer in (300, 301)]
    groups = group_samples(alike, LENGTH, IMAGE)
    batch = pack([groups], LENGTH, PAD)
    assert batch.segments.learned[batch.source].tolist() == [1, 2, 1, 4]
    assert batch.target.tolist() == [300, 2, 301, 2]
