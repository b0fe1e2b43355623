"""Questions with accepted answers, one's own or of the VQA family: soft accuracy, exact match, and containment.

Soft accuracy and its normalisation are those of the VQA evaluation (Antol et al. 2015) in the form by which TextVQA
is scored (`EvalAIAnswerProcessor` of Pythia, `m4c_evaluator.py` in LLaVA), quirks included.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import Rule, Sample, Verdict, no_answer
from basalt.eval.records import checked, image_in, read_rows, require

SOFT, EXACT, CONTAINS = "soft", "exact", "contains"
PEOPLE = 10  # answers to a question of VQA and TextVQA, each by another person

AS_GIVEN = Rule("as given", "read", "only case, blanks, and marks at the ends were set aside to find the answer")
PROCESSED = Rule("processed", "read", "the score is that of the official processing: words and marks were changed")
WITHIN = Rule("within", "read", "an accepted answer stands in the answer as whole words")
UNMATCHED = Rule("unmatched", "read", "the answer is none of the accepted ones")

# What each mark is set aside for: dropped where one stands beside a blank anywhere in the text, else made a blank.
_MARKS = ';/[]"{}()=+\\_-><@`!'
_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# The original's list, less the entries that change nothing and those with capitals, which no small letters match.
_CONTRACTION_PAIRS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't
hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've
it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at
'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've shouldve=should've shouldnt=shouldn't
shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd thered've=there'd've
there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't
whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've
whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's
wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
"""
_CONTRACTIONS = {short: full for short, _, full in (pair.partition("=") for pair in _CONTRACTION_PAIRS.split())}


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """The samples of one's own JSON or JSONL: records with `id`, `image`, `question`, and `answer` or `answers`.

    Raises:
        DataError: a record is not of this form.
    """
    source = ImageSource(images) if images else None
    samples = []
    for number, record in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        require(record, ("id", "image", "question"), where)
        answers = record.get("answers", [record["answer"]] if "answer" in record else [])
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise DataError(
                f"{where}: needs the accepted 'answers', a list of texts, or one 'answer'; found {answers!r}"
            )
        samples.append(
            Sample(
                id=str(record["id"]),
                prompt=record["question"],
                gold=tuple(answers),
                images=(image_in(source, record["image"]),),
                cluster=record["image"],
            )
        )
    return checked(samples, path)


def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
    """Soft accuracy; exact match with an accepted answer; an accepted answer within the prediction."""
    plain, accepted = as_given(prediction), {as_given(answer) for answer in sample.gold}
    failed = no_answer(prediction) or UNMATCHED
    within = any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", plain) for answer in accepted if answer)
    return {
        SOFT: soft(prediction, sample.gold),
        EXACT: Verdict(1.0, AS_GIVEN, plain) if plain in accepted else Verdict(0.0, failed, plain),
        CONTAINS: Verdict(1.0, WITHIN, plain) if within else Verdict(0.0, failed, plain),
    }


def soft(prediction: str, gold: Sequence[str]) -> Verdict:
    """The VQA accuracy after the official processing; the rule says whether the processing made the score."""
    answer = process(prediction)
    earned = _agreement(answer, tuple(process(text) for text in gold))
    plain = as_given_score(prediction, gold)
    return Verdict(earned, plain.rule if earned == plain.score else PROCESSED, answer)


def as_given_score(prediction: str, gold: Sequence[str]) -> Verdict:
    """The VQA accuracy of the answer as it was given: only case, blanks, and marks at the ends are set aside."""
    plain = as_given(prediction)
    earned = _agreement(plain, tuple(as_given(text) for text in gold)) if plain else 0.0
    return Verdict(earned, AS_GIVEN if earned else no_answer(prediction) or UNMATCHED, plain)


@lru_cache(maxsize=100_000)  # gold answers repeat
def process(text: str) -> str:
    """An answer as the official evaluation compares it.

    Quirks kept: "none" is 0; "N/A" is "n"; only the first 32 full stops go (a flag passed where `re.sub` takes a
    count), and those before a digit stay. A rule for commas in numbers never fires there, all being gone by then.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if beside_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [word for word in (_WORDS.get(word, word) for word in text.split()) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def as_given(text: str) -> str:
    """Case, runs of blanks, and marks at the ends set aside."""
    return " ".join(text.casefold().split()).strip(" .,:;!?'\"")


def _agreement(answer: str, gold: Sequence[str]) -> float:
    """The score for as many people's answers as agree, the mean over leaving each of the ten out.

    Where there are not ten, they are not ten people's but the accepted ones: any of them is right.
    """
    same = gold.count(answer)
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(same, 4)] if len(gold) == PEOPLE else float(same > 0)
