"""A stage whose code changed must say whether its results did."""

import json

import pytest
from stage_versions import GOLDEN, code_digest, current, versions


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


@pytest.mark.parametrize("folder", ["stages", "models", "kernels"])
def test_covers_what_decides_results(folder):
    assert any(name.startswith(folder) for name in current())
