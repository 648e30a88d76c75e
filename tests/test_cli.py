"""The command line: every bad input is one sentence and exit code 2, and what is asked for arrives."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import REWARDS, make_model, make_tokenizer, settings, write
from tiltlm.inference.training.filtered.sft import SFT
from tiltlm.lm.load import load
from tiltlm.workflow.recipe import Recipe

COMMANDS = ("plan", "train", "certify", "sample", "report")


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def numbers(file):
    """The JSON file; NaN and Infinity are not JSON."""

    def refuse(name):
        raise AssertionError(f"{name} in {file}")

    return json.loads(Path(file).read_text(), parse_constant=refuse)


class TestTemperature:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--beta", "0"], "beta is 0.0; it is a temperature in reward units per nat and must be positive"),
            (["--beta", "-1"], "beta is -1.0; it is a temperature"),
            (["--beta", "nan"], "beta is nan; it is a temperature"),
            (["--beta", "inf"], "beta is inf; it is a temperature"),
            (["--beta", "much"], "--beta is 'much': .* valid number, .*; tiltlm plan --help lists what there is"),
            (["--beta", "1", "--kl-budget", "1"], "beta and kl_budget are ways to choose the same thing; give one"),
            (["--kl-budget", "1", "--reward-goal", "1"], "kl_budget and reward_goal are ways to choose the same"),
            (["--kl-budget", "0"], "kl_budget is 0.0.*greater than 0"),
            (["--kl-budget", "nan"], "kl_budget is nan"),
            (
                ["--kl-budget", "50"],
                r"kl_budget is 50, but with these draws the frontier goes from .* choose a value in",
            ),
            (["--reward-goal", "3"], "reward_goal is 3, but with these draws the frontier goes from"),
        ],
    )
    def test_by_flag(self, refused, here, flags, message):
        assert re.search(message, refused("plan", "recipe.yaml", *flags))
        assert not (here / "run" / "plan.json").exists()

    @pytest.mark.parametrize("beta", [0, -0.5, float("nan"), "much", [1]])
    def test_by_recipe(self, refused, here, models, beta):
        write(here / "recipe.yaml", settings(models, beta=beta))
        assert re.match(r"error: beta is .*(;|\()", refused("plan", "recipe.yaml"))

    def test_a_flag_replaces_the_recipes_way_to_choose(self, cli, here):
        assert cli("plan", "recipe.yaml", "--kl-budget", "0.1").code == 0
        assert numbers("run/plan.json")["chosen"]["beta"] != 0.25

    def test_training_needs_one(self, refused, here, models):
        write(here / "recipe.yaml", settings(models, beta=None))
        assert "beta is missing; give --beta, or --kl-budget or --reward-goal" in refused("train", "recipe.yaml")
        assert not (here / "run" / "policy").exists()


class TestRecipe:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("model: [", "recipe 'bad.yaml' is not YAML .*mend it"),
            ("", "recipe 'bad.yaml' holds no keys; write lines like"),
            ("just words", "recipe 'bad.yaml' holds no keys"),
            ("- a\n- b", "recipe 'bad.yaml' holds no keys"),
            (b"\xff\xfe\x00", "recipe 'bad.yaml' is not YAML"),
            ("model: x\n", "prompts is missing in bad.yaml; give --prompts or write 'prompts: …' into the recipe"),
            ("modle: x\nprompts: y\nreward: z", "unknown key 'modle' in bad.yaml; did you mean 'model'?"),
            ("model: x\nprompts: y\nreward: z\nkl-budget: 1", "unknown key 'kl-budget' .*did you mean 'kl_budget'?"),
            ("model: x\nprompts: y\nreward: z\nqqq: 1", "unknown key 'qqq' in bad.yaml; known keys: model, "),
            (
                "model: x\nprompts: y\nreward: z\nsteps: many",
                "steps is 'many' in bad.yaml: .*valid integer.*training steps",
            ),
            ("model: x\nprompts: y\nreward: z\nsteps: 0", "steps is 0 in bad.yaml: .*greater than or equal to 1"),
            ("model: x\nprompts: y\nreward: z\nschedule: square", "schedule is 'square' in bad.yaml: .*'cosine'"),
            ("model: x\nprompts: y\nreward: z\nbounds: [1, -1]", "bounds are .*give the smallest reward first"),
            ("model: x\nprompts: y\nreward: z\ntemperature: .inf", "temperature is inf in bad.yaml: .*finite"),
            (
                "model: x\nbeta: 0.1\nbeta: 1",
                "recipe 'bad.yaml' is not YAML .'beta' is there twice in line 1 and after.; mend",
            ),
            (
                "model: x\nprompts: y\nreward: z\nbeta: true",
                r"beta is true, which it cannot be \(temperature in reward",
            ),
            ("model: x\nprompts: y\nreward: z\nlora_alpha: 0", "lora_alpha is 0 in bad.yaml: .*greater than 0"),
            (
                "model: x\nprompts: y\nreward: z\nstop_on_hacking: true",
                "stop_on_hacking is on, but there is no gold to tell by; give a held-out reward",
            ),
        ],
    )
    def test_content(self, refused, here, content, message):
        (here / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        assert re.match(f"error: {message}", refused("plan", "bad.yaml"))

    def test_missing(self, refused, here):
        assert "recipe 'no.yaml' cannot be read (No such file or directory); check the path" in refused(
            "plan", "no.yaml"
        )

    def test_a_folder(self, refused, here):
        assert "recipe '.' cannot be read (Is a directory)" in refused("plan", ".")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["plan", "recipe.yaml", "--kl-budgt", "1"],
                r"no such option: --kl-budgt .*--kl-budget.*; tiltlm plan --help",
            ),
            (["plan", "recipe.yaml", "--samples", "1"], "samples is 1: .*greater than or equal to 2"),
            (["plan", "recipe.yaml", "--bounds", "1"], "'--bounds' requires 2 arguments"),
            (["sample", "recipe.yaml", "--draws", "0"], "--draws is '0': .*1; tiltlm sample --help"),
            (["plann"], "no such command 'plann'"),
            (["report"], "missing argument 'RUN'"),
        ],
    )
    def test_flags(self, refused, here, arguments, message):
        assert re.search(message, refused(*arguments), re.IGNORECASE)

    def test_flags_alone_are_a_recipe(self, cli, here, models):
        flags = ["--model", models / "chat", "--prompts", "prompts.txt", "--reward", "rewards.py:good", "--beta", 0.5]
        assert cli("plan", *flags, "--samples", 8, "--max-new-tokens", 4, "--out", "run").code == 0
        assert numbers("run/recipe.json")["beta"] == 0.5

    def test_bounds_may_be_negative(self, cli, here):
        assert cli("plan", "recipe.yaml", "--bounds", "-1", "1").code == 0
        assert numbers("run/recipe.json")["bounds"] == [-1, 1]

    def test_paths_are_relative_to_the_recipe(self, cli, here, monkeypatch):
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")
        assert cli("plan", "../recipe.yaml").code == 0

    def test_every_field_is_a_flag(self):
        from tiltlm.cli.options import FILE_ONLY, GROUPS

        flags = [name for names in GROUPS.values() for name in names]
        assert sorted(Recipe.model_fields) == sorted([*flags, *FILE_ONLY])


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", None, "prompts 'none.txt': there is no such file; give a .txt"),
            ("empty.txt", "", "prompts 'empty.txt' is empty; write one prompt a line"),
            ("blank.txt", "\n \n", "prompts 'blank.txt' is empty"),
            ("hole.txt", "the film\n\na story\n", "prompt 2 is empty; remove it or write a text"),
            ("latin.txt", b"caf\xe9", "prompts 'latin.txt' is not UTF-8 text"),
            ("odd.xyz", "the film", "prompts 'odd.xyz' is a .xyz file; use .txt, .jsonl"),
            ("empty.jsonl", "", "prompts 'empty.jsonl' is empty"),
            ("broken.jsonl", "{", "line 1 of prompts 'broken.jsonl' is not JSON"),
            ("hole.jsonl", '{"prompt": "the film"}\n{"prompt": ""}', "prompt 2 is empty"),
            ("null.jsonl", '{"prompt": "the film"}\n{"prompt": null}', "prompt 2 is NoneType None; a prompt is"),
            ("number.jsonl", '{"prompt": 3}', "prompt 1 is int 3; a prompt is a text, or a list of messages"),
            ("text.jsonl", '{"text": "a", "label": 1}', "column is 'prompt', but .* has the columns text, label; name"),
            ("text.csv", "text,label\na,1\n", "column is 'prompt', but text.csv has the columns text, label"),
            ("rows.csv", "prompt\n", "prompts 'rows.csv' has no rows"),
            (
                "long.txt",
                "the film " * 100,
                r"prompt 1 has \d+ tokens, .* leaves room for 122; shorten the prompt or lower",
            ),
        ],
    )
    def test_bad(self, refused, here, name, content, message):
        if content is not None:
            (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert re.search(message, refused("plan", "recipe.yaml", "--prompts", name))
        assert not (here / "run" / "plan.json").exists()

    def test_an_empty_row(self, refused, here):
        (here / "p.jsonl").write_text('{"prompt": "the film"}\n{}\n')
        assert "prompt 2 is NoneType None" in refused("plan", "recipe.yaml", "--prompts", "p.jsonl")

    def test_another_column(self, cli, here):
        (here / "p.csv").write_text("text,answer\nthe film,a\na story,b\n")
        flags = ["--prompts", "p.csv", "--column", "text", "--reward", "rewards.py:answered"]
        assert cli("plan", "recipe.yaml", *flags).code == 0

    def test_a_completion_longer_than_the_context(self, refused, here):
        message = refused("plan", "recipe.yaml", "--max-new-tokens", "128")
        assert re.search("max_new_tokens is 128, but .* has a context of 128 tokens; lower max_new_tokens", message)

    def test_messages_for_a_model_without_chat_template(self, refused, here, models):
        (here / "p.jsonl").write_text('{"prompt": [{"role": "user", "content": "hi"}]}\n')
        message = refused("plan", "recipe.yaml", "--prompts", "p.jsonl", "--model", models / "base")
        assert "prompt 1 is a list of messages, but the model has no chat template; use an instruction-tuned" in message

    def test_messages_that_the_template_refuses(self, refused, here, models):
        strict = "{% if messages|length > 1 %}{{ raise_exception('roles must\nalternate') }}{% endif %}"
        model, tokenizer = make_model("llama"), make_tokenizer()
        tokenizer.chat_template = strict
        model.save_pretrained(here / "strict")
        tokenizer.save_pretrained(here / "strict")
        two = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
        (here / "p.jsonl").write_text(json.dumps({"prompt": two}))
        message = refused("plan", "recipe.yaml", "--prompts", "p.jsonl", "--model", "strict")
        assert "prompt 1 does not fit the model's chat template (roles must alternate); mend its messages" in message

    def test_chat_for_a_model_without_template(self, refused, here, models):
        message = refused("plan", "recipe.yaml", "--chat", "--model", models / "base")
        assert re.search("chat is on, but .*base has no chat template; use an instruction-tuned model", message)

    def test_conversations_go_through_the_template_and_reach_the_reward_as_messages(self, cli, here):
        talk = [{"role": "system", "content": "short"}, {"role": "user", "content": "the film?"}]
        (here / "p.jsonl").write_text("\n".join(json.dumps({"prompt": talk[i:]}) for i in (0, 1)))
        flags = ["--prompts", "p.jsonl", "--reward", "rewards.py:conversation"]
        assert cli("plan", "recipe.yaml", *flags).code == 0
        assert [p["prompt"] for p in numbers("run/plan.json")["per_prompt"]] == ["the film?"] * 2
        ended = cli("sample", "recipe.yaml", *flags, "--json", "s.json")
        assert ended.code == 0
        assert numbers("s.json")["prompts"][0]["prompt"] == talk


class TestModel:
    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
    def test_no_such_folder(self, refused, here, name):
        message = refused("plan", "recipe.yaml", "--model", name)
        assert f"model '{name}': there is no such folder; give a folder with config.json, or a hub id" in message

    def test_no_such_file(self, refused, here):
        assert "model 'no.gguf': there is no such file" in refused("plan", "recipe.yaml", "--model", "no.gguf")

    def test_no_such_hub_id(self, refused, here, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = refused("plan", "recipe.yaml", "--model", "nobody/nothing")
        assert re.search(
            r"model 'nobody/nothing' cannot be loaded \(.*\); give a hub id, a folder, a .gguf file", message
        )

    def test_an_empty_folder(self, refused, here):
        (here / "empty").mkdir()
        assert "model './empty' cannot be loaded (" in refused("plan", "recipe.yaml", "--model", "./empty")

    def test_damaged_weights(self, refused, here):
        make_model("llama").save_pretrained(here / "damaged")
        make_tokenizer().save_pretrained(here / "damaged")
        os.truncate(here / "damaged" / "model.safetensors", 1000)
        assert "damaged' cannot be loaded (" in refused("plan", "recipe.yaml", "--model", "damaged")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--dtype", "int8"], "dtype is 'int8'; use auto, float32"),
            (["--dtype", "Tensor"], "dtype is 'Tensor'; use auto"),
            (["--device", "abacus"], r"device is 'abacus' and cannot be used \(.*\); use auto or cpu"),
            (["--prior-adapter", "nowhere"], "nowhere holds no PEFT adapter"),
        ],
    )
    def test_settings(self, refused, here, flags, message):
        assert re.search(message, refused("plan", "recipe.yaml", *flags))

    def test_no_pad_and_pad_equal_to_eos_give_the_same_plan(self, cli, here, models):
        for name in ("chat", "padded"):
            assert load(models / name).body.tokenizer.pad_token == (None if name == "chat" else "</s>")
            assert cli("plan", "recipe.yaml", "--model", models / name, "--out", name).code == 0
        assert numbers("chat/plan.json") == numbers("padded/plan.json")

    def test_neither_does_training_mind(self, cli, here, models):
        for name in ("chat", "padded"):
            assert cli("train", "recipe.yaml", "--model", models / name, "--out", name).code == 0
        a, b = (load_file(f"{name}/policy/adapter_model.safetensors") for name in ("chat", "padded"))
        assert all(torch.equal(a[name], b[name]) for name in a)


BROKEN = {
    "none": "is None",
    "nan": "is nan",
    "plus": "is inf",
    "minus": "is -inf",
    "outside": "is 7.0, outside its declared bounds [0.0, 1.0],",
    "text": "is 'seven', which is not a number,",
    "raises": "raised ZeroDivisionError (division by zero)",
}
"""Rewards that are at fault for some completions, and what is said of it."""
HOPELESS = {
    "nothing": "returned NoneType; return a list with one number a completion",
    "short": "returned 1 values for 48 completions; return one a completion",
    "tensor": "returned a tensor of shape (48,); return a list with one number a completion",
}
"""Rewards that do not return one value a completion."""


class TestReward:
    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            ("good", "reward is 'good'; write it as file.py:function"),
            ("none.py:good", "reward: there is no file 'none.py'; give file.py:function"),
            ("rewards.py:goood", "reward 'rewards.py:goood': rewards.py has no function 'goood'; it has good, odd"),
            ("rewards.py:not_a_function", "rewards.py has no function 'not_a_function'"),
            (
                "broken.py:good",
                r"reward file 'broken.py' raised ZeroDivisionError on import \(division by zero\); mend it",
            ),
            ("syntax.py:good", "reward file 'syntax.py' raised SyntaxError on import"),
            ("needs.py:good", "reward file 'needs.py' raised ModuleNotFoundError on import .*no_such_package"),
            ("leaves.py:good", r"reward file 'leaves.py' raised SystemExit on import \(3\); mend it"),
            ("no_such_package.mod:good", "'no_such_package.mod' raised ModuleNotFoundError .*install the package"),
            (":good", "reward ':good'"),
            ("rewards.py:answered", "reward 'answered' asks for 'answer', which is not among its arguments .*none"),
        ],
    )
    def test_not_found(self, refused, here, reward, message):
        (here / "broken.py").write_text("1 / 0\n")
        (here / "syntax.py").write_text("def good(:\n")
        (here / "needs.py").write_text("import no_such_package\n")
        (here / "leaves.py").write_text("import sys\nsys.exit(3)\n")
        assert re.search(message, refused("plan", "recipe.yaml", "--reward", reward))
        assert not (here / "run" / "plan.json").exists()

    @pytest.mark.parametrize("command", ["plan", "train"])
    @pytest.mark.parametrize("name", BROKEN)
    def test_at_fault_names_the_completion(self, cli, here, command, name):
        ended = cli(command, "recipe.yaml", "--reward", f"rewards.py:{name}")
        assert ended.code == 2
        (error,) = ended.errors
        assert BROKEN[name] in error
        assert error.endswith("; mend the reward, or set on_error: drop to leave such completions out")
        completion = ast.literal_eval(re.search(r"for completion (.*); mend", error)[1])
        assert len(completion) % 2 == 1
        assert not (here / "run" / "policy").exists()

    @pytest.mark.parametrize("name", BROKEN)
    def test_at_fault_is_dropped_and_counted(self, cli, here, name):
        flags = ["--reward", f"rewards.py:{name}", "--on-error", "drop"]
        ended = cli("plan", "recipe.yaml", *flags)
        assert ended.code == 0, ended.err
        (note,) = [n for n in numbers("run/plan.json")["notes"] if "dropped" in n]
        assert 0 < int(re.match(r"(\d+) completions had no usable reward and were dropped", note)[1]) < 48
        assert note in ended.out
        assert cli("train", "recipe.yaml", *flags).code == 0
        steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        assert sum(step["dropped"] for step in steps) > 0
        assert all(step["reward"] == 0.5 for step in steps)

    @pytest.mark.parametrize("on_error", ["fail", "drop"])
    @pytest.mark.parametrize("name", HOPELESS)
    def test_not_one_value_a_completion(self, refused, here, name, on_error):
        message = refused("plan", "recipe.yaml", "--reward", f"rewards.py:{name}", "--on-error", on_error)
        assert f"reward '{name}' {HOPELESS[name]}" in message

    def test_all_dropped_is_an_error(self, cli, refused, here):
        flags = ["--reward", "rewards.py:never", "--on-error", "drop"]
        assert "no completion has a reward: all were dropped" in refused("plan", "recipe.yaml", *flags)
        (error,) = cli("train", "recipe.yaml", *flags).errors
        assert "every completion of a step was dropped" in error
        assert not (here / "run" / "policy").exists()

    def test_an_unknown_policy_on_errors(self, refused, here):
        message = refused("plan", "recipe.yaml", "--on-error", "ignore")
        assert re.search("on_error is 'ignore': .*'fail' or 'drop'", message)

    def test_every_reward_equal_is_a_note(self, cli, here):
        ended = cli("plan", "recipe.yaml", "--reward", "rewards.py:constant")
        assert ended.code == 0
        assert "Every completion of a prompt got the same reward in 16 draws: there is nothing to learn" in ended.out
        assert cli("train", "recipe.yaml", "--reward", "rewards.py:constant").code == 0
        assert cli("certify", "recipe.yaml", "--reward", "rewards.py:constant").code == 0

    def test_every_completion_equal_is_a_note(self, cli, here):
        for command in ("plan", "certify"):
            ended = cli(
                command, "recipe.yaml", "--temperature", "1e-6", *(["--policy", "prior"] * (command == "certify"))
            )
            assert ended.code == 0
            assert re.search("completions .*are equal", ended.out), command

    def test_every_completion_truncated_is_a_note_with_cap_and_fraction(self, cli, here):
        for command in ("plan", "certify"):
            ended = cli(
                command, "recipe.yaml", "--max-new-tokens", "2", *(["--policy", "prior"] * (command == "certify"))
            )
            assert ended.code == 0
            found = re.search(r"(\d+)% of the completions were cut at .*2.*; .*raise", ended.out)
            assert int(found[1]) > 90


class TestFolders:
    @pytest.mark.parametrize("command", ["plan", "train", "certify"])
    def test_out_that_cannot_be_written(self, refused, here, command):
        # root may write anywhere, but not into a folder whose parent is a regular file
        (here / "file").write_text("mine")
        message = refused(command, "recipe.yaml", "--out", "file/run")
        assert re.search(
            r"file/run cannot be written \((Not a directory|File exists)\); make room or choose another", message
        )
        assert (here / "file").read_text() == "mine"

    @pytest.mark.parametrize("file", ["file/out.json", "."])
    @pytest.mark.parametrize("command", ["plan", "train", "certify", "sample"])
    def test_json_that_cannot_be_written_is_found_before_the_work(self, refused, here, command, file):
        (here / "file").write_text("mine")
        assert re.search("cannot be written|is a folder", refused(command, "recipe.yaml", "--json", file))
        assert not (here / "run").exists()

    def test_an_earlier_run_is_not_touched(self, refused, cli, here):
        assert cli("train", "recipe.yaml").code == 0
        before = everything(here)
        flags = ["--beta", "0.5", "--samples", "8"]
        message = refused("train", "recipe.yaml", *flags)
        assert "out 'run' holds checkpoints of an earlier run; go on with --resume, or choose another folder" in message
        assert "earlier run" in refused("train", "recipe.yaml", "--kl-budget", "0.2")
        assert everything(here) == before

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--model", "other"], "its model is"),
            (["--lr", "0.1"], "its lr is 0.0003, now it is 0.1"),
            (["--beta", "0.5"], "its beta is 0.25, now it is 0.5"),
            (["--lora-r", "3"], "its policy is"),
        ],
    )
    def test_a_checkpoint_of_another_run_is_refused(self, cli, here, models, flags, message):
        assert cli("train", "recipe.yaml").code == 0
        before = everything(here)
        flags = [str(models / flag) if flag == "other" else flag for flag in flags]
        ended = cli("train", "recipe.yaml", "--resume", *flags)
        assert ended.code == 2
        (error,) = ended.errors
        assert re.search(f"of another run: {message}.*; resume with the same settings, or choose another", error)
        assert everything(here) == before

    def test_a_finished_run_resumes_to_the_same_policy(self, cli, here):
        assert cli("train", "recipe.yaml").code == 0
        before = everything(here)
        assert cli("train", "recipe.yaml", "--resume", "--json", "t.json").code == 0
        after = everything(here)
        assert numbers("t.json")["last_step"]["step"] == 3
        assert {p: c for p, c in after.items() if p.name != "t.json"} == before

    def test_a_plan_of_another_reward_does_not_come_to_lie_beside_a_policy(self, cli, here, refused):
        assert cli("train", "recipe.yaml").code == 0
        before = everything(here)
        (here / "elsewhere").mkdir()
        shutil.copy(here / "rewards.py", here / "elsewhere")
        before = everything(here)
        message = refused("plan", "recipe.yaml", "--reward", "rewards.py:constant")
        assert (
            "out 'run' holds the policy of another run (not the same: reward); choose another folder, --out" in message
        )
        assert "(not the same: prior, reward)" in refused(
            "plan", "recipe.yaml", "--reward", "rewards.py:constant", "--temperature", "0.5"
        )
        assert everything(here) == before
        assert cli("plan", "recipe.yaml", "--beta", "0.5").code == 0
        assert numbers("run/recipe.json")["beta"] == 0.25, "it is the policy's"
        for same in (
            ["--reward", "./rewards.py:good"],
            ["--reward", "elsewhere/rewards.py:good"],
            ["--bounds", "-1", "1"],
        ):
            assert cli("plan", "recipe.yaml", *same).code == 0, same
        (here / "others.txt").write_text("one\ntwo\nthree\n")
        assert cli("plan", "recipe.yaml", "--prompts", "others.txt").code == 0
        said = " ".join(cli("report", "run").out.split())
        assert "certified yet" in said
        page = (here / "run/report.html").read_text()
        assert "The plan and the training are of different prompts, whose frontiers need not be the same." in page
        shutil.rmtree(here / "run" / "policy")  # as if training had been cut off
        assert "(not the same: reward)" in refused("plan", "recipe.yaml", "--reward", "rewards.py:constant")

    def test_a_folder_that_does_not_say_what_it_is_about(self, cli, here):
        """An earlier version's: nothing is refused, and nothing is written over."""
        assert cli("train", "recipe.yaml").code == 0
        for file in (here / "run" / "recipe.json", here / "run" / "policy" / "tiltlm.json"):
            values = numbers(file)
            values.get("recipe", values).pop("about")
            file.write_text(json.dumps(values))
        before = (here / "run" / "recipe.json").read_bytes()
        assert cli("plan", "recipe.yaml", "--reward", "rewards.py:constant").code == 0
        assert (here / "run" / "recipe.json").read_bytes() == before
        assert cli("plan", "recipe.yaml").code == 0
        assert "something else" not in cli("certify", "recipe.yaml").err

    def test_the_prior_alone_has_no_training_to_differ_from(self, cli, here):
        assert cli("plan", "recipe.yaml").code == 0
        assert cli("certify", "recipe.yaml", "--policy", "prior", "--reward", "rewards.py:constant").code == 0
        said = " ".join(cli("report", "run").out.split())
        assert "Training and certificate" not in said
        assert "The plan and the certificate are of different runs (not the same: reward)" in said

    def test_what_came_together_in_a_folder_is_told_apart(self, cli, here):
        assert cli("plan", "recipe.yaml", "--reward", "rewards.py:constant").code == 0
        assert cli("train", "recipe.yaml").code == 0
        assert "something else" not in cli("certify", "recipe.yaml").err
        ended = cli("report", "run")
        said = "The plan and the certificate are of different runs (not the same: reward)"
        assert said in " ".join(ended.out.split())
        assert said in (here / "run" / "report.html").read_text()
        ended = cli("certify", "recipe.yaml", "--reward", "rewards.py:constant")
        assert "trained on something else than it is judged by now (not the same: reward)" in ended.err
        again = " ".join(cli("report", "run").out.split())
        assert "The plan and" not in again
        assert "Training and certificate are of different runs (not the same: reward)" in again

    def test_a_reward_that_was_mended_before_resuming_is_told(self, cli, here):
        assert cli("train", "recipe.yaml").code == 0
        assert "changed" not in cli("train", "recipe.yaml", "--resume").err
        (here / "rewards.py").write_text(REWARDS.replace("% 8 / 8", "% 4 / 4"))
        ended = cli("train", "recipe.yaml", "--resume")
        assert ended.code == 0
        assert "the reward (its code or its settings) has changed since the run in run began" in ended.err

    def test_a_base_that_has_changed_is_told(self, cli, here, models):
        shutil.copytree(models / "chat", here / "base")
        assert cli("train", "recipe.yaml", "--model", "base").code == 0
        model = AutoModelForCausalLM.from_pretrained(here / "base")
        model.lm_head.weight.data *= 1.5
        model.save_pretrained(here / "base")
        ended = cli("certify", "recipe.yaml", "--model", "base")
        assert "trained on something else than it is judged by now (not the same: prior)" in ended.err

    def test_nothing_to_certify(self, refused, here):
        message = refused("certify", "recipe.yaml")
        assert "'run/policy' holds neither an adapter, nor a critic, nor a model; run tiltlm train first" in message
        assert "'none' holds neither" in refused("certify", "recipe.yaml", "--policy", "none")

    def test_an_adapter_of_another_model(self, refused, cli, here):
        make_model("gpt2").save_pretrained(here / "gpt2")
        make_tokenizer().save_pretrained(here / "gpt2")
        assert cli("train", "recipe.yaml", "--model", "gpt2").code == 0
        message = refused("certify", "recipe.yaml")
        assert "the adapter in run/policy does not fit this model" in message

    @pytest.mark.parametrize("folder", [None, "empty"])
    def test_no_run_to_report(self, refused, here, folder):
        if folder:
            (here / folder).mkdir()
        assert re.search("there is no run folder 'run'|plan.json is missing", refused("report", folder or "run"))


class TestGivenCompletions:
    """What `--engine sft` and `--engine dpo` learn of a file."""

    @pytest.fixture
    def pairs(self, here, models):
        rows = [{"prompt": "the film", "chosen": f" is good {i}", "rejected": f" is bad {i}"} for i in range(4)]
        (here / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        write(here / "given.yaml", settings(models, data="pairs.jsonl", reward=None, prompts=None, bounds=None))

    def test_sft_learns_the_chosen_ones(self, cli, here, pairs, monkeypatch):
        learned, loss = [], SFT.loss

        def seen(self, forward, scored, state=None):
            learned.extend(scored.draws.texts)
            return loss(self, forward, scored, state)

        monkeypatch.setattr(SFT, "loss", seen)
        assert cli("train", "given.yaml", "--engine", "sft").code == 0
        assert len(learned) == 3 * 4
        assert all("good" in text for text in learned)

    def test_sft_needs_no_temperature(self, cli, refused, here, models, pairs):
        values = settings(models, data="pairs.jsonl", reward=None, prompts=None, bounds=None, beta=None)
        write(here / "given.yaml", values)
        ended = cli("train", "given.yaml", "--engine", "sft")
        assert ended.code == 0
        assert "no beta, which has no part in this, 3 steps of 2 prompts × given completions" in ended.err
        assert numbers("run/policy/tiltlm.json")["beta"] is None
        message = refused("train", "given.yaml", "--engine", "dpo")
        assert "beta is missing in given.yaml; without a reward nothing can choose it" in message
        write(here / "given.yaml", values | {"engine": "sft"})
        flags = ["--reward", "rewards.py:good", "--prompts", "prompts.txt"]
        assert "beta is missing; give --beta" in refused("certify", "given.yaml", *flags)
        assert cli("plan", "given.yaml", *flags, "--beta", "1").code == 0, "training had no reward"


class TestSample:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--engine", "smcc"], "engine is 'smcc'; did you mean 'smc'?"),
            (["--proposal", "none"], "'none' holds neither an adapter, nor a critic, nor a model"),
        ],
    )
    def test_bad(self, refused, here, flags, message):
        assert message in refused("sample", "recipe.yaml", *flags)

    @pytest.mark.parametrize(("engine", "most"), [("rejection", 32), ("best-of-n", 1), ("quasi-rejection", 32)])
    def test_no_copies_are_made_of_what_counts_alike(self, cli, here, engine, most):
        ended = cli("sample", "recipe.yaml", "--engine", engine, "--draws", "32", "--count", "40", "--json", "s.json")
        assert ended.code == 0
        found = numbers("s.json")
        assert all(len(row["completions"]) <= most for row in found["prompts"])
        more = "" if engine == "best-of-n" else "raise --draws, or "
        said = f"no more of 32 draws were kept; for 40, {more}go on with another --seed"
        assert said in " ".join(ended.out.split())

    def test_rejection_gives_as_many_as_it_accepted(self, cli, here):
        flags = ["--engine", "rejection", "--draws", "32", "--count", "64", "--json", "s.json"]
        assert cli("sample", "recipe.yaml", *flags).code == 0
        found = numbers("s.json")
        accepted = [32 * rate for rate in found["diagnostics"]["acceptance"]]
        assert [len(row["completions"]) for row in found["prompts"]] == pytest.approx(accepted)

    def test_importance_says_its_effective_sample_size(self, cli, here):
        assert cli("sample", "recipe.yaml", "--draws", "32", "--json", "s.json").code == 0
        assert all(1 <= ess <= 32 for ess in numbers("s.json")["diagnostics"]["ess"])

    def test_rejection_needs_bounds(self, refused, here, models):
        write(here / "recipe.yaml", settings(models, bounds=None))
        message = refused("sample", "recipe.yaml", "--engine", "rejection")
        assert "rejection needs a reward with bounds; declare them" in message

    def test_rejection_needs_the_prior(self, refused, cli, here):
        assert cli("train", "recipe.yaml").code == 0
        message = refused("sample", "recipe.yaml", "--engine", "rejection", "--proposal", "run/policy")
        assert "rejection is exact only from the prior" in message

    @pytest.mark.parametrize("engine", ["best-of-n", "importance", "rejection"])
    def test_each_engine(self, cli, here, engine):
        flags = ["--engine", engine, "--draws", "32", "--count", "2", "--json", "s.json"]
        ended = cli("sample", "recipe.yaml", *flags)
        assert ended.code == 0, ended.err
        found = numbers("s.json")
        assert set(found) == {"engine", "draws", "prompts", "log_z", "diagnostics"}
        assert [row["prompt"] for row in found["prompts"]] == ["the film", "a quiet story", "two friends"]
        for row in found["prompts"]:
            assert row["prompt"] in ended.out
            assert len(row["completions"]) == (1 if engine == "best-of-n" else 2)
            assert all(set(c) == {"text", "reward"} for c in row["completions"])
        assert (found["log_z"] is None) == (engine == "best-of-n")
        again = cli("sample", "recipe.yaml", *flags)
        assert again.out == ended.out
        assert cli("sample", "recipe.yaml", *flags, "--seed", "1").out != ended.out

    def test_a_single_draw_has_no_error_bar_and_is_still_json(self, cli, here):
        assert cli("sample", "recipe.yaml", "--draws", "1", "--json", "s.json").code == 0
        assert numbers("s.json")["log_z"][0]["stderr"] is None

    def test_a_trained_proposal(self, cli, here):
        assert cli("train", "recipe.yaml").code == 0
        assert cli("sample", "recipe.yaml", "--proposal", "run/policy").code == 0


class TestRun:
    def test_plan_train_certify_report(self, cli, here, models):
        write(here / "recipe.yaml", settings(models, beta=None, kl_budget=0.2, certify_every=2, certify_samples=4))
        assert cli("plan", "recipe.yaml", "--json", "p.json").code == 0
        plan = numbers("p.json")
        assert plan == numbers("run/plan.json")
        keys = {"prior_reward", "samples_per_prompt", "frontier", "best_of_n", "chosen", "per_prompt", "notes", "about"}
        assert set(plan) == keys
        beta = plan["chosen"]["beta"]
        assert plan["chosen"]["kl"]["value"] == pytest.approx(0.2, abs=0.02)

        ended = cli("train", "recipe.yaml", "--json", "t.json")
        assert ended.code == 0, ended.err
        trained = numbers("t.json")
        assert trained["beta"] == beta
        assert trained["policy"] == "run/policy"
        assert trained["last_step"]["step"] == 3
        assert f"beta {beta:.3g}, 3 steps of 2 prompts × 3 completions" in ended.err

        assert cli("certify", "recipe.yaml", "--json", "c.json").code == 0
        certificate = numbers("c.json")
        assert certificate == numbers("run/certificate.json")
        assert certificate["beta"] == beta
        keys = {"beta", "reward", "kl_prior", "elbo", "log_z_lower", "log_z_upper", "kl_posterior", "ess", "notes"}
        assert keys <= set(certificate)
        assert [set(row) for row in numbers("run/samples.json")["prompts"]] == [
            {"prompt", "prior", "posterior", "policy"}
        ] * 3

        ended = cli("report", "run", "--json", "r.json")
        assert ended.code == 0, ended.err
        assert Path(numbers("r.json")["report"]).read_text().lstrip().lower().startswith("<!doctype html")
        assert numbers("r.json")["certificate"] == certificate

    def test_certify_keeps_the_beta_it_was_trained_at(self, cli, here, models):
        assert cli("train", "recipe.yaml", "--beta", "0.4").code == 0
        write(here / "recipe.yaml", settings(models, beta=None))
        assert cli("certify", "recipe.yaml").code == 0
        assert numbers("run/certificate.json")["beta"] == 0.4
        assert cli("certify", "recipe.yaml", "--beta", "0.3").code == 0
        assert numbers("run/certificate.json")["beta"] == 0.3

    def test_draws_of_the_prior_are_kept(self, cli, here, monkeypatch):
        from tiltlm.lm.view import ModelPrior

        assert cli("plan", "recipe.yaml").code == 0
        drawn, draw = [], ModelPrior.draw
        monkeypatch.setattr(ModelPrior, "draw", lambda *a: drawn.append(1) or draw(*a))
        first = everything(here)
        assert cli("plan", "recipe.yaml").code == 0
        assert not drawn
        assert everything(here) == first
        assert cli("plan", "recipe.yaml", "--beta", "0.5").code == 0
        assert not drawn
        for change in (["--seed", "1"], ["--samples", "17"], ["--reward", "rewards.py:constant"]):
            drawn.clear()
            assert cli("plan", "recipe.yaml", *change).code == 0
            assert drawn, change

    def test_a_changed_reward_file_is_drawn_for_again(self, cli, here):
        assert cli("plan", "recipe.yaml").code == 0
        before = numbers("run/plan.json")["prior_reward"]
        (here / "rewards.py").write_text(REWARDS.replace("% 8 / 8", "% 8 / 16"))
        assert cli("plan", "recipe.yaml").code == 0
        assert numbers("run/plan.json")["prior_reward"]["value"] == pytest.approx(before["value"] / 2)

    def test_damaged_draws_are_drawn_again(self, cli, here):
        assert cli("plan", "recipe.yaml").code == 0
        plan = numbers("run/plan.json")
        os.truncate(here / "run" / "prior" / "draws.safetensors", 100)
        assert cli("plan", "recipe.yaml").code == 0
        assert numbers("run/plan.json") == plan

    def test_the_policy_is_an_adapter_that_peft_loads(self, cli, here, models):
        from peft import PeftModel

        assert cli("train", "recipe.yaml", "--lr", "0.01").code == 0
        names = {path.name for path in (here / "run" / "policy").iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
            "tiltlm.json",
            "tokenizer.json",
        } <= names
        model = PeftModel.from_pretrained(make_model("llama"), here / "run" / "policy")
        ids = torch.arange(2, 8)[None]
        with torch.no_grad():
            on = model(input_ids=ids).logits
            with model.disable_adapter():
                off = model(input_ids=ids).logits
        assert not torch.equal(on, off)

    def test_all_weights_are_trained_without_an_adapter(self, cli, here):
        assert cli("train", "recipe.yaml", "--lora-r", "0", "--lr", "0.01").code == 0
        assert (here / "run" / "policy" / "config.json").is_file()
        assert cli("certify", "recipe.yaml").code == 0
        assert numbers("run/certificate.json")["kl_prior"]["value"] > 0

    def test_tensorboard_gets_the_metrics(self, cli, here):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert cli("train", "recipe.yaml", "--trackers", "tensorboard").code == 0
        (file, *_) = sorted((here / "run" / "tiltlm").rglob("events.out.tfevents.*"), key=lambda p: -p.stat().st_size)
        events = EventAccumulator(str(file))
        events.Reload()
        assert {"reward", "kl_prior", "elbo", "loss"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]

    @pytest.mark.parametrize("tracker", ["trackio", "nonsense"])
    def test_a_tracker_that_is_not_there(self, cli, here, tracker):
        ended = cli("train", "recipe.yaml", "--trackers", tracker)
        assert ended.code == 2
        assert f"tracker '{tracker}' is not installed; install it, or choose tensorboard" in ended.errors[0]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_shows_an_example(self, cli, command):
        ended = cli(command, "--help")
        assert ended.code == 0
        assert re.search(rf"Examples?: tiltlm {command} ", ended.out)

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_the_program_shows_its_commands(self, cli, arguments):
        ended = cli(*arguments)
        assert ended.code == 0
        assert all(command in ended.out for command in COMMANDS)

    def test_help_does_not_wait_for_torch(self):
        code = (
            "import sys\nfrom tiltlm.cli.main import run\nsys.argv = ['tiltlm', 'train', '--help']\n"
            "try: run()\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'transformers', 'peft', 'plotly', 'datasets') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_an_error_of_the_real_program(self, here):
        command = [sys.executable, "-m", "tiltlm", "plan", "recipe.yaml", "--beta", "nan"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: beta is nan; it is a temperature")
        assert done.stderr.count("\n") == 1

    @pytest.mark.slow  # the sentence is checked in this process by TestReward, the program's end by the test above
    def test_an_error_of_the_real_program_that_needs_the_model(self, here):
        command = [sys.executable, "-m", "tiltlm", "plan", "recipe.yaml", "--reward", "rewards.py:nan"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: reward 'nan' is nan for completion")
        assert done.stderr.count("\n") == 1
