"""Conformance: do our scores of LLaVA-1.5-13B's own published answers equal what was published?

The files are not ours to ship. Whoever has them checks (`basalt eval conformance`), and what was found is kept in
`conformance.json` with the digest of the code that scored: a report shows it only for that code.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from basalt.data.readers import DataError
from basalt.eval.benchmark import OFFICIAL
from basalt.eval.run import parser_version
from basalt.eval.scoring import Scores, rescore

RECORD = Path(__file__).with_name("conformance.json")
MODEL = "LLaVA-1.5-13B"


@dataclass(frozen=True)
class Golden:
    """Published answers, and what they must score officially: figures by name, to the digits written.

    A figure's name is a metric, or KIND/GROUP/METRIC. `data` and `answers` are paths from the folder of public data.
    """

    data: str
    answers: str
    figures: Mapping[str, str]


GOLDEN = {
    "pope": Golden(
        "golden/pope",
        "golden/pope/answers/llava-v1.5-13b.jsonl",
        {
            "f1": "85.9",
            "category/random/f1": "87.1",
            "category/popular/f1": "86.2",
            "category/adversarial/f1": "84.5",
        },
    ),
    "scienceqa": Golden(
        "golden/scienceqa/llava_test_CQM-A.json",
        "golden/scienceqa/answers/llava-v1.5-13b_output.jsonl",
        {"context/image/accuracy": "71.64", "accuracy": "74.39"},
    ),
    "mm-vet": Golden(
        "golden/mm-vet/mm-vet.json",
        "golden/mm-vet/results/llava-v1.5-13b_gpt-4-grade-3runs.json",
        {
            "score": "36.3",
            "std": "0.2",
            "capability/rec/score": "40.5",
            "capability/ocr/score": "28.4",
            "capability/know/score": "23.5",
            "capability/gen/score": "24.2",
            "capability/spat/score": "35.2",
            "capability/math/score": "8.8",
        },
    ),
    "textvqa": Golden(
        "golden/textvqa/TextVQA_0.5.1_val.json", "golden/textvqa/answers/llava-v1.5-13b.jsonl", {"accuracy": "61.3"}
    ),
    # What the official parser says of the raw outputs, three of which it draws; published is 36.4.
    "mmmu": Golden("mmmu/validation.parquet", "golden/mmmu/llava1.5_13b", {"accuracy": "36.6"}),
}


@dataclass(frozen=True)
class Conformance:
    """What a benchmark's golden answers scored, beside what they must."""

    parser: str
    samples: int
    expected: dict[str, str]
    found: dict[str, str]

    @property
    def exact(self) -> bool:
        return self.expected == self.found


def check(benchmark: str, folder: Path) -> Conformance:
    """Scores the golden answers below a folder of public data.

    Raises:
        DataError: they are not there, or not as published.
    """
    golden = GOLDEN[benchmark]
    data, answers = folder / golden.data, folder / golden.answers
    if absent := [str(path) for path in (data, answers) if not path.exists()]:
        raise DataError(f"{MODEL}'s published answers are not here: no {', '.join(absent)}")
    scores = rescore(benchmark, data, answers)
    found = {name: _written(scores, name, digits) for name, digits in golden.figures.items()}
    return Conformance(parser_version(benchmark), len(scores.scored), dict(golden.figures), found)


def write_record(found: Mapping[str, Conformance]) -> None:
    """Keeps what was found for reports."""
    RECORD.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=2) + "\n")


def read_record(benchmark: str) -> Conformance | None:
    """What was found for a benchmark by the code as it is now; `None` where that code was not checked."""
    kept = json.loads(RECORD.read_text()).get(benchmark)
    return Conformance(**kept) if kept and kept["parser"] == parser_version(benchmark) else None


def _written(scores: Scores, name: str, like: str) -> str:
    """A figure with as many decimals as the published one."""
    *group, metric = name.split("/")
    figures = scores.groups[group[0]][group[1]][1] if group else scores.overall
    return f"{figures[OFFICIAL][metric]:.{len(like.partition('.')[2])}f}"
