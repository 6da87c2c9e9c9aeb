"""Work of jacfunc's own, written down while it runs."""

from __future__ import annotations

from collections.abc import Callable
from gc import disable, enable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from jacfunc._errors import Nameless
from jacfunc._memory import PeakBytes
from jacfunc._traces import Compiler, Executable
from jacfunc._traces.tape import written_down
from tests.house.calls import num_calls


def executable(work: Callable[[], tuple[Tensor, ...]], *sources: Tensor) -> Executable:
    graph = written_down(work, sources)
    return Executable(graph, sources, 0, Compiler("replay"))


def test_it_computes_what_was_computed_of_other_numbers() -> None:
    a, b = torch.randn(3, 4), torch.randn(4)
    run = executable(lambda: ((a * 2).sin() @ b, a.T.reshape(-1)), a, b)
    x, y = torch.randn(3, 4), torch.randn(4)
    first, second = run((x, y))
    torch.testing.assert_close(first, (x * 2).sin() @ y)
    assert torch.equal(second, x.T.reshape(-1))


def test_copies_of_sources_are_made_only_where_somebody_may_write_into_them() -> None:
    x = torch.randn(3, 4)
    run = executable(lambda: (x.clone().sin(),), x)
    assert "clone" not in str(run.graph.graph)
    for work in (lambda: (x.clone(),), lambda: (x.clone().mul_(2),), lambda: (x.T.clone(),)):
        other = torch.randn(3, 4)
        before, (result,) = other.clone(), executable(work, x)((other,))
        result.zero_()
        assert torch.equal(other, before)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a shape": lambda x: x.unflatten(2, (2, 2)),
    "an order": lambda x: x.permute(2, 0, 1),
    "a shape in another order": lambda x: x.transpose(0, 1).unsqueeze(2).mT,
    "parts in another order": lambda x: x.unflatten(2, (2, 2)).transpose(1, 3),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_views_that_were_made_before_are_those_of_a_source(
    view: Callable[[Tensor], Tensor], order: tuple[int, ...]
) -> None:
    shape = [(2, 3, 4)[n] for n in order]
    back = [order.index(n) for n in range(3)]
    draw = lambda: torch.randn(shape).permute(back)  # noqa: E731
    source, other = draw(), draw()
    before = view(source)
    run = executable(lambda: (before * 2,), source)
    torch.testing.assert_close(run((other,))[0], view(other) * 2)


def test_of_a_source_with_gaps_dimensions_of_one_entry_come_and_go() -> None:
    draw = lambda: torch.randn(3, 5, 1, 4)[:, 0]  # noqa: E731
    source, other = draw(), draw()
    before = source.squeeze(1).unsqueeze(0), source.unsqueeze(-1)
    run = executable(lambda: (before[0] * 2, before[1] * 3), source)
    first, second = run((other,))
    torch.testing.assert_close(first, other.squeeze(1).unsqueeze(0) * 2)
    torch.testing.assert_close(second, other.unsqueeze(-1) * 3)


def test_views_with_gaps_are_refused() -> None:
    source = torch.randn(3, 4)
    before = source[:, ::2]
    with pytest.raises(Nameless, match="comes from elsewhere"):
        executable(lambda: (before * 2,), source)


def test_backward_passes_are_seen() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.sin()
    run = executable(lambda: torch.autograd.grad(y.sum() * 2, x), x, y)
    other = torch.randn(3)
    torch.testing.assert_close(run((other, other.sin()))[0], 2 * other.cos())


def test_each_run_writes_into_memory_of_its_own() -> None:
    a = torch.randn(2, 3)

    def work() -> tuple[Tensor, ...]:
        whole = torch.zeros(4, 3)
        whole[:2] = a
        whole.narrow(0, 2, 2).copy_(a * 2)
        whole.view(-1)[0].add_(1)
        return (whole,)

    run, x = executable(work, a), torch.ones(2, 3)
    first = run((x,))[0]
    kept = first.clone()
    second = run((2 * x,))[0]
    assert torch.equal(first, kept)
    expected = torch.cat([2 * x, 4 * x])
    expected[0, 0] += 1
    assert torch.equal(second, expected)


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda a: a + torch.ones(2).numpy().sum().item() if a.sum() > 0 else a, "no tensor"),
        (lambda a: a.add_(1), "writes into what comes from outside"),
        (lambda a: a + OTHER, "comes from elsewhere"),
        (lambda a: a + torch.rand(2), "does not do the same each time"),
    ],
    ids=["reads numbers", "writes", "another tensor", "draws"],
)
def test_what_may_change_is_refused(work: Callable[[Tensor], Tensor], reason: str) -> None:
    a = torch.ones(2)
    with pytest.raises(ValueError, match=reason):
        written_down(lambda: (work(a),), (a,))


OTHER = torch.ones(2)


def test_a_refusal_keeps_nothing_alive() -> None:
    a, made = torch.ones(2), list[ref[Tensor]]()

    def work() -> tuple[Tensor, ...]:
        made.append(ref(a.exp()))
        held = a.sin()
        made.append(ref(held))
        return (held + OTHER,)

    disable()
    try:
        with pytest.raises(ValueError, match="comes from elsewhere") as raised:
            written_down(work, (a,))
        del raised
        assert [seen() for seen in made] == [None, None]
    finally:
        enable()


def test_what_is_made_is_freed_as_it_would_be_else() -> None:
    """Later tensors lie where earlier ones have lain: they are told apart."""
    a, other = torch.randn(1000), torch.randn(1000)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        places, total = set[int](), a.cos()
        for number in range(20):
            wave = a.sin() if number % 2 else a.exp()
            places.add(wave.data_ptr())
            total = total * wave[:500].repeat(2) + number
            wave.mul_(2)
            del wave
        assert len(places) < 20
        return total, a.tan()[3:]

    with PeakBytes() as plain:
        work(a)
    with PeakBytes() as counted:
        graph = written_down(lambda: work(a), (a,))
    assert counted.peak == plain.peak
    run = Executable(graph, (a,), 0, Compiler("replay"))
    for result, expected in zip(run((other,)), work(other), strict=True):
        torch.testing.assert_close(result, expected)


def operators(run: Executable) -> list[str]:
    return [str(node.target) for node in run.graph.graph.nodes if node.op == "call_function"]


def test_shapes_and_copies_on_the_way_are_left_out() -> None:
    def work(a: Tensor) -> tuple[Tensor, ...]:
        whole = torch.stack([a.sin()]).unsqueeze(2).transpose(0, 2)[:, :, 0:9]
        return (torch.cat([whole.permute(2, 0, 1, 3)[:, 0]]).squeeze(1).select(0, 0).exp(),)

    a, other = torch.randn(1, 4), torch.randn(1, 4)
    run = executable(lambda: work(a), a)
    assert operators(run) == ["aten.sin.default", "aten.select.int", "aten.exp.default"]
    assert torch.equal(run((other,))[0], other[0].sin().exp())


def test_entries_in_another_order_are_not_left_out() -> None:
    a, other = torch.randn(4, 4), torch.randn(4, 4)
    work = lambda a: (a.t().sin().t()[1:].reshape(-1), a.expand(2, 4, 4)[:, 1], a[:, 0].exp())  # noqa: E731
    run = executable(lambda: work(a), a)
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


def test_copies_that_are_returned_have_memory_of_their_own() -> None:
    a = torch.randn(3)

    def work() -> tuple[Tensor, ...]:
        wave = a.sin()
        return wave, torch.stack([wave]), torch.cat([wave])[:2]

    first, *others = executable(work, a)((a,))
    first.zero_()
    for other in others:
        assert torch.equal(other.flatten(), a.sin()[: other.numel()])


def test_slices_are_views_and_those_of_constants_are_constants() -> None:
    a, other = torch.randn(1, 4), torch.randn(1, 4)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        (row,) = a.sin().unbind()
        seeds = torch.eye(2).unbind(-1)
        return row.exp(), (seeds[1] * row[:2]).unsqueeze(0).unbind()[0].cos()

    run = executable(lambda: work(a), a)
    assert not any("unbind" in name or "eye" in name for name in operators(run))
    assert len(operators(run)) == 6  # no slice of one row alone is taken
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


def test_slices_that_are_written_into_are_those_of_what_is_read_later() -> None:
    a, other = torch.randn(3), torch.randn(3)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        rows = torch.zeros(2, 3)
        first, second = rows.unbind()
        first.add_(a)
        second.sub_(a)
        return (rows * 2,)

    run = executable(lambda: work(a), a)
    for _ in range(2):  # each run has zeros of its own
        assert torch.equal(run((other,))[0], work(other)[0])


def test_a_copy_that_is_written_into_stays_one() -> None:
    a, other = torch.randn(3), torch.randn(3)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        wave = a.sin()
        copy = torch.cat([wave])
        return copy.mul_(2) + wave, wave * 1

    run = executable(lambda: work(a), a)
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("shape", "dims", "calls"),
    [
        ((1, 4, 1, 6), (0, 2, 3), 1),  # of the two last ones alone
        ((4, 6), (1,), 1),
        ((1, 4, 6), (-1,), 2),  # and the shape of what is left
        ((2, 12), (1,), 2),  # half of the samples
        ((8, 3), (1,), 2),
        ((4, 6), (), 1),
    ],
)
@pytest.mark.parametrize("keepdim", [False, True])
def test_reductions_are_those_of_what_has_the_shape(
    shape: tuple[int, ...], dims: tuple[int, ...], calls: int, keepdim: bool
) -> None:
    a, other = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    calls += keepdim and bool(dims) and calls < 2
    work = lambda a: torch.linalg.vector_norm(a.view(shape), dim=dims, keepdim=keepdim)  # noqa: E731
    if dims:
        run = executable(lambda: (work(a),), a)
        assert len(operators(run)) == calls
        torch.testing.assert_close(run((other,))[0], work(other))
    total = lambda a: a.view(shape).sum(dims or None, keepdim=keepdim)  # noqa: E731
    torch.testing.assert_close(executable(lambda: (total(a),), a)((other,))[0], total(other))


def test_what_nobody_reads_is_left_out_with_what_is_added_to_it() -> None:
    a, other = torch.randn(3, 4), torch.randn(3, 4)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        wave, lost = a.sin(), a.cos()
        lost.add_(wave.exp()).mul_(2)
        lost.view(-1)[2:].sub_(1)
        return (wave.mul_(3),)

    run = executable(lambda: work(a), a)
    assert operators(run) == ["aten.sin.default", "aten.mul_.Tensor"]
    assert torch.equal(run((other,))[0], other.sin() * 3)


def test_what_is_written_stays_where_a_view_is_read_later() -> None:
    a, other = torch.randn(3, 4), torch.randn(3, 4)

    def work(a: Tensor) -> tuple[Tensor, ...]:
        wave, kept = a.sin(), a.cos()
        row, part = wave[1], kept[:2]
        wave.mul_(2)  # the result of the call itself goes nowhere
        part.add_(1)
        kept.mul_(3)
        return row.exp(), kept[:1] * 1

    run = executable(lambda: work(a), a)
    assert sum("_." in name for name in operators(run)) == 3
    for result, expected in zip(run((other,)), work(other), strict=True):
        torch.testing.assert_close(result, expected)


def called(run: Executable) -> list[str]:
    """What the graph calls in the end."""
    nodes: Any = run._run
    every: Any = [n.target for n in nodes.__self__.graph.nodes if n.op.startswith("call")]
    return [getattr(target, "__qualname__", str(target)) for target in every]


SUMS: dict[str, Callable[..., Tensor]] = {
    "a row": lambda a, b, c, d: a @ b + d.view(1, 5).expand(3, 5),
    "a row of ones in front": lambda a, b, c, d: d.expand(3, 5) + a @ b,
    "a column": lambda a, b, c, d: a @ b + c[:, :1].expand(3, 5),
    "a matrix": lambda a, b, c, d: c + a @ b,
    "products": lambda a, b, c, d: c + a @ b + a.sin() @ b,
}


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_a_product_is_added_as_it_is_taken(total: Callable[..., Tensor]) -> None:
    draw = lambda: [torch.randn(s).double() for s in ((3, 4), (4, 5), (3, 5), (5,))]  # noqa: E731
    sources, others = draw(), draw()
    run = executable(lambda: (total(*sources),), *sources)
    torch.testing.assert_close(run(tuple(others))[0], total(*others))
    names = called(run)
    assert "addmm" in names
    assert not {"mm", "add", "expand"} & {*names}


OTHER_SUMS: dict[str, Callable[..., Tensor]] = {
    "of the product alone": lambda a, b, c, d: (p := a @ b) + p,
    "with a factor": lambda a, b, c, d: torch.add(c, a @ b, alpha=2),
    "that others take, too": lambda a, b, c, d: (p := a @ b) + c + p.sin(),
    "of factors that are written into": lambda a, b, c, d: written_late(a * 1, b, c),
}


def written_late(factor: Tensor, b: Tensor, c: Tensor) -> Tensor:
    product = factor @ b
    factor.mul_(2)
    return c + product + factor.sum()


@pytest.mark.parametrize("total", OTHER_SUMS.values(), ids=OTHER_SUMS)
def test_other_sums_stay_as_they_are(total: Callable[..., Tensor]) -> None:
    draw = lambda: [torch.randn(s).double() for s in ((3, 4), (4, 5), (3, 5), (5,))]  # noqa: E731
    sources, others = draw(), draw()
    run = executable(lambda: (total(*sources),), *sources)
    torch.testing.assert_close(run(tuple(others))[0], total(*others))
    assert "addmm" not in called(run)


def test_tensors_without_entries_may_come_from_anywhere() -> None:
    nothing, a, other = torch.empty(0, 2), torch.randn(3, 2), torch.randn(3, 2)
    run = executable(lambda: (torch.cat([a.exp(), nothing]), nothing), a)
    joined, none = run((other,))
    assert torch.equal(joined, other.exp())
    assert none.shape == (0, 2)


@pytest.mark.parametrize("inner", [1, 2])
def test_a_column_times_a_row_is_no_product_of_matrices(inner: int) -> None:
    draw = lambda: (torch.randn(5, inner), torch.randn(3, inner))  # noqa: E731
    (a, b), (x, y) = draw(), draw()
    run = executable(lambda: (a.sin() @ b.cos().T,), a, b)
    run((x, y))

    def is_product(frame: Any, event: str, function: Any) -> bool:
        return event == "c_call" and getattr(function, "__name__", "") == "mm"

    assert num_calls(lambda: run((x, y)), is_product) == inner - 1
    (result,) = run((x, y))
    torch.testing.assert_close(result, x.sin() @ y.cos().T)
    assert result.is_contiguous()


def test_operators_are_called_without_torchs_method_around_them() -> None:
    a, other = torch.randn(3, 4), torch.randn(3, 4)
    work = lambda a: (a.sigmoid().cumsum(1), *a.sort(1))  # noqa: E731
    run = executable(lambda: work(a), a)
    run((other,))
    method = torch._ops.OpOverload.__call__.__code__
    assert not num_calls(lambda: run((other,)), lambda frame, *_: frame.f_code is method)
    for result, expected in zip(run((other,)), work(other), strict=True):
        assert torch.equal(result, expected)


def pulled_onto(images: Tensor, kernel: Tensor, u: Tensor, **how: Any) -> tuple[Tensor, ...]:
    """What a convolution pulls back onto its images, by autograd."""
    points = images.detach().requires_grad_()
    with torch.enable_grad():
        out = torch.nn.functional.conv2d(points, kernel.detach(), **how)
    return torch.autograd.grad(out, points, u)


def convolved(channels: int, dtype: torch.dtype = torch.float32, **how: Any) -> list[Tensor]:
    images, kernel = torch.randn(2, channels, 7, 6), torch.randn(4, channels, 3, 2)
    u = torch.randn_like(torch.nn.functional.conv2d(images, kernel, **how))
    return [x.to(dtype) for x in (images, kernel, u)]


FEW_CHANNELS = [
    *((channels, {}) for channels in (1, 3)),
    *((channels, {"stride": (2, 1), "padding": (1, 2)}) for channels in (1, 3)),
    # of more channels, where few places of the kernel see a pixel
    *((channels, {"stride": 2, "padding": 1}) for channels in (4, 16)),
]


@pytest.mark.parametrize(("channels", "how"), FEW_CHANNELS, ids=str)
def test_onto_few_channels_a_convolution_is_pulled_back_by_torchs_own(
    channels: int, how: dict[str, Any]
) -> None:
    """It would be filled up with zeros to sixteen channels."""
    sources, others = convolved(channels, **how), convolved(channels, **how)
    run = executable(lambda: pulled_onto(*sources, **how), *sources)
    (found,) = run(tuple(others))
    (expected,) = pulled_onto(*[x.double() for x in others], **how)
    torch.testing.assert_close(found, expected.float())
    assert "aten._slow_conv2d_backward.output_mask" in called(run)


@pytest.mark.parametrize(
    ("channels", "dtype", "how"),
    [
        *((4, torch.float32, {}), (4, torch.float32, {"stride": (2, 1)})),
        *((1, torch.float64, {}), (1, torch.float32, {"dilation": 2})),
        (17, torch.float32, {"stride": 2}),
    ],
)
def test_other_convolutions_are_pulled_back_as_they_were(
    channels: int, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    sources, others = convolved(channels, dtype, **how), convolved(channels, dtype, **how)
    run = executable(lambda: pulled_onto(*sources, **how), *sources)
    torch.testing.assert_close(run(tuple(others))[0], pulled_onto(*others, **how)[0])
    assert "aten.convolution_backward.default" in called(run)
