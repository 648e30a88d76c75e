"""The speed benchmarks: their counts against torch's own counter, their arithmetic, and our sides on a tiny model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

BENCH = Path(__file__).parents[1] / "bench"
LENGTH = 40


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        from models import llama

        llama(folder, width=56, layers=2, vocabulary=128, heads=4)
    return folder


class TestCounts:
    """`roofline_counts` against what torch counts when a model runs."""

    @pytest.fixture
    def small(self):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
        return LlamaForCausalLM(config)

    def forward(self, model):
        """What the counts say of a whole forward pass; eager attention takes the square and not its half."""
        from roofline_counts import Model

        m = Model.of(model.config, 4)
        products = 2 * LENGTH * (m.block_weights + m.width * m.vocabulary)
        return products, m.attention(LENGTH**2)

    def test_a_forward_pass(self, small):
        with FlopCounterMode(display=False) as counter:
            small(torch.arange(LENGTH)[None])
        assert counter.get_total_flops() == sum(self.forward(small))

    @pytest.mark.parametrize("trained", [False, True])
    def test_a_backward_pass(self, small, trained):
        small.requires_grad_(trained)
        embedded = small.get_input_embeddings()(torch.arange(LENGTH)[None]).detach().requires_grad_()
        loss = small(inputs_embeds=embedded).logits.sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        products, attention = self.forward(small)
        assert counter.get_total_flops() == (2 if trained else 1) * products + 2 * attention

    def test_phases_are_made_of_these(self):
        from roofline_counts import Model, Size, phases, triangle

        model = Model(layers=2, width=32, inner=48, heads=4, groups=2, head=8, vocabulary=300, bytes=2)
        size = Size(prompts=3, read=5, group=1, tokens=7, rank=0)
        assert size.pairs == 3 * triangle(5 + 6)  # with one completion a prompt there is nothing to share
        found = phases(model, size)
        block = 2 * model.block_weights
        assert found["prefill"].blocks + found["decode"].blocks == found["prior scoring"].blocks == block * 3 * 11
        assert found["forward"].head == 2 * 32 * 300 * 3 * 7
        assert found["backward"].blocks == 2 * found["forward"].blocks
        lora = phases(model, Size(prompts=3, read=5, group=1, tokens=7, rank=4))
        assert lora["backward"].blocks == lora["forward"].blocks
        assert lora["forward"].other - found["forward"].other == 2 * model.lora_weights(4) * 3 * 11
        shared = phases(model, Size(prompts=3, read=5, group=8, tokens=7, rank=0))
        assert shared["prefill"].operations == found["prefill"].operations


def test_exponents_are_those_of_powers():
    from fits import exponent, last_exponent

    sizes = [8, 16, 32, 64]
    assert exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert last_exponent(sizes, [100, 100, 100, 300]) == pytest.approx(1.585, abs=1e-3)


class TestSummary:
    def summarise(self, runs):
        return {"seconds a step": sum(run["seconds"] for run in runs) / len(runs), "peak_memory_bytes": 2e9}

    def test_ratios_are_taken_within_a_round(self):
        from harness import summary

        rounds = [
            {"TiltLM": {"seconds": 1.0}, "TRL": {"seconds": 3.0}},
            {"TiltLM": {"seconds": 10.0}, "TRL": {"seconds": 20.0}},
        ]
        found = summary(rounds, self.summarise)
        assert found["over_ours"]["TRL"]["seconds a step"] == {"median": 2.5, "least": 2.0, "most": 3.0}

    def test_a_peer_that_is_ahead_is_said_to_be(self):
        from harness import summary
        from tables import notes, ratio

        rounds = [{"TiltLM": {"seconds": 2.0}, "TRL": {"seconds": 1.0}}]
        found = {"summary": summary(rounds, self.summarise), "missing": {"vLLM": "no room"}, "rounds": rounds}
        said = notes(found)
        assert "**TRL does better than TiltLM** in seconds a step." in said
        assert "vLLM did not run: no room" in said
        assert ratio("seconds a step")(found["summary"]["over_ours"]["TRL"]) == "**0.50 ×**"

    def test_other_work_is_refused(self):
        from harness import require_same_work

        require_same_work("case", [{"TiltLM": {"tokens": [8]}, "TRL": {"tokens": [8]}}])
        with pytest.raises(SystemExit, match="not the same work"):
            require_same_work("case", [{"TiltLM": {"tokens": [8]}, "TRL": {"tokens": [7]}}])


def answer_of(script, flags, monkeypatch, capsys):
    """What one of our sides prints, run in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--dtype", "float32"])
    module = __import__(script)
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_sides_figures_are_found_among_what_it_says():
    from harness import figures

    assert figures('warming up\n{"seconds": [1.0]}\n{not figures}\nengine shut down\n') == {"seconds": [1.0]}
    assert figures("Traceback: it broke\n") is None


def test_our_step_does_all_of_its_work_and_agrees_with_transformers(tiny, monkeypatch, capsys):
    flags = [tiny, "--steps", 2, "--prompts", 2, "--group", 3, "--tokens", 5, "--rank", 4, "--examples", 1]
    found = answer_of("step_tiltlm", flags, monkeypatch, capsys)
    assert found["tokens"] == [2 * 3 * 5] * 2  # no completion ended early
    assert len(found["seconds"]) == 2
    assert len(found["warmup_seconds"]) == 1
    agreement = found["agreement"]
    assert max(agreement["drawn"], agreement["scored"]) < 1e-5


def test_our_generation_makes_every_token(tiny, monkeypatch, capsys):
    flags = [tiny, "--sequences", 4, 8, "--tokens", 5]
    assert answer_of("generation_tiltlm", flags, monkeypatch, capsys)["tokens"] == [20, 40]


def test_our_smc_makes_every_token(tiny, monkeypatch, capsys):
    flags = [tiny, "--particles", 4, 6, "--tokens", 5]
    assert answer_of("smc_tiltlm", flags, monkeypatch, capsys)["tokens"] == [20, 30]


def test_wrong_log_probabilities_stop_the_benchmark(tiny):
    from agreement import with_transformers

    import tiltlm as tl

    prior = tl.load(tiny, dtype="float32").prior(max_new_tokens=4)
    options = SimpleNamespace(model=tiny, device="cpu", dtype="float32")
    with_transformers(prior, options)

    class Off:
        """The prior with scores that are a hundredth of a nat too high."""

        def __getattr__(self, name):
            return getattr(prior, name)

        def log_prob(self, draws):
            return prior.log_prob(draws) + 0.01

    with pytest.raises(SystemExit, match="nats a token from transformers"):
        with_transformers(Off(), options)


def test_every_phase_of_the_roofline_is_timed(tiny, monkeypatch):
    import roofline
    from roofline_machine import Machine

    def instant(device, dtypes, shapes):
        return Machine({dtype: dict.fromkeys(shapes, 1e9) for dtype in dtypes}, 1e9)

    monkeypatch.setattr("roofline_machine.measure", instant)
    monkeypatch.setattr(roofline, "model_folder", lambda kind: tiny)
    options = SimpleNamespace(
        device="cpu", dtype="float32", prompts=2, group=2, tokens=4, rank=4, micro=8, repeats=1, quick=True
    )
    found = roofline.measure(options)
    for name in ("prefill", "decode", "sampling from logits", "prior scoring", "forward", "backward", "update"):
        assert found["phases"][name]["possible_seconds"] > 0, name
    assert found["about"]["passes"] == 2
    assert [table.title for table in roofline.tables(found)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step", "generation", "smc", "curves", "roofline"])
def test_each_comparison_runs_alone(script, tmp_path):
    import subprocess

    flags = ["--quick", "--device", "cpu", "--out", tmp_path / "out.json"]
    if script != "roofline":
        flags += ["--rounds", "1", "--sides", "TiltLM", "--work", tmp_path / "work"]
    done = subprocess.run([sys.executable, BENCH / f"{script}.py", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["hardware"]["cores"]
