"""Training rows from the formats people have, images by name; see `DataSet`.

LLaVA JSON, OpenAI fine-tuning JSONL, captions and questions in JSONL, Hugging Face parquet, webdataset tars. Nothing
is read into memory but text and the sizes of the images.
"""

from basalt.data.readers.data_set import DataSet, find_shards, read_rows
from basalt.data.readers.files import Images, ImageSource
from basalt.data.readers.json_rows import read_records
from basalt.data.readers.rows import PLACEHOLDER, DataError, Row, Unusable, is_inside

__all__ = [
    "PLACEHOLDER",
    "DataError",
    "DataSet",
    "ImageSource",
    "Images",
    "Row",
    "Unusable",
    "find_shards",
    "is_inside",
    "read_records",
    "read_rows",
]
