"""The chunked head against plain autograd."""

import pytest
import torch

from tiltlm.lm import head as module
from tiltlm.lm.head import Head, apply_law, token_kl, token_log_prob
from tiltlm.protocols import Law

LAWS = [Law(), Law(temperature=0.6), Law(top_k=4)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 11 * 3)  # three rows at a time


def make(n=10, d=5, v=11):
    torch.manual_seed(0)
    features = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, d, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(v, dtype=torch.float64, requires_grad=True)
    return features, weight, bias, torch.randint(v, (n,))


def inside(features, weight, bias, law, scale=1.0):
    """Targets that top-k keeps, so that the log-probability is finite."""
    logits = apply_law((features @ weight.T + bias) * scale, law)
    return logits.argmax(-1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_log_prob_and_its_gradients(law, scale):
    features, weight, bias, _ = make()
    targets = inside(features, weight, bias, law, scale)
    cotangent = torch.randn(len(features), dtype=torch.float64)
    got = token_log_prob(features, Head(weight, bias, scale), targets, law)
    logits = apply_law((features @ weight.T + bias) * scale, law)
    want = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, (features, weight, bias), cotangent)
    truths = torch.autograd.grad(want, (features, weight, bias), cotangent)
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("law", LAWS[:2])
@pytest.mark.parametrize("trained_head", [False, True])
def test_kl_and_its_gradient(law, trained_head):
    features, weight, bias, _ = make()
    other = torch.randn_like(features).detach()
    w, b = (weight, bias) if trained_head else (weight.detach(), bias.detach())
    prior_head = Head(weight.detach() + 0.1, bias.detach())
    got = token_kl(features, Head(w, b, 0.7), other, prior_head, law)
    log_q = apply_law((features @ w.T + b) * 0.7, law).log_softmax(-1)
    log_p = apply_law(other @ prior_head.weight.T + prior_head.bias, law).log_softmax(-1)
    want = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(got, want)
    of = (features, weight) if trained_head else (features,)
    for grad, truth in zip(torch.autograd.grad(got.sum(), of), torch.autograd.grad(want.sum(), of), strict=True):
        torch.testing.assert_close(grad, truth)


def test_impossible_tokens_do_not_make_nan():
    features = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    kl = token_kl(features, Head(), features, Head(), Law())
    assert kl.tolist() == [0.0]


def test_softcapped_and_plain_heads():
    features, weight, _, targets = make()
    got = token_log_prob(features, Head(weight, None, 1.0, softcap=2.0), targets, Law())
    want = (torch.tanh(features @ weight.T / 2) * 2).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want)


def test_logits_of_the_whole_batch_are_never_held(monkeypatch):
    features, weight, bias, targets = make(n=200)
    largest = 0
    plain = Head.product

    def watched(self, rows):
        nonlocal largest
        largest = max(largest, len(rows))
        return plain(self, rows)

    monkeypatch.setattr(Head, "product", watched)
    token_log_prob(features, Head(weight, bias), targets, Law()).sum().backward()
    assert largest == 3
