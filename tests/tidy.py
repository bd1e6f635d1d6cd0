"""Fails when a file under src/flexkv includes a module that its own does not name in DEPS, when a *_test.cc is not built,
or when a line is too long. usage: tidy.py SOURCE_DIR MODULE_GRAPH"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_INCLUDE = re.compile(r'#include "flexkv/(\w+)/')
_WIDTH = 120


def closure(graph: dict[str, set[str]], module: str) -> set[str]:
    found, waiting = {module}, [module]
    while waiting:
        for dependency in graph.get(waiting.pop(), set()) - found:
            found.add(dependency)
            waiting.append(dependency)
    return found


def main(source: Path, graph_file: Path) -> int:
    graph = {}
    for line in graph_file.read_text().splitlines():
        name, _, dependencies = line.partition(":")
        graph[name.strip()] = set(dependencies.split())
    problems = []
    for module in sorted(path for path in (source / "src/flexkv").iterdir() if path.is_dir()):
        if module.name not in graph:
            problems.append(f"{module}: no flexkv_module(...)")
            continue
        allowed = closure(graph, module.name)
        built = (module / "CMakeLists.txt").read_text()
        for file in sorted(module.rglob("*")):
            if file.suffix not in (".h", ".cc", ".cu"):
                continue
            lines = file.read_text().splitlines()
            for number, line in enumerate(lines, 1):
                where = f"{file.relative_to(source)}:{number}"
                if (match := _INCLUDE.match(line)) and match[1] not in allowed and not file.stem.endswith("_test"):
                    problems.append(f"{where}: {match[1]} is not in DEPS of {module.name}")
                if len(line) > _WIDTH:
                    problems.append(f"{where}: {len(line)} columns")
            if (
                file.stem.endswith("_test")
                and file.suffix == ".cc"
                and file.parent == module
                and file.name not in built
            ):
                problems.append(f"{file.relative_to(source)}: not in TESTS of {module.name}")
    print("\n".join(problems) or f"{len(graph)} modules are tidy")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
