"""The table of model families in the README, from the registry.

python tests/python/families_table.py            prints it
python tests/python/families_table.py --write    puts it into README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mqadapt_rs import _core

README = Path(__file__).resolve().parents[2] / "README.md"
PLACE = re.compile(r"(?<=<!-- families: tests/python/families_table.py -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def table() -> str:
    """A row for each family, in alphabetical order."""
    lines = [
        "| `model_type` | converted by | run, measured, searched | written for | GGUF |",
        "|---|---|---|---|---|",
    ]
    for family in sorted(_core.families(), key=lambda family: family.model_type):
        methods = "every method" if family.runnable else "`mean`, `first`, `random`"
        yes = {True: "yes", False: "no"}
        cells = [
            f"`{family.model_type}`",
            methods,
            yes[family.runnable],
            ", ".join(f"`{target}`" for target in family.targets())
            + ("" if family.layers_may_differ else ", layers alike"),
            yes[family.gguf],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or writes it."""
    if sys.argv[1:] == ["--write"]:
        README.write_text(PLACE.sub(lambda _: table(), README.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
