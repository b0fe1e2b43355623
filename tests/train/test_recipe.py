from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from basalt.train.loop import load_base_lm
from basalt.train.recipe import DataSource, Recipe, RecipeError, load_recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import train_stage2

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD: dict[str, Any] = {
    "tower": {
        "kind": "efficientnet-lite",
        "id": "efficientnet-lite2",
        "image_size": 256,
        "tokens": 64,
        "width": 2528,
        "fit": "resize",
    },
    "base_lm": "var/base/lm",
    "image_token_id": 16,
    "projector_hidden": 32,
    "data": [{"rows": "$BASALT_TEST_DATA/rows.json", "images": "${BASALT_TEST_DATA}/images"}],
    "projector_learning_rate": 1e-3,
    "steps": 10,
    "rows_per_pass": 2,
    "row_length": 320,
}


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASALT_TEST_DATA", "/somewhere")


def load(tmp_path: Path, fields: dict[str, Any]) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_recipe(path)


def test_paths_are_expanded_from_the_environment(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.data == [DataSource(rows=Path("/somewhere/rows.json"), images=Path("/somewhere/images"))]
    assert recipe.base_lm == Path("var/base/lm")
    assert recipe.lora is None
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe  # as a run's directory keeps it


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: "-".join(path.parts[-2:]))
def test_the_recipes_of_the_project_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "SCENES", "CHAT", "CAPTIONS"):
        monkeypatch.setenv(f"BASALT_{name}", "/data")
    recipe = load_recipe(path)
    assert (recipe.lora is not None) == (recipe.start is not None) == ("stage2" in path.name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps: Input should be greater than 0"),
        ({"epoch": 3}, "epoch: Extra inputs are not permitted"),
        ({"epochs": 3}, "Value error, give `steps` or `epochs`, one of the two"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"tower": {**GOOD["tower"], "fit": "stretch"}}, r"tower\.fit: Input should be 'resize' or 'pad'"),
        ({"warmup": 1.0}, "warmup: Input should be less than 1"),
        ({"decay": 0}, "decay: Input should be greater than 0"),
        ({"lora": {"rank": 0}}, r"lora\.rank: Input should be greater than 0"),
        ({"data": [{"rows": "$BASALT_TEST_UNSET/rows.json"}]}, r"data\.0\.rows: .*variable that is not set"),
        ({"data": [{"rows": "rows.json", "weight": 0}]}, r"data\.0\.weight: Input should be greater than 0"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: {says}"):
        load(tmp_path, GOOD | change)


@pytest.mark.parametrize("field", ["tower", "base_lm", "data", "row_length"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(RecipeError, match=f"{field}: Field required"):
        load(tmp_path, {name: value for name, value in GOOD.items() if name != field})


def test_a_base_lm_that_is_not_there(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "base"), "var/base/none"):
        with pytest.raises(RecipeError, match=f"base_lm: there is no directory {missing}"):
            load_base_lm(load(tmp_path, GOOD | {"base_lm": missing}), torch.device("cpu"))


def test_what_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "missing.yaml")
    for text, says in (("steps: [", "not valid YAML"), ("", "recipe.yaml"), ("- a\n- b", "recipe.yaml")):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError, match=says):
            load_recipe(tmp_path / "recipe.yaml")


def test_each_stage_refuses_the_other_s_recipe(tmp_path: Path) -> None:
    first = load(tmp_path, GOOD)
    second = load(tmp_path, GOOD | {"lora": {}, "start": "runs/stage1"})
    with pytest.raises(RecipeError, match="belong to stage 2"):
        train_stage1(second, tmp_path / "run")
    with pytest.raises(RecipeError, match="stage 2 needs"):
        train_stage2(first, tmp_path / "run")
