"""Probes against the conditions of their optimum, another solver, and data whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from grr.evaluation.probe import attentive_probe, linear_probe, logistic_regression

CPU = torch.device("cpu")


def blobs(n: int, d: int, classes: int, *, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the unit vectors, one a class: the same centres for every seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.eye(classes, d)[labels] + noise * torch.randn(n, d, generator=generator), labels


def objective(weight, bias, x, labels, strength):
    return F.cross_entropy(x @ weight.T + bias, labels) + strength / 2 * weight.square().sum()


def newton(x: torch.Tensor, labels: torch.Tensor, classes: int, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same minimum by Newton's method, with the whole Hessian written out. Source: Böhning 1992."""
    n, d = x.shape
    x1 = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)  # the last column is the bias
    theta = torch.zeros(classes, d + 1, dtype=x.dtype)
    penalty = torch.full((classes, d + 1), strength, dtype=x.dtype)
    penalty[:, -1] = 0
    for _ in range(60):
        p = (x1 @ theta.T).softmax(1)
        gradient = (p - F.one_hot(labels, classes)).T @ x1 / n + penalty * theta
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # [n, c, c]
        hessian = torch.einsum("nij,na,nb->iajb", curvature, x1, x1) / n
        hessian = hessian.reshape(classes * (d + 1), -1) + penalty.flatten().diag()
        theta = theta - (torch.linalg.pinv(hessian, hermitian=True) @ gradient.flatten()).view_as(theta)
    return theta[:, :-1], theta[:, -1]


@settings(max_examples=20)
@given(
    n=st.integers(8, 40),
    d=st.integers(1, 6),
    classes=st.integers(2, 4),
    strength=st.sampled_from([1e-3, 0.03, 1.0]),
    seed=st.integers(0, 999),
)
def test_the_gradient_at_a_solution_is_zero_and_the_loss_is_minimal(n, d, classes, strength, seed):
    x, labels = blobs(n, d, classes, noise=0.7, seed=seed)
    x = x.double()
    weight, bias = logistic_regression(x, labels, classes, strength)
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    least = objective(*leaves, x, labels, strength)
    gradients = torch.autograd.grad(least, leaves)
    assert max(g.abs().max().item() for g in gradients) < 1e-7
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        step = size * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        assert objective(weight + step, bias, x, labels, strength) > least


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_logistic_regression_equals_newtons_method(strength):
    x, labels = blobs(60, 4, 3, noise=0.5, seed=0)
    weight, bias = logistic_regression(x.double(), labels, 3, strength)
    expected_weight, expected_bias = newton(x.double(), labels, 3, strength)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias - bias.mean(), expected_bias - expected_bias.mean(), rtol=1e-5, atol=1e-6)


def test_separable_features_are_classified_without_an_error():
    train, test = blobs(120, 16, 6, noise=0.05, seed=0), blobs(60, 16, 6, noise=0.05, seed=1)
    found = linear_probe(*train, *test, 6)
    assert (found["top_1"], found["mean_per_class"]) == (1.0, 1.0)


def test_shuffled_labels_stay_at_chance():
    """200 of 4 classes: four standard deviations of a guess are 0.12."""
    (x, labels), (test, test_labels) = blobs(200, 16, 4, noise=0.05, seed=0), blobs(200, 16, 4, noise=0.05, seed=1)
    generator = torch.Generator().manual_seed(0)
    noise, test_noise = torch.randn(200, 16, generator=generator), torch.randn(200, 16, generator=generator)
    assert abs(linear_probe(noise, labels, test_noise, test_labels, 4)["top_1"] - 0.25) < 0.12
    shuffled = labels[torch.randperm(200, generator=generator)]
    shuffled_test = test_labels[torch.randperm(200, generator=generator)]
    assert abs(linear_probe(x, shuffled, test, shuffled_test, 4)["top_1"] - 0.25) < 0.12


@settings(max_examples=5)
@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_shift_and_scale_of_features_do_not_change_the_accuracy(shift, scale, seed):
    (x, labels), (test, test_labels) = blobs(60, 5, 3, noise=0.4, seed=seed), blobs(60, 5, 3, noise=0.4, seed=seed + 1)
    found = linear_probe(x.double(), labels, test.double(), test_labels, 3)
    moved = linear_probe(scale * x.double() + shift, labels, scale * test.double() + shift, test_labels, 3)
    assert found == pytest.approx(moved)


def test_the_strength_is_chosen_on_held_out_images():
    """Forty noisy dimensions and few images: the weakest penalty learns the noise by heart."""
    (x, labels), (test, test_labels) = blobs(60, 40, 3, noise=0.5, seed=0), blobs(600, 40, 3, noise=0.5, seed=1)
    chosen = linear_probe(x, labels, test, test_labels, 3)
    weakest = linear_probe(x, labels, test, test_labels, 3, strengths=(1e-5,))
    assert chosen["strength"] > 1e-5 == weakest["strength"]
    assert chosen["top_1"] > weakest["top_1"]


def needles(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve patches of noise, one of which, anywhere, tells the class; its mark says that it is the one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    patches = torch.randn(n, 12, 16, generator=generator)
    place = torch.randint(0, 12, (n,), generator=generator)
    patches[torch.arange(n), place] = 4 * torch.eye(16)[labels] + 6 * torch.eye(16)[15]
    return patches, labels


def test_an_attentive_probe_learns_where_to_look_which_the_mean_cannot():
    (x, labels), (test, test_labels) = needles(400, 0), needles(200, 1)
    options = {"epochs": 20, "batch_size": 20, "lr": 1e-2}
    found = attentive_probe(x, labels, test, test_labels, 4, 2, CPU, **options)
    assert found["top_1"] > 0.95
    assert linear_probe(x.mean(1), labels, test.mean(1), test_labels, 4)["top_1"] < found["top_1"] - 0.2
    assert found == attentive_probe(x, labels, test, test_labels, 4, 2, CPU, **options)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert abs(attentive_probe(x, shuffled, test, test_labels, 4, 2, CPU, **options)["top_1"] - 0.25) < 0.13


def test_a_seed_decides_weights_and_order_and_leaves_the_global_generator():
    (x, labels), (test, test_labels) = needles(60, 0), needles(40, 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    attentive_probe(x, labels, test, test_labels, 4, 2, CPU, epochs=1)
    assert torch.equal(torch.rand(1), expected)
