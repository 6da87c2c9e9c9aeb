"""Calls by keyword, of several tensors and through doors made anew are settled as others are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._settled import SettledBatch
from tests.house.calls import num_calls

CALLS = 24
"""So many calls settle all that can be, and write down what can be written."""


class Masked(nn.Module):
    """A network of numbers, a mask and ids, with a setting and a default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.table = nn.Embedding(6, 5)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        doubled: bool = False,
        power: float = 1.0,
    ) -> Tensor:
        hidden = self.first(x).tanh() ** power
        if ids is not None:
            hidden = hidden + self.table(ids)
        out: Tensor = self.last(hidden if mask is None else hidden * mask)
        return out * 2 if doubled else out


class InTree(Masked):
    """It returns its only tensor in a dict, in a tuple."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return ({"out": super().forward(*args, **kwargs)},)


def given(seed: int, size: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 4, generator=draw),
        "mask": torch.rand(size, 5, generator=draw).round(),
        "ids": torch.randint(6, (size,), generator=draw),
    }


def is_settled(call: Callable[[], Any]) -> bool:
    """Is a call taken by what others have settled?"""
    code = SettledBatch.made.__code__
    return num_calls(call, lambda frame, event, _: event == "call" and frame.f_code is code) == 1


def rows_of(module: nn.Module, wrt: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Rows by one gradient after the other, ``[B, C, *tensor]``, each of a sample alone."""
    rows = []
    for b in range(len(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))):
        one = [x[b : b + 1] if isinstance(x, Tensor) else x for x in args]
        named = {n: x[b : b + 1] if isinstance(x, Tensor) else x for n, x in kwargs.items()}
        out = module(*one, **named)
        out = out[0]["out"] if isinstance(out, tuple) else out
        each = [
            torch.autograd.grad(y, wrt, retain_graph=True, materialize_grads=True) for y in out[0]
        ]
        rows.append([torch.stack(column) for column in zip(*each, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check(module: nn.Module, jacobian: Any, *args: Any, **kwargs: Any) -> None:
    expected = rows_of(module, [*module.parameters()], *args, **kwargs)
    jacobian = jacobian[0]["out"] if isinstance(jacobian, tuple) else jacobian
    for block, rows in zip(jacobian.values(), expected, strict=True):
        torch.testing.assert_close(block, rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [Masked, InTree])
def test_by_keyword_numbers_masks_and_ids_may_change(kind: type[Masked]) -> None:
    module = kind()
    door = jacfunc.module_jacobian(module, per_sample=True)
    for seed in range(CALLS):
        door(**given(seed))
    for seed in range(CALLS, CALLS + 4):
        check(module, door(**given(seed)), **given(seed))
    with torch.no_grad():
        module.last.weight *= -2
    check(module, door(**given(99)), **given(99))
    few = num_calls(lambda: door(**given(1)), lambda frame, event, _: event == "call")
    strange = num_calls(
        lambda: jacfunc.module_jacobian(module, per_sample=True, chunk_size=3)(**given(1)),
        lambda frame, event, _: event == "call",
    )
    assert few < strange / 2


@pytest.mark.parametrize("kind", [Masked, InTree])
def test_other_keywords_are_others(kind: type[Masked]) -> None:
    module = kind()
    door = jacfunc.module_jacobian(module, per_sample=True)
    for seed in range(CALLS):
        door(**given(seed))
    every = given(77)
    x, mask, ids = every.values()
    for args, kwargs in (
        ((), every | {"doubled": True}),
        ((), every | {"doubled": False, "power": 1.0}),  # as by default
        ((), every | {"power": 2.0}),
        ((), every | {"power": 2}),
        ((), {"ids": ids, "mask": mask, "x": x}),
        ((), {"x": x, "ids": ids}),
        ((), {"x": x, "mask": None, "ids": ids}),
        ((x,), {"ids": ids, "mask": mask}),
        ((x, mask, ids, True), {}),
        ((x[:2], mask[:2], ids[:2]), {}),
        ((), every | {"mask": mask > 0.5}),
        ((), every),
    ):
        for _ in range(3):
            check(module, door(*args, **kwargs), *args, **kwargs)


def test_by_inputs_of_a_call_with_several_tensors() -> None:
    module = Masked()
    every = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    mask_alone = jacfunc.module_jacobian(module, "inputs", per_sample=True, inputs="mask")
    crossed = jacfunc.module_jacobian(module, "inputs", per_sample=True, inputs=["mask", "x"])
    wrt = ("params", "inputs")
    both = jacfunc.module_jacobian(module, wrt, per_sample=True, strategy="structured")
    for seed in range(2 * CALLS):
        kwargs = given(seed)
        if seed % 2:  # their order is that of the call
            kwargs = dict(reversed(kwargs.items()))
        answers = every(**kwargs), mask_alone(**kwargs), crossed(**kwargs), both(**kwargs)
        if seed < CALLS:
            continue
        leaves = {n: kwargs[n].clone().requires_grad_() for n in ("x", "mask")}
        rows = rows_of(module, [*leaves.values()], **kwargs | leaves)
        # of the own sample alone
        own = [r[torch.arange(6), :, torch.arange(6)] for r in rows]
        of_x, of_mask = own
        assert list(answers[0]) == list(kwargs)
        assert answers[0]["ids"] is None
        torch.testing.assert_close(answers[0]["x"], of_x)
        torch.testing.assert_close(answers[0]["mask"], of_mask)
        torch.testing.assert_close(answers[1], of_mask)
        torch.testing.assert_close(answers[2], (of_mask, of_x))
        check(module, answers[3][0], **kwargs)
        torch.testing.assert_close(answers[3][1]["mask"], of_mask)
    for door in (every, mask_alone, crossed, both):
        assert is_settled(lambda door=door: door(**given(1)))  # type: ignore[misc]


def test_doors_made_anew_share_what_they_have_settled() -> None:
    module, kwargs = Masked(), given(0)
    for _ in range(CALLS):
        jacfunc.module_jacobian(module, "inputs", per_sample=True)(**kwargs)
    by_inputs = lambda **options: jacfunc.module_jacobian(  # noqa: E731
        module, "inputs", per_sample=True, **options
    )(**kwargs)
    assert is_settled(by_inputs)
    assert not is_settled(lambda: by_inputs(inputs="x"))
    assert not is_settled(lambda: by_inputs(strategy="reverse"))
    assert list(by_inputs(inputs=("x",))[0].shape) == [6, 3, 4]
    module.first.register_forward_hook(lambda *_: None)  # it is another module now
    assert not is_settled(by_inputs)


@pytest.mark.parametrize("strategy", ["auto", "autotune", "reverse", "structured"])
def test_what_doors_share_keeps_no_module_alive(strategy: str) -> None:
    module = Masked()
    for seed in range(CALLS):
        jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(**given(seed))
    alive = ref(module)
    del module
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", [Masked, InTree])
def test_kernels_come_in_the_tree_that_the_module_returns(kind: type[Masked]) -> None:
    module = kind()
    for seed in range(CALLS + 3):
        every = given(seed)
        kernel = jacfunc.ntk(module, None, tuple(every.values()))
        kernel = kernel[0]["out"] if kind is InTree else kernel
        rows = rows_of(module, [*module.parameters()], **every)
        flat = torch.cat([r.flatten(2) for r in rows], 2)
        torch.testing.assert_close(kernel, torch.einsum("bcp,dep->bdce", flat, flat))
    if kind is InTree:  # torch's loss takes no such tree
        with pytest.raises((TypeError, AttributeError)):
            jacfunc.gradient_norms(module, nn.MSELoss())(*every.values(), torch.randn(6, 3))


def test_losses_and_products_of_several_tensors() -> None:
    module, loss = Masked(), nn.MSELoss(reduction="sum")
    norms, matrix = jacfunc.gradient_norms(module, loss), jacfunc.ggn(module, loss)
    v = {name: torch.randn_like(param) for name, param in module.named_parameters()}
    flat_v = torch.cat([x.flatten() for x in v.values()])
    for seed in range(CALLS + 3):
        every, y = given(seed), torch.randn(6, 3)
        answers = norms(*every.values(), y), matrix(*every.values(), y)
        product, diagonal = answers[1] @ v, matrix(*every.values(), y).diagonal()
        rows = rows_of(module, [*module.parameters()], **every)
        flat = torch.cat([r.flatten(2) for r in rows], 2)
        residual = 2 * (module(**every) - y).detach()
        expected = torch.einsum("bcp,bc->bp", flat, residual).norm(dim=1)
        torch.testing.assert_close(answers[0], expected, atol=1e-4, rtol=1e-4)
        of_v = 2 * torch.einsum("bcp,bcq,q->p", flat, flat, flat_v)
        torch.testing.assert_close(torch.cat([x.flatten() for x in product.values()]), of_v)
        of_squares = 2 * flat.square().sum((0, 1))
        torch.testing.assert_close(torch.cat([x.flatten() for x in diagonal.values()]), of_squares)


def test_the_same_tensor_twice_is_two_inputs() -> None:
    module = nn.Bilinear(3, 3, 2)
    door = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for seed in range(CALLS + 2):
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, 5, 3, generator=draw)
        for pair in ((x, x), (x, y)):
            left, right = door(*pair)
            torch.testing.assert_close(left, torch.einsum("cij,bj->bci", module.weight, pair[1]))
            torch.testing.assert_close(right, torch.einsum("cij,bi->bcj", module.weight, pair[0]))


def test_masks_and_settings_of_an_encoder_by_keyword() -> None:
    """BERT: a mask that is whole is left away, and settings return more."""
    tf = pytest.importorskip("transformers", reason="the extra test-hf is not installed")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.BertConfig(**small, intermediate_size=8, vocab_size=20, max_position_embeddings=8)
    module = tf.BertForSequenceClassification(config).eval()
    select = "*query.weight"
    door = jacfunc.module_jacobian(module, select=select, per_sample=True)
    (weight,) = [p for name, p in module.named_parameters() if name.endswith("query.weight")]

    def of_logits(**kwargs: Any) -> Tensor:
        rows = []
        for b in range(4):
            named = {n: x[b : b + 1] if isinstance(x, Tensor) else x for n, x in kwargs.items()}
            (logits,) = module(**named).logits
            each = [torch.autograd.grad(y, weight, retain_graph=True)[0] for y in logits]
            rows.append(torch.stack(each))
        return torch.stack(rows)

    def check_call(jacobian: Any, **kwargs: Any) -> None:
        (block,) = jacobian.logits.values()
        torch.testing.assert_close(block, of_logits(**kwargs), atol=1e-6, rtol=1e-3)

    for seed in range(CALLS):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 20, (4, 5), generator=draw)
        whole, padded = torch.ones(4, 5, dtype=torch.long), torch.ones(4, 5, dtype=torch.long)
        padded[0, 3:] = 0
        jacobian = door(input_ids=ids, attention_mask=whole)
    check_call(jacobian, input_ids=ids, attention_mask=whole)
    assert is_settled(lambda: door(input_ids=ids, attention_mask=whole))
    for _ in range(3):
        check_call(door(input_ids=ids, attention_mask=padded), input_ids=ids, attention_mask=padded)
        swapped = {"attention_mask": padded, "input_ids": ids}
        check_call(door(**swapped), **swapped)
        more = {"input_ids": ids, "attention_mask": whole, "return_dict": True}
        check_call(door(**more), **more)
        more["output_hidden_states"] = True
        jacobian = door(**more)
        assert len(jacobian.hidden_states) == 2
        check_call(jacobian, **more)
        check_call(door(input_ids=ids), input_ids=ids)
