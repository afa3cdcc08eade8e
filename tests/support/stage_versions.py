"""Which code each stage version stands for: written by ``make versions``, held by tests/policy.

Fingerprints carry a hand-bumped version and not a hash of the source (docs/adr/0002). The price is
that somebody may change what a stage computes and forget the bump; this file notices.
"""

import ast
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "stages" / "versions.json"
# What decides a result: stages, the models they read, the numerical definitions they call. Triton
# kernels do not count: their tests hold them to the references.
SOURCES = (
    "stages/**/*.py", "models/**/*.py", "kernels/*.py", "kernels/*/reference.py",
    "dirotq/plan.py", "dirotq/rotation.py", "dirotq/tensors.py", "dirotq/quantizer.py",
    "dirotq/allocation.py", "dirotq/gate.py", "dirotq/nearest.py", "dirotq/overrides.py",
    "dirotq/planning.py", "dirotq/prices.py", "dirotq/sensitivity.py",
    "dirotq/low_rank.py", "dirotq/smoothing.py", "dirotq/spectrum.py", "dirotq/feedback.py",
    "dirotq/judging/*.py",
)  # fmt: skip


def current(root: Path = ROOT) -> dict[str, dict[str, object]]:
    """{file: {"versions": {stage class: version}, "code": digest}} of the checkout ``root``."""
    found = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return {
        path.relative_to(root).as_posix(): {"versions": versions(text), "code": code_digest(text)}
        for path in found
        if (text := path.read_text()).strip()
    }


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
