"""Photos captioned by the assistant itself, so that an assistant that is trained on still captions as well.

A few thousand photos seen again with the references they were learned from are learned by heart, and the captions of
other photos get worse. The assistant's own captions hold it in place, as its own answers do for chat; those that agree
best with the references, of several, draw it a little towards what people agree on (expert iteration). Each photo is
shown from a view that was not trained on: mirrored, and cut a little.
"""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps

from basalt.assistants import load_assistant
from basalt.data.images import decode_image
from basalt.data.readers import DataError, ImageSource
from basalt.eval.captions import PROMPT, CiderD, read_samples
from basalt.model.assistant import LocalAssistant
from basalt.model.precision import dtype_of

BATCH = 32
LEAST = 0.5  # CIDEr-D of a caption that is kept
KEPT = 2  # captions of a photo
TEMPERATURE = 0.7
SHOWN = 0.85  # of a photo's width and height, at least

Views = list[Image.Image]


def caption_photos(
    model: Path,
    base_lm: Path,
    rows: Path,
    images: Path,
    out: Path,
    *,
    candidates: int = 4,
    count: int | None = None,
    seed: int = 0,
) -> int:
    """Writes `captions.jsonl` and `images.tar`, the views that the captions are of.

    Args:
        rows: JSON or JSONL of records with `image`, its name in `images`, and `captions`, the references.
        candidates: a photo's greedy caption, and sampled ones besides; of those no worse than the greedy one the best
            are kept.
        count: of how many photos, drawn from all of them; None for all.

    Returns:
        Of how many photos captions were kept.

    Raises:
        AssistantError: the assistant or its base LM cannot be loaded.
        DataError: the rows are not of this form, or an image is missing.
        ImageError: an image cannot be decoded.
    """
    references = {sample.id: sample.gold for sample in read_samples(rows)}
    ciderd = CiderD(references)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    names = rng.sample(sorted(references), min(count or len(references), len(references)))
    if not names:
        raise DataError(f"{rows} holds no photos")
    assistant = LocalAssistant(load_assistant(model), base_lm, dtype_of("auto", torch.device("cpu")))
    source = ImageSource(images)
    out.mkdir(parents=True, exist_ok=True)
    kept = 0
    with tarfile.open(out / "images.tar", "w") as archive, (out / "captions.jsonl").open("w") as file:
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            views = [_view(decode_image(source.read(name)), rng) for name in batch]
            for name, view, offered in zip(batch, views, _candidates(assistant, views, candidates), strict=True):
                scores = {caption: ciderd.score(name, caption) for caption in offered}
                best = sorted(scores, key=scores.__getitem__, reverse=True)[:KEPT]
                chosen = [caption for caption in best if scores[caption] >= max(scores[offered[0]], LEAST)]
                if chosen:
                    shown = f"own-{kept:06d}.jpg"
                    _add(archive, shown, view)
                    file.write(json.dumps({"image": shown, "captions": chosen}) + "\n")
                    kept += 1
    return kept


def _candidates(assistant: LocalAssistant, views: Views, count: int) -> Iterator[list[str]]:
    """Captions of each view, the greedy one first."""
    asked = [
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}], [view]) for view in views
    ]
    greedy = assistant.answer(asked, max_new_tokens=32)
    sampled: list[str] = []
    if count > 1:
        sampled = assistant.answer(
            asked, max_new_tokens=32, do_sample=True, temperature=TEMPERATURE, num_return_sequences=count - 1
        )
    for index, caption in enumerate(greedy):
        yield [caption, *sampled[index * (count - 1) : (index + 1) * (count - 1)]]


def _view(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored, and a part of it."""
    share = rng.uniform(SHOWN, 1.0)
    width, height = (max(1, round(side * share)) for side in photo.size)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    return ImageOps.mirror(photo.crop((left, top, left + width, top + height)))


def _add(archive: tarfile.TarFile, name: str, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    entry = tarfile.TarInfo(name)
    entry.size = buffer.tell()
    buffer.seek(0)
    archive.addfile(entry, buffer)
