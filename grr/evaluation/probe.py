"""Probes of frozen features: logistic regression, and attentive pooling with a linear layer."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grr.components import AttentionPooler
from grr.evaluation.zero_shot import accuracy
from grr.parallel.device import where_float64_is
from grr.training.optim import adamw
from grr.training.schedule import set_lr, warmup_cosine

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FOLD = 5  # every fifth training image is held out to choose the strength
CONVERGED = 1e-9  # largest entry of the gradient at the solution

logger = logging.getLogger(__name__)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
) -> dict[str, float]:
    """Linear probe: train logistic regression on features, and return the test `accuracy` and the chosen strength.

    features: [n, d], labels: [n], test_features: [m, d], test_labels: [m]. Features are centred and divided by their
    mean length, so that a strength of the penalty has the same meaning for all models. The strength with the highest
    accuracy on a held-out fifth of each class is chosen, the lower loss decides ties; the final fit uses all features.
    Computed in float64, on the device of the features, or on the CPU if that does not have float64.
    """
    features, labels, test_features, test_labels = map(where_float64_is, (features, labels, test_features, test_labels))
    features, test_features = features.double(), test_features.double()
    centre = features.mean(0)
    length = (features - centre).norm(dim=1).mean().clamp_min(1e-12)
    features, test_features = (features - centre) / length, (test_features - centre) / length
    strength = _best_strength(features, labels, classes, strengths)
    weight, bias = logistic_regression(features, labels, classes, strength)
    return {**accuracy(F.linear(test_features, weight, bias), test_labels), "strength": strength}


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, strength: float, *, tolerance: float = CONVERGED
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + strength / 2 * |weights|^2; returns weights [c, d] and biases [c].

    features: float64 [n, d], labels: [n]. With a positive strength the minimum is unique. L-BFGS starts from zero and
    ends when no entry of the gradient exceeds the tolerance; a warning is logged if rounding ends it earlier.
    """
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=20_000,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    objective()
    largest = max(float(x.grad.abs().max()) for x in (weight, bias) if x.grad is not None)
    if largest > 1000 * tolerance:
        logger.warning("logistic_regression: stopped with a gradient of %.1e at strength=%g", largest, strength)
    return weight.detach(), bias.detach()


def attentive_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    num_heads: int,
    device: torch.device,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> dict[str, float]:
    """Attentive probe: train an attention pooler of one query and a linear layer; returns the test `accuracy`.

    features: [n, p, d], labels: [n], test_features: [m, p, d], test_labels: [m]. Trained in float32 with AdamW and one
    cosine of the learning rate; seed: of weights and order. Source: CoCa (Yu et al. 2022), frozen-feature evaluation.
    """
    dim = features.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pooler = AttentionPooler(dim, 1, num_heads)
        probe = nn.Sequential(nn.LayerNorm(dim), pooler, nn.Flatten(), nn.Linear(dim, classes)).to(device)
        order = [torch.randperm(len(labels)) for _ in range(epochs)]
    optimizer = adamw(probe, lr=lr, weight_decay=weight_decay, decay_all=False)
    batches = [batch for epoch in order for batch in epoch.split(batch_size)]
    for step, batch in enumerate(batches):
        set_lr(optimizer, warmup_cosine(step, len(batches), lr, min_lr=0.0))
        loss = F.cross_entropy(probe(features[batch].to(device).float()), labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = [probe(some.to(device).float()).cpu() for some in test_features.split(batch_size)]
    return accuracy(torch.cat(scores), test_labels)


def _best_strength(features: Tensor, labels: Tensor, classes: int, strengths: tuple[float, ...]) -> float:
    """Returns the best strength on every fifth image of the sorted labels; the greatest if there are too few images."""
    held = torch.argsort(labels, stable=True)[FOLD - 1 :: FOLD]
    kept = torch.ones_like(labels, dtype=torch.bool)
    kept[held] = False

    def held_out(strength: float) -> tuple[float, float]:
        weight, bias = logistic_regression(features[kept], labels[kept], classes, strength, tolerance=1e-6)
        scores = F.linear(features[held], weight, bias)  # [n / 5, c]
        right = (scores.argmax(1) == labels[held]).double().mean().item()
        return right, -F.cross_entropy(scores, labels[held]).item()

    return max(strengths, key=held_out) if len(held) else max(strengths)
