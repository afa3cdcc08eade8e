"""Two processes that share one GPU make the bytes of one; so do two GPUs, where there are two."""

import pytest
import torch
from tiny_line import configured, run, tree_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STAGES = ("capture", "basis", "rank", "gptq", "fuse")


@pytest.mark.parametrize("devices", [(0,), (0, 1)])
def test_bytes_do_not_depend_on_workers_or_devices(tiny_root, tmp_path, devices):
    if len(devices) > torch.cuda.device_count():
        pytest.skip("one GPU")
    settings = f"executor.devices=[{','.join(map(str, devices))}]"
    one = run(configured(tiny_root, tmp_path / "one", "device=cuda", "until=pack"))
    two = run(
        configured(
            tiny_root, tmp_path / "two", "device=cuda", "until=pack", settings, "executor.workers=2"
        )
    )
    for name in STAGES:
        assert one[name].fingerprint == two[name].fingerprint
        assert tree_bytes(one[name].data) == tree_bytes(two[name].data), name
    peaks = two["gptq"].provenance["workers"]
    assert len(peaks) == 2 and all(peak["peak_vram_bytes"] > 0 for peak in peaks)
