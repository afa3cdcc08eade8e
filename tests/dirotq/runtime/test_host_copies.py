"""Copies from the host, with ``meta`` in the part of the device: its tensors have no values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dirotq.runtime.graph_call import NotGraphable
from dirotq.runtime.graph_capture import first_line
from dirotq.runtime.host_copies import HostCopies, Noted


def device(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def recorded(
    warm_up: Callable[[], Any],
    capture: Callable[[], Any] | None = None,
    mode: Callable[[], Any] = torch.no_grad,
) -> HostCopies:
    """Note what one function copies, then repeat it for another."""
    copies = HostCopies("meta")
    with mode():
        with copies.noting():
            warm_up()
        with copies.repeating():
            (capture or warm_up)()
    return copies


COPIES: dict[str, Callable[[Tensor], Any]] = {
    "to": lambda t: t.to("meta"),
    "to with a dtype": lambda t: t.to("meta", torch.bfloat16),
    "copy_": lambda t: device(*t.shape).copy_(t),
    "part": lambda t: device(2, *t.shape)[0].copy_(t),
    "item": lambda t: device(4).__setitem__(2, t.sum()),
    "index": lambda t: device(4)[t.long()],
    "index of a column": lambda t: device(4, 4)[:, t.long()],
    "where": lambda t: torch.where(device(2) > 0, t.sum(), device(2)),
    "index_put": lambda t: device(4).index_put_((t.long(),), t),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", [lambda: torch.arange(3.0), lambda: torch.ones(2, 2)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_constants_of_the_host_are_kept(copy, make, mode):
    copies = recorded(lambda: copy(make()), mode=mode)
    assert copies.kept()
    assert all(kept.is_meta for kept in copies.kept())
    assert copies.taken == len(copies.noted)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_values_that_change(copy):
    with pytest.raises(NotGraphable, match="that it makes on the host change from call to call"):
        recorded(lambda: copy(torch.arange(3.0)), lambda: copy(torch.arange(3.0).flip(0) + 0.5))


def test_random_numbers_of_the_host():
    with pytest.raises(NotGraphable, match="change from call to call"):
        recorded(lambda: torch.randn(3).to("meta"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2, dtype=torch.complex64), torch.full((2,), 1 + 1e-7j)),
    ],
)
def test_bits_are_compared(first, second):
    for a in (first, second, torch.tensor([torch.nan]), torch.ones(0), torch.tensor(True)):
        recorded(lambda a=a: a.to("meta"))
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: first.to("meta"), lambda: second.to("meta"))


def test_order_number_and_way():
    a, b = torch.zeros(2), torch.ones(2)
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: (a.to("meta"), b.to("meta")), lambda: (b.to("meta"), a.to("meta")))
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: a.to("meta"), lambda: (a.to("meta"), a.to("meta")))
    with pytest.raises(NotGraphable, match="it copied 2 values of the host, now 1"):
        recorded(lambda: (a.to("meta"), a.to("meta")), lambda: a.to("meta"))
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: a.to("meta"), lambda: a.to("meta", torch.float16))


def test_the_capture_gets_copies_of_its_own():
    """Here the device's tensors are the host's, which have values: what was noted is handed out."""
    copies = HostCopies("meta")
    host, how = torch.arange(3.0), {"device": torch.device("meta"), "dtype": torch.float32}
    how |= {"layout": torch.strided}
    with copies.noting():
        host.to("meta")
    assert [noted.how[1] for noted in copies.noted] == [how]
    copies.noted[0] = Noted(copies.noted[0].how, copies.noted[0].host, torch.full((3,), 7.0))
    for _ in range(2):
        with copies.repeating():
            got = torch.arange(3.0).to("meta")
        assert got.tolist() == [7, 7, 7]
        got.zero_()  # a forward may write into its own table


def test_what_is_noted_is_not_the_forwards():
    host = torch.ones(2)

    def forward() -> None:
        host.fill_(1.0)
        host.to("meta").add_(1)
        host.fill_(2.0)

    recorded(forward)


@pytest.mark.parametrize("read", [lambda t: t[1:].to("meta"), lambda t: device(3) * t[0]])
def test_weights_on_the_host(read):
    """They may be written to between calls."""
    weight, other = torch.ones(3), torch.ones(3)
    copies = HostCopies("meta", [weight, torch.ones(0)])
    with torch.no_grad(), copies.noting():
        read(other)
        torch.ones(0).to("meta")
        with pytest.raises(NotGraphable, match="reads a weight that is not on the device"):
            read(weight)


def test_one_table_is_kept_once():
    """CogView4's blocks each copy the same tables."""
    cos, sin = torch.ones(3), torch.zeros(3)
    copies = recorded(lambda: [t.to("meta") for _ in range(5) for t in (cos, sin)])
    assert (copies.taken, len({id(kept) for kept in copies.kept()})) == (10, 2)


def test_numbers_that_kernels_are_given():
    fill = lambda y: device(3).index_put_((device(3) > 0,), torch.tensor(y))  # noqa: E731
    assert not recorded(lambda: fill(1.0)).kept()
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: fill(1.0), lambda: fill(2.0))
    recorded(lambda: device(3) * torch.tensor(2.0))
    with pytest.raises(NotGraphable, match="change"):
        recorded(lambda: device(3) * torch.tensor(2.0), lambda: device(3) * torch.tensor(3.0))
    assert not recorded(lambda: device(3) * torch.tensor(2.0)).kept()


@pytest.mark.parametrize(
    ("read", "operator"),
    [
        (lambda: device(1).to("cpu"), "aten._to_copy"),
        (lambda: torch.empty(2).copy_(device(2)), "aten.copy_"),
        (lambda: device(1).item(), "aten._local_scalar_dense"),
        (lambda: bool(device(1) > 0), "aten."),
        (lambda: device(3).nonzero(), "aten.nonzero"),
        (lambda: device(3)[device(3) > 0], "aten.index"),
        (lambda: device(3)[torch.ones(3, dtype=torch.bool)], "aten.index"),
        (lambda: device(3).index_put_((device(3) > 0,), device()), "aten.index_put_"),
        (lambda: device(3).index_put_((device(3) > 0,), torch.ones(3)), "aten.index_put_"),
        (lambda: device(3).masked_select(device(3) > 0), "aten.masked_select"),
        (lambda: torch.equal(device(3), device(3)), "aten.equal"),
        (lambda: device(3).repeat_interleave(device(3).long()), "aten.repeat_interleave"),
    ],
)
def test_values_read_back(read, operator):
    with pytest.raises(NotGraphable, match="reads values of the device back") as caught:
        recorded(read)
    assert str(caught.value).startswith(operator)


def test_what_reads_nothing_back():
    def forward() -> None:
        x, index = device(3), torch.zeros(2, dtype=torch.long, device="meta")
        x[index], x[None, 1] = 1, 2
        x.index_put_((x > 0,), torch.tensor(3.0))  # x[x > 0] = 3, which is masked_fill
        x.repeat_interleave(index[:1].expand(3), output_size=7)
        torch.where(x > 0, x, 0 * x).to(torch.float16).to("meta")
        torch.ones(3).nonzero().sum().item()  # the host's own
        torch.ones(3).to(torch.float16)

    assert not recorded(forward).kept()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("compiled_before", [True, False])
def test_compiled_blocks_stay_compiled(backend, compiled_before):
    torch.compiler.reset()
    plain: list[int] = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                plain.append(1)
            return x.sin().cos() + torch.arange(3)

    block, x = Block(), torch.randn(3)
    want = Block()(x)
    plain.clear()
    block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        if compiled_before:
            block(x)
        with torch.compiler.set_stance("fail_on_recompile" if compiled_before else "default"):
            recorded(lambda: torch.testing.assert_close(block(x), want))
        with torch.compiler.set_stance("fail_on_recompile"):  # and none was made for the mode
            block(x)
    assert not plain


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_blocks_with_a_break(backend):
    torch.compiler.reset()

    def forward(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos() + torch.arange(3.0).sort().values

    block, x = torch.compile(forward, backend=backend), torch.randn(3)
    with torch.no_grad():
        block(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            recorded(lambda: torch.testing.assert_close(block(x), forward(x)))


def test_compiled_blocks_copy_too():
    torch.compiler.reset()
    factor = 1.0

    def make(x: Tensor) -> Tensor:
        return x + torch.full((3,), factor).to(x.device)

    block = torch.compile(make, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        block(device(3))
    assert recorded(lambda: block(device(3))).kept()
    with pytest.raises(NotGraphable, match=r"^aten\._to_copy"):
        recorded(torch.compile(lambda: device(3).to("cpu"), backend="aot_eager"))


def test_constructors_are_as_before():
    before = torch._C._only_lift_cpu_tensors()
    recorded(lambda: torch.tensor([1.0]).to("meta"))
    with pytest.raises(NotGraphable):
        recorded(lambda: device(1).item())
    assert torch._C._only_lift_cpu_tensors() == before
    assert not torch._C._len_torch_dispatch_stack()


def test_failing_operators_are_named():
    with pytest.raises(RuntimeError) as caught:
        recorded(lambda: device(3) @ device(4))
    assert first_line(caught.value).endswith(" in aten.dot.default")
    assert first_line(NotGraphable("why")) == "why"
    assert first_line(ValueError("a\nb")) == "ValueError: a"


def test_remembered_tables_are_held_and_weights_are_not():
    """The host in the part of the device: its tensors lie somewhere."""
    table, weight, x = torch.ones(3), torch.ones(3), torch.ones(3)
    copies = HostCopies("cpu", [weight])
    with torch.no_grad():
        with copies.noting():
            table[1:] + weight[1:] + x[1:]
        with copies.repeating():
            table[1:] + weight[1:] + x[1:]
    held = {tensor.untyped_storage().data_ptr() for tensor in copies.kept()}
    assert held >= {table.data_ptr(), x.data_ptr()}
    assert weight.data_ptr() not in held
