"""Stage 1, alignment: the projector alone learns to speak the base LM's language, on captions.

LLaVA-1.5's recipe (Liu et al. 2023): tower and LM frozen, lr 1e-3, cosine, warm-up 3 %. A recipe may have the
projector grounded first (see `basalt.train.grounding`).
"""

from pathlib import Path

from basalt.train.grounding import Grounder
from basalt.train.loop import Run, assemble, begun
from basalt.train.recipe import Recipe, RecipeError
from basalt.train.stop import Stop, never


def train_stage1(recipe: Recipe, directory: Path, stop: Stop = never) -> None:
    """Trains the projector and leaves it in the run's last checkpoint.

    Raises:
        Stopped: `stop` said so.
    """
    if recipe.lora or recipe.start:
        raise RecipeError("stage 1 trains a fresh projector alone: `lora` and `start` belong to stage 2")
    run = Run(recipe, directory, stop)
    if recipe.grounding is not None and not begun(directory):
        embeddings = run.lm.get_input_embeddings().weight.detach()
        grounder = Grounder(run.dealer.sources, recipe.tower, embeddings, run.tokenizer.tokenizer)
        grounder.train(run, recipe.grounding, stop)
    run.train("stage1", *assemble(run.projector, run.lm, recipe), stop)
