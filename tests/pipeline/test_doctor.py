import importlib

from dirotq.pipeline import doctor


def test_says_what_there_is(dirotq, store_root):
    result = dirotq("doctor")
    assert result.status == 0
    for topic in ("python", "torch", "triton", "diffusers", "gpu", "store", "hub", "would run"):
        assert f"\n{topic} " in f"\n{result.out}"
    assert str(store_root) in result.out
    assert "offline" in result.out


def test_broken_installs_are_findings_not_failures(monkeypatch):
    def broken(name):
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(doctor, "import_module", broken)
    monkeypatch.setattr(doctor, "versions", lambda: dict.fromkeys(doctor.LIBRARIES))
    found = doctor.findings()
    assert "missing" in found["torch"]
    assert "undefined symbol" in found["diffusers"]
    assert importlib.import_module("json")
