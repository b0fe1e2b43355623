"""Which files are the rows, and where an image is looked for."""

import json
from pathlib import Path

import pytest

from basalt.data.readers import DataError, DataSet
from tests.data.readers.test_json_rows import GOOD


def test_rows_that_name_images_need_to_know_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD]))
    with pytest.raises(DataError, match=r"a\.json, row 0 names the image 'x\.jpg': name its folder or tar as `images`"):
        list(DataSet(path).rows())
    assert len(list(DataSet(path, tmp_path).rows())) == 1


@pytest.mark.parametrize(
    ("files", "named", "says"),
    [
        ([], "a.json", "no such file of rows"),
        ([], "a-{0..1}.tar", "a-0.tar: there is no such file"),
        (["x.txt"], "", "holds no .parquet and no .tar"),
        (["x.tar", "x.parquet"], "", "holds .parquet and .tar files"),
        (["x.json", "y.json"], "{x,y}.json", "holds .json files: name those of one format, .parquet or .tar"),
    ],
)
def test_what_are_no_rows_is_refused(tmp_path: Path, files: list[str], named: str, says: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(DataError, match=says):
        DataSet(tmp_path / named)
