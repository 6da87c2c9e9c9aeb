"""Every door from eight threads at once: right, and everything as it was before."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import cuda, mha

import jacfunc
from jacfunc import _lock as _lock

THREADS, ROUNDS = 8, 15
EAGER = 5e-5
"""Seconds after which Python goes on with another thread; 0.005 unless told otherwise."""

Check = Callable[[], None]


def at_once(works: Sequence[Check], rounds: int = ROUNDS) -> None:
    """Each work in a thread of its own, all of them from the same moment on, over and over."""
    start, errors = threading.Barrier(len(works)), list[str]()

    def run(work: Check) -> None:
        start.wait()
        for _ in range(rounds):
            try:
                work()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {str(error)[:200]}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(EAGER)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, f"{len(errors)} of {len(works) * rounds}: {sorted(set(errors))[:5]}"


def of_the_process() -> list[Any]:
    """What all threads share."""
    return [
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        forward_ad._current_level,
        hash(torch.get_rng_state().numpy().tobytes()),
        [entry for entry in warnings.filters if "requires_grad" in str(entry[1])],
    ]


def made_of(module: nn.Module) -> list[Any]:
    """The objects in a module, and what its tensors hold."""
    parts = [(part, vars(part).copy()) for part in module.modules()]
    tables = [dict(table) for part, own in parts for table in (own["_parameters"], own["_buffers"])]
    hooks = [own[key] for _, own in parts for key in own if "hooks" in key]
    ids = [[(name, id(x)) for name, x in table.items()] for table in tables]
    return [
        ids,
        [[(key, id(value)) for key, value in own.items()] for _, own in parts],
        [dict(some) for some in hooks],
        [x.tolist() for x in module.state_dict().values()],
        [x.grad for x in module.parameters()],
    ]


@contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    before = of_the_process(), [made_of(module) for module in modules]
    yield
    assert before == (of_the_process(), [made_of(module) for module in modules])


def gives(expected: Tensor, call: Callable[[], Tensor]) -> Check:
    def check() -> None:
        torch.testing.assert_close(call(), expected, rtol=1e-10, atol=1e-10)

    return check


def rows_of(outputs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The Jacobian as a matrix, one ``torch.autograd.grad`` a row."""
    rows = [torch.autograd.grad(out, inputs, retain_graph=True) for out in outputs.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


# --- functions ---

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    A, T = (torch.randn(*size, dtype=torch.float64) for size in ((5, 4), (60, 2)))
    X, Y = (torch.randn(size, dtype=torch.float64) for size in (4, 2))
    BATCH = torch.randn(3, 4, dtype=torch.float64)


def wave(x: Tensor) -> Tensor:
    return torch.tanh(A @ x) * x.sum()


def tall(y: Tensor) -> Tensor:
    return torch.sin(T @ y)


def scalar(x: Tensor) -> Tensor:
    return wave(x).square().sum()


def of_tree(tree: dict[str, Tensor]) -> Tensor:
    return wave(tree["a"]) * tree["b"]


def of_a_graph(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    result: Tensor = jacfunc.graph_jacobian(wave(x), x)
    return result


def jacobian_of(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return rows_of(func(x), [x])


def hessian_of(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(func(x), x, create_graph=True)
    return rows_of(slope, [x])


J, J_TALL, H = jacobian_of(wave, X), jacobian_of(tall, Y), hessian_of(scalar, X)
J_EACH = torch.stack([jacobian_of(wave, x) for x in BATCH])
ONCE = jacfunc.jacobian(tall)
FUNCTIONS: dict[str, Check] = {
    "jacrev": gives(J, lambda: jacfunc.jacrev(wave)(X)),
    "jacfwd": gives(J, lambda: jacfunc.jacfwd(wave)(X)),
    "jacfwd in chunks": gives(J, lambda: jacfunc.jacfwd(wave, chunk_size=2)(X)),
    "jacfwd in memory": gives(J_TALL, lambda: jacfunc.jacfwd(tall, memory="1 MiB")(Y)),
    "auto": gives(J, lambda: jacfunc.jacobian(wave)(X)),
    "auto, of tall ones": gives(J_TALL, lambda: jacfunc.jacobian(lambda y: tall(y))(Y)),
    "auto, one for all": gives(J_TALL, lambda: ONCE(Y)),
    "looped": gives(J, lambda: jacfunc.jacobian(wave, strategy="looped")(X)),
    "columns": gives(J, lambda: jacfunc.jacobian(wave, strategy=jacfunc.Looped("columns"))(X)),
    "structured": gives(J, lambda: jacfunc.jacobian(wave, strategy="structured")(X)),
    "value": gives(J, lambda: jacfunc.value_and_jacobian(wave, strategy="forward")(X)[1]),
    "of a tree": gives(J * 2, lambda: jacfunc.jacfwd(of_tree)({"a": X, "b": X.new_tensor(2)})["a"]),
    "of a graph": gives(J, lambda: of_a_graph(X)),
    "hessian": gives(H, lambda: jacfunc.hessian(scalar)(X)),
    "hessian, forward": gives(H, lambda: jacfunc.hessian(scalar, strategy="forward")(X)),
    "laplacian": gives(H.trace(), lambda: jacfunc.laplacian(scalar)(X)),
    "hessian_diagonal": gives(H.diagonal(), lambda: jacfunc.hessian_diagonal(scalar)(X)),
    "jacrev of jacfwd": gives(H, lambda: jacfunc.jacrev(jacfunc.jacfwd(scalar))(X)),
    "jvp": gives(J @ X, lambda: jacfunc.jvp(wave, (X,), (X,))[1]),
    "jvp in torch's vmap": gives(
        J.T, lambda: torch.vmap(lambda v: jacfunc.jvp(wave, (X,), (v,))[1])(torch.eye(4).double())
    ),
    "vjp": gives(J.T @ J[:, 0], lambda: jacfunc.vjp(wave, X)[1](J[:, 0])[0]),
    "vmap of jacrev": gives(J_EACH, lambda: jacfunc.vmap(jacfunc.jacrev(wave))(BATCH)),
    "vmap of jacfwd": gives(J_EACH, lambda: jacfunc.vmap(jacfunc.jacfwd(wave))(BATCH)),
    "gram": gives(J @ J.T, lambda: jacfunc.gram(wave)(X)),
}


def _asked() -> None:
    told = jacfunc.plan(wave, X)
    assert told.forecast is not None
    assert told.forecast.result_bytes == J.nbytes
    assert jacfunc.estimate(wave, X)["forward"].result_bytes == J.nbytes
    assert jacfunc.explain(wave, X, strategy="forward").peak_bytes >= J.nbytes


SLOW: dict[str, Check] = {
    "plans": _asked,
    "autotune": gives(J, lambda: jacfunc.jacobian(wave, strategy="autotune")(X)),
}


@pytest.mark.parametrize("door", FUNCTIONS)
def test_functions(door: str) -> None:
    with unchanged():
        at_once([FUNCTIONS[door]] * THREADS)


@pytest.mark.parametrize("door", SLOW)
def test_functions_that_are_planned(door: str) -> None:
    with unchanged():
        at_once([SLOW[door]] * THREADS, rounds=2)


# --- modules ---


class Attentive(nn.Module):
    """What takes the fused kernels, and the fast path of whole layers, wherever it may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.scale * x.unflatten(1, (2, 4)))
        return self.attention(hidden, hidden, hidden, need_weights=False)[0][:, 0, :2]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2))


class Problem:
    """A module with all that is expected of it, taken row by row."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.module = make().double().eval()
            self.x = torch.randn(3, 8, dtype=torch.float64)
            self.y = torch.randn(3, 2, dtype=torch.float64)
        params = list(self.module.parameters())
        own = self.x.clone().requires_grad_()
        plain = [self.module(sample[None])[0] for sample in own]
        self.outputs = torch.stack(plain).detach()
        self.jacobian = torch.stack([rows_of(out, params) for out in plain])
        every = zip(plain, range(3), strict=True)
        self.by_inputs = torch.stack(
            [rows_of(out, [own]).unflatten(1, (3, 8))[:, b] for out, b in every]
        )

    def doors(self) -> dict[str, Check]:
        module, x, y, full = self.module, self.x, self.y, self.jacobian
        flat = {"per_sample": True, "flat": True}
        square = torch.einsum("bmp,bmq->pq", full, full)
        kernel = torch.einsum("amp,bnp->abmn", full, full)
        slopes = torch.einsum("bmp,bm->bp", full, self.outputs - y)
        scores = torch.randn((1, 3, 2), dtype=torch.float64, generator=_seeded())[0]
        drawn = torch.einsum("bmp,bm->bp", full, scores).square().sum(0)
        names = [name for name, _ in module.named_parameters()]
        shapes = {name: param.shape for name, param in module.named_parameters()}
        ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs - targets).square().sum() / 2

        def streamed(by: Any) -> Tensor:
            items = list(jacfunc.stream_jacobian(module, by, per_sample=True, chunk_size=2)(x))
            if by == "params":
                return torch.cat([block.flatten(2) for _, block in items], 2)
            blocks = [torch.cat([part[n].flatten(2) for n in names], 2) for _, part in items]
            return torch.cat(blocks, 0 if by == "samples" else 1)

        def row(tensors: dict[str, Tensor]) -> Tensor:
            return torch.cat([tensors[name].flatten() for name in names])

        def of_params(params: dict[str, Tensor], sample: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(module, params, (sample[None],))[0]
            return found

        def of_input(sample: Tensor) -> Tensor:
            found: Tensor = module(sample[None])[0]
            return found

        values = {name: param.detach().clone() for name, param in module.named_parameters()}
        whole = {"jacrev": jacfunc.jacrev, "jacfwd": jacfunc.jacfwd}
        by_name = ("auto", "reverse", "forward", "structured", "looped")
        shared = jacfunc.module_jacobian(module, **flat)
        return {
            **{
                name: gives(
                    full,
                    lambda name=name: jacfunc.module_jacobian(module, strategy=name, **flat)(x),
                )
                for name in by_name
            },
            "one for all": gives(full, lambda: shared(x)),
            "whole": gives(
                full.flatten(0, 1), lambda: jacfunc.module_jacobian(module, flat=True)(x)
            ),
            "forward, whole": gives(
                full.flatten(0, 1),
                lambda: jacfunc.module_jacobian(module, flat=True, strategy="forward")(x),
            ),
            "inputs": gives(
                self.by_inputs,
                lambda: jacfunc.module_jacobian(module, "inputs", per_sample=True)(x),
            ),
            "inputs, forward": gives(
                self.by_inputs,
                lambda: jacfunc.module_jacobian(
                    module, "inputs", per_sample=True, strategy="forward"
                )(x),
            ),
            **{by: gives(full, lambda by=by: streamed(by)) for by in ("params", "rows", "samples")},
            **{
                f"{name} of parameters": gives(
                    full[0],
                    lambda take=take: torch.cat(
                        [block.flatten(1) for block in take(of_params)(values, x[0]).values()], 1
                    ),
                )
                for name, take in whole.items()
            },
            **{
                f"{name} of an input": gives(
                    self.by_inputs[0], torch.no_grad()(lambda take=take: take(of_input)(x[0]))
                )
                for name, take in whole.items()
            },
            "vmap": gives(self.by_inputs, lambda: jacfunc.vmap(jacfunc.jacrev(of_input))(x)),
            "ntk of a function": gives(kernel, lambda: jacfunc.ntk(of_params, values, x)),
            "ntk": gives(kernel, lambda: jacfunc.ntk(module, None, x, chunk_size=2)),
            "product": gives(square.sum(1), lambda: row(jacfunc.ggn(module, loss)(x, y) @ ones)),
            "diagonal": gives(
                square.diagonal(), lambda: row(jacfunc.ggn(module, loss)(x, y).diagonal())
            ),
            "fisher": gives(
                drawn,
                lambda: row(
                    jacfunc.fisher(module, "gaussian", reduction="sum", generator=_seeded())(
                        x
                    ).diagonal()
                ),
            ),
            "norms": gives(slopes.norm(dim=1), lambda: jacfunc.gradient_norms(module, loss)(x, y)),
            "projection": gives(
                jacfunc.random_projection(module, 8)(x),
                lambda: jacfunc.random_projection(module, 8)(x),
            ),
        }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


MAKERS: dict[str, Callable[[], nn.Module]] = {"perceptron": perceptron, "attention": Attentive}
DOORS = list(Problem(perceptron).doors())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("maker", MAKERS)
def test_one_module_for_all_threads(maker: str, door: str) -> None:
    problem = Problem(MAKERS[maker])
    check = problem.doors()[door]
    with unchanged(problem.module):
        at_once([check] * THREADS, rounds=ROUNDS if maker == "perceptron" else 2)


@pytest.mark.parametrize("door", DOORS)
def test_a_module_for_each_thread(door: str) -> None:
    problems = [Problem(MAKERS["attention"]) for _ in range(THREADS)]
    with unchanged(*(problem.module for problem in problems)):
        at_once([problem.doors()[door] for problem in problems], rounds=1)


def test_functions_of_a_module_that_is_lent_meanwhile() -> None:
    problem = Problem(perceptron)
    doors = problem.doors()
    names = ("jacrev of parameters", "jacrev of an input", "vmap", "ntk of a function")
    works = [doors[name] for name in (*names, "structured", "inputs", "reverse", "params")]
    with unchanged(problem.module):
        at_once(works)


# --- threads of a module's own ---


def by_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def by_future(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def by_event(work: Callable[[], Any]) -> Any:
    is_done, results = threading.Event(), list[Any]()

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)
        is_done.set()

    threading.Thread(target=run).start()
    while not is_done.wait(0.01):
        pass
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


class Waiting(nn.Module):
    """Takes a step in a thread of its own, and waits for that."""

    def __init__(self, wait: Callable[[Callable[[], Any]], Any], step: Check) -> None:
        super().__init__()
        self.layer, self.waits = nn.Linear(4, 3), (wait, step)

    def forward(self, x: Tensor) -> Tensor:
        wait, step = self.waits
        wait(step)
        result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("wait", [by_thread, by_future, by_event])
def test_a_thread_that_a_module_waits_for_is_refused(
    wait: Callable[[Callable[[], Any]], Any],
) -> None:
    inner = nn.Linear(2, 2)
    model = Waiting(wait, lambda: jacfunc.module_jacobian(inner)(torch.ones(2)))
    model(torch.ones(4))
    with unchanged(model, inner), pytest.raises(RuntimeError, match="must not wait for a thread"):
        jacfunc.module_jacobian(model)(torch.ones(4))


def test_a_thread_that_calls_while_a_module_waits_for_another_one_has_its_turn() -> None:
    is_waiting, pauses = threading.Event(), iter([1.5 * _lock.LOOK_SECONDS * _lock.MOST_LOOKS])

    def pause() -> None:
        is_waiting.set()
        time.sleep(next(pauses, 0))

    model, other = Waiting(by_thread, pause), nn.Linear(2, 2).double()
    expected = torch.eye(2, dtype=torch.float64)

    def check() -> None:
        is_waiting.wait()
        gives(expected, lambda: jacfunc.module_jacobian(other)(torch.ones(2).double())["bias"])()

    at_once([lambda: jacfunc.module_jacobian(model)(torch.ones(4)), check], rounds=1)


# --- all doors at a time ---


def everything_at_once() -> None:
    """Each thread goes through half of all doors, each from another one on."""
    shared = [Problem(make) for make in MAKERS.values()]
    own = [Problem(perceptron) for _ in range(THREADS)]
    doors = [*FUNCTIONS.values(), *SLOW.values()]
    doors += [check for problem in shared for check in problem.doors().values()]

    def work(thread: int) -> Check:
        mine = [*doors, *own[thread].doors().values()]
        turn = iter(mine[thread * 10 :] + mine[: thread * 10])
        return lambda: next(turn)()

    with unchanged(*(problem.module for problem in (*shared, *own))):
        at_once([work(thread) for thread in range(THREADS)], rounds=len(doors) // 2)


def test_all_doors_at_once() -> None:
    """In a process of its own: forward mode in two threads may end it."""
    code = (
        "import tests.house.test_threads as t; t.torch.set_num_threads(1); t.everything_at_once()"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-2000:]


READS_OF_GENERATORS = """
import gc, sys, threading, torch
from jacfunc._torch import RandomState

sys.setswitchinterval(1e-6)
gc.set_threshold(1)
gc.callbacks.append(lambda phase, info: sum(range(100)) + sum(n for n in range(2000)))

def read():
    for _ in range(50):
        state = RandomState((torch.zeros(1),))
        state.repeat()
        assert not state.has_changed()

threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_collections_of_garbage_while_generators_are_read() -> None:
    """In torch alone two threads that read a generator may wait for each other for ever."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", READS_OF_GENERATORS]
    assert subprocess.run(command, timeout=100, cwd=root).returncode == 0


def test_errors_leave_no_trace_either() -> None:
    module = perceptron().double()

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError(str(self.inner(x).sum().shape))

    failing = Failing()

    def fail() -> None:
        for strategy in ("reverse", "forward", "auto"):
            with pytest.raises(ArithmeticError):
                jacfunc.module_jacobian(failing, strategy=strategy)(torch.ones(2, 8).double())
            with pytest.raises(ArithmeticError):
                jacfunc.jacobian(lambda x: failing(x), strategy=strategy)(torch.ones(2, 8).double())

    with unchanged(failing):
        at_once([fail] * THREADS, rounds=3)


def test_one_stream_for_each_thread_of_one_module() -> None:
    """Blocks of one are asked for between those of another: nothing is held in between."""
    problem = Problem(perceptron)
    stream = jacfunc.stream_jacobian(problem.module, "rows", per_sample=True, chunk_size=1)
    streams = [stream(problem.x) for _ in range(4)]

    def check() -> None:
        expected = problem.jacobian
        for items in streams:
            with turn:
                part, blocks = next(items)
            found = torch.cat([block.flatten(2) for block in blocks.values()], 2)
            torch.testing.assert_close(found, expected[:, part])

    turn = threading.Lock()  # a generator runs in one thread at a time
    with unchanged(problem.module):
        at_once([check] * 2, rounds=1)


# --- random numbers ---

WIDTH = 6
MASKS = torch.tensor(list(product((0.0, 2.0), repeat=WIDTH)), dtype=torch.float64)


class Dropping(nn.Module):
    """``W₂ (m · W₁ x)`` with a mask m of zeros and twos."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Linear(4, WIDTH, bias=False).double()
            self.last = nn.Linear(WIDTH, 5, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x), 0.5))

    def jacobians(self) -> Tensor:
        """By the input, for every mask."""
        return self.last.weight.detach() * MASKS.unsqueeze(1) @ self.first.weight.detach()


DROPPING = Dropping()


def drops_once(call: Callable[[], Tensor]) -> Check:
    """Is it the Jacobian of one mask, whichever?"""
    every = DROPPING.jacobians()

    def check() -> None:
        apart = (every - call()).abs().amax((1, 2)).min()
        assert apart < 1e-10, f"columns of several masks: {apart:.3g} from any one of them"

    return check


_FIRST, _LAST = DROPPING.first.weight.detach(), DROPPING.last.weight.detach()
_X = torch.ones(4, dtype=torch.float64)


def dropping(x: Tensor) -> Tensor:
    return _LAST @ F.dropout(_FIRST @ x, 0.5)


RANDOM: dict[str, Check] = {
    "jacrev": drops_once(lambda: jacfunc.jacrev(dropping)(_X)),
    "jacfwd in chunks": drops_once(
        lambda: jacfunc.jacfwd(dropping, randomness="same", chunk_size=1)(_X)
    ),
    "columns": drops_once(
        lambda: jacfunc.jacobian(dropping, strategy=jacfunc.Looped("columns"))(_X)
    ),
    "auto": drops_once(lambda: jacfunc.jacobian(lambda x: dropping(x))(_X)),
    "structured": drops_once(lambda: jacfunc.jacobian(dropping, strategy="structured")(_X)),
    "module": drops_once(
        lambda: jacfunc.module_jacobian(
            DROPPING,
            "inputs",
            strategy=jacfunc.Forward(chunk_size=1),
            per_sample=True,
            randomness="same",
        )(_X.expand(2, 4))[1]
    ),
}


@pytest.mark.parametrize("door", RANDOM)
def test_one_mask_for_all_columns(door: str) -> None:
    at_once([RANDOM[door]] * THREADS, rounds=5)


def test_one_mask_for_all_columns_at_all_doors() -> None:
    at_once([*RANDOM.values(), RANDOM["jacrev"], RANDOM["jacrev"]], rounds=40)


def test_modules_draw_the_same_numbers_in_all_threads() -> None:
    """Each call starts from the state of torch's generator, and puts it back."""
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        mask = F.dropout(torch.ones(1, WIDTH, dtype=torch.float64), 0.5)[0]
    expected = _LAST * mask @ _FIRST

    def call() -> Tensor:
        jac = jacfunc.module_jacobian(DROPPING, "inputs", per_sample=True, randomness="same")
        return jac(_X.expand(3, 4))[2]

    at_once([gives(expected, call)] * THREADS)
    assert torch.equal(state, torch.get_rng_state())


# --- what stays parallel ---


def test_pullbacks_do_not_wait_for_forward_mode() -> None:
    pushing, pulled = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        pushing.set()
        assert pulled.wait(30)
        return wave(x)

    def pull() -> None:
        assert pushing.wait(30)
        gives(J, lambda: jacfunc.jacrev(wave)(X))()
        gives(H, lambda: jacfunc.hessian(scalar, strategy="reverse-over-reverse")(X))()
        pulled.set()

    at_once([gives(J, lambda: jacfunc.jacfwd(slow)(X)), pull], rounds=1)


def test_pullbacks_do_not_wait_for_each_other() -> None:
    together = threading.Barrier(4)

    def meeting(x: Tensor) -> Tensor:
        together.wait(30)
        return wave(x)

    at_once([gives(J, lambda: jacfunc.jacrev(meeting)(X))] * 4, rounds=3)


def test_forward_mode_outside_is_seen_in_its_own_thread_alone() -> None:
    """A derivative of torch's around a door in one thread is none around those of the others."""
    problem = Problem(perceptron)
    outer = gives(H, lambda: torch.func.jacfwd(jacfunc.jacrev(scalar))(X))
    inner = [problem.doors()[door] for door in ("structured", "ntk", "params")]
    with unchanged(problem.module):
        at_once([outer, *inner])


def test_a_thread_of_torchs_own_does_not_wait_for_the_one_that_waits_for_it() -> None:
    """As hooks in a backward pass on an accelerator: they get what torch keeps for the caller."""
    entered, caller = threading.Event(), threading.get_ident()

    def hook() -> None:
        torch._C._stash_obj_in_tls(_lock._THREAD, caller)
        gives(J, lambda: jacfunc.jacfwd(wave)(X))()
        entered.set()

    with _lock.alone():
        thread = threading.Thread(target=hook, daemon=True)
        thread.start()
        assert entered.wait(30)
    thread.join()
