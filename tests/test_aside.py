"""Gradients of parameters aside: what the chain may not touch it does not touch, and memory is held long enough."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from scalefold.kernels.around import aside
from scalefold.kernels.table import use_operations
from scalefold.kernels.triton_ops import INTERPRETED, TRITON
from scalefold.model.evoformer import EvoformerStack
from scalefold.step import reducer
from scalefold.step.parameters import FlatParameters
from scalefold.tune import operation_cases as cases
from test_kernels_block import SMALL

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="streams are stood in for: kernels run in the interpreter")

ROWS = (1, 2, 16)
CASES = [
    cases.projections(ROWS, 16, [16, 16, 16, 16, 4], 1),
    cases.gated_output(ROWS, 16, 2, 16, 1, dropped=True),
    cases.transition(ROWS, 16, 2, 1),
    cases.triangle_project(ROWS, 16, 1),
    cases.triangle_output(ROWS, 16, 1),
    cases.triangle_multiplication((1, 16, 16), 16, True, 1),  # both of its parts have the gradient of one layer norm
    cases.outer_product_update(16, 8, 8, 1),
]


class Stream:
    """Says what a stream was told, in the order of all streams."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.said.append(f"event {sum(text.startswith('event') for text in self.said)}")
        return self.said[-1]

    def wait_event(self, event):
        self.said.append(f"{self.name} waits for {event}")


@pytest.fixture
def said(monkeypatch):
    """What streams are told, where there is no GPU."""
    told: list[str] = []

    @contextmanager
    def on(stream):
        told.append(f"on {stream.name}")
        yield
        told.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("chain", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    return told


ONES = torch.ones(4)


def worked(said, count=1):
    """Says when it computes so many gradients."""

    def compute():
        said.append("work")
        return [ONES] * count

    return compute


def side():
    return aside.Side(torch.device("cpu"))


def parameter():
    return torch.zeros(4, requires_grad=True)


def test_without_a_side_gradients_are_computed_where_they_are_asked_for(said):
    assert aside.gradients([parameter()], [], lambda: "found") == "found"
    aside.join()
    assert said == []


def test_work_aside_follows_the_chain_and_the_chain_follows_it_at_the_end(said):
    with side().used():
        assert aside.gradients([parameter(), None], [torch.ones(2), None], worked(said, 2)) == [ONES, ONES]
        said.append("more of the chain")
    work = ["side waits for chain", "on side", "work", "off side", "event 0"]
    assert said == [*work, "more of the chain", "chain waits for event 0"]


@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(4, requires_grad=True) * 1.0, lambda: _with_gradient()], ids=["no leaf", "a gradient"]
)
def test_gradients_that_the_chain_goes_on_with_are_computed_on_it_after_all_work_aside(said, make):
    with side().used():
        aside.gradients([parameter()], [], worked(said))
        said.clear()
        aside.gradients([make()], [], worked(said))
    assert said == ["chain waits for event 0", "work"]


def _with_gradient():
    found = parameter()
    found.grad = torch.ones(4)
    return found


def test_the_next_backward_may_take_the_same_parameters_aside(said):
    own, known = side(), parameter()
    for _ in range(2):
        with own.used():
            assert aside.gradients([known], [], worked(said)) == [ONES]
    assert said.count("on side") == 2


def test_a_second_gradient_is_added_to_the_first_one_aside(said):
    known, first, other = parameter(), torch.full((4,), 2.0), torch.zeros(4)
    with side().used():
        aside.gradients([known], [], lambda: [first])
        assert aside.gradients([known, parameter()], [], lambda: [torch.ones(4), other]) == [None, other]
    assert first.tolist() == [3.0] * 4
    assert said.count("on side") == 2


def test_what_unfinished_work_reads_is_kept_until_the_chain_has_waited_for_it(said, monkeypatch):
    monkeypatch.setattr(aside, "MOST_HELD", 100)
    own = side()
    with own.used():
        for _ in range(3):  # 40 bytes each: the third is too much, and the older half, one, may go
            aside.gradients([parameter()], [torch.zeros(10)], worked(said))
        assert len(own._held) == 2
        assert [text for text in said if text.startswith("chain waits")] == ["chain waits for event 0"]
    assert not own._held
    assert said[-1] == "chain waits for event 2"


def test_what_reads_gradients_follows_them_aside_and_keeps_them(said, monkeypatch):
    monkeypatch.setattr(aside, "MOST_HELD", 100)
    aside.follow([], lambda: said.append("on the chain"))
    with aside.Side(torch.device("cpu")).used():
        aside.gradients([parameter()], [], worked(said))
        said.clear()
        aside.follow([torch.zeros(20)], lambda: said.append("collected"))
        assert said[:4] == ["side waits for chain", "on side", "collected", "off side"]
        assert said[5:] == [], "80 bytes are held"
        aside.follow([torch.zeros(20)], lambda: said.append("collected"))
        assert said[-1] == "chain waits for event 0", "the older half is let go"
    assert said[-1] == "chain waits for event 1"


def test_gradients_are_collected_and_summed_over_ranks_aside_while_the_backward_goes_on(said, monkeypatch):
    module = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    flat, x = FlatParameters(module, torch.device("cpu")), torch.randn(4, 8)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))

    def all_reduce(values, group, async_op):
        said.append(f"sum of {values.numel()}")

    monkeypatch.setattr(reducer.dist, "all_reduce", all_reduce)
    buckets = reducer.GradientReducer(flat, object(), bucket_mib=2**-12)  # type: ignore[arg-type]
    buckets.begin()
    with aside.Side(torch.device("cpu")).used():
        module(x).sum().backward()
        sums = [n for n, text in enumerate(said) if text.startswith("sum")]
        assert len(sums) == len(buckets.buckets) > 1
        assert all((said[n - 1], said[n + 1]) == ("on side", "off side") for n in sums)
        assert not any(text.startswith("chain waits") for text in said)
    buckets.finish()
    assert said[-1].startswith("chain waits for event")
    (collected,) = flat.gradients.values()
    found = dict(flat.named_views(collected))
    for (name, parameter), gradient in zip(module.named_parameters(), expected, strict=True):
        assert parameter.grad is None
        assert torch.equal(found[name], gradient)


def test_a_gradient_that_autograd_adds_to_another_one_is_found(said):
    """One of an operation here, one of an operation of PyTorch: their sum is made before the first one is there."""
    with cases.on_device("cpu"):
        inputs = cases.transition(ROWS, 16, 2, 1).build()
        loss = inputs.call(TRITON).float().square().sum() + sum(leaf.float().sum() for leaf in inputs.leaves)
    with pytest.raises(RuntimeError, match="was read before it was computed"), side().used():
        loss.backward()
    assert aside.gradients([parameter()], [], lambda: "here") == "here"


def test_a_backward_that_fails_leaves_no_side_in_use(said):
    def broken():
        with side().used():
            aside.gradients([parameter()], [torch.zeros(1)], worked(said))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert said[-1] == "chain waits for event 0"
    assert aside.gradients([parameter()], [], lambda: "here") == "here"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation)
def test_gradients_computed_aside_become_those_of_the_parameters_as_they_are(said, case):
    """The chain would read unfinished values if autograd copied, added or converted one."""
    found, run = [], aside.Side.run

    def noted(self, parameters, read, compute):
        results = list(run(self, parameters, read, compute))
        found.extend(result.data_ptr() for result in results if result is not None)  # no tensor: a held one is copied
        return results

    with cases.on_device("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(aside.Side, "run", noted)
        gradients = []
        for own in (None, side()):
            inputs = case.build()
            outputs = cases.outputs_of(inputs, TRITON)
            loss = sum(output.float().square().sum() for output in outputs)
            if own is None:
                loss.backward()
            else:
                with own.used():
                    loss.backward()
            gradients.append([leaf.grad for leaf in inputs.leaves])
    assert found
    assert said.count("on side") == (2 if case.operation == "triangle_multiplication" else 1)
    kept = {gradient.data_ptr() for gradient in gradients[1]}
    assert set(found) <= kept
    assert all(map(torch.equal, *gradients))


def test_gradients_of_a_whole_block_have_the_same_bits_aside(said):
    """Raises if one is read on the chain, by whichever operation: see ``Side.used``."""
    stack = EvoformerStack(64, 32, 16, SMALL).to(torch.bfloat16)
    use_operations(stack, TRITON)
    for weight in stack.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    m, z, found = torch.randn(1, 3, 5, 64), torch.randn(1, 5, 5, 32), []
    for own in (None, side()):
        torch.manual_seed(1)  # dropout
        stack.zero_grad()
        outputs = stack(m.bfloat16(), z.bfloat16(), torch.ones(1, 3, 5), torch.ones(1, 5, 5))
        with own.used() if own is not None else nullcontext():
            sum(output.float().square().sum() for output in outputs).backward()
        found.append([parameter.grad for parameter in stack.parameters()])
    assert said.count("on side") > len(CASES)
    assert all(map(torch.equal, *found))
