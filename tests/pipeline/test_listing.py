import pytest

from dirotq.pipeline.listing import packed_models

CARD = "---\n---\n# {name}, packed to 4 bits by DiRotQ\n\nThe 16-bit model. {loras}\n"


def publish(store, stage, recipe, files, **metrics):
    with store.create(stage, recipe) as draft:
        for name, text in files.items():
            (draft.data / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.data / name).write_text(text)
        draft.metrics.update(metrics)
    return draft.artifact


@pytest.fixture
def packed(store):
    """``packed(name, method)``: a packed model and the plan that it was packed by."""

    def make(name="flux", method="rtn", loras=""):
        plan = publish(store, "rank", {"stage": {"method": {"name": method}, "of": name}}, {})
        card = CARD.format(name=name, loras=loras)
        files = {"model/model_index.json": "{}", "model/README.md": card, "model/vae/x": "12345"}
        recipe = {"inputs": {"rank": str(plan)}, "stage": {"of": name}}
        return publish(store, "pack", recipe, files, bits_per_parameter=4.5)

    return make


def test_what_is_known_of_a_packed_model(store, packed):
    one = packed("flux", "svdquant", "LoRAs in its weights: `a.safetensors` (weight 1), `b` (2).")
    (found,) = packed_models(store)
    assert (found.artifact, found.model) == (str(one), "flux + a.safetensors + b")
    assert (found.method, found.bits, found.psnr) == ("svdquant", 4.5, None)
    assert (found.bytes, found.path) == (one.bytes, one.data / "model")


def test_the_last_score_counts(store, packed):
    one = packed()
    for psnr in (31.0, 32.5):
        recipe = {"inputs": {"pack": str(one)}, "stage": {"psnr": psnr}}
        publish(store, "validate", recipe, {}, psnr=psnr)
    assert [found.psnr for found in packed_models(store)] == [32.5]


def test_the_table_ends_with_whole_paths(dirotq, store, packed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    paths = [str(packed(name).data / "model") for name in ("flux", "a much longer name")]
    result = dirotq("list")
    head, *lines = result.out.splitlines()
    assert (result.status, head.split()[0], head.split()[-1]) == (0, "artifact", "path")
    assert [line[head.index("path") :] for line in lines] == paths
    assert [line[head.index("model") :].split("  ")[0] for line in lines] == [
        "flux", "a much longer name",
    ]  # fmt: skip


def test_what_is_lost_is_a_dash(dirotq, store, packed):
    one = packed()
    store.remove(next(a for a in store.list() if a.stage == "rank").path)
    (one.data / "model" / "README.md").write_bytes(b"\xff")
    words = dirotq("list").out.splitlines()[1].split()
    assert words[1:3] == ["-", "-"]
    (one.path / "manifest.json").write_text("{")
    assert "no packed models in" in dirotq("list").out  # `dirotq verify` names the damage


def test_a_name_changes_no_terminal(dirotq, packed):
    packed("a\x1b[31mb")
    assert "\x1b" not in dirotq("list").out


def test_nothing_packed_yet(dirotq, store):
    assert f"no packed models in {store.root}" in dirotq("list").out
    dirotq("compress", "until=squares")
    assert "no packed models in" in dirotq("list").out
    dirotq("compress")
    assert dirotq("list").out.splitlines()[1].startswith("total/")
    assert dirotq("list", "store=s3://x").status == 2
