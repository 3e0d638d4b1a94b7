"""Agreement of two runs: what is compared, on which scale, and that nothing is left changed behind."""

import torch
from torch import nn

from recompile.compare import Outcome, error, run


def test_the_error_is_relative_to_the_largest_magnitude():
    found, expected = Outcome([torch.tensor([1.0, 101.0])]), Outcome([torch.tensor([1.0, 100.0])])
    assert abs(error(found, expected) - 0.01) < 1e-9


def test_a_nan_on_one_side_only_is_an_infinite_error():
    nan = Outcome([torch.tensor([float("nan"), 1.0])])
    assert error(nan, Outcome([torch.tensor([0.0, 1.0])])) == float("inf")
    assert error(nan, nan) == 0


def test_rounding_noise_of_a_zero_gradient_is_measured_on_the_largest_gradients_scale():
    found = Outcome(gradients=[torch.tensor([1e-9]), torch.tensor([1.0])])
    expected = Outcome(gradients=[torch.tensor([-1e-9]), torch.tensor([1.0])])
    assert error(found, expected) < 1e-5


def test_a_wrong_gradient_or_buffer_is_seen():
    right = Outcome([torch.ones(1)], [torch.ones(2)], [torch.ones(3)])
    assert error(Outcome([torch.ones(1)], [torch.zeros(2)], [torch.ones(3)]), right) == 1
    assert error(Outcome([torch.ones(1)], [torch.ones(2)], [torch.zeros(3)]), right) == 1


def test_a_run_puts_the_buffers_back_and_returns_what_they_became():
    model = nn.BatchNorm1d(2)
    found = run(model, model, (torch.arange(6.0).reshape(3, 2),), grad=True)
    assert model.running_mean.tolist() == [0, 0]
    assert not torch.equal(found.buffers[0], model.running_mean)
    assert len(found.gradients) == 2


def test_the_seed_moves_dropout_but_not_the_output_gradients():
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Dropout()), (torch.ones(2, 64),)
    first, again, other = (run(model, model, inputs, grad=True, seed=seed) for seed in (0, 0, 1))
    assert error(again, first) == 0
    assert error(other, first) > 0
