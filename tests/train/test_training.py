"""Both stages for real, on a tiny random Llama and the default's tower."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from basalt.assistants import AssistantError, load_assistant, sha256
from basalt.data.readers import DataError
from basalt.model.assistant import LocalAssistant
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.precision import dtype_of, name_of
from basalt.model.projector import load_projector
from basalt.model.vision_encoder import efficientnet_lite_weights
from basalt.train.checkpoints import learned
from basalt.train.data import Dealer, prefetched
from basalt.train.features import FeatureCache, LiveFeatures
from basalt.train.loop import Run, compile_layers, has_compiler, keep_recipe
from basalt.train.optimizer import MasterAdamW, rate_factor
from basalt.train.publish import publish
from basalt.train.recipe import DataSource, Recipe, RecipeError
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import train_stage2
from tests.tiny_lm import make_lm
from tests.train.runs import masters, needs_compiler, same


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in directory.iterdir() if path.is_file()}


def test_stage_1_lowers_the_loss_and_trains_the_projector_alone(stage1: Recipe, aligned: Path, tmp_path: Path) -> None:
    figures = log(aligned)
    assert [entry["step"] for entry in figures] == list(range(4, 41, 4))  # with each checkpoint
    fresh = Run(stage1, tmp_path / "fresh")
    before = fresh.held_out_loss(MultimodalLlama(None, fresh.projector, fresh.lm, stage1.image_token_id))
    assert figures[-1]["loss"] < figures[0]["loss"] < before + 0.1
    assert figures[-1]["held_out_loss"] < before - 0.1
    shown = figures[-1]["samples"]
    assert len(shown) == 3
    assert all("Describe the image." in sample["question"] for sample in shown)
    assert {sample["expected"] for sample in shown} == {"A red ellipse.", "A red rectangle.", "A green ellipse."}
    trained = masters(aligned)
    names = [f"linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]
    assert list(trained) == names
    started = fresh.projector.state_dict()
    assert all(not torch.equal(trained[name].bfloat16(), started[name]) for name in names)


def test_without_held_out_rows_those_trained_on_are_shown(stage1: Recipe, tmp_path: Path) -> None:
    train_stage1(stage1.model_copy(update={"held_out": None, "samples": 2, "steps": 2}), tmp_path / "run")
    [figures] = log(tmp_path / "run")
    assert [sample["expected"] for sample in figures["samples"]] == ["A red ellipse.", "A red rectangle."]
    assert "held_out_loss" not in figures


def test_stage_2_goes_on_from_stage_1_and_trains_projector_and_lora(
    aligned: Path, instructed: Path, base_lm: Path
) -> None:
    trained, before = masters(instructed), masters(aligned)
    adapter = {name: value for name, value in trained.items() if not name.startswith("linear_")}
    assert adapter
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    # 7 linear layers in each of the 2 blocks, and each has learned: a LoRA starts with B = 0.
    moved = [name for name, value in adapter.items() if ".lora_B." in name and value.any()]
    assert len(moved) == 14
    projector = {name: value for name, value in trained.items() if name.startswith("linear_")}
    assert projector.keys() == before.keys()
    assert all(not torch.equal(projector[name], before[name]) for name in projector)
    change = max(float((projector[name] - before[name]).abs().max()) for name in projector)
    assert change < 0.1  # it went on, it did not start afresh
    assert digests(base_lm) == digests(make_lm(instructed.parent / "twin"))
    saved = load_file(instructed / "lora" / "adapter_model.safetensors")
    assert len(saved) == len(adapter)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    stage: int, stage1: Recipe, stage2: Recipe, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_stage1 if stage == 1 else train_stage2
    recipe = stage1 if stage == 1 else stage2.model_copy(update={"start": aligned})
    recipe = recipe.model_copy(update={"steps": 10})
    train(recipe, tmp_path / "whole")

    deal = Dealer.step

    def interrupted(dealer: Dealer, number: int):
        if number == 7:  # three steps after the last checkpoint
            raise KeyboardInterrupt
        return deal(dealer, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Dealer, "step", interrupted)
        train(recipe, tmp_path / "broken")
    assert learned(tmp_path / "broken")["step"] == 4
    train(recipe, tmp_path / "broken")
    assert same(masters(tmp_path / "broken"), masters(tmp_path / "whole"))


def test_what_is_published_answers(instructed: Path, base_lm: Path, data: Path, tmp_path: Path) -> None:
    publish(instructed, "tiny", tmp_path, {"note": "a test"})
    assistant = load_assistant(tmp_path / "tiny")
    lineage: Any = assistant.manifest.lineage
    assert lineage["note"] == "a test"
    assert lineage["base_lm"] == sha256((base_lm / "model.safetensors").read_bytes())
    assert lineage["tower"] == sha256(efficientnet_lite_weights().read_bytes())
    assert lineage["run"]["recipe"]["lora"]["rank"] == 4
    captions = str(data / "captions.jsonl")
    assert (
        lineage["run"]["data"][captions] == lineage["run"]["start"]["data"][captions] == digests(data)["captions.jsonl"]
    )
    assert lineage["run"]["measured"]["held_out_loss"] == log(instructed)[-1]["held_out_loss"]
    assert assistant.manifest.lora is not None
    assert assistant.manifest.lora.rank == 4
    local = LocalAssistant(assistant, base_lm)
    picture = Image.open(data / "images" / "red-ellipse.png").convert("RGB")
    describe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    hello = [{"role": "user", "content": "Hello!"}]
    options = {"max_new_tokens": 12}
    together = local.answer([(describe, [picture]), (hello, [])], **options)
    assert together == [*local.answer([(describe, [picture])], **options), *local.answer([(hello, [])], **options)]
    assert all(isinstance(answer, str) for answer in together)


def test_a_version_names_the_one_it_came_from(aligned: Path, stage2: Recipe, instructed: Path, tmp_path: Path) -> None:
    parent, run = tmp_path / "stage1", tmp_path / "stage2"
    shutil.copytree(aligned, parent)
    first = publish(parent, "first", tmp_path / "models", {})
    shutil.copytree(instructed, run)
    (run / "recipe.json").write_text(stage2.model_copy(update={"start": parent}).model_dump_json())
    second = publish(run, "second", tmp_path / "models", {})
    assert first.manifest.lineage["parent"] is None
    assert second.manifest.lineage["parent"] == f"first@{first.version.removeprefix('sha256:')}"


def test_stage_1_is_published_without_a_lora(aligned: Path, base_lm: Path, tmp_path: Path) -> None:
    assistant = publish(aligned, "tiny", tmp_path, {})
    assert assistant.manifest.lora is None
    assert LocalAssistant(assistant, base_lm).answer([([{"role": "user", "content": "Hello!"}], [])], max_new_tokens=2)


def test_the_published_projector_takes_raw_features(stage1: Recipe, aligned: Path, tmp_path: Path) -> None:
    published = load_projector(publish(aligned, "tiny", tmp_path, {}))
    run = Run(stage1, aligned)
    state = learned(aligned)
    run.projector.float().load_state_dict(state["projector"])
    run.standardizer.load_state_dict(state["standardizer"])
    cache = run.dealer.sources[0].features
    assert cache is not None
    features = torch.stack([cache[name] for name in cache.rows])
    with torch.no_grad():
        expected = run.projector(run.standardizer(features))
        torch.testing.assert_close(published(features.float()), expected, atol=5e-3, rtol=1e-2)  # float16 weights


def test_publishing_needs_a_checkpoint(stage1: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(stage1.model_dump_json())
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        publish(run, "tiny", tmp_path / "models", {})


def test_an_unfinished_stage_2_is_not_published(stage2: Recipe, instructed: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copytree(instructed / "checkpoints", unfinished / "checkpoints")
    shutil.copy(instructed / "recipe.json", unfinished)
    with pytest.raises(FileNotFoundError, match="not finished"):
        publish(unfinished, "tiny", tmp_path / "models", {})
    assert not (tmp_path / "models").exists()


def test_a_projector_of_other_widths_is_refused_before_the_data_is_read(
    stage2: Recipe, aligned: Path, tmp_path: Path
) -> None:
    wide = make_lm(tmp_path / "wide", width=128)
    update = {"start": aligned, "base_lm": wide, "features": tmp_path / "features"}
    with pytest.raises(AssistantError, match=r"2532 → 48 → 64 \(tower → hidden → base LM\), but 2532 → 48 → 128 is"):
        train_stage2(stage2.model_copy(update=update), tmp_path / "run")
    assert not (tmp_path / "features").exists()
    run = tmp_path / "moved"
    shutil.copytree(aligned, run)
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text()).model_copy(update={"base_lm": wide})
    (run / "recipe.json").write_text(recipe.model_dump_json())
    with pytest.raises(AssistantError, match="but 2532 → 48 → 128 is wanted: use the tower and base LM it was trained"):
        publish(run, "tiny", tmp_path / "models", {})
    assert not (tmp_path / "models").exists()


def test_a_run_is_not_gone_on_with_by_another_recipe(stage1: Recipe, aligned: Path) -> None:
    with pytest.raises(RecipeError, match=r"projector_learning_rate: 0\.003 before, 0\.1 now"):
        train_stage1(stage1.model_copy(update={"projector_learning_rate": 0.1}), aligned)


def test_a_run_settles_its_precision_when_it_begins(stage1: Recipe, tmp_path: Path) -> None:
    undecided, path = stage1.model_copy(update={"dtype": "auto"}), tmp_path / "recipe.json"
    here = keep_recipe(undecided, path).dtype
    assert here == name_of(dtype_of("auto", torch.device("cpu")))
    other = "float32" if here == "bfloat16" else "bfloat16"  # as on a machine of the other kind
    path.write_text(stage1.model_copy(update={"dtype": other}).model_dump_json())
    assert keep_recipe(undecided, path).dtype == other
    with pytest.raises(RecipeError, match=f"dtype: {other} before, {here} now"):
        keep_recipe(stage1.model_copy(update={"dtype": here}), path)


def test_a_data_set_with_many_broken_images_is_refused(stage1: Recipe, data: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (data / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "red-ellipse.png").write_bytes(b"not a picture")
    broken = stage1.data[0].model_copy(update={"images": images})
    recipe = stage1.model_copy(update={"data": [broken], "features": tmp_path / "features"})
    with pytest.raises(DataError, match="of 12 rows, 2 dropped: 2 × an image is missing or cannot be decoded"):
        train_stage1(recipe, tmp_path / "run")


def test_rows_longer_than_a_row_are_refused(stage1: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 × longer than row_length \(line 1: 59 tokens, row_length is 20\)"):
        train_stage1(stage1.model_copy(update={"row_length": 20}), tmp_path / "run")


def test_a_step_deals_the_same_batches_whenever_it_is_asked(stage2: Recipe, aligned: Path, tmp_path: Path) -> None:
    recipe = stage2.model_copy(update={"start": aligned})
    one, other = Run(recipe, tmp_path / "one").dealer, Run(recipe, tmp_path / "other").dealer
    forward = {number: one.step(number) for number in range(8)}
    for number in (5, 0, 7):
        for mine, theirs in zip(forward[number].batches, other.step(number).batches, strict=True):
            assert torch.equal(mine.packed.ids, theirs.packed.ids)
            assert mine.packed.images == theirs.packed.images
            assert (mine.features is None) == (theirs.features is None)
            if mine.features is not None and theirs.features is not None:
                assert torch.equal(mine.features, theirs.features)


def test_learning_rates_warm_up_stay_and_fall() -> None:
    factors = [rate_factor(step, 100, warmup=0.1, decay=0.5) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.01
    assert rate_factor(55, 100, warmup=0.1, decay=1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_steps_too_small_for_bf16_add_up() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([({"weight": parameter}, 1e-4)], weight_decay=0.0)
    for _ in range(200):
        parameter.sum().backward()
        optimizer.step(1.0, clip=1.0)
    assert parameter[0].item() == pytest.approx(0.98, abs=0.004)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, needs_compiler])])
def test_the_gradients_of_many_passes_add_up_in_float32(compiled: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).bfloat16()
    passes = [torch.randn(8, 32, dtype=torch.bfloat16) for _ in range(16)]
    if compiled:
        layer.compile()

    def gradient(passes: list[Tensor]) -> Tensor:
        optimizer = MasterAdamW([({"weight": layer.weight, "bias": layer.bias}, 0.0)], weight_decay=0.0)
        for rows in passes:
            layer(rows).float().square().sum().backward()
        optimizer.step(1.0, clip=1e9)
        return torch.cat([master.grad.flatten() for master in optimizer.masters if master.grad is not None])

    together = gradient(passes)
    assert together.dtype == torch.float32
    one_by_one = torch.stack([gradient([rows]) for rows in passes]).double().sum(0)
    assert float((together - one_by_one).norm() / one_by_one.norm()) < 1e-6  # in bf16 it would be 4e-3


@pytest.mark.slow
@needs_compiler
def test_compiled_training_is_the_same_training(
    stage2: Recipe, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stage2.model_copy(update={"start": aligned})
    train_stage2(recipe, tmp_path / "plain")
    monkeypatch.setattr("basalt.train.loop.COMPILE_FROM", 1)
    train_stage2(recipe, tmp_path / "compiled")
    plain, compiled = log(tmp_path / "plain"), log(tmp_path / "compiled")
    assert compiled[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.01)
    assert compiled[-1]["held_out_loss"] == pytest.approx(plain[-1]["held_out_loss"], rel=0.01)


def test_features_computed_each_time_train_the_same(stage2: Recipe, aligned: Path, tmp_path: Path) -> None:
    """In float32, as the tower may round otherwise in another batch."""
    runs = {}
    for keep in (True, False):
        update = {"start": aligned, "keep_features": keep, "dtype": "float32", "steps": 4, "checkpoint_every": 2}
        train_stage2(stage2.model_copy(update=update), tmp_path / str(keep))
        runs[keep] = [entry["loss"] for entry in log(tmp_path / str(keep))]
    assert runs[True] == pytest.approx(runs[False], abs=1e-5)


@pytest.mark.parametrize(("steps", "kind"), [(1, LiveFeatures), (40, FeatureCache)])
def test_features_of_more_images_than_the_steps_need_are_not_computed(
    steps: int, kind: type, stage1: Recipe, tmp_path: Path
) -> None:
    update = {"steps": steps, "rows_per_pass": 1, "passes_per_step": 1, "row_length": 80, "features": tmp_path / "kept"}
    run = Run(stage1.model_copy(update=update | {"held_out": None}), tmp_path / "run")
    [source] = run.dealer.sources
    assert isinstance(source.features, kind)


@pytest.mark.parametrize("row_length", [80, 400], ids=["plain", "segments"])
def test_an_image_that_turns_out_broken_ends_no_run(row_length: int, stage1: Recipe, tmp_path: Path) -> None:
    """The first of 24, shown in samples and alone in its pass, where features are computed each time."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(24):
        image = tmp_path / "images" / f"{number:02}.png"
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(image)
        said = ("Red. " * 50 if row_length == 400 else "Red ") + f"{number:02}."
        turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": said}]
        rows.append({"image": image.name, "conversations": turns})
    (tmp_path / "images" / "00.png").write_bytes(b"not a picture")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = DataSource(rows=tmp_path / "rows.json", images=tmp_path / "images")
    update: dict[str, Any] = {"keep_features": False, "dtype": "float32", "data": [source], "held_out": source}
    update |= {"row_length": row_length, "rows_per_pass": 1, "passes_per_step": 1, "steps": 24}
    recipe = stage1.model_copy(update=update)
    train_stage1(recipe, tmp_path / "run")
    figures = log(tmp_path / "run")
    assert len(figures) == 6
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["held_out_loss"]) for line in figures)
    assert [sample["expected"].split()[-1] for sample in figures[0]["samples"]] == ["01.", "02.", "03."]
    tokens = [line["tokens"] for line in figures]
    assert sum(tokens) == 23 / 4 * max(tokens)  # four steps each, one of them with nothing in it


def test_layers_are_run_as_they_are_where_no_compiler_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = nn.ModuleList([nn.Linear(2, 2)])
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    compile_layers(layers)
    assert "there is no C++ compiler ($CXX or g++)" in caplog.text
    assert layers[0]._compiled_call_impl is None


def test_a_gpu_needs_a_c_compiler_and_a_cpu_one_for_c_plus_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)

    def there() -> tuple[bool, bool]:
        return has_compiler(on_gpu=True), has_compiler()

    assert there() == (False, False)
    for name, found in (("clang", (True, False)), ("g++", (True, True))):
        (tmp_path / name).touch(mode=0o755)
        assert there() == found
    monkeypatch.setenv("CC", "gcc")  # it alone is asked for
    assert there() == (False, True)


def test_passes_hold_rows_of_like_length(stage2: Recipe, aligned: Path, tmp_path: Path) -> None:
    dealer = Run(stage2.model_copy(update={"start": aligned}), tmp_path / "run").dealer
    for batch in dealer.step(0).batches + dealer.step(1).batches:
        used = int((batch.packed.groups >= 0).sum(1).max())
        assert used <= batch.packed.ids.shape[1] < used + 32


def test_what_is_prefetched_comes_in_order_and_errors_where_they_belong() -> None:
    assert list(prefetched(lambda number: number * 2, range(3, 7))) == [6, 8, 10, 12]
    assert list(prefetched(str, range(0))) == []

    def make(number: int) -> int:
        return 6 // (2 - number)

    seen = []
    with pytest.raises(ZeroDivisionError):
        for made in prefetched(make, range(4)):
            seen.append(made)
    assert seen == [3, 6]
