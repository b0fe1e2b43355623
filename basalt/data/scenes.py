"""Pictures drawn by the project with questions about them: emoji, coloured shapes, printed words, bar charts.

What is in the picture, how many, which colour, where, is there one, what does it say: every answer is known
because the picture was drawn from it. One row per question in LLaVA JSON, so that many share an image, with
`kind` and `gold` beside it for scoring. The `test` split draws other layouts on other grounds, and a tenth
of the words is kept for it.
"""

import json
import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from basalt.data.emoji import CATEGORY, MASS, PLURAL_ONLY, indefinite, load_emoji, plural
from basalt.data.preprocess import SPELLED
from basalt.data.readers import PLACEHOLDER

Split = Literal["train", "test"]

SIZE = 256  # pixels a side
NUMBERS = ("zero", "one", "two", "three", "four", "five")
COLOURS = {
    "red": (220, 30, 35), "green": (30, 150, 55), "blue": (35, 75, 215), "yellow": (245, 210, 30),
    "orange": (245, 130, 20), "purple": (130, 45, 165), "pink": (250, 130, 185), "brown": (125, 75, 35),
    "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
PLACES = {
    "on the left": (0.22, 0.5), "on the right": (0.78, 0.5), "at the top": (0.5, 0.22),
    "at the bottom": (0.5, 0.78), "in the middle": (0.5, 0.5),
}  # fmt: skip

ASK: dict[str, tuple[str, ...]] = {
    "what": ("What is this?", "What is in the picture?", "What do you see?", "What is shown here?", "Name the object.",
             "What can you see in this image?", "What object is this?", "What does the picture show?"),
    "count": ("How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}.",
              "How many {plural} are in the picture?", "What is the number of {plural}?"),
    "colour": ("What color is the {noun}?", "What colour is the {noun}?", "Which color is the {noun}?",
               "Which colour does the {noun} have?", "Tell me the color of the {noun}."),
    "where": ("Where is the {noun}?", "Where in the picture is the {noun}?",
              "In which part of the image is the {noun}?", "Where do you see the {noun}?"),
    "yesno": ("Is there {noun} in the picture?", "Is there {noun}?", "Do you see {noun}?", "Can you see {noun} here?",
              "Does the image show {noun}?"),
    "read": ("What does it say?", "What does the sign say?", "Read the text.", "What is written here?",
             "What word is this?", "What is the word in the picture?", "Which word is printed here?"),
    "spell": ("Spell the word.", "Spell what is written.", "Which letters are printed here?"),
    "tallest": ("Which bar is the tallest?", "Which bar is the highest?", "What color is the tallest bar?"),
    "shortest": ("Which bar is the shortest?", "Which bar is the lowest?", "What color is the shortest bar?"),
    "caption": ("Describe the image.", "Describe the image.", "What do you see in this picture?"),
}  # fmt: skip


Box = tuple[str, float, float, float, float]  # what it shows; left, top, right, bottom in pixels, on file in shares


@dataclass
class Scene:
    """A picture, what stands where in it, and the questions asked about it: (kind, question, answer, gold)."""

    image: Image.Image
    boxes: list[Box] = field(default_factory=list)
    questions: list[tuple[str, str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """What scenes are drawn from."""

    emoji: dict[str, list[Image.Image]]
    fonts: list[Path]
    words: list[str]
    vary: bool = False  # mirror and tint the emoji, soften the words: more vendors and cameras than there are


def make_scenes(
    out: Path, *, emoji: list[Path], fonts: list[Path], count: int, seed: int, split: Split = "train", workers: int = 2
) -> Path:
    """Draws `count` scenes into `out/images` and writes `out/scenes.json` and `out/boxes.json`, and the
    rows of each kind also into `out/KIND.json`.

    Args:
        emoji: unpacked emoji packages (see `basalt.data.emoji`).
        fonts: TrueType or OpenType files for words.

    Returns:
        The path of the rows. The same arguments give the same files.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    draw = partial(_draw_one, out, tuple(emoji), tuple(fonts), seed, split)
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(draw, range(count), chunksize=50))
    rows = [row for scene_rows, _ in drawn for row in scene_rows]
    (out / "boxes.json").write_text(json.dumps({scene_rows[0]["image"]: boxes for scene_rows, boxes in drawn}))
    for kind in sorted({str(row["kind"]) for row in rows}):
        (out / f"{kind}.json").write_text(json.dumps([row for row in rows if row["kind"] == kind]))
    target = out / "scenes.json"
    target.write_text(json.dumps(rows))
    return target


def held_out_words() -> frozenset[str]:
    """The words that no training scene shows: every tenth of the list."""
    return frozenset(_words()[::10])


@cache
def _words() -> list[str]:
    return (Path(__file__).parent / "words.txt").read_text().split()


@cache
def _material(emoji: tuple[Path, ...], fonts: tuple[Path, ...], split: Split) -> Material:
    words = [word for word in _words() if split == "test" or word not in held_out_words()]
    return Material(load_emoji(list(emoji)), list(fonts), words, vary=split == "train")


def _draw_one(
    out: Path, emoji: tuple[Path, ...], fonts: tuple[Path, ...], seed: int, split: Split, number: int
) -> tuple[list[dict[str, str | list[dict[str, str]]]], list[Box]]:
    rng = random.Random(f"{seed}/{split}/{number}")
    material = _material(emoji, fonts, split)
    kinds: list[Callable[[Material, Split, random.Random], Scene]] = [word, thing, group, pair, shapes, chart]
    scene = rng.choices(kinds, weights=(36, 20, 18, 10, 10, 6))[0](material, split, rng)
    name = f"images/{split}-{seed}-{number:06d}.jpg"
    scene.image.save(out / name, quality=90)
    rows: list[dict[str, str | list[dict[str, str]]]] = [
        {
            "id": f"{split}-{seed}-{number:06d}-{index}",
            "image": name,
            "kind": kind,
            "gold": gold,
            "conversations": [
                {"from": "human", "value": f"{PLACEHOLDER}\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, (kind, question, answer, gold) in enumerate(scene.questions)
    ]
    shares: list[Box] = []
    for label, *edges in scene.boxes:
        left, top, right, bottom = (round(edge / SIZE, 4) for edge in edges)
        shares.append((label, left, top, right, bottom))
    return rows, shares


def word(material: Material, split: Split, rng: random.Random) -> Scene:
    """One printed word, as a sign or plain."""
    held_out = held_out_words()
    text = rng.choice(material.words)
    if split == "test" and rng.random() < 0.5:
        text = rng.choice(sorted(held_out))
    drawn = rng.choices((text.upper(), text, text.capitalize()), weights=(5, 3, 2))[0]
    paper, ink = _contrasting(rng)
    image = _ground(split, rng, paper if rng.random() < 0.6 else None)
    font = ImageFont.truetype(rng.choice(material.fonts), rng.randint(44, 96))
    left, top, right, bottom = font.getbbox(drawn)
    label = Image.new("RGBA", (int(right - left) + 24, int(bottom - top) + 20), (*COLOURS[paper], 255))
    ImageDraw.Draw(label).text((12 - left, 10 - top), drawn, font=font, fill=COLOURS[ink])
    flat, angle = label.size, rng.uniform(-6, 6)
    label = label.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    scale = min(1.0, rng.uniform(200, 250) / label.width, 200 / label.height)
    label = label.resize(
        (max(1, round(label.width * scale)), max(1, round(label.height * scale))), Image.Resampling.LANCZOS
    )
    corner = _paste(image, label, rng.random(), rng.random())
    if material.vary and rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    scene = Scene(image)
    turn = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    for index, letter in enumerate(drawn):
        begin, end = (12 + font.getlength(drawn[:stop]) for stop in (index, index + 1))
        x, y = (begin + end - flat[0]) / 2, 0.0  # of the letter's middle from the label's
        x, y = x * turn[0] + y * turn[1], -x * turn[1] + y * turn[0]
        x, y = corner[0] + label.width / 2 + x * scale, corner[1] + label.height / 2 + y * scale
        width, height = (end - begin) * scale / 2, (flat[1] - 20) * scale / 2
        scene.boxes.append((letter, x - width, y - height, x + width, y + height))
    _ask(scene, rng, "read", f'It says "{SPELLED.join(drawn)}".', text)
    if split == "train":
        if rng.random() < 0.3:
            _ask(scene, rng, "spell", "-".join(drawn), text)
        if rng.random() < 0.3:
            _ask(scene, rng, "caption", f'The word "{SPELLED.join(drawn)}" in {ink} letters on {paper}.', text)
    _ask(scene, rng, "yesno", *_yes_no(rng, None, [], material), noun=None)
    return scene


def thing(material: Material, split: Split, rng: random.Random) -> Scene:
    """One thing, large."""
    noun, picture = _thing(material, rng)
    scene = Scene(_ground(split, rng))
    _place(scene, noun, picture, rng.randint(90, 220), rng.random(), rng.random(), rng)
    _ask(scene, rng, "what", indefinite(noun), noun)
    _ask(scene, rng, "caption", f"A picture of {indefinite(noun)}.", noun)
    _ask(scene, rng, "yesno", *_yes_no(rng, noun, [noun], material), noun=None)
    if rng.random() < 0.1 and _countable(noun):
        _ask(scene, rng, "count", NUMBERS[1], NUMBERS[1], noun=noun)
    return scene


def group(material: Material, split: Split, rng: random.Random) -> Scene:
    """One to five of a kind, sometimes with one other thing among them."""
    noun, picture = _thing(material, rng, countable=True)
    number = rng.randint(1, 5)
    other = _thing(material, rng, besides=noun, countable=True) if rng.random() < 0.3 else None
    scene = Scene(_ground(split, rng))
    size = rng.randint(44, 74)
    cells = _cells(number + (other is not None), split, rng)
    for x, y in cells[:number]:
        _place(scene, noun, picture, size + rng.randint(-5, 5), x, y, rng)
    nouns = [noun]
    if other:
        _place(scene, *other, size, *cells[number], rng)
        nouns.append(other[0])
    _ask(scene, rng, "count", NUMBERS[number], NUMBERS[number], noun=noun)
    _ask(scene, rng, "yesno", *_yes_no(rng, rng.choice(nouns), nouns, material), noun=None)
    things = indefinite(noun) if number == 1 else f"{NUMBERS[number]} {plural(noun)}"
    _ask(scene, rng, "caption", f"A picture of {things}{f' and {indefinite(other[0])}' if other else ''}.", noun)
    return scene


def pair(material: Material, split: Split, rng: random.Random) -> Scene:
    """Two or three different things in different places."""
    scene = Scene(_ground(split, rng))
    number = rng.randint(2, 3)
    rows = rng.random() < 0.4 and number == 2
    slots = ["at the top", "at the bottom"] if rows else ["on the left", "on the right"]
    places = [*slots, "in the middle"] if number == 3 else slots
    nouns: list[str] = []
    for place in places:
        noun, picture = _thing(material, rng, besides=nouns[-1] if nouns else None)
        while noun in nouns:
            noun, picture = _thing(material, rng)
        nouns.append(noun)
        x, y = PLACES[place]
        jitter = 0.06 if split == "train" else 0.1
        if not rows:
            y += rng.uniform(-0.25, 0.25) if number == 2 else 0.0
        x, y = x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)
        _place(scene, noun, picture, rng.randint(60, 84), x, y, rng)
    for noun, place in rng.sample(list(zip(nouns, places, strict=True)), 2):
        _ask(scene, rng, "where", place, place.split()[-1], noun=noun)
    _ask(scene, rng, "yesno", *_yes_no(rng, rng.choice(nouns), nouns, material), noun=None)
    listed = " and ".join(indefinite(noun) for noun in nouns)
    _ask(scene, rng, "caption", f"A picture of {listed}.", nouns[0])
    return scene


def shapes(material: Material, split: Split, rng: random.Random) -> Scene:
    """One to three coloured shapes."""
    ground = rng.choice(["white", "black", "grey"])
    scene = Scene(_ground(split, rng, ground))
    kinds = rng.sample(SHAPES, rng.randint(1, 3))
    colours = rng.sample([colour for colour in COLOURS if colour != ground], len(kinds))
    cells = _cells(len(kinds), split, rng)
    size = rng.randint(60, 90) if len(kinds) > 1 else rng.randint(80, 150)
    for kind, colour, (x, y) in zip(kinds, colours, cells, strict=True):
        _place(scene, f"{colour} {kind}", shape(kind, COLOURS[colour]), size, x, y, rng, turn=8)
    for kind, colour in zip(kinds, colours, strict=True):
        _ask(scene, rng, "colour", colour, colour, noun=kind)
    if len(kinds) == 1:
        _ask(scene, rng, "what", indefinite(f"{colours[0]} {kinds[0]}"), kinds[0])
    present = rng.random() < 0.5
    asked = rng.choice(kinds) if present else rng.choice([kind for kind in SHAPES if kind not in kinds])
    answer = "yes" if present else "no"
    _ask(scene, rng, "yesno", answer, answer, noun=f"a {asked}")
    listed = " and ".join(indefinite(f"{colour} {kind}") for colour, kind in zip(colours, kinds, strict=True))
    _ask(scene, rng, "caption", f"A picture of {listed}.", kinds[0])
    return scene


def chart(material: Material, split: Split, rng: random.Random) -> Scene:
    """Two to five coloured bars of different heights."""
    scene = Scene(_ground(split, rng, "white"))
    draw = ImageDraw.Draw(scene.image)
    number = rng.randint(2, 5)
    colours = rng.sample([colour for colour in COLOURS if colour != "white"], number)
    heights = rng.sample(range(30, 201, 26), number)
    pitch = 220 / number
    gap = rng.uniform(0.15, 0.4) if split == "train" else rng.uniform(0.2, 0.5)
    draw.line([(14, 226), (242, 226)], fill=(60, 60, 60), width=3)
    for index, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = 18 + index * pitch + pitch * gap / 2
        edges = (left, 225 - height, left + pitch * (1 - gap), 225)
        draw.rectangle(edges, fill=COLOURS[colour])
        scene.boxes.append((f"{colour} bar", *edges))
    tallest, shortest = colours[heights.index(max(heights))], colours[heights.index(min(heights))]
    _ask(scene, rng, "tallest", f"the {tallest} bar", tallest, kind_as="chart")
    _ask(scene, rng, "shortest", f"the {shortest} bar", shortest, kind_as="chart")
    _ask(scene, rng, "count", NUMBERS[number], NUMBERS[number], noun="bar", kind_as="chart")
    _ask(scene, rng, "caption", f"A bar chart with {NUMBERS[number]} bars. The {tallest} bar is the tallest.", tallest)
    return scene


def shape(kind: str, colour: tuple[int, int, int]) -> Image.Image:
    """A filled shape, RGBA, 256 px."""
    big = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(big)
    star = [(128, 4), (158, 94), (252, 94), (176, 150), (205, 240), (128, 184), (51, 240), (80, 150), (4, 94), (98, 94)]
    match kind:
        case "circle":
            draw.ellipse((4, 4, 252, 252), fill=colour)
        case "square":
            draw.rectangle((10, 10, 246, 246), fill=colour)
        case "triangle":
            draw.polygon([(128, 8), (250, 244), (6, 244)], fill=colour)
        case "star":
            draw.polygon(star, fill=colour)
        case "diamond":
            draw.polygon([(128, 4), (224, 128), (128, 252), (32, 128)], fill=colour)
        case "heart":
            draw.ellipse((12, 24, 136, 148), fill=colour)
            draw.ellipse((120, 24, 244, 148), fill=colour)
            draw.polygon([(20, 112), (236, 112), (128, 246)], fill=colour)
        case _:
            raise ValueError(f"no shape {kind!r}")
    return big


def _ask(
    scene: Scene,
    rng: random.Random,
    kind: str,
    answer: str,
    gold: str,
    *,
    noun: str | None = None,
    kind_as: str | None = None,
) -> None:
    """Adds a question in one of its phrasings. For yes/no the noun stands in `gold` after a colon until here."""
    question = rng.choice(ASK[kind])
    if kind == "yesno" and noun is None:
        gold, _, noun = gold.partition(":")
    if noun is not None:
        question = question.format(noun=noun, plural=plural(noun))
    scene.questions.append((kind_as or kind, question, answer, gold))


def _yes_no(rng: random.Random, present: str | None, all_present: list[str], material: Material) -> tuple[str, str]:
    """An answer, and gold with the noun asked for; absent nouns are as likely as present ones.

    Writing is asked after in scenes with and without it, so that the question does not give the answer away. Some of
    what is absent is of the same category as what is there.
    """
    writing = rng.choice(["a word", "text", "some writing"])
    if rng.random() < 0.5:
        return "yes", f"yes:{writing if present is None else indefinite(present)}"
    if present is not None and rng.random() < 0.3:
        return "no", f"no:{writing}"
    others = [noun for noun in material.emoji if noun not in all_present]
    alike = [noun for noun in others if present is not None and CATEGORY.get(noun) == CATEGORY.get(present)]
    absent = rng.choice(alike if alike and rng.random() < 0.4 else others)
    return "no", f"no:{indefinite(absent)}"


def _countable(noun: str) -> bool:
    return noun not in MASS and noun not in PLURAL_ONLY


def _thing(
    material: Material, rng: random.Random, *, besides: str | None = None, countable: bool = False
) -> tuple[str, Image.Image]:
    nouns = [noun for noun in material.emoji if noun != besides and (not countable or _countable(noun))]
    noun = rng.choice(nouns)
    picture = rng.choice(material.emoji[noun])
    return noun, _varied(picture, rng) if material.vary else picture


def _varied(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored or not, a little duller or brighter, more or less colourful."""
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    alpha, plain = picture.getchannel("A"), picture.convert("RGB")
    for enhancer in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        plain = enhancer(plain).enhance(rng.uniform(0.7, 1.3))
    plain.putalpha(alpha)
    return plain


def _contrasting(rng: random.Random) -> tuple[str, str]:
    light, dark = ("white", "yellow", "pink"), ("black", "blue", "red", "green", "purple", "brown")
    pair_ = rng.choice(light), rng.choice(dark)
    return pair_ if rng.random() < 0.6 else (pair_[1], pair_[0])


def _ground(split: Split, rng: random.Random, colour: str | None = None) -> Image.Image:
    """Plain, shaded or softly grained; stripes are kept for the test."""
    if colour is not None:
        base = (128, 128, 128) if colour == "grey" else COLOURS[colour]
        return Image.new("RGB", (SIZE, SIZE), tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in base))
    soft = tuple(rng.randint(120, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), soft)
    other = tuple(max(0, min(255, value + rng.randint(-60, 60))) for value in soft)
    if split == "test" and rng.random() < 0.5:
        draw = ImageDraw.Draw(image)
        step = rng.randint(24, 48)
        for x in range(0, SIZE, 2 * step):
            draw.rectangle((x, 0, x + step - 1, SIZE), fill=other)
        return image
    if rng.random() < 0.5:
        shade = Image.linear_gradient("L").resize((SIZE, SIZE)).rotate(rng.choice((0, 90, 180, 270)))
        image = Image.composite(Image.new("RGB", (SIZE, SIZE), other), image, shade)
    elif rng.random() < 0.3:
        grain = Image.frombytes("L", (SIZE, SIZE), rng.randbytes(SIZE * SIZE))  # Pillow's own noise has no seed
        noise = grain.filter(ImageFilter.GaussianBlur(3))
        image = Image.blend(image, noise.convert("RGB"), 0.25)
    return image


def _cells(number: int, split: Split, rng: random.Random) -> list[tuple[float, float]]:
    """Places that do not overlap: cells of a 3 × 3 grid, or in half of the test a row."""
    if split == "test" and number <= 3 and rng.random() < 0.5:
        places = [((index + 0.5) / number, rng.uniform(0.35, 0.65)) for index in range(number)]
    else:
        grid = [(column, row) for column in range(3) for row in range(3)]
        wobble = 0.04 if split == "train" else 0.05
        places = [
            ((column + 0.5) / 3 + rng.uniform(-wobble, wobble), (row + 0.5) / 3 + rng.uniform(-wobble, wobble))
            for column, row in rng.sample(grid, number)
        ]
    rng.shuffle(places)
    return places


def _place(
    scene: Scene,
    label: str,
    picture: Image.Image,
    size: int,
    x: float,
    y: float,
    rng: random.Random,
    *,
    turn: float = 15,
) -> None:
    """Pastes a picture with its middle at (x, y) of the scene, turned a little, kept inside, and notes its box."""
    scale = size / max(picture.size)
    small = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    if rng.random() < 0.5:
        small = small.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    left = min(max(round(x * SIZE - small.width / 2), 0), max(SIZE - small.width, 0))
    top = min(max(round(y * SIZE - small.height / 2), 0), max(SIZE - small.height, 0))
    scene.image.paste(small, (left, top), small)
    scene.boxes.append((label, left, top, left + small.width, top + small.height))


def _paste(image: Image.Image, label: Image.Image, x: float, y: float) -> tuple[int, int]:
    """Pastes a label at the share (x, y) of the room around it; returns its left top corner."""
    corner = round(x * max(SIZE - label.width, 0)), round(y * max(SIZE - label.height, 0))
    image.paste(label, corner, label)
    return corner
