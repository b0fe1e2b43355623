"""Grounding: what each visual token shows, and that a projector learns to say it."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from basalt.data.scenes import Box
from basalt.train.grounding import GROUND, ONE, ONE_SHARE, PLACE_SHARE, PLACES, Grounder, Photo, cell_contents
from basalt.train.loop import Run
from basalt.train.recipe import Grounding, Recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stop import never

NAMED = {GROUND: [0], "red": [1], "blue car": [2, 3]}
IDS = NAMED | {place: [4 + index] for index, place in enumerate(PLACES)}
IDS |= {ONE: [9]}
WORDS = {token: word for word, tokens in IDS.items() for token in tokens}


def shown(boxes: list[Box], side: int) -> list[dict[str, float]]:
    """Word → share for each token, in order; the places apart from the rest."""
    cells: dict[int, dict[str, float]] = defaultdict(dict)
    for cell, token, share in cell_contents(boxes, side, IDS):
        cells[cell][WORDS[token]] = cells[cell].get(WORDS[token], 0.0) + share
    return [cells[cell] for cell in range(side * side)]


def things(cell: dict[str, float]) -> dict[str, float]:
    told = 1 - PLACE_SHARE - cell.get(ONE, 0.0)
    return {word: pytest.approx(share / told) for word, share in cell.items() if word in NAMED}


def test_a_token_shows_the_boxes_it_lies_in() -> None:
    cells = shown([("red", 0.0, 0.0, 0.5, 1.0), ("blue car", 0.5, 0.5, 1.0, 1.0)], 2)
    assert [things(cell) for cell in cells] == [{"red": 1.0}, {GROUND: 1.0}, {"red": 1.0}, {"blue car": 1.0}]
    assert things(shown([("red", 0.0, 0.0, 0.5, 1.0), ("blue car", 0.5, 0.0, 1.0, 1.0)], 1)[0]) == {
        "red": 0.5,
        "blue car": 0.5,
    }


def test_the_token_with_a_thing_s_centre_says_one() -> None:
    row = ("red", 0.0, 0.0, 0.6, 0.3), ("red", 0.7, 0.0, 0.8, 0.3), ("red", 0.9, 0.0, 1.0, 0.3)
    cells = shown([*row, *row, ("blue car", 0.0, 0.4, 1.0, 1.0)], 2)
    assert [cell.get(ONE, 0) for cell in cells] == [2 * ONE_SHARE, 2 * ONE_SHARE, 0, ONE_SHARE]


def test_a_token_tells_where_it_lies() -> None:
    places = [[word for word in cell if word in PLACES] for cell in shown([], 3)]
    assert [sorted(cell) for cell in places] == [
        ["left", "top"], ["middle", "top"], ["right", "top"],
        ["left", "middle"], ["middle"], ["middle", "right"],
        ["bottom", "left"], ["bottom", "middle"], ["bottom", "right"],
    ]  # fmt: skip


def test_a_box_much_smaller_than_a_token_is_found_and_one_that_only_touches_is_not() -> None:
    assert things(shown([("red", 0.1, 0.1, 0.2, 0.2)], 1)[0]) == {"red": 1.0}
    assert things(shown([("red", 0.45, 0.0, 1.0, 1.0)], 2)[0]) == {GROUND: 1.0}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(NAMED)), *[st.floats(0, 1) for _ in range(4)]).filter(
            lambda box: box[1] < box[3] and box[2] < box[4]
        ),
        max_size=6,
    ),
    st.integers(1, 8),
)
def test_the_shares_of_every_token_add_up_to_one(boxes: list[Box], side: int) -> None:
    shares: dict[int, float] = defaultdict(float)
    for cell, _, share in cell_contents(boxes, side, IDS):
        assert share > 0
        shares[cell] += share
    assert sorted(shares) == list(range(side * side))
    assert all(total == pytest.approx(1.0) for total in shares.values())


@pytest.fixture
def grounded(stage1: Recipe, data: Path, tmp_path: Path) -> Recipe:
    """Stage 1 with a box around the left half of each picture, named by the first letter of its colour."""
    boxes = {path.name: [(path.name[0], 0.0, 0.0, 0.5, 1.0)] for path in sorted((data / "images").iterdir())}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    source = stage1.data[0].model_copy(update={"boxes": tmp_path / "boxes.json"})
    return stage1.model_copy(update={"data": [source], "grounding": Grounding(steps=60), "steps": 4})


def test_visual_tokens_come_to_point_to_what_they_show(grounded: Recipe, tmp_path: Path) -> None:
    run = Run(grounded, tmp_path / "run")
    source = run.dealer.sources[0]
    assert source.features is not None
    grounder = Grounder([source], grounded.tower, run.lm.get_input_embeddings().weight, run.tokenizer.tokenizer)
    names = sorted(source.boxes)
    features = torch.stack([source.features[name] for name in names])

    def right() -> float:
        with torch.no_grad():
            found, _ = grounder.scores(
                run.projector(run.standardizer(features).to(run.projector.linear_1.weight.dtype))
            )
        column = {run.tokenizer.tokenizer.decode([token]): place for token, place in grounder.column.items()}
        left = torch.tensor([column[name[0]] for name in names])
        return float((found[:, [0, 2]].argmax(-1) == left[:, None]).float().mean())

    assert right() < 0.7
    assert grounded.grounding is not None
    grounder.train(run, grounded.grounding, never)
    assert right() == 1.0


def test_a_photo_teaches_only_telling_words(grounded: Recipe, tmp_path: Path) -> None:
    run = Run(grounded, tmp_path / "run")
    embeddings = run.lm.get_input_embeddings().weight
    source = run.dealer.sources[0]
    photo = type(source)(source.groups, 1.0, source.features, {})
    # The tiny tokenizer has bytes and no words: nothing in these captions is one.
    assert Grounder([source, photo], grounded.tower, embeddings, run.tokenizer.tokenizer).photos == []


def test_the_loss_of_a_photo_falls_as_its_words_are_shown(grounded: Recipe, tmp_path: Path) -> None:
    run = Run(grounded, tmp_path / "run")
    source = run.dealer.sources[0]
    assert source.features is not None
    grounder = Grounder([source], grounded.tower, run.lm.get_input_embeddings().weight.float(), run.tokenizer.tokenizer)
    token, column = random.Random(0).choice(sorted(grounder.column.items()))
    photos = [Photo(source.features, "red-ellipse.png", [(token, 1.0)])]
    elsewhere = (grounder.words[(column + 1) % len(grounder.words)] + grounder.mean).expand(1, 4, -1).clone()
    shown = elsewhere.clone()
    shown[0, 2] = grounder.words[column] + grounder.mean
    losses = [float(grounder.photo_loss(grounder.scores(visual)[0], photos)) for visual in (elsewhere, shown)]
    assert losses[1] < 1.5 < losses[0]


def test_grounding_needs_boxes(stage1: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`boxes`"):
        train_stage1(stage1.model_copy(update={"grounding": Grounding(steps=2)}), tmp_path / "run")


def test_a_resumed_stage_1_is_not_grounded_again(
    grounded: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_stage1(grounded, tmp_path / "run")
    assert "grounding" in capsys.readouterr().out
    train_stage1(grounded.model_copy(update={"steps": 6}), tmp_path / "run")
    assert "grounding" not in capsys.readouterr().out
