"""A site is computed once for the views that read one tensor, and never from another one."""

import copy
import gc
import weakref
from typing import Any

import torch
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor, nn

from dirotq.kernels.linear import SharedRead, SiteView

ROWS = slice(0, 16), slice(16, 32), slice(32, 48)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = packed(tiny_spec(rank=8))
        self.asked: list[slice | None] = []

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        self.asked.append(rows)
        return self.site(x, rows=rows)


def views() -> tuple[Counting, list[SiteView]]:
    site = Counting()
    shared = SharedRead(site, len(ROWS))
    return site, [SiteView(site, rows, shared) for rows in ROWS]


def read(site: Counting, parts: Any, x: Tensor) -> None:
    for part in parts:
        torch.testing.assert_close(part(x), site.site(x)[..., part.output_rows])


def test_one_computation_serves_all_views():
    site, parts = views()
    for seed in range(3):
        read(site, parts, torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)))
    assert site.asked == [None] * 3


def test_any_order_and_the_same_tensor_again():
    site, parts = views()
    x = torch.randn(2, 5, 64)
    read(site, reversed(parts), x)
    read(site, parts, x)
    assert site.asked == [None] * 2


def test_a_tensor_that_was_written_to_is_read_anew():
    site, parts = views()
    x = torch.randn(2, 5, 64)
    read(site, parts[:1], x)
    x.mul_(2)
    read(site, parts[1:], x)
    assert len(site.asked) > 1


def test_views_of_different_tensors_compute_their_own_rows():
    """As of a cross-attention that somebody grouped, once it was seen."""
    site, parts = views()
    for _ in range(3):
        for part in parts:
            read(site, [part], torch.randn(2, 5, 64))
    assert site.asked[3:] == [*ROWS, *ROWS]
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    read(site, parts, x)
    read(site, parts, y)
    assert site.asked[9:] == [*ROWS, None]


def test_nothing_is_remembered_in_inference_mode():
    site, parts = views()
    with torch.inference_mode():
        x = torch.randn(2, 5, 64)
        read(site, parts[:1], x)
        x.mul_(2)
        read(site, parts[1:], x)
    assert site.asked == [*ROWS]


def test_what_was_computed_goes_with_the_tensor():
    _site, parts = views()
    x = torch.randn(2, 5, 64)
    made = weakref.ref(parts[0](x)._base)
    assert made() is not None
    del x
    gc.collect()
    assert made() is None
    x = torch.randn(2, 5, 64)
    outputs = [part(x) for part in parts]
    made = weakref.ref(outputs[0]._base)
    del outputs
    assert made() is None


def test_a_deep_copy_remembers_nothing():
    _site, parts = views()
    x = torch.randn(2, 5, 64)
    parts[0](x)
    twin = copy.deepcopy(nn.ModuleList(parts))
    twin[0].site.site.wscale.mul_(2)
    assert twin[1].shared.site is twin[0].site
    assert not torch.allclose(twin[1](x), parts[1](x))


def test_hooks_of_views_and_of_the_site_have_their_say():
    """Each is called once for a call, may change what passes, and is gone when it is removed."""
    site, parts = views()
    x = torch.randn(2, 5, 64)
    plain = [part(x) for part in parts]
    fired = []
    hooks = [
        parts[1].register_forward_pre_hook(
            lambda _, given: (fired.append("pre"), given[0] * 2)[1:]
        ),
        parts[2].register_forward_hook(lambda _, __, made: (fired.append("post"), made + 1)[1]),
        site.register_forward_hook(lambda _, __, made: (fired.append("site"), made * 3)[1]),
    ]
    got = [part(x) for part in parts]
    doubled = site.site(x * 2)[..., ROWS[1]]
    torch.testing.assert_close(got[0], plain[0] * 3)
    torch.testing.assert_close(got[1], doubled * 3)
    torch.testing.assert_close(got[2], plain[2] * 3 + 1)
    assert fired.count("pre") == fired.count("post") == 1
    assert fired.count("site") >= 2  # the second view reads another tensor
    for hook in hooks:
        hook.remove()
    for part, want in zip(parts, plain, strict=True):
        torch.testing.assert_close(part(x), want)
