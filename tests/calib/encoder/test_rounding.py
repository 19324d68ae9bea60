"""Rounding to INT8: GPTQ beats rounding to nearest, degenerate inputs do no harm, and activations are rounded as in ONNX."""

import pytest
import torch
from torch import Tensor

from fastvlm_edge.calib.encoder.rounding import fake_quantize, round_to_data


def round_to_nearest(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales[:, None]).round().clamp(-127, 127)


def correlated(inputs: int = 48, outputs: int = 32, rows: int = 4000) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 6) @ torch.randn(6, inputs) + 0.2 * torch.randn(rows, inputs), torch.randn(outputs, inputs)


def test_rounding_to_data_halves_the_error_of_the_output() -> None:
    x, weight = correlated()
    scales = weight.abs().amax(1) / 127
    moment = x.T @ x / len(x)
    errors = []
    for rounded in (round_to_nearest(weight, scales), round_to_data(weight, scales, moment)):
        assert rounded.abs().max() <= 127 and torch.equal(rounded, rounded.round())
        errors.append(float((x @ (weight - rounded * scales[:, None]).T).square().mean()))
    assert errors[1] < errors[0] / 4  # of the square


def test_inputs_that_tell_nothing_of_each_other_are_rounded_to_nearest() -> None:
    _, weight = correlated()
    scales = weight.abs().amax(1) / 127
    assert torch.equal(round_to_data(weight, scales, torch.eye(48)), round_to_nearest(weight, scales))


@pytest.mark.parametrize("moment", [torch.zeros(48, 48), torch.ones(48, 48)])
def test_inputs_that_are_dead_or_all_the_same_can_be_rounded(moment: Tensor) -> None:
    _, weight = correlated()
    rounded = round_to_data(weight, weight.abs().amax(1) / 127, moment)
    assert torch.isfinite(rounded).all()


def test_fake_quantisation_is_that_of_onnx() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 500.0, -500.0])
    assert fake_quantize(x, 1.0).tolist() == [0, 2, 2, 0, -2, 127, 127, -128]
