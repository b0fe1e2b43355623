"""Whether a recipe can go on from a published assistant, by its manifest: asked before anything is loaded."""

from basalt.assistants import Manifest
from basalt.train.recipe import Recipe

KEEPS_AN_ASSISTANT = (
    "keep_start is the share of an assistant's projector and LoRA that is kept: it needs stage 2, "
    "with an assistant that has a LoRA as its start; leave it out, or name one"
)


def misfits(manifest: Manifest, recipe: Recipe, lm_dim: int | None) -> dict[str, str]:
    """What of an assistant is not as the recipe has it: the field → both values in words; empty where it fits.

    Args:
        lm_dim: of the recipe's base LM; None where that is not on this machine.
    """
    tower = {f"tower.{name}": value for name, value in manifest.tower.model_dump().items()}
    theirs = tower | {"projector_hidden": manifest.projector.hidden, "image_token_id": manifest.base_lm.image_token_id}
    ours = {f"tower.{name}": value for name, value in recipe.tower.model_dump().items()}
    ours |= {"projector_hidden": recipe.projector_hidden, "image_token_id": recipe.image_token_id}
    if lm_dim is not None:
        theirs["width of the base LM"], ours["width of the base LM"] = manifest.base_lm.lm_dim, lm_dim
    if manifest.lora is not None and recipe.lora is not None:
        theirs["lora.rank"], ours["lora.rank"] = manifest.lora.rank, recipe.lora.rank
    return {
        name: f"{name} is {value} there and {ours[name]} in the recipe"
        for name, value in theirs.items()
        if value != ours[name]
    }
