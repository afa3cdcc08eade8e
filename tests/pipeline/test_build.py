import pytest
from toyline.stages import Squares

from dirotq.errors import ConfigError
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config

TOY = "toyline.conf"


def line(*overrides):
    return build(compose_config(overrides, TOY))


def test_overrides_reach_the_stages(store_root):
    built = line("squares.power=3", "force=squares")
    assert [step.name for step in built.steps] == ["numbers", "squares", "total"]
    assert built.steps[1].stage == Squares(power=3, fail=False)
    assert built.store.root == store_root
    assert built.force == {"squares"}
    assert line("force=[squares,total]").force == {"squares", "total"}


def test_until():
    assert [step.name for step in line("until=squares").steps] == ["numbers", "squares"]


@pytest.mark.parametrize("override", ["until=nix", "force=nix", "force=[squares,nix]"])
def test_unknown_stage_names(override):
    with pytest.raises(ConfigError, match=r"nix.*numbers, squares, total"):
        line(override)


def test_a_stage_behind_the_last_is_not_forced():
    with pytest.raises(ConfigError, match="force=total: until=squares does not run it"):
        line("until=squares", "force=total")
    assert line("until=squares", "force=squares").force == {"squares"}


def test_a_stage_that_refuses_its_value_says_so_itself():
    with pytest.raises(ConfigError, match=r"^squares.power=5: allowed are 2 and 3$"):
        line("squares.power=5")


def test_stage_without_configuration():
    with pytest.raises(ConfigError, match="names the stage 'squares', which has no configuration"):
        line("~squares")


def test_what_is_cached_is_not_checked_again(dirotq, monkeypatch):
    """Its checks passed when it ran, and need libraries and files that may be gone."""
    assert dirotq("compress").status == 0

    def check(self):
        raise ConfigError(f"squares.power={self.power} is checked")

    monkeypatch.setattr(Squares, "check", check, raising=False)
    assert dirotq("compress").status == 0
    assert "squares.power=2 is checked" in dirotq("plan", "force=squares").err
    assert "squares.power=3 is checked" in dirotq("plan", "squares.power=3").err
