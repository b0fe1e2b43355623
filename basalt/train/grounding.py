"""Grounding, how stage 1 begins: the projector learns what stands where before anything is run through the LM.

In a drawn scene it is known what every visual token shows: the box it lies in, or bare ground. The token is
trained to point to the base LM's own embeddings of those words (or of that letter), so that the frozen LM is
handed a picture as the words it shows, and a little of where each stands. The token with a thing's centre points to
"one" too: things over several tokens can so be counted, and a letter is not read twice. A photo has no boxes: the
words of its answers must be found somewhere among its tokens (multiple-instance learning; Maron & Lozano-Pérez 1998).
No LM is run, so an image costs some fiftieth of what it costs in the stages.
"""

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from basalt.assistants import TowerSpec
from basalt.data.preprocess import IGNORE
from basalt.data.scenes import Box
from basalt.train import parallel
from basalt.train.data import Source
from basalt.train.features import FeatureCache, LiveFeatures
from basalt.train.loop import Run
from basalt.train.optimizer import MasterAdamW
from basalt.train.phase import Phase
from basalt.train.progress import Tally
from basalt.train.recipe import Grounding
from basalt.train.stop import Stop

GROUND = "background"  # the word for a token that lies in no box
PLACES = ("top", "left", "middle", "right", "bottom")
PLACE_SHARE = 0.15  # of a token's content that tells where it lies
ONE, ONE_SHARE = "one", 0.15  # the word for a thing's centre, and its share of the token's content, for two at most
COVERED = 0.35  # a box is a token's content where they overlap by this share of the smaller side, both ways
SHARPNESS = 20.0  # cosines → logits
COMMON, RARE = 0.12, 8  # words in more than this share, or in fewer than this many, of the photos tell nothing
PHOTO_WEIGHT, LENGTH_WEIGHT = 0.3, 0.1

Content = list[tuple[int, int, float]]  # (visual token, vocabulary id, share); a token's shares add up to 1


@dataclass(frozen=True)
class Photo:
    features: FeatureCache | LiveFeatures
    name: str
    words: list[tuple[int, float]]  # vocabulary id → share


def cell_contents(boxes: list[Box], side: int, ids_of: dict[str, list[int]]) -> Content:
    """What each visual token of a `side` × `side` grid shows: boxes by area, centres of boxes, its own place."""
    shown: list[dict[int, float]] = [defaultdict(float) for _ in range(side * side)]  # vocabulary id → area
    for label, left, top, right, bottom in boxes:
        for cell, areas in enumerate(shown):
            row, column = divmod(cell, side)
            width = min(right, (column + 1) / side) - max(left, column / side)
            height = min(bottom, (row + 1) / side) - max(top, row / side)
            if width > COVERED * min(1 / side, right - left) and height > COVERED * min(1 / side, bottom - top):
                for token in ids_of[label]:
                    areas[token] += max(width * height, 1e-9) / len(ids_of[label])
    centres = Counter(
        min(int((top + bottom) / 2 * side), side - 1) * side + min(int((left + right) / 2 * side), side - 1)
        for _, left, top, right, bottom in boxes
    )
    content: Content = []
    for cell, areas in enumerate(shown):
        areas = areas or {ids_of[GROUND][0]: 1.0}
        ones = ONE_SHARE * min(centres[cell], 2)
        scale = (1 - PLACE_SHARE - ones) / sum(areas.values())
        shares = defaultdict(float, {token: scale * area for token, area in areas.items()})
        if ones:
            shares[ids_of[ONE][0]] += ones
        for place in _places(cell, side):
            shares[ids_of[place][0]] += PLACE_SHARE / 2
        content += [(cell, token, share) for token, share in shares.items()]
    return content


def _places(cell: int, side: int) -> tuple[str, str]:
    """Which third of the rows and of the columns a cell lies in."""
    row, column = (3 * (index + 0.5) / side for index in divmod(cell, side))
    return ("top", "middle", "bottom")[int(row)], ("left", "middle", "right")[int(column)]


class Grounder:
    """The objective over one recipe's sources.

    Args:
        embeddings: the base LM's, `[vocab, lm_dim]`.
        tokenizer: the base LM's.

    Raises:
        ValueError: no source has boxes.
    """

    def __init__(self, sources: list[Source], tower: TowerSpec, embeddings: Tensor, tokenizer: Any) -> None:
        side = math.isqrt(tower.tokens)
        labels = {label for source in sources for boxes in source.boxes.values() for label, *_ in boxes}
        if not labels:
            raise ValueError("grounding needs a data source with `boxes`")
        # A letter stands alone, as it does where a word is spelled; a word begins with its space.
        ids_of = {
            label: tokenizer(label if len(label) == 1 else f" {label}", add_special_tokens=False).input_ids
            for label in sorted({*labels, GROUND, ONE, *PLACES})
        }
        self.scenes = [
            (source.features, name, cell_contents(boxes, side, ids_of))
            for source in sources
            if source.features is not None
            for name, boxes in source.boxes.items()
            if name in source.features
        ]
        self.photos = _photos([source for source in sources if not source.boxes], tokenizer)
        vocabulary = sorted(
            {token for ids in ids_of.values() for token in ids}
            | {token for photo in self.photos for token, _ in photo.words}
        )
        self.column = {token: column for column, token in enumerate(vocabulary)}
        self.mean = embeddings.float().mean(0)
        centred = embeddings[vocabulary].float() - self.mean
        self.length = float(centred.norm(dim=1).mean())
        self.words = normalize(centred, dim=1).to(embeddings.dtype)  # [V, lm_dim]

    def scores(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens `[N, tokens, lm_dim]` → log-probabilities `[N, tokens, V]` of the words, and how far the
        tokens are from the words' usual length."""
        pointing = visual - self.mean.to(visual)
        off = (pointing.float().norm(dim=-1) / self.length - 1).square().mean()
        logits = SHARPNESS * normalize(pointing, dim=-1) @ self.words.T
        return logits.float().log_softmax(-1), off

    def scene_loss(self, log_probabilities: Tensor, contents: list[Content]) -> Tensor:
        """Cross-entropy of each visual token with what it shows."""
        image, cell, word, share = zip(
            *(
                (index, cell, self.column[token], share)
                for index, content in enumerate(contents)
                for cell, token, share in content
            ),
            strict=True,
        )
        found = log_probabilities[list(image), list(cell), list(word)]
        return -(found * torch.tensor(share, device=found.device)).sum() / (len(contents) * log_probabilities.shape[1])

    def photo_loss(self, log_probabilities: Tensor, photos: list[Photo]) -> Tensor:
        """Each word of a photo's answers must be what some of its tokens show."""
        shown = log_probabilities.exp().mean(1)  # [N, V]
        losses = []
        for index, photo in enumerate(photos):
            columns = [self.column[token] for token, _ in photo.words]
            shares = torch.tensor([share for _, share in photo.words], device=shown.device)
            losses.append(-(shown[index, columns].clamp(min=1e-6).log() * shares).sum())
        return torch.stack(losses).mean()

    def train(
        self,
        run: Run,
        grounding: Grounding,
        stop: Stop,
    ) -> None:
        """Trains the run's projector, bf16, in place; cosine to zero after a short warm-up.

        Raises:
            Stopped: `stop` said so.
        """
        projector, standardizer, seed = run.projector, run.standardizer, run.recipe.seed
        with torch.no_grad():
            projector.linear_2.bias.copy_(self.mean)
        optimizer = MasterAdamW([(dict(projector.named_parameters()), grounding.learning_rate)], weight_decay=0.01)

        def scores(features: Tensor) -> tuple[Tensor, Tensor]:
            return self.scores(projector(standardizer(features.to(run.device)).to(projector.linear_1.weight)))

        def deal(step: int) -> tuple[list[Content], Tensor, list[Photo], Tensor | None]:
            rng = random.Random(f"{seed}/grounding/{step}")
            scenes = rng.sample(self.scenes, min(grounding.images_per_step, len(self.scenes)))
            photos = rng.sample(self.photos, min(grounding.images_per_step // 2, len(self.photos)))
            return (
                [content for _, _, content in scenes],
                torch.stack([cache[name] for cache, name, _ in scenes]),
                photos,
                torch.stack([photo.features[photo.name] for photo in photos]) if photos else None,
            )

        def work(step: int, dealt: tuple[list[Content], Tensor, list[Photo], Tensor | None]) -> Tally:
            contents, shown, photos, photographed = dealt
            log_probabilities, off = scores(shown)
            scene_loss = self.scene_loss(log_probabilities, contents)
            loss = scene_loss + LENGTH_WEIGHT * off
            means: dict[str, tuple[Tensor | float, float]] = {"loss": (scene_loss.detach(), 1)}
            if photographed is not None:
                log_probabilities, off = scores(photographed)
                photo_loss = self.photo_loss(log_probabilities, photos)
                loss = loss + PHOTO_WEIGHT * photo_loss + LENGTH_WEIGHT * off
                means["photo_loss"] = (photo_loss.detach(), 1)
            (loss / parallel.rank_and_world()[1]).backward()  # all processes see the same images
            warm = min(1.0, (step + 1) / 50)
            optimizer.step(warm * 0.5 * (1 + math.cos(math.pi * step / grounding.steps)), clip=1.0)
            return Tally(means, 0)

        Phase(
            name="grounding",
            directory=run.directory / "grounding",
            steps=grounding.steps,
            checkpoint_every=500,
            deal=deal,
            work=work,
            state=lambda: {"optimizer": optimizer.state(), "standardizer": standardizer.state_dict()},
            load=lambda state: optimizer.load(state["optimizer"]),
            stop=stop,
        ).run()


def _photos(sources: list[Source], tokenizer: Any) -> list[Photo]:
    """The sources' images with the telling words of all answers about them."""
    bags: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
    for number, source in enumerate(sources):
        for group in source.groups:
            for name in group.images:
                for branch in group.branches:
                    bags[number, name].update({label for label in branch.labels if label != IGNORE})
    frequency = Counter(token for bag in bags.values() for token in bag)
    telling = {
        token
        for token, count in frequency.items()
        if RARE <= count <= COMMON * len(bags) and _is_word(tokenizer.decode([token]))
    }
    photos = []
    for (number, name), bag in bags.items():
        words = {token: count for token, count in bag.items() if token in telling}
        features = sources[number].features
        if words and features is not None:
            total = sum(words.values())
            photos.append(Photo(features, name, [(token, count / total) for token, count in words.items()]))
    return photos


def _is_word(text: str) -> bool:
    return text.startswith(" ") and len(text) >= 4 and text[1:].isalpha()
