"""Which code each stage version stands for: written by ``make versions``, held by tests/policy.

Fingerprints carry a hand-bumped version and not a hash of the source (docs/adr/0002). The price is
that somebody may change what a stage computes and forget the bump; this file notices.
"""

import ast
import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "stages" / "versions.json"
WATCHED = ("stages", "models", "kernels", "dirotq", "pipeline/stage.py", "pipeline/units.py")
"""Folders of which every file is watched: a list of files kept by hand forgets the next one. Of the
pipeline, what tells which finished work may be used again."""
EXCEPTIONS = {
    "kernels/[!f]*/[!r_]*.py": "Triton kernels and their shapes: tests hold them to reference.py",
    "kernels/[!f]*/row.py": "the same",
    "kernels/fp4_linear/[!_]*.py": "the same",
    "dirotq/_registration.py": "tells diffusers where the loader is",
    "dirotq/errors.py": "texts",
    "dirotq/progress.py": "what is shown while a stage runs",
}
"""{pattern: why a change there can't change a published result}."""


def current(root: Path = ROOT) -> dict[str, dict[str, object]]:
    """{file: {"versions": {stage class: version}, "code": digest}} of the checkout ``root``."""
    return {
        name: {"versions": versions(text), "code": code_digest(text)}
        for name in watched(root)
        if (text := (root / name).read_text()).strip()
    }


def watched(root: Path = ROOT) -> list[str]:
    """Every source file that may decide a result, relative to ``root``."""
    names = sorted(path.relative_to(root).as_posix() for path in sources(root))
    return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in EXCEPTIONS)]


def sources(root: Path = ROOT) -> list[Path]:
    """Every source file of WATCHED, the exceptions among them."""
    places = [root / place for place in WATCHED]
    return [path for place in places for path in ([place] if place.suffix else place.rglob("*.py"))]


def versions(text: str) -> dict[str, str]:
    """The ``version`` of every class in a source file that states one."""
    return {
        node.name: ast.literal_eval(statement.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.target.id == "version"
        and statement.value is not None
    }


def code_digest(text: str) -> str:
    """Digest of the code lines alone: no docstrings, no comment lines, no blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        # Docstrings, and the strings that document constants.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    code = [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(current(), indent=2, sort_keys=True) + "\n")
    print(f"wrote {GOLDEN.relative_to(ROOT)}")
