"""Which weights are the prior's, and which the policy's."""

from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.lm.load import load

PROMPTS = ["the film", "a quiet story of two"]


def score(view, draws):
    return view.log_prob(replace(draws, sampler=""))


def shake(policy, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in policy.named_parameters().values():
            value.add_(0.1 * torch.randn_like(value))


@pytest.fixture
def saved_adapter(tmp_path):
    """Somebody's adapter, made with plain peft."""
    peft = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(9)
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    peft.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def setting(rng):
    lm = load(make_model("llama"), make_tokenizer())
    prior = lm.prior(max_new_tokens=8)
    return lm, prior, prior.draw(prior.encode(PROMPTS), 6, rng)


def test_a_new_policy_is_the_prior_and_training_it_leaves_the_prior_alone(setting):
    _, prior, draws = setting
    before = score(prior, draws)
    policy = prior.policy(lora=tl.LoRA(4))
    torch.testing.assert_close(score(policy, draws), before, rtol=0, atol=0)
    shake(policy)
    assert (score(policy, draws) - before).abs().max() > 0.01
    torch.testing.assert_close(score(prior, draws), before, rtol=0, atol=0)
    assert policy.body.model is prior.body.model, "one copy of the base weights"


def test_full_fine_tuning_has_its_own_frozen_reference(setting):
    _, prior, draws = setting
    before = score(prior, draws)
    policy = prior.policy(lora=None)
    shake(policy)
    assert (score(policy, draws) - before).abs().max() > 0.01
    torch.testing.assert_close(score(prior, draws), before, rtol=0, atol=0)
    assert not any(value.requires_grad for value in prior.body.model.parameters())


def test_policy_from_an_adapter_keeps_the_base_as_prior(setting, saved_adapter):
    _, prior, draws = setting
    base = score(prior, draws)
    policy = prior.policy(start=saved_adapter)
    theirs = PeftModel.from_pretrained(make_model("llama"), saved_adapter)
    expected = score(load(theirs, make_tokenizer()).prior(max_new_tokens=8), draws)
    torch.testing.assert_close(score(policy, draws), expected)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(score(prior, draws), base, rtol=0, atol=0)


def test_an_adapter_can_be_the_prior_and_stays_frozen(setting, saved_adapter):
    lm, base, draws = setting
    prior = lm.prior(max_new_tokens=8, adapter=saved_adapter)
    before = score(prior, draws)
    assert (before - score(base, draws)).abs().max() > 0.01
    policy = prior.policy()
    torch.testing.assert_close(score(policy, draws), before, rtol=0, atol=0)
    shake(policy)
    assert (score(policy, draws) - before).abs().max() > 0.01
    torch.testing.assert_close(score(prior, draws), before, rtol=0, atol=0)


def test_loading_an_adapter_folder_makes_it_the_model(saved_adapter, tmp_path, setting):
    import json

    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((saved_adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (saved_adapter / "adapter_config.json").write_text(json.dumps(config))
    lm, _, draws = setting
    expected = score(lm.prior(max_new_tokens=8, adapter=saved_adapter), draws)
    torch.testing.assert_close(score(load(saved_adapter).prior(max_new_tokens=8), draws), expected)


def test_a_saved_policy_is_an_adapter_that_plain_peft_loads(setting, tmp_path):
    _, prior, draws = setting
    policy = prior.policy(lora=tl.LoRA(3))
    shake(policy)
    policy.save(tmp_path / "policy")
    theirs = PeftModel.from_pretrained(make_model("llama"), tmp_path / "policy")
    again = load(theirs, make_tokenizer()).prior(max_new_tokens=8)
    torch.testing.assert_close(score(again, draws), score(policy, draws))


def test_a_saved_full_model_loads_with_transformers(setting, tmp_path):
    _, prior, draws = setting
    policy = prior.policy(lora=None)
    shake(policy)
    policy.save(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    again = load(model, make_tokenizer()).prior(max_new_tokens=8)
    torch.testing.assert_close(score(again, draws), score(policy, draws))
    loaded = load(tmp_path / "policy").prior(max_new_tokens=8)
    torch.testing.assert_close(score(loaded, draws), score(policy, draws))


def test_exact_kl_of_a_policy_is_the_difference_it_makes(setting):
    _, prior, draws = setting
    policy = prior.policy(lora=tl.LoRA(4))
    assert policy.token_kl(draws).abs().max() < 1e-6
    shake(policy)
    forward = policy.forward(draws, frozenset({"log_q", "kl"}))
    torch.testing.assert_close(forward.kl.detach(), policy.token_kl(draws))
    assert (forward.kl >= -1e-6).all()
    assert forward.kl.max() > 1e-3
    forward.kl.sum().backward()
    assert all(value.grad is not None for value in policy.named_parameters().values())


def test_adapters_take_the_precision_of_the_base(rng):
    prior = load(make_model("llama").to(torch.bfloat16), make_tokenizer()).prior(max_new_tokens=4)
    policy = prior.policy()
    assert {value.dtype for value in policy.named_parameters().values()} == {torch.bfloat16}


def test_an_adapter_of_another_model_is_refused(setting, saved_adapter):
    _, prior, _ = setting
    gpt = load(make_model("gpt2"), make_tokenizer()).prior(max_new_tokens=4)
    with pytest.raises(tl.InputError, match="does not fit this model"):
        gpt.policy(start=saved_adapter)
    with pytest.raises(tl.InputError, match="no PEFT adapter"):
        prior.policy(start=saved_adapter.parent / "nowhere")


def test_an_adapter_on_the_output_layer_counts(setting, rng):
    """Then the fused head would leave it out, so the model is run whole."""
    _, prior, draws = setting
    policy = prior.policy(lora=tl.LoRA(2, targets=("lm_head", "v_proj")))
    shake(policy)
    ids = torch.cat([draws.prompts.tokens[0][draws.prompts.mask[0]], draws.tokens[0][draws.mask[0]]])[None]
    policy.body.adapters.activate(policy.adapter)
    with torch.no_grad():
        logits = policy.body.model(input_ids=ids).logits[0].log_softmax(-1)
    length = int(draws.lengths[0])
    want = logits[-length - 1 : -1].gather(-1, ids[0, -length:, None])[:, 0]
    torch.testing.assert_close(score(policy, draws)[0, :length], want, atol=1e-4, rtol=1e-4)


def test_gradients_survive_a_look_at_the_prior(setting):
    """The prior switches the adapter off between the policy's forward and backward pass."""
    _, prior, draws = setting
    policy = prior.policy(lora=tl.LoRA(2))
    shake(policy)
    forward = policy.forward(draws, frozenset({"log_q"}))
    score(prior, draws)
    forward.log_q.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in policy.named_parameters().values())


def test_switching_freezes_nothing(setting, monkeypatch):
    """A reward in another thread may switch in the middle of a backward pass, which drops what weights without gradient get."""
    _, prior, draws = setting
    policy = prior.policy(lora=tl.LoRA(2))
    changed = []
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda tensor, wanted=True: changed.append(wanted))
    for view in (prior, policy, prior, policy):
        score(view, draws)
    assert not changed
    assert all(value.requires_grad for value in policy.named_parameters().values())


def test_only_what_is_trained_takes_gradients(setting, saved_adapter):
    lm, prior, _ = setting
    frozen = lm.prior(max_new_tokens=8, adapter=saved_adapter)
    policy = prior.policy(lora=tl.LoRA(2))
    other = frozen.policy()
    trained = {id(value) for view in (policy, other) for value in view.named_parameters().values()}
    assert {id(value) for value in prior.body.model.parameters() if value.requires_grad} == trained
    other.discard()
    assert {id(v) for v in prior.body.model.parameters() if v.requires_grad} == {
        id(v) for v in policy.named_parameters().values()
    }


def test_a_model_in_memory_may_be_loaded_again(setting):
    """As in a notebook: both loads' priors are the base, and both policies stay what they are."""
    lm, prior, draws = setting
    again = load(lm.body.model, make_tokenizer())
    first, second = prior.policy(lora=tl.LoRA(2)), again.prior(max_new_tokens=8).policy(lora=tl.LoRA(2))
    shake(first)
    shake(second, seed=1)
    before = [score(view, draws) for view in (prior, first, second)]
    third = load(lm.body.model, make_tokenizer()).prior(max_new_tokens=8)
    for view in (first, third, second, prior):
        expected = before[{id(first): 1, id(second): 2}.get(id(view), 0)]
        torch.testing.assert_close(score(view, draws), expected, rtol=0, atol=0)
    assert all(value.requires_grad for view in (first, second) for value in view.named_parameters().values())


def test_adapters_that_somebody_else_has_put_in_are_refused():
    model = make_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(tl.InputError, match="holds adapters already, of add_adapter"):
        load(model, make_tokenizer())


def test_a_folder_in_the_home_is_the_same_folder(saved_adapter, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), saved_adapter).save_pretrained(
        tmp_path / "adapter"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tl.load("~/adapter").adapter is not None


def theirs(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (theirs(bias="all"), "trains the base's biases too"),
        (theirs(init_lora_weights="pissa"), "taken a part of the base's weights into itself .*'pissa'"),
        (theirs(init_lora_weights="olora"), "taken a part of the base's weights"),
        (theirs(modules_to_save=["norm"]), r"more than low-rank updates \(modules_to_save\)"),
        (theirs(trainable_token_indices=[5]), r"more than low-rank updates \(trainable_token_indices\)"),
        (LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "is of type LOHA"),
    ],
    ids=["bias", "pissa", "olora", "modules", "tokens", "loha"],
)
def test_an_adapter_that_changes_more_than_itself_is_refused(setting, tmp_path, config, reason):
    """In memory as in a folder: switched off, it would not leave the base."""
    peft = get_peft_model(make_model("qwen"), config)
    peft.save_pretrained(tmp_path)
    with pytest.raises(tl.InputError, match=f"the model's adapter 'default' .*{reason}.*merge_and_unload"):
        load(peft, make_tokenizer())
    with pytest.raises(tl.InputError, match=f"the adapter in .*{reason}.*merge_and_unload"):
        load(make_model("qwen"), make_tokenizer()).prior(adapter=tmp_path)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_that_somebody_puts_into_a_loaded_model_are_not_its_prior(setting, saved_adapter):
    """The model has one switch: who loaded it plain still sees it plain, and who loads the adapters sees both."""
    lm, prior, draws = setting
    peft = PeftModel.from_pretrained(lm.body.model, saved_adapter)
    adapted = load(peft, make_tokenizer()).prior(max_new_tokens=8)
    assert (score(adapted, draws) - draws.log_q).abs().max() > 0.01
    torch.testing.assert_close(score(prior, draws), draws.log_q, rtol=0, atol=1e-5)
    again = PeftModel(lm.body.model, theirs(), adapter_name="mine")
    with pytest.raises(tl.InputError, match="inside another PeftModel"):
        load(again, make_tokenizer())


def test_damaged_adapters_are_told(saved_adapter, setting):
    prior = setting[1]
    weights, config = saved_adapter / "adapter_model.safetensors", saved_adapter / "adapter_config.json"
    whole = weights.read_bytes(), config.read_bytes()
    weights.write_bytes(whole[0][:100])
    with pytest.raises(tl.InputError, match="the weights of the adapter in .*theirs are damaged .*anew"):
        prior.policy(start=saved_adapter)
    weights.unlink()
    with pytest.raises(tl.InputError, match=r"theirs has no weights \(no adapter_model.safetensors\)"):
        prior.policy(start=saved_adapter)
    weights.write_bytes(whole[0])
    config.write_bytes(whole[1][:-20])
    with pytest.raises(tl.InputError, match="adapter_config.json in .*theirs cannot be read .*anew"):
        prior.policy(start=saved_adapter)


def test_layers_that_the_model_has_not_are_named(setting):
    with pytest.raises(tl.InputError, match=r"targets of the LoRA are \('nope',\), .*; its linear layers are .*q_proj"):
        setting[1].policy(lora=tl.LoRA(2, targets=("nope",)))
    assert setting[1].policy(lora=tl.LoRA(2)).adapter == "tilt0", "the failed one left nothing behind"


def test_a_folder_is_a_path_or_a_text(setting, tmp_path):
    setting[1].policy(lora=tl.LoRA(2)).save(str(tmp_path / "policy"))
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()


def test_an_adapter_that_is_merged_is_refused():
    peft = get_peft_model(make_model("llama"), theirs())
    peft.merge_adapter()
    with pytest.raises(tl.InputError, match="merged into its base; call its unmerge_adapter"):
        load(peft, make_tokenizer())


@pytest.mark.parametrize(
    "more", [{"target_modules": ["q_proj", "embed_tokens"]}, {"use_dora": True}, {"lora_bias": True}]
)
def test_every_part_of_a_low_rank_adapter_counts(more, rng, tmp_path):
    """Embeddings, magnitudes and biases are continued, trained and saved like the rest."""
    peft = get_peft_model(make_model("qwen"), theirs(**more))
    torch.manual_seed(3)
    for value in peft.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn_like(value)
    prior = load(peft, make_tokenizer()).prior(max_new_tokens=8)
    draws = prior.draw(prior.encode(PROMPTS), 6, rng)
    policy = prior.policy()
    torch.testing.assert_close(score(policy, draws), draws.log_q, rtol=0, atol=1e-4)
    shake(policy)
    policy.save(tmp_path)
    again = load(make_model("qwen"), make_tokenizer()).prior(max_new_tokens=8, adapter=tmp_path)
    assert (score(policy, draws) - draws.log_q).abs().max() > 0.01
    torch.testing.assert_close(score(again, draws), score(policy, draws), rtol=0, atol=1e-4)


def test_values_are_of_the_features_that_there_are(setting):
    """With an adapter on the output layer the features are logits; a policy whose values are of hidden states says so."""
    _, prior, draws = setting
    needs = frozenset({"log_q", "values"})
    earlier = prior.policy(lora=tl.LoRA(2), values=True)
    assert earlier.forward(draws, needs).values is not None
    later = prior.policy(lora=tl.LoRA(2, targets=("lm_head",)), values=True)
    assert later.forward(draws, needs).values is not None
    with pytest.raises(tl.InputError, match="adapter on the output layer"):
        earlier.forward(draws, needs)


def test_a_critic_takes_no_adapter_on_the_output_layer(setting):
    _, prior, _ = setting
    with pytest.raises(tl.InputError, match="the critic's adapter is on the output layer"):
        prior.critic(lora=tl.LoRA(2, targets=("lm_head",)))


def test_two_models_never_pass_for_one(rng):
    first, second = (load(make_model("llama", seed=s), make_tokenizer()).prior(max_new_tokens=4) for s in (0, 1))
    assert first.identity != second.identity


def test_top_k_cannot_be_trained():
    prior = load(make_model("llama"), make_tokenizer()).prior(top_k=5)
    with pytest.raises(tl.InputError, match="top_k is 5"):
        prior.policy()
