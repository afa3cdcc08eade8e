from dirotq.pipeline.explain import differences


def test_differences_of_nested_recipes():
    old = {"stage": {"damping": 0.01, "grid": [8, 16], "gone": 1}, "inputs": {}}
    new = {"stage": {"damping": 0.02, "grid": [8, 32], "new": None}, "inputs": {}}
    assert differences(old, new) == {
        "recipe.damping": ("0.01", "0.02"),
        "recipe.grid[1]": ("16", "32"),
        "recipe.gone": ("1", "(absent)"),
        "recipe.new": ("(absent)", "None"),
    }
    assert differences(old, old) == {}


def test_says_why_each_stage_would_run(dirotq, store):
    assert "numbers would run because the store has no artifact" in dirotq("explain").out
    dirotq("compress")
    dirotq("compress", "numbers.count=5", "squares.power=3")
    out = dirotq("explain", "squares.power=3").out.splitlines()
    assert out[0].startswith("numbers is cached: numbers/")
    assert out[1].startswith("squares would run because recipe.power 2 -> 3 (against squares/")
    assert out[2].startswith("total would run because its input changed: squares/")
    assert "because of force" in dirotq("explain", "force=total").out


def test_compares_two_artifacts(dirotq, store):
    dirotq("compress", "until=squares")
    dirotq("compress", "until=squares", "squares.power=3")
    one, other = [str(artifact) for artifact in store.list() if artifact.stage == "squares"]
    assert dirotq("explain", one, other).out == f"{one} -> {other}: recipe.power 2 -> 3\n"
    assert "the same recipe" in dirotq("explain", one, one, f"store={store.root}").out
