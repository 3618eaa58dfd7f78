"""What a compensation of blocks refuses, each time with the reason and with nothing touched."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes import compensate_blocks as module
from qpass.passes.compensate_blocks import compensate_blocks
from tests.linear_blocks import MAPS, METHODS, TOKENS, batches_of, linear_block
from tests.small_models import Feeds, from_text, weights


def refused(reference: Graph, graph: Graph, batches: list[Feeds], **options: object) -> list[str]:
    """Compensate, and check that nothing was touched."""
    before = graph.fingerprint()
    result = compensate_blocks(reference, graph, batches, **options)
    assert (result.method, result.report.changed) == ("none", 0)
    assert (result.added_nodes, result.added_parameters, result.added_macs) == (0, 0, 0)
    assert graph.fingerprint() == before
    return [refusal.reason for refusal in result.report.refusals]


@pytest.mark.parametrize("method", METHODS)
def test_a_useless_fit_is_refused_with_its_number(method: str) -> None:
    """An error that looks like noise: rounding of the branch to a coarse grid."""
    reference = linear_block(TOKENS, seed=5)
    coarse = from_text(
        TOKENS.replace("f = Add (f0, b)", "f1 = Add (f0, b) i = Round (f1) f = Identity (i)"),
        **{name: array_of(reference.tensors()[name]) for name in "wb"},
    )
    fine = batches_of(reference, 8)
    reasons = refused(reference, coarse, fine, method=method)
    assert len(reasons) == 1
    assert "no map helps on samples left out: R2 -0." in reasons[0]


def test_the_model_gate_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that is good on its block and bad for the model: the map is replaced by a wrong one."""
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    original = module.fit_block

    def misfit(*arguments, **options):
        fit = original(*arguments, **options)
        fit.mapped.linear.weight[...] *= -1.0
        return fit

    monkeypatch.setattr(module, "fit_block", misfit)
    (reason,) = refused(reference, wrong, batches_of(reference))
    assert reason.startswith("no sure improvement: ")


def test_one_batch_has_nothing_to_judge_by() -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    (reason,) = refused(reference, wrong, batches_of(reference, 1))
    assert "only one batch" in reason


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_has_nothing_to_leave_out(method: str) -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    (reason,) = refused(reference, wrong, batches_of(reference, 2, samples=1), method=method)
    assert reason == "there is one sample to fit to: none could be left out"


def test_batches_of_one_sample_are_dealt_out() -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    result = compensate_blocks(reference, wrong, batches_of(reference, 16, samples=1))
    assert result.method == "qwt"


def test_a_model_without_blocks() -> None:
    text = TOKENS.replace("y = Add (x, f)", "y = Relu (f)")
    reference, wrong = linear_block(text, seed=5), linear_block(text, seed=6)
    assert refused(reference, wrong, batches_of(reference)) == ["the model has no residual block"]


def test_a_sum_that_is_computed_in_another_way() -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    wrong.node("node_y").op = "Sum"
    assert refused(reference, wrong, batches_of(reference)) == [
        "the quantized graph computes its sum in another way"
    ]


def test_a_map_that_does_not_fit_into_memory() -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    (reason,) = refused(reference, wrong, batches_of(reference), memory_bytes=1 << 10)
    assert reason == "a map of 16 x 16 channels takes 16 KiB to fit"


def test_inputs_that_do_not_lie_on_the_output() -> None:
    """A valid 3x3 convolution: 8 positions become 6, no 1x1 convolution does that."""
    body = """
    s = Conv (x, s_w)  f = Conv (x, w, b)  y = Add (f, s)
    """
    text = MAPS[: MAPS.index("{")].replace("32,4,4", "32,6,6") + "{" + body + "}"
    made = []
    for seed in (5, 6):
        random = np.random.default_rng(seed)
        made.append(
            from_text(
                text, w=weights(random, 32, 16, 3, 3, fan_in=144), b=np.ones(32, np.float32),
                s_w=weights(np.random.default_rng(1), 32, 16, 3, 3, fan_in=144),
            )
        )  # fmt: skip
    (reason,) = refused(*made, batches_of(made[0]))
    assert reason == "its input [4, 16, 8, 8] does not lie on its output [4, 32, 6, 6]"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_activations(value: float) -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    batches = batches_of(reference)
    batches[0]["x"][0, 0, 0] = value
    with np.errstate(invalid="ignore"):
        (reason,) = refused(reference, wrong, batches)
    assert reason == "its activations hold NaN or infinity"
