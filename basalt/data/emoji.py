"""Everyday things as emoji: which emoji show which plain noun, and their pictures from free SVG sets.

A set is an unpacked `@iconify-json/*` npm package (noto, openmoji, twemoji, …): `icons.json` holds SVG bodies
by name and `chars.json` the name of each Unicode code point, so one table of characters names the pictures of
every vendor. Some packages (emojione, noto-v1, streamline-emojis) leave `chars.json` empty but use the same names,
fxemoji without their hyphens: they are looked up in the tables of the packages given beside them.
"""

import io
import json
from pathlib import Path

from PIL import Image

# Category → noun → the emoji that show it. Near-duplicates are merged; what has no plain name is left out.
CLASSES: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "🐕🐶🐩", "cat": "🐈🐱", "mouse": "🐁🐭🐀", "cow": "🐄🐮", "rabbit": "🐇🐰", "bear": "🐻",
        "panda": "🐼", "koala": "🐨", "tiger": "🐅🐯", "lion": "🦁", "horse": "🐎🐴", "unicorn": "🦄",
        "zebra": "🦓", "deer": "🦌", "pig": "🐖🐷", "sheep": "🐑🐏", "goat": "🐐", "camel": "🐪🐫",
        "giraffe": "🦒", "elephant": "🐘", "rhino": "🦏", "hippo": "🦛", "monkey": "🐒🐵", "kangaroo": "🦘",
        "hedgehog": "🦔", "bat": "🦇", "fox": "🦊", "wolf": "🐺", "squirrel": "🐿",
        "chicken": "🐔🐓", "chick": "🐤🐥🐣", "duck": "🦆", "swan": "🦢", "owl": "🦉", "parrot": "🦜",
        "peacock": "🦚", "penguin": "🐧", "eagle": "🦅", "turkey": "🦃", "flamingo": "🦩", "frog": "🐸",
        "crocodile": "🐊", "turtle": "🐢", "lizard": "🦎", "snake": "🐍", "dinosaur": "🦕🦖", "whale": "🐳🐋",
        "dolphin": "🐬", "fish": "🐟🐠", "shark": "🦈", "octopus": "🐙", "crab": "🦀", "lobster": "🦞",
        "snail": "🐌", "butterfly": "🦋", "caterpillar": "🐛", "ant": "🐜", "bee": "🐝", "ladybug": "🐞",
        "spider": "🕷", "scorpion": "🦂",
    },
    "fruit": {
        "apple": "🍎🍏", "pear": "🍐", "orange": "🍊", "lemon": "🍋", "banana": "🍌", "watermelon": "🍉",
        "grapes": "🍇", "strawberry": "🍓", "cherries": "🍒", "peach": "🍑", "mango": "🥭", "pineapple": "🍍",
        "coconut": "🥥", "kiwi": "🥝",
    },
    "vegetable": {
        "tomato": "🍅", "eggplant": "🍆", "avocado": "🥑", "broccoli": "🥦", "cucumber": "🥒", "corn": "🌽",
        "carrot": "🥕", "potato": "🥔", "onion": "🧅", "garlic": "🧄", "mushroom": "🍄",
    },
    "food": {
        "bread": "🍞", "croissant": "🥐", "pretzel": "🥨", "pancakes": "🥞", "cheese": "🧀", "burger": "🍔",
        "fries": "🍟", "pizza": "🍕", "hot dog": "🌭", "sandwich": "🥪", "taco": "🌮", "egg": "🥚🍳",
        "salad": "🥗", "popcorn": "🍿", "sushi": "🍣", "spaghetti": "🍝", "ice cream": "🍦🍨", "donut": "🍩",
        "cookie": "🍪", "cake": "🎂🍰", "cupcake": "🧁", "pie": "🥧", "chocolate": "🍫", "candy": "🍬",
        "lollipop": "🍭",
    },
    "drink": {"milk": "🥛", "coffee": "☕", "wine": "🍷", "beer": "🍺"},
    "plant": {
        "flower": "🌸🌼🌺", "rose": "🌹", "sunflower": "🌻", "tulip": "🌷", "tree": "🌳🌲", "palm tree": "🌴",
        "cactus": "🌵", "leaf": "🍃🍁🍂", "clover": "🍀☘",
    },
    "vehicle": {
        "car": "🚗🚙🚘", "taxi": "🚕", "bus": "🚌🚍", "police car": "🚓", "fire truck": "🚒", "ambulance": "🚑",
        "truck": "🚚🚛", "tractor": "🚜", "motorcycle": "🏍", "bicycle": "🚲", "train": "🚂🚆🚄🚅", "plane": "✈🛩",
        "helicopter": "🚁", "rocket": "🚀", "boat": "⛵🚤", "ship": "🚢",
    },
    "instrument": {
        "guitar": "🎸", "piano": "🎹", "drum": "🥁", "trumpet": "🎺", "violin": "🎻", "saxophone": "🎷",
    },
    "piece of clothing": {
        "shirt": "👕", "pants": "👖", "dress": "👗", "shoe": "👟👞", "boot": "👢", "socks": "🧦", "hat": "🎩👒",
        "cap": "🧢", "crown": "👑", "glasses": "👓", "sunglasses": "🕶", "scarf": "🧣", "gloves": "🧤",
    },
    "tool": {"hammer": "🔨", "axe": "🪓", "wrench": "🔧", "saw": "🪚", "scissors": "✂", "ladder": "🪜", "broom": "🧹"},
    "object": {
        "umbrella": "☂☔🌂", "football": "🏈", "soccer ball": "⚽", "basketball": "🏀", "tennis ball": "🎾",
        "trophy": "🏆", "medal": "🏅🥇", "microphone": "🎤", "headphones": "🎧", "phone": "📱☎", "laptop": "💻",
        "keyboard": "⌨", "camera": "📷📸", "television": "📺", "radio": "📻", "watch": "⌚", "clock": "🕐⏰🕰",
        "light bulb": "💡", "candle": "🕯", "book": "📕📖📗📘📙", "newspaper": "📰", "envelope": "✉📧",
        "pencil": "✏", "pen": "🖊🖋", "key": "🔑🗝", "lock": "🔒", "magnet": "🧲", "microscope": "🔬",
        "telescope": "🔭", "door": "🚪", "bed": "🛏", "chair": "🪑", "sofa": "🛋", "toilet": "🚽", "bathtub": "🛁",
        "toothbrush": "🪥", "basket": "🧺", "bucket": "🪣", "ring": "💍", "backpack": "🎒", "handbag": "👜👛",
        "gift": "🎁", "balloon": "🎈", "kite": "🪁", "teddy bear": "🧸", "robot": "🤖", "ghost": "👻", "skull": "💀",
        "pumpkin": "🎃", "Christmas tree": "🎄", "diamond": "💎", "bell": "🔔", "bomb": "💣", "shopping cart": "🛒",
        "spoon": "🥄", "knife": "🔪", "anchor": "⚓", "traffic light": "🚦🚥",
    },
    "thing in nature": {
        "sun": "☀🌞", "moon": "🌙🌛", "cloud": "☁", "rainbow": "🌈", "snowman": "⛄☃", "snowflake": "❄", "fire": "🔥",
        "volcano": "🌋", "mountain": "⛰🏔", "globe": "🌍🌎🌏",
    },
    "building": {"house": "🏠🏡", "castle": "🏰🏯", "church": "⛪", "tent": "⛺"},
    "body part": {"hand": "✋🖐", "eye": "👁",
        "ear": "👂", "nose": "👃", "foot": "🦶", "tooth": "🦷", "bone": "🦴", "brain": "🧠"},
    "person": {"man": "👨", "woman": "👩", "boy": "👦", "girl": "👧", "baby": "👶"},
}  # fmt: skip

CATEGORY = {noun: category for category, nouns in CLASSES.items() for noun in nouns}

# Nouns that take no "a" and are not counted.
PLURAL_ONLY = frozenset(
    [
        "grapes",
        "cherries",
        "pancakes",
        "fries",
        "pants",
        "socks",
        "glasses",
        "sunglasses",
        "gloves",
        "scissors",
        "headphones",
    ]
)
MASS = frozenset(
    [
        "broccoli",
        "corn",
        "garlic",
        "bread",
        "cheese",
        "popcorn",
        "sushi",
        "spaghetti",
        "chocolate",
        "candy",
        "milk",
        "coffee",
        "wine",
        "beer",
        "fire",
    ]
)

_IRREGULAR_PLURAL = {
    "mouse": "mice", "sheep": "sheep", "deer": "deer", "fish": "fish", "wolf": "wolves", "leaf": "leaves",
    "knife": "knives", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes",
}  # fmt: skip


def plural(noun: str) -> str:
    """`dog` → `dogs`; the last word of a compound changes."""
    if noun in PLURAL_ONLY or noun in MASS:
        return noun
    if noun in _IRREGULAR_PLURAL:
        return _IRREGULAR_PLURAL[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def indefinite(noun: str) -> str:
    """`dog` → `a dog`, `apple` → `an apple`, `grapes` → `grapes`."""
    if noun in PLURAL_ONLY or noun in MASS:
        return noun
    # "a unicorn": the only vowel letter here that is not a vowel sound.
    return f"an {noun}" if noun[0] in "aeiou" and noun != "unicorn" else f"a {noun}"


def load_emoji(packages: list[Path], *, size: int = 192) -> dict[str, list[Image.Image]]:
    """Noun → its pictures over all `packages`, RGBA, trimmed, longest side `size` pixels.

    A noun that no package shows is left out. Raises FileNotFoundError when a path is not an iconify package.
    """
    tables = [json.loads((package / "chars.json").read_text()) for package in packages]
    shared = {code: name for table in reversed(tables) for code, name in table.items()}
    pictures: dict[str, list[Image.Image]] = {noun: [] for noun in CATEGORY}
    for package, own in zip(packages, tables, strict=True):
        names = own or shared
        icons = json.loads((package / "icons.json").read_text())
        known = {name.replace("-", ""): name for name in (*icons.get("aliases", {}), *icons["icons"])}
        for nouns in CLASSES.values():
            for noun, characters in nouns.items():
                for character in characters:
                    name = names.get(f"{ord(character):x}", "")
                    icon = _icon(icons, known.get(name.replace("-", "")))
                    if icon is not None:
                        pictures[noun].append(_render(icon, icons, size))
    return {noun: images for noun, images in pictures.items() if images}


def _icon(icons: dict, name: str | None) -> dict | None:
    """The icon called `name`, or the one it is an alias of; None when this vendor does not draw it."""
    alias = icons.get("aliases", {}).get(name)
    return icons["icons"].get(alias["parent"] if alias else name)


def _render(icon: dict, icons: dict, size: int) -> Image.Image:
    import resvg_py  # only drawing needs it; scoring answers uses the nouns alone

    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    # Half as large again before trimming, so that what remains is never enlarged by much.
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size * 3 // 2, height=size * 3 // 2, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
