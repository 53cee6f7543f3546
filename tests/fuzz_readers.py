"""Feed the readers bytes that reach ever more of their code (coverage-guided, with atheris).

  pip install atheris                          # not a dependency of anything here
  python -m tests.fuzz_readers -max_total_time=600 [a folder for the corpus]

An input is the ending of a file (its first byte chooses) and its content. Whatever the content,
`read_file` must return columns of equal length and `stream_texts` one text a row, or either must
raise `UserError` with one sentence; and both must agree on the rows of what both can read. The
options are libFuzzer's. A finding stops the run and is left in a file named crash-*.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nin_text"]):
    from nin_text import readers
    from nin_text.errors import UserError

ENDINGS = (
    ".csv",
    ".tsv",
    ".jsonl",
    ".json",
    ".txt",
    ".csv.gz",
    ".jsonl.bz2",
    ".csv.xz",
    ".parquet",
)
PLACE = Path(tempfile.mkdtemp())


def check(data: bytes) -> None:
    """Read a file of these bytes in both ways.

    Raises:
        AssertionError: if an answer is not what it must be; or whatever the readers let through.
    """
    path = PLACE / f"a{ENDINGS[data[0] % len(ENDINGS)] if data else '.csv'}"
    path.write_bytes(data[1:])
    table = rows = None
    try:
        table = readers.read_file(path)
    except UserError as error:
        assert "\n" not in str(error), str(error)
    else:
        assert len({len(column) for column in table.values()}) == 1
    try:
        rows = list(readers.stream_texts(path))
    except UserError as error:
        assert "\n" not in str(error), str(error)
    else:
        assert all(isinstance(text, str) and 0 <= share <= 1 for share, text, _ in rows)
    if table is not None and rows is not None:
        assert len(rows) == len(next(iter(table.values())))


def main() -> None:
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
