"""Drift: CKA, token KL and weight distance against numbers worked by hand, and on a tiny model moved by a known amount."""

from __future__ import annotations

import math

import pytest
import torch

from llmrl.evaluation.drift import CKA, Lens, drift, linear_cka, token_kl, weight_distance, weights_digest

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_of_a_representation_with_itself_turned_shifted_and_scaled():
    X = normal(50, 6)
    Q, _ = torch.linalg.qr(normal(6, 6, seed=1))
    assert linear_cka(X, X) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(X, 3.0 * X @ Q + 5.0) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(X, X @ torch.diag(torch.tensor([5.0, 1, 1, 1, 1, 0.1]).double())) < 0.95  # axes scaled apart are a change
    assert linear_cka(X, normal(50, 3, seed=2)) == pytest.approx(linear_cka(normal(50, 3, seed=2), X))


def test_cka_by_hand():
    """Samples (1, 0), (-1, 0), (0, 1), (0, -1) against 1, -1, 1, -1 (all centred): X'X = 2 I, so ||X'X|| = 2 sqrt 2; ||Y'Y|| = 4; Y'X = (2, 2),
    squared norm 8. CKA = 8 / (8 sqrt 2) = 0.7071."""
    X = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    Y = torch.tensor([[1.0], [-1], [1], [-1]])
    assert linear_cka(X, Y) == pytest.approx(1 / math.sqrt(2), abs=1e-12)
    assert linear_cka(X, torch.tensor([[1.0], [1], [-1], [-1]])) == pytest.approx(0.0, abs=1e-12)  # blind to which axis
    assert linear_cka(X, torch.ones(4, 1)) is None


def test_cka_in_parts_is_cka_at_once():
    X, Y = normal(40, 5) + 3, normal(40, 7, seed=1) - 2
    parts = CKA()
    for a, b in ((0, 1), (1, 17), (17, 40)):
        parts.add(X[a:b], Y[a:b])
    assert parts.value() == pytest.approx(linear_cka(X, Y), rel=1e-9) and parts.n == 40
    with pytest.raises(ValueError, match="3 and 2 samples"):
        parts.add(X[:3], Y[:2])


def test_token_kl_by_hand():
    """KL((1/2, 1/4, 1/4) || (1/4, 1/2, 1/4)) = 1/2 ln 2 - 1/4 ln 2; a banned token (-inf on both sides) adds nothing."""
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0]]).log()
    assert token_kl(p, q).tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-7)


def test_weight_distance_by_hand():
    base = [("a", torch.tensor([3.0, 0.0])), ("b", torch.tensor([[4.0]]))]
    moved = [("b", torch.tensor([[4.0]])), ("a", torch.tensor([3.0, 1.0]))]
    assert weight_distance(base, moved) == pytest.approx(0.2) and weight_distance(base, base) == 0.0
    with pytest.raises(ValueError, match="b is missing"):
        weight_distance(base, base[:1])
    with pytest.raises(ValueError, match="c"):
        weight_distance(base, [*base, ("c", torch.ones(1))])
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        weight_distance(base, [("a", torch.ones(3)), base[1]])
    assert weights_digest(base) == weights_digest(list(base)) != weights_digest(moved)


def lens(scale: float, offset: float = 0.0, layers: int = 2) -> Lens:
    """A "model" of two tokens: hidden state (id, position + offset), logits (scale * id, 0)."""

    def hidden(ids):
        state = torch.stack([torch.tensor(list(ids)).float(), torch.arange(len(ids)).float() + offset], 1)
        return [state] * layers

    return Lens(hidden, lambda h: torch.stack([scale * h[:, 0], torch.zeros(len(h))], 1), lambda: [("w", torch.tensor([scale]))])


def test_drift_looks_at_the_positions_that_predict_the_response():
    """Response (0, 1, 1) behind context (0, 1): predicted at ids 1, 0, 1. KL at id 1 of softmax(1, 0) against softmax(2, 0); none at id 0."""
    p1, p2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    kl = p1 * math.log(p1 / p2) + (1 - p1) * math.log((1 - p1) / (1 - p2))
    found = drift(lens(1.0), lens(2.0, offset=9.0), [([0, 1], [0, 1, 1]), ([0], [])])
    assert found["kl_nats"] == pytest.approx(2 / 3 * kl, rel=1e-5) and found["cka"] == pytest.approx([1.0, 1.0])
    assert (found["weight_distance"], found["tokens"], found["traces"], found["left_out"]) == (1.0, 3, 1, {})


def test_what_two_models_do_not_allow_is_none_with_a_reason():
    found = drift(lens(1.0), lens(1.0, layers=3), [([0], [1, 0])])
    assert found["cka"] is None and "2 layers in the base, 3 in the model" in found["left_out"]["cka"] and found["kl_nats"] == 0.0
