"""Which files of a Rust crate use which: from `use` paths and others that begin with `crate` or `super`.

Re-exports are followed to the file that they come from. Tests and comments are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

Module = tuple[str, ...]
"""Path of a module in its crate; empty for `lib.rs`."""

PATH = re.compile(r"\b(crate|super)((?:::\w+)*)(?:::\{([^;]*?)\})?")
REEXPORT = re.compile(r"pub(?:\([a-z]+\))? use ([\w:]+?)::(\{[^}]*\}|\w+);")
MOST_HOPS = 5
"""Re-exports of re-exports."""


def sources(src: Path) -> dict[Module, str]:
    """The text of every module of a crate."""
    out = {}
    for file in sorted(src.rglob("*.rs")):
        parts = list(file.relative_to(src).with_suffix("").parts)
        if "tests" in parts:
            continue
        if parts[-1] in ("mod", "lib"):
            parts = parts[:-1]
        code = file.read_text().split("#[cfg(test)]")[0]
        out[tuple(parts)] = re.sub(r"//[^\n]*", "", code)
    return out


def uses(src: Path) -> dict[Module, set[Module]]:
    """The modules that each module of a crate uses, its own submodules aside where it only declares them."""
    texts = sources(src)

    def module_of(path: Module) -> Module:
        while path and path not in texts:
            path = path[:-1]
        return path

    exported: dict[Module, dict[str, Module]] = defaultdict(dict)
    for module, text in texts.items():
        for path, names in REEXPORT.findall(text):
            parts = tuple(part for part in path.split("::") if part not in ("crate", "self"))
            target = module_of(parts if path.startswith("crate") else (*module, *parts))
            exported[module].update(dict.fromkeys(re.findall(r"\w+", names), target))

    graph: dict[Module, set[Module]] = {module: set() for module in texts}
    for module, text in texts.items():
        for root, path, names in PATH.findall(text):
            base = () if root == "crate" else module[:-1]
            parts = (*base, *(part for part in path.split("::") if part))
            items = [re.split(r"::|\s", name.strip())[0] for name in names.split(",") if name.strip()]
            for full in [(*parts, item) for item in items] or [parts]:
                target = module_of(full)
                rest = full[len(target) :]
                for _ in range(MOST_HOPS):
                    if not rest or exported[target].get(rest[0], target) == target:
                        break
                    target = exported[target][rest[0]]
                if target not in (module, ()) and (rest or target != module[: len(target)]):
                    graph[module].add(target)
    return graph
