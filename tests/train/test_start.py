"""Stage 2 that goes on from a published assistant."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from basalt.assistants import Assistant
from basalt.catalog import reference
from basalt.model.assistant import load_lm
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.projector import Projector, load_projector
from basalt.train.loop import Run
from basalt.train.lora import add_lora
from basalt.train.publish import publish
from basalt.train.recipe import DataSource, LoRA, Recipe, RecipeError
from basalt.train.stage2_instruct import train_stage2
from basalt.train.stop import Stopped
from tests.tiny_lm import make_lm
from tests.train.runs import masters, same


@pytest.fixture(scope="module")
def assistant(instructed: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return publish(instructed, "parent", tmp_path_factory.mktemp("models"), {})


@pytest.fixture(scope="module")
def going_on(stage2: Recipe, assistant: Assistant) -> Recipe:
    return stage2.model_copy(update={"start": assistant.directory, "dtype": "float32", "steps": 4})


def begin(recipe: Recipe, directory: Path) -> tuple[Run, MultimodalLlama]:
    """The run and its model before the first step."""
    run = Run(recipe, directory)
    assert run.start is not None and recipe.lora is not None
    lm = add_lora(run.lm, recipe.lora, run.start.adapter)
    return run, MultimodalLlama(None, run.projector, lm, recipe.image_token_id)


def weights(assistant: Assistant) -> dict[str, torch.Tensor]:
    files = ("projector.safetensors", "lora/adapter_model.safetensors")
    return {name: value for file in files for name, value in load_file(assistant.path(file)).items()}


def test_unfolding_is_the_inverse_of_folding() -> None:
    torch.manual_seed(0)
    projector, features = Projector(24, 32, 16), torch.randn(8, 24) * 3 + 2
    mean, std = features.mean(0), features.std(0)
    unfolded = projector.unfolded(mean, std)
    with torch.no_grad():
        torch.testing.assert_close(unfolded((features - mean) / std), projector(features), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unfolded.folded(mean, std)(features), projector(features), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_run_begins_as_the_assistant_it_starts_from(
    going_on: Recipe, assistant: Assistant, base_lm: Path, tmp_path: Path
) -> None:
    run, model = begin(going_on, tmp_path / "run")
    published = load_lm(assistant, base_lm, torch.float32)
    own = MultimodalLlama(None, load_projector(assistant), published, going_on.image_token_id)
    losses = []
    for batch in run.held_out:
        assert batch.features is not None
        losses.append((float(own.packed_loss(batch.packed, batch.features.float())), len(batch.packed.target)))
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert run.held_out_loss(model) == pytest.approx(expected, abs=1e-4)
    assert run.standardizer.std.max() > run.standardizer.std.min()  # measured on the run's own images


def test_projector_and_lora_are_trained_on_and_the_parent_is_named(
    going_on: Recipe, assistant: Assistant, tmp_path: Path
) -> None:
    train_stage2(going_on, tmp_path / "run")
    before = load_file(assistant.path("lora/adapter_model.safetensors"))
    trained = {name.replace(".default", ""): value for name, value in masters(tmp_path / "run").items()}
    assert all(value.any() for name, value in before.items() if ".lora_B." in name)
    changes = [float((trained[name] - value.float()).abs().max()) for name, value in before.items()]
    assert 0 < min(changes) <= max(changes) < 0.02  # four steps of at most 0.002, and bf16
    child = publish(tmp_path / "run", "child", tmp_path / "models", {})
    assert child.manifest.lineage["parent"] == reference(assistant)


def test_a_share_of_the_assistant_is_kept_in_what_is_published(
    going_on: Recipe, assistant: Assistant, tmp_path: Path
) -> None:
    def published(share: float) -> dict[str, torch.Tensor]:
        recipe = going_on.model_copy(update={"keep_start": share})
        train_stage2(recipe, tmp_path / "run")  # once: of a finished run the share may still be changed
        return weights(publish(tmp_path / "run", "child", tmp_path / "models", {}))

    start, learned, both = weights(assistant), published(0.0), published(0.25)
    assert not same(learned, start)
    for name, value in both.items():
        mean = 0.25 * start[name].float() + 0.75 * learned[name].float()
        torch.testing.assert_close(value.float(), mean, rtol=2**-7, atol=2e-4)  # all three are stored in bf16


@pytest.mark.parametrize("start", ["a run of stage 1", "an assistant without a LoRA"])
def test_a_share_is_kept_only_of_an_assistant_with_a_lora(
    start: str, going_on: Recipe, aligned: Path, tmp_path: Path
) -> None:
    path = aligned if start == "a run of stage 1" else publish(aligned, "plain", tmp_path / "models", {}).directory
    with pytest.raises(RecipeError, match="keep_start is the share of an assistant's projector and LoRA"):
        Run(going_on.model_copy(update={"start": path, "keep_start": 0.5}), tmp_path / "run")


def test_an_assistant_without_a_lora_begins_with_a_fresh_one(going_on: Recipe, aligned: Path, tmp_path: Path) -> None:
    plain = publish(aligned, "plain", tmp_path / "models", {})
    run, model = begin(going_on.model_copy(update={"start": plain.directory}), tmp_path / "run")
    assert run.start is not None and run.start.adapter is None
    assert not any(value.any() for name, value in model.lm.named_parameters() if ".lora_B." in name)


def test_without_images_features_stay_as_they_are(going_on: Recipe, data: Path, tmp_path: Path) -> None:
    update = {"data": [DataSource(rows=data / "chat.json")], "held_out": None}
    run, _ = begin(going_on.model_copy(update=update), tmp_path / "run")
    assert run.start is not None
    assert same(dict(run.projector.state_dict()), dict(run.start.projector.state_dict()))


def test_a_stopped_run_ends_with_the_same_weights_from_the_same_version_alone(
    going_on: Recipe, instructed: Path, assistant: Assistant, tmp_path: Path
) -> None:
    start = shutil.copytree(assistant.directory, tmp_path / "models" / "parent")
    recipe = going_on.model_copy(update={"start": start})
    train_stage2(recipe, tmp_path / "whole")
    asked = iter([False, True])
    with pytest.raises(Stopped):
        train_stage2(recipe, tmp_path / "run", lambda: next(asked))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train_stage2(recipe, tmp_path / "run")
    assert same(masters(tmp_path / "run"), masters(tmp_path / "whole"))
    another = publish(instructed, "parent", tmp_path / "models", {"note": "a newer version"})
    with pytest.raises(RecipeError, match=f"was begun from {reference(assistant)}, and .* is {reference(another)} now"):
        train_stage2(recipe, tmp_path / "other")


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ({"projector_hidden": 40}, "projector_hidden is 48 there and 40 in the recipe"),
        ({"image_token_id": 15}, "image_token_id is 16 there and 15 in the recipe"),
        ({"lora": LoRA(rank=8, alpha=8)}, r"lora\.rank is 4 there and 8 in the recipe"),
        ({"lora": LoRA(rank=4, alpha=4)}, "lora_alpha is 8 there and 4 in the recipe"),
    ],
)
def test_an_assistant_that_does_not_fit_is_refused_before_the_data_is_read(
    going_on: Recipe, tmp_path: Path, update: dict[str, Any], says: str
) -> None:
    update = update | {"features": tmp_path / "features"}
    with pytest.raises(RecipeError, match=says):
        train_stage2(going_on.model_copy(update=update), tmp_path / "run")
    assert not (tmp_path / "features").exists()


def test_another_tower_base_lm_or_adapted_layers_are_refused(
    going_on: Recipe, assistant: Assistant, tmp_path: Path
) -> None:
    tower = going_on.tower.model_copy(update={"fit": "pad", "width": 2530})
    with pytest.raises(
        RecipeError, match=r"tower\.width is 2532 there and 2530 in .*; tower\.fit is resize there and pad"
    ):
        train_stage2(going_on.model_copy(update={"tower": tower}), tmp_path / "tower")
    wide = make_lm(tmp_path / "wide", width=128)
    with pytest.raises(RecipeError, match="width of the base LM is 64 there and 128 in the recipe"):
        train_stage2(going_on.model_copy(update={"base_lm": wide}), tmp_path / "lm")
    other = shutil.copytree(assistant.directory, tmp_path / "other")
    config = json.loads((other / "lora/adapter_config.json").read_text()) | {"target_modules": ["q_proj", "v_proj"]}
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["parts"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "lora/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"target_modules is \['q_proj', 'v_proj'\] there and \['down_proj', "):
        train_stage2(going_on.model_copy(update={"start": other}), tmp_path / "layers")
