"""Many rows tokenised by all cores: a set of LLaVA's 665k takes minutes where one core takes half an hour."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from basalt.data.preprocess import Sample, Tokenizer
from basalt.data.readers import Row
from basalt.supervisor import end_with_parent

CHUNK = 512  # rows handed to a process together
MANY = 32768  # rows: with fewer, starting processes takes longer than they save

_tokenizer: Tokenizer  # of a process of the pool


def tokenised(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[tuple[Row, Sample]]:
    """Each row with what `Tokenizer.sample` makes of it, in order.

    Raises:
        ValueError: that of `Tokenizer.sample`.
    """
    workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(rows) < MANY or workers < 2:
        yield from ((row, tokenizer.sample(row.messages)) for row in rows)
        return
    # Spawned: a fork of a process whose threads hold locks may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(tokenizer,)) as pool:
        yield from zip(rows, pool.map(_sample, (row.messages for row in rows), chunksize=CHUNK), strict=True)


def _begin(tokenizer: Tokenizer) -> None:
    end_with_parent()  # it would wait for rows for ever
    global _tokenizer
    _tokenizer = tokenizer


def _sample(messages: list[dict[str, object]]) -> Sample:
    return _tokenizer.sample(messages)
