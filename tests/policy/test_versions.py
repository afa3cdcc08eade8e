"""A stage whose code changed must say whether its results did."""

import ast
import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from stage_versions import (
    EXCEPTIONS,
    GOLDEN,
    ROOT,
    WATCHED,
    code_digest,
    current,
    sources,
    versions,
    watched,
)


def test_changed_code_comes_with_a_decision():
    golden, now = json.loads(GOLDEN.read_text()), current()
    changed = [name for name in sorted(golden | now) if golden.get(name) != now.get(name)]
    assert not changed, (
        f"{', '.join(changed)} differ from tests/stages/versions.json. If results can change, bump "
        "`version` of the stages concerned; if they cannot, leave it. Then run `make versions`."
    )


def test_every_stage_states_a_version():
    stated = [name for entry in current().values() for name in entry["versions"]]
    assert len(stated) >= 8
    assert len(set(stated)) == len(stated)


CODE = '''
"""Doc."""
class Fit:
    """Doc."""
    version: ClassVar[str] = "3"
    def run(self):
        # why
        return 1
'''


def test_digest_sees_code_and_nothing_else():
    same = CODE.replace("Doc.", "Other words,\n    on two lines.").replace("# why", "# because")
    assert code_digest(same) == code_digest(CODE)
    assert code_digest(CODE.replace("return 1", "return 2")) != code_digest(CODE)
    assert versions(CODE) == {"Fit": "3"}


# Faults that an earlier guard, a list of files kept by hand, let pass.
@pytest.mark.parametrize(
    ("file", "line", "changed"),
    [
        ("dirotq/quantize/moments.py", "total / tokens", "total / (tokens + 1)"),
        ("dirotq/evaluate/fidelity.py", "PSNR_LIMIT = ", "PSNR_LIMIT = 50 or "),
        ("dirotq/evaluate/statistics.py", "LEVEL = 0.95", "LEVEL = 0.9"),
        ("dirotq/evaluate/metrics/clip_score.py", "(100 * ", "(101 * "),
        ("kernels/gptq/reference.py", "+ damping * 10", "+ damping * 11"),
    ],
)
def test_faults_of_the_past_are_noticed(file, line, changed):
    text = (ROOT / file).read_text()
    assert line in text
    assert file in watched()
    assert code_digest(text.replace(line, changed)) != code_digest(text)


def test_a_changed_number_in_any_folder_is_noticed(tmp_path):
    """In every file that has one and is no exception, so in every folder."""
    for path in sources():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    before, folders, expected = current(tmp_path), set(), set()
    for path in sources(tmp_path):
        name = path.relative_to(tmp_path).as_posix()
        changed = one_more(path.read_text())
        if changed and not any(fnmatchcase(name, pattern) for pattern in EXCEPTIONS):
            path.write_text(changed)
            expected.add(name)
            folders.add(path.parent)
    after = current(tmp_path)
    assert {name for name in before if before[name] != after[name]} == expected
    assert folders == {path.parent for path in sources(tmp_path)}


def one_more(text: str) -> str | None:
    """The source with one added to its first number; None if it has none."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            old = lines[node.lineno - 1].encode()
            line = old[: node.col_offset] + b"(1 + " + old[node.col_offset :]
            end = node.end_col_offset + len(b"(1 + ")
            lines[node.lineno - 1] = (line[:end] + b")" + line[end:]).decode()
            return "\n".join(lines)
    return None


def test_every_file_that_a_stage_imports_is_watched_or_excepted():
    """Whatever folder it lies in: a helper that moves elsewhere doesn't leave the guard."""
    known = set(watched())
    reached, waiting = set(), [p.relative_to(ROOT).as_posix() for p in ROOT.glob("stages/*.py")]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        waiting += _imported(ROOT / name)
    reached = {n for n in reached if not n.startswith(("pipeline/", "assets/", "conf/"))}
    assert {"stages", "models", "kernels", "dirotq"} < set(WATCHED)  # all that may compute
    excepted = {n for n in reached if any(fnmatchcase(n, pattern) for pattern in EXCEPTIONS)}
    assert reached - known - excepted == set()
    assert len(reached) > 60


def test_exceptions_are_few_and_in_use():
    files = [path.relative_to(ROOT).as_posix() for path in sources()]
    assert len(EXCEPTIONS) < 8
    for pattern in EXCEPTIONS:
        assert any(fnmatchcase(name, pattern) for name in files), pattern
    assert "kernels/gptq/reference.py" in watched()
    assert "kernels/second_moment/__init__.py" in watched()
    assert "kernels/gptq/kernel.py" not in watched()


def _imported(file: Path) -> list[str]:
    """Files of ours that ``file`` imports, relative to the root."""
    found = []
    package = file.parent.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            module = ".".join([package.replace("/", "."), module]).strip(".")
        elif module.startswith("dirotq"):
            module = module.removeprefix("dirotq").strip(".")
        else:
            continue
        for path in (module, *(f"{module}.{alias.name}" for alias in node.names)):
            for place in (f"{path.replace('.', '/')}", f"dirotq/{path.replace('.', '/')}"):
                for candidate in (f"{place}.py", f"{place}/__init__.py"):
                    if (ROOT / candidate).is_file():
                        found.append(candidate)
    return found
