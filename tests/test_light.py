"""The light body gives what transformers and PEFT give, and every short cut is the long way round in double precision."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.lm import attention, causal, shared_cache
from tiltlm.lm.attention import Groups, Keys, Sight, attend
from tiltlm.lm.light import LightBody
from tiltlm.lm.load import load
from tiltlm.lm.operations import Gated, Given, Normed, Projection, project, rms_norm, rotate
from tiltlm.lm.packing import Packer, _cpu_packs
from tiltlm.lm.shared_cache import SharedCache
from tiltlm.lm.stops import StopStrings, _closers
from tiltlm.testing import small_language

PROMPTS = ["the film", "a quiet story of two friends who", "good"]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def model_of(kind: str):
    """A model in double precision, its norms too: transformers takes those in single precision, whatever the model is in."""
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    else:
        model = make_model(kind)
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(len(norm.weight), model.config.rms_norm_eps))
    return model.double().eval()


def without_light(view):
    """The same view through transformers' own forward pass."""
    backbone = copy.copy(view.body.backbone)
    backbone._light = None
    return replace(view, body=replace(view.body, backbone=backbone))


def policy_of(model, **law):
    prior = load(model, make_tokenizer()).prior(max_new_tokens=14, **law)
    policy = prior.policy(lora=tl.LoRA(r=3, alpha=5))
    torch.manual_seed(1)
    for name, value in policy.named_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    return prior, policy


@pytest.mark.parametrize("kind", ["llama", "qwen", "qwen3", "mistral"])
def test_the_light_body_is_used_and_gives_the_models_draws_log_probs_and_gradients(kind):
    prior, policy = policy_of(model_of(kind))
    assert prior.body.backbone._light is not None
    prompts = prior.encode(PROMPTS)
    assert isinstance(prior.body.backbone.prefill(prompts).memory.cache, SharedCache)
    draws = policy.draw(prompts, 40, torch.Generator().manual_seed(2))
    assert len(set(draws.lengths.tolist())) > 2, "the test needs ragged completions"
    slow = without_light(policy).draw(prompts, 40, torch.Generator().manual_seed(2))
    assert torch.equal(draws.tokens, slow.tokens)
    torch.testing.assert_close(draws.log_q, slow.log_q, atol=1e-11, rtol=0)
    torch.testing.assert_close(prior.log_prob(draws), without_light(prior).log_prob(draws), atol=1e-11, rtol=0)

    shortest = draws.lengths.argsort()[:4]
    uneven = draws.select(
        torch.cat([shortest, torch.tensor([3, 4, 5, 90, 91, 50])])
    )  # groups of several sizes, not in order
    found = []
    for view in (policy, without_light(policy)):
        log_q = view.forward(uneven, frozenset({"log_q"})).log_q
        loss = (log_q.sum(-1) * torch.linspace(-1, 2, len(log_q))).sum()
        found.append((log_q.detach(), torch.autograd.grad(loss, list(policy.named_parameters().values()))))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-11, rtol=0)
    for got, want in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_all_weights_have_the_models_gradient():
    prior = load(model_of("llama"), make_tokenizer()).prior(max_new_tokens=10)
    policy = prior.policy(lora=None)
    draws = prior.draw(prior.encode(PROMPTS), 4, torch.Generator().manual_seed(0))
    found = []
    for view in (policy, without_light(policy)):
        log_q = view.forward(draws, frozenset({"log_q"})).log_q.sum()
        found.append(torch.autograd.grad(log_q, list(policy.named_parameters().values())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_a_body_that_computes_otherwise_is_not_light():
    class Louder(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight, self.inner = inner.weight, inner

        def forward(self, x):
            return 1.001 * self.inner(x)

    model = make_model("llama")
    assert LightBody.of(model.model) is not None
    model.model.norm = Louder(model.model.norm)
    assert LightBody.of(model.model) is None
    assert LightBody.of(make_model("gpt2").transformer) is None
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    assert LightBody.of(windowed.model) is None


def test_an_adapter_that_is_not_plain_goes_through_peft():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    lm = load(get_peft_model(make_model("llama"), config), make_tokenizer())
    prior = lm.prior(max_new_tokens=4)
    prompts = prior.encode(PROMPTS)
    assert not isinstance(prior.body.backbone.prefill(prompts).memory.cache, SharedCache)
    assert len(prior.draw(prompts, 2, torch.Generator().manual_seed(0))) == 6


def plain_attention(q, keys, values, owner, sight):
    """One row and one position at a time."""
    heads, rows, _, positions, _ = q.shape
    out = torch.zeros_like(q)
    for row in range(rows):
        k = torch.cat([keys.shared[:, owner[row]], keys.own[:, row]], dim=1)
        v = torch.cat([values.shared[:, owner[row]], values.own[:, row]], dim=1)
        for position in range(positions):
            seen = sight.real[row].clone()
            seen[sight.past + position + 1 :] = False
            if not sight.asks[row, position]:
                continue
            for head in range(heads):
                scores = q[head, row, :, position] @ k[head, seen].T
                out[head, row, :, position] = scores.softmax(-1) @ v[head, seen]
    return out


@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("positions", [None, 2])
def test_shared_attention_and_its_gradient(monkeypatch, owner, past, positions):
    if positions is not None:
        monkeypatch.setattr(attention, "POSITIONS", positions)
    torch.manual_seed(0)
    prompts, new, width, prompt = max(owner) + 1, 5, 3, 4
    tensor = lambda *shape: torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, own, shared = tensor(2, 4, 3, new), (2, 4, past + new), (2, prompts, prompt)
    tensors = [q, tensor(*shared), tensor(*own), tensor(*shared), tensor(*own)]
    real = torch.ones(4, prompt + past + new, dtype=torch.bool)
    real[0, :2] = real[2, -1] = real[3, -3:] = False
    sight = Sight(real, real[:, -new:], prompt)
    keys, values = Keys(*tensors[1:3]), Keys(*tensors[3:])
    groups = Groups(torch.tensor(owner), prompts)
    got = attend(q, keys, values, groups, sight)
    want = plain_attention(q, keys, values, owner, sight)
    asks = sight.asks[None, :, None, :, None]
    torch.testing.assert_close(got * asks, want * asks)
    cotangent = torch.randn_like(want) * asks
    for grad, truth in zip(
        torch.autograd.grad(got, tensors, cotangent), torch.autograd.grad(want, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(grad, truth)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, keys, values, groups, sight), got)


def test_each_operation_has_its_own_gradient():
    torch.manual_seed(0)
    tensor = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, weight = tensor(6, 4), tensor(4)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), functional.rms_norm(x, (4,), weight, 1e-3))
    angle = torch.randn(6, 1, 2, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angle.cos(), angle.sin()), (tensor(6, 3, 4),))

    four = [tensor(5, 4), tensor(5), tensor(2, 4), tensor(5, 2), tensor(3, 4)]
    for how, kept in ((Given(), (x,)), (Normed(1e-3), (x, weight)), (Gated(), (x, tensor(6, 4)))):

        def two(w, b, down, up, v, *kept, how=how):
            return project((Projection(w, b, down, up, 0.7), Projection(v)), how, *kept)

        assert torch.autograd.gradcheck(two, (*four, *kept))
        with torch.no_grad():
            torch.testing.assert_close(two(*four, *kept)[1], how.value(*kept) @ four[-1].T)
    torch.testing.assert_close(Gated().value(x, x + 1), functional.silu(x) * (x + 1))


@pytest.mark.parametrize(("how", "kept"), [(Normed(1e-3), [(7, 8), (8,)]), (Gated(), [(7, 8), (7, 8)])])
def test_a_product_keeps_what_its_input_is_made_of_and_not_the_input(how, kept):
    layer = Projection(torch.randn(5, 8), None, torch.randn(2, 8), torch.randn(5, 2))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        project([layer], how, *(torch.randn(shape, requires_grad=True) for shape in kept))
    assert saved == [*kept, (5, 8), (2, 8), (5, 2), (7, 2)]


def test_rows_of_a_cache_leave_the_original_as_it_is():
    prior = load(model_of("llama"), make_tokenizer()).prior(max_new_tokens=8)
    backbone = prior.body.backbone
    prompts = prior.encode(PROMPTS)
    with torch.no_grad():
        prefix = backbone.prefill(prompts).rows(torch.tensor([0, 0, 1, 2]))
        seen = torch.cat([prefix.mask, torch.ones(4, 1, dtype=torch.bool)], dim=-1)
        ids = torch.tensor([[5], [6], [7], [8]])
        expected = backbone.features(ids, seen, prefix.rows(torch.arange(4)).memory)
        fewer = prefix.rows(torch.tensor([3, 1]))
        got = backbone.features(ids[[3, 1]], seen[[3, 1]], fewer.memory)
        again = backbone.features(ids, seen, prefix.memory)
    torch.testing.assert_close(got, expected[[3, 1]])
    torch.testing.assert_close(again, expected)
    assert prefix.memory.cache.groups.count == 3
    assert fewer.memory.cache.groups.count == 2


@pytest.mark.skipif(
    not _cpu_packs(), reason="this CPU or this build of torch has no bfloat16 products with packed weights"
)
def test_packed_weights_are_made_anew_when_they_change_and_agree_in_bfloat16():
    torch.manual_seed(0)
    layers = tuple(
        Projection(
            torch.randn(n, 64).bfloat16(), None, torch.randn(4, 64).bfloat16(), torch.randn(n, 4).bfloat16(), 2.0
        )
        for n in (48, 32)
    )
    x, packer = torch.randn(5, 64).bfloat16(), Packer()
    with torch.no_grad():
        for _ in range(2):
            for got, want in zip(packer.pack("here", layers)(x), project(layers, Given(), x), strict=True):
                assert (got.float() - want.float()).abs().max() < 0.02 * want.float().abs().max()
            layers[0].weight.mul_(-3)


def test_light_is_no_farther_from_float32_than_transformers_in_bfloat16(record_property):
    prior, policy = policy_of(make_model("llama"))
    draws = policy.draw(prior.encode(PROMPTS), 40, torch.Generator().manual_seed(0))
    half, half_policy = policy_of(make_model("llama").to(torch.bfloat16))
    draws = replace(draws, sampler="")
    gaps = {}
    for name, view in (("light", half_policy), ("transformers", without_light(half_policy))):
        gaps[name] = float((view.log_prob(draws) - draws.log_q).abs()[draws.mask].mean())
        record_property(f"bf16_gap_{name}", gaps[name])
    print(f"bf16 against float32, mean difference a token: {gaps}")
    assert half.body.backbone._light is not None
    assert gaps["light"] < 1.25 * gaps["transformers"]


def test_stop_strings_look_at_few_rows_and_miss_none():
    tokenizer = make_tokenizer()
    looked: list[int] = []

    class Watched(StopStrings):
        def within(self, tokens):
            looked.append(len(tokens))
            return super().within(tokens)

    texts = ["the film was good", "a quiet story", "é of two friends"]
    for stop in ("m w", "é", "s", "y"):
        stops = Watched(tokenizer, (stop,))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            found = [n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n])]
            first = found[0] if found else None
            for n in range(1, (first or len(ids)) + 1):
                got = stops.completed(torch.tensor([ids[n - 1]]), lambda _, ids=ids, n=n: ids[:n])
                assert bool(got) == (n == first)
    assert len(_closers(tokenizer, ("y",))) < len(tokenizer) / 2
    assert _closers(tokenizer, ("y ",)) is None, "a space may be lost at the beginning of a text"


class TestRecomputing:
    """Gradient checkpointing: the same gradients, and less kept for them."""

    def gradients(self, policy, draws, context):
        named, kept = policy.named_parameters(), []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = policy.forward(draws, frozenset({"log_q"})).log_q.sin().sum()
            loss.backward()
        found = {name: value.grad.clone() for name, value in named.items()}
        for value in named.values():
            value.grad = None
        return found, sum(kept)

    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    @pytest.mark.parametrize("lora", [True, False])
    def test_gradients_are_the_same_and_less_is_kept(self, kind, lora):
        prior, policy = policy_of(model_of(kind))
        policy = policy if lora else prior.policy(lora=None)
        draws = policy.draw(policy.encode(PROMPTS), 12, torch.Generator().manual_seed(2))
        expected, all_kept = self.gradients(policy, draws, contextlib.nullcontext())
        found, kept = self.gradients(policy, draws, policy.body.backbone.recomputing())
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
        assert kept < 0.5 * all_kept
        assert not policy.body.backbone._light._recompute

    def test_training_asks_for_it(self, monkeypatch):
        prior, _ = policy_of(model_of("llama"))
        target = prior * tl.Reward(lambda completions: [len(text) / 20 for text in completions], beta=0.2)
        used = []
        monkeypatch.setattr("tiltlm.lm.light.checkpoint", lambda run, *args, **_: (used.append(1), run(*args))[1])
        for asked in (False, True):
            tl.fit(target, PROMPTS, steps=1, batch=2, lora=tl.LoRA(r=2), gradient_checkpointing=asked)
            assert bool(used) is asked

    def test_other_models_are_refused(self):
        target = load(make_model("gpt2"), make_tokenizer()).prior(max_new_tokens=4) * tl.Reward(
            lambda completions: [0.0] * len(completions), beta=0.2
        )
        with pytest.raises(tl.InputError, match="gradient_checkpointing is on, .* GPT2LMHeadModel is not one"):
            tl.fit(target, PROMPTS, steps=1, batch=2, gradient_checkpointing=True)
        world = small_language()
        with pytest.raises(tl.InputError, match="gradient_checkpointing is on, .* TabularLM is not one"):
            tl.fit(world.target, world.prompts, steps=1, batch=1, lora=None, gradient_checkpointing=True)


class TestPromptsThatBeginAlike:
    """What all prompts of a pass begin with, such as a system prompt or examples, is read once."""

    EXAMPLES = "a quiet story of two friends who the film "
    ALIKE = (EXAMPLES + "good", EXAMPLES + "of a story who", EXAMPLES + "two", EXAMPLES + "two")

    @pytest.fixture
    def read(self, monkeypatch):
        """Tokens that went through the layers, pass by pass; a few that are spared are worth a pass."""
        monkeypatch.setitem(causal.SPARED, "cpu", 4)
        seen, run = [], LightBody._run
        monkeypatch.setattr(
            LightBody, "_run", lambda self, hidden, *rest: (seen.append(len(hidden)), run(self, hidden, *rest))[1]
        )
        return seen

    @pytest.mark.parametrize("lora", [True, False])
    @pytest.mark.parametrize("rows", [256, 5])  # five at a time: prompts come beside those that are under way
    def test_draws_log_probs_and_gradients_are_the_models(self, read, lora, rows):
        prior, policy = policy_of(model_of("llama"))
        policy = replace(policy if lora else prior.policy(lora=None), rows=rows)
        prompts = prior.encode(self.ALIKE)
        draws = policy.draw(prompts, 6, torch.Generator().manual_seed(2))
        assert torch.equal(
            draws.tokens, without_light(policy).draw(prompts, 6, torch.Generator().manual_seed(2)).tokens
        )
        read.clear()
        found = []
        for view in (policy, without_light(policy)):
            log_q = view.forward(draws, frozenset({"log_q"})).log_q
            loss = (log_q.sum(-1) * torch.linspace(-1, 2, len(log_q))).sum()
            found.append((log_q.detach(), torch.autograd.grad(loss, list(policy.named_parameters().values()))))
        lengths = prompts.mask.sum(-1)
        begin = read[0]
        assert begin > 4
        assert read[1] == int(lengths.sum()) - len(prompts) * begin
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-11, rtol=0)
        for got, want in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)

    def test_beginnings_of_completions_too(self, read):
        prior, _ = policy_of(model_of("llama"))
        draws = prior.draw(prior.encode(self.ALIKE), 3, torch.Generator().manual_seed(0))
        keep = (draws.lengths // 2).clamp(min=1)
        read.clear()
        moved = prior.redraw(draws, keep, torch.Generator().manual_seed(1))
        assert 4 < read[0] < read[1]
        expected = without_light(prior).redraw(draws, keep, torch.Generator().manual_seed(1))
        assert torch.equal(moved.tokens, expected.tokens)

    def test_recomputing_a_layer_gives_the_same_gradient(self, read):
        _, policy = policy_of(model_of("llama"))
        draws = policy.draw(policy.encode(self.ALIKE), 4, torch.Generator().manual_seed(2))
        gradients = []
        for context in (contextlib.nullcontext(), policy.body.backbone.recomputing()):
            with context:
                loss = policy.forward(draws, frozenset({"log_q"})).log_q.sin().sum()
                gradients.append(torch.autograd.grad(loss, list(policy.named_parameters().values())))
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        ("alike", "passes"),
        [
            (("good", "a film"), 1),
            ((EXAMPLES,), 1),
            ((EXAMPLES, EXAMPLES + "good"), 2),
            ((EXAMPLES + "a story who two", EXAMPLES + "e story who two"), 2),  # alike again after a difference
        ],
    )
    def test_the_last_token_of_each_is_left_and_one_prompt_is_read_at_once(self, read, alike, passes):
        prior, _ = policy_of(model_of("llama"))
        prompts = prior.encode(alike)
        read.clear()
        prefix = prior.body.backbone.prefill(prompts)
        assert len(read) == passes
        expected = without_light(prior).body.backbone.prefill(prompts)
        torch.testing.assert_close(prefix.last, expected.last, atol=1e-11, rtol=0)

    def test_few_tokens_are_not_worth_a_pass(self, read, monkeypatch):
        prior, _ = policy_of(model_of("llama"))
        monkeypatch.setitem(causal.SPARED, "cpu", 1000)
        prompts = prior.encode(self.ALIKE)
        read.clear()
        prior.body.backbone.prefill(prompts)
        assert len(read) == 1


@pytest.mark.parametrize("most", [0, 2**20])
def test_rows_draw_alike_with_their_prompts_to_themselves_or_shared(monkeypatch, most):
    prior, policy = policy_of(model_of("llama"))
    assert prior.law.max_new_tokens < shared_cache.ROOM, "the room behind a row is to be looked past"
    monkeypatch.setattr(shared_cache, "APART_BYTES", most)
    prompts, kept = prior.encode(PROMPTS), []
    apart = SharedCache.apart
    monkeypatch.setattr(SharedCache, "apart", lambda cache: kept.append(apart(cache)) or kept[-1])
    draws = policy.draw(prompts, 20, torch.Generator().manual_seed(2))
    assert [bool(cache.shared) for cache in kept] == [most == 0]
    slow = without_light(policy).draw(prompts, 20, torch.Generator().manual_seed(2))
    assert torch.equal(draws.tokens, slow.tokens)
    torch.testing.assert_close(draws.log_q, slow.log_q, atol=1e-11, rtol=0)


def test_prompts_and_completions_are_read_in_one_pass(monkeypatch):
    prior, policy = policy_of(model_of("llama"))
    draws = policy.draw(prior.encode(PROMPTS), 4, torch.Generator().manual_seed(2))
    passes = []
    run = LightBody._run
    monkeypatch.setattr(LightBody, "_run", lambda body, *args: passes.append(len(args[1])) or run(body, *args))
    policy.forward(draws, frozenset({"log_q"}))
    assert passes == [2]
    passes.clear()
    policy.forward(replace(draws, tokens=draws.tokens[:, :1], mask=draws.mask[:, :1]), frozenset({"log_q"}))
    assert passes == [1], "of completions of one token the prompts are all there is to read"


def test_keys_that_are_multiplied_lie_in_one_piece(monkeypatch):
    """Of others oneDNN makes copies, layer by layer and token by token."""
    prior, policy = policy_of(model_of("llama"))
    products, pieces = attention._products, []
    monkeypatch.setattr(
        attention,
        "_products",
        lambda x, shared, own, groups: pieces.append(own.is_contiguous()) or products(x, shared, own, groups),
    )
    draws = policy.draw(prior.encode(PROMPTS), 4, torch.Generator().manual_seed(2))
    prior.log_prob(draws)
    assert len(pieces) > draws.tokens.shape[1]
    assert all(pieces)
