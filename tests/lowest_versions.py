"""The lowest versions that pyproject.toml admits, as constraints of pip.

python tests/lowest_versions.py > constraints-lowest.txt   # `make test-lowest` does
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path


def lowest(pyproject: Path) -> Iterator[str]:
    """`name==version; marker` for every requirement of the project and its extras.

    Raises:
        ValueError: if a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = {*project["dependencies"], *(each for extra in extras for each in extra)}
    for requirement in sorted(requirements):
        if requirement.startswith(f"{project['name']}["):  # an extra made of extras
            continue
        found = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
        if not found:
            raise ValueError(f"{requirement!r} in {pyproject} has no lower bound")
        marker = requirement.partition(";")[2]
        yield f"{found[1]}=={found[2]}" + (f";{marker}" if marker else "")


if __name__ == "__main__":
    print("\n".join(lowest(Path(__file__).parents[1] / "pyproject.toml")))
