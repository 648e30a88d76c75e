"""`tiltlm task`: the packaged applications, and a recipe of one's own, from its data to a table."""

import json
from pathlib import Path

import pytest
import yaml

import tiltlm as tl
from conftest import settings, write
from tiltlm.cli.options import GROUPS, recipe_command
from tiltlm.rewards.catalogue import make_part
from tiltlm.tasks import about, applications, task_recipe, tasks
from tiltlm.workflow import methods
from tiltlm.workflow.methods import METHODS
from tiltlm.workflow.recipe_files import quickened, read_recipe
from tiltlm.workflow.templates import templated

FILES = ("prior", "prior-then-greedy", "prior-then-mbr", "lead-1")
ROWS = [("the film", "a good one"), ("a quiet story", "it is dull"), ("two friends", "they meet")]


@pytest.fixture
def own(here, models):
    """A recipe with a test set and metrics, on the small random model."""
    lines = [json.dumps({"prompt": p, "reference": r, "kind": "film"}) for p, r in ROWS]
    (here / "train.jsonl").write_text("\n".join(lines))
    (here / "test.jsonl").write_text("\n".join(lines[:2]))
    changes = {"prompts": "train.jsonl", "test": "test.jsonl", "steps": 2, "template": "{{ kind }}: {{ prompt }}"}
    metrics = [{"part": "chrf", "column": "reference"}, {"part": "repetition"}]
    return write(
        here / "own.yaml",
        settings(
            models, **changes, metrics=metrics, quick={"steps": 1}, baselines=["lead-1", "prior/mbr", "sft/policy"]
        ),
    )


class TestTable:
    def test_every_method_with_two_seeds(self, cli, here, own):
        ended = cli("task", own, "--table", "--seeds", 2, "--draws", 4, "--json", "t.json")
        assert ended.code == 0, ended.err
        found = json.loads((here / "t.json").read_text())
        assert [system["name"] for system in found["systems"]] == [*METHODS, "lead-1", "prior/mbr", "sft/policy"]
        assert all(system["seeds"] == 2 for system in found["systems"])
        assert all(system["seconds"] > 0 for system in found["systems"] if system["name"] != "lead-1")
        assert found["metrics"][:2] == ["chrf", "repetition"]
        assert found["prompts"] == 2
        by_name = {system["name"]: system["metrics"] for system in found["systems"]}
        assert by_name["prior"]["KL to prior"]["value"] == pytest.approx(0, abs=1e-5)
        assert "KL to prior" in by_name["policy"]
        assert "KL to prior" not in by_name["smc"]
        bounds = {o["method"]: o["kl_posterior"] for o in found["outcomes"]}
        elbos = {o["method"]: o["elbo"] for o in found["outcomes"]}
        first = {o["method"]: o for o in reversed(found["outcomes"])}
        assert elbos["smc"] is elbos["lead-1"] is None
        assert first["prior"]["elbo"] == pytest.approx(first["prior"]["reward"] / found["beta"], rel=1e-5)
        ratios = json.loads((here / "run" / "task" / "policy-0.json").read_text())["log_ratios"]
        moved = sum(map(sum, ratios)) / sum(map(len, ratios))
        assert first["policy"]["elbo"] == pytest.approx(first["policy"]["reward"] / found["beta"] - moved, rel=1e-5)
        assert bounds["policy"]["low"] <= bounds["policy"]["high"]
        assert bounds["best-of-n"] is None
        assert found["baseline"] == "prior"
        assert by_name["policy"]["chrf"]["difference"] is not None
        assert by_name["best-of-n"]["distinct-2"]["value"] is None  # one completion a prompt has no diversity
        texts = {name: json.loads((here / "run" / "task" / f"{name}-0.json").read_text())["texts"] for name in FILES}
        assert texts["lead-1"] == [["the"], ["a"]]  # of the source, without what the template wrote before it
        assert all(len(some) == 1 for some in texts["prior-then-greedy"])
        assert (
            texts["prior-then-greedy"] == json.loads((here / "run/task/prior-then-greedy-1.json").read_text())["texts"]
        )
        for chosen, among in zip(texts["prior-then-mbr"], texts["prior"], strict=True):
            assert chosen[0] in among
        assert (here / "run" / "task.html").stat().st_size > 1000
        assert (here / "run" / "seed-1" / "policy").is_dir()
        warm = json.loads((here / "run" / "seed-1" / "after-sft" / "recipe.json").read_text())
        assert warm["start"].endswith("run/seed-1/sft")
        assert by_name["sft/policy"]["KL to prior"]["value"] > 0

    def test_an_interval_without_an_upper_end_comes_back_from_its_file(self, cli, here, own):
        flags = ["task", own, "--methods", "prior", "--draws", 4]
        first = cli(*flags, "--exact-budget", 0)
        assert first.code == 0, first.err
        kept = json.loads((here / "run" / "task" / "prior-0.json").read_text())
        assert kept["kl_posterior"][2] is None
        again = cli(*flags, "--exact-budget", 0)
        assert again.code == 0, again.err
        assert "∞]" in first.out
        assert "∞]" in again.out

    def test_what_is_done_is_not_done_again(self, cli, here, own):
        flags = ["task", own, "--methods", "prior,policy", "--draws", 4]
        assert cli(*flags).code == 0
        kept = {file: file.stat().st_mtime_ns for file in (here / "run").rglob("*.json") if "task" in file.parts}
        (here / "run" / "task" / "policy-0.json").write_text("{")  # as a kill in the middle of writing leaves it
        assert cli(*flags).code == 0
        again = json.loads((here / "run" / "task" / "policy-0.json").read_text())
        assert len(again["texts"]) == 2
        prior = here / "run" / "task" / "prior-0.json"
        assert prior.stat().st_mtime_ns == kept[prior]
        other = cli(*flags, "--beta", 0.5)
        assert other.code == 2
        assert "trained with other settings" in other.err

    def test_sft_is_trained_once_for_all_rows_that_need_it(self, cli, here, own, monkeypatch):
        trained, train = [], methods.fit
        monkeypatch.setattr(methods, "fit", lambda *args, **rest: (trained.append(args[2]), train(*args, **rest))[1])
        flags = ["task", own, "--draws", 4, "--methods"]
        assert cli(*flags, "sft").code == 0
        drawn = json.loads((here / "run/task/sft-0.json").read_text())
        assert cli(*flags, "sft/policy").code == 0
        (here / "run/task/sft-0.json").unlink()
        assert cli(*flags, "sft").code == 0
        again = json.loads((here / "run/task/sft-0.json").read_text())
        assert len(trained) == 1
        assert again["texts"] == drawn["texts"]  # the adapter that was kept is the one that was judged
        write(own, yaml.safe_load(own.read_text()) | {"methods": {"sft": {"lr": 0.05}}})
        assert cli(*flags, "sft").code == 0
        assert len(trained) == 2
        assert "trained with other settings" in cli(*flags, "sft/policy").err  # it went on from the other adapter

    def test_other_metrics_need_no_new_draws_and_another_reward_does(self, cli, here, own):
        flags = ["--methods", "prior,policy", "--draws", 4, "--json", "t.json"]
        assert cli("task", own, *flags).code == 0
        kept = {file: file.stat().st_mtime_ns for file in (here / "run" / "task").iterdir()}
        write(own, yaml.safe_load(own.read_text()) | {"metrics": [{"part": "length"}]})
        assert cli("task", own, *flags).code == 0
        assert "chrf" not in json.loads((here / "t.json").read_text())["metrics"]
        assert kept == {file: file.stat().st_mtime_ns for file in (here / "run" / "task").iterdir()}
        (here / "rewards.py").write_text((here / "rewards.py").read_text() + "\n# another\n")
        assert "trained with other settings" in cli("task", own, *flags).err

    def test_dpo_compares_its_own_draws(self, cli, own, monkeypatch):
        """A few posterior samples of a prompt are mostly one text, so that their pairs say nothing."""
        seen, train = [], methods.fit
        monkeypatch.setattr(
            methods, "fit", lambda *args, **rest: (seen.append((args[2], rest)), train(*args, **rest))[1]
        )
        assert cli("task", own, "--draws", 4, "--methods", "dpo").code == 0
        [(engine, rest)] = seen
        assert isinstance(engine, tl.DPO)
        assert rest["source"] is None

    def test_a_method_may_have_its_own_keys(self, cli, refused, here, own):
        flags = ["--methods", "policy,dpo", "--draws", 4, "--json", "t.json"]
        assert cli("task", own, *flags).code == 0
        texts = {name: (here / f"run/task/{name}-0.json").read_text() for name in ("policy", "dpo")}
        write(own, yaml.safe_load(own.read_text()) | {"methods": {"dpo": {"lr": 0.05}}})
        assert cli("task", own, *flags).code == 0
        assert (here / "run/task/policy-0.json").read_text() == texts["policy"]
        assert (here / "run/task/dpo-0.json").read_text() != texts["dpo"]
        write(own, yaml.safe_load(own.read_text()) | {"methods": {"dpo": {"lrr": 0.05}}})
        assert "methods: dpo: unknown key 'lrr'" in refused("task", own, *flags)

    def test_refusals(self, refused, here, own):
        assert "method is 'ppo'" in refused("task", own, "--methods", "ppo")
        assert "baseline is 'sft'" in refused("task", own, "--methods", "prior,policy", "--baseline", "sft")
        assert "betas is 'a,b'" in refused("task", own, "--betas", "a,b")
        assert "betas has 0.0" in refused("task", own, "--betas", "1,0")
        assert "did you mean 'translation'" in refused("task", "translaton")
        assert "test is missing" in refused("task", "recipe.yaml")
        write(here / "bad.yaml", yaml.safe_load(own.read_text()) | {"quick": {"stepz": 1}})
        assert "quick: unknown key 'stepz'" in refused("task", "bad.yaml", "--quick")


class TestBetas:
    def test_each_beta_has_its_policy_and_its_prediction(self, cli, here, own):
        ended = cli("task", own, "--betas", "0.5,2", "--draws", 4, "--json", "b.json")
        assert ended.code == 0, ended.err
        found = json.loads((here / "b.json").read_text())
        assert [point["beta"] for point in found["points"]] == [0.5, 2.0]
        near, far = (point["predicted"] for point in found["points"])
        assert near["kl"] > far["kl"] > 0  # a smaller beta asks for more
        assert near["reward"] > far["reward"]
        assert all(point["kl"]["stderr"] >= 0 for point in found["points"])
        assert (here / "run" / "beta-0.5" / "seed-0" / "policy").is_dir()
        assert (here / "run" / "betas.html").stat().st_size > 1000
        assert "E r reached" in ended.out
        kept = (here / "run" / "beta-2" / "seed-0" / "policy").stat().st_mtime_ns
        assert cli("task", own, "--betas", "2", "--draws", 4).code == 0
        assert (here / "run" / "beta-2" / "seed-0" / "policy").stat().st_mtime_ns == kept


class TestPackaged:
    def test_the_five_are_there(self, cli):
        assert applications() == ("captions", "generation", "qa", "summary", "translation")
        assert {name.partition("-")[0] for name in tasks()} == set(applications())
        shown = cli("task").out
        assert all(name in shown for name in tasks())
        assert "tiltlm task NAME --quick" in shown

    def test_the_help_says_what_may_be_given(self, cli, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        said = cli("task", "--help").out
        assert "an application's name, or a YAML file" in said
        assert "[a:b] takes some rows" in said  # and is no markup

    @pytest.mark.parametrize("name", tasks())
    def test_their_recipes_hold(self, name):
        recipe = read_recipe(task_recipe(name), {})
        quick = quickened(recipe)
        assert quick.out == f"{recipe.out}-quick"
        assert quick.steps < recipe.steps
        assert recipe.test != recipe.prompts
        assert about(name)
        link = Path("recipes") / f"{name}.yaml"
        assert link.resolve() == task_recipe(name).resolve()
        for part in [*recipe.reward, *recipe.metrics]:
            if part["part"] != "pass-at-k":
                kept = {key: value for key, value in part.items() if key not in ("part", "weight", "of")}
                make_part(part["part"], kept, "smollm2-135m-instruct")

    def test_a_task_by_name_takes_flags(self):
        taken = []
        command = recipe_command("Run", find=task_recipe)(lambda recipe: taken.append(recipe))  # noqa: PLW0108  its parameter's name counts
        command(recipe="qa", **{**dict.fromkeys(GROUPS["Run"]), "out": "elsewhere"})
        assert taken[0].out == "elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks())
def test_each_runs(cli, tmp_path, name):
    """`--quick`, on the real data and models."""
    ended = cli("task", name, "--quick", "--out", tmp_path / name, "--json", tmp_path / "t.json")
    if ended.code == 2 and ("is not installed" in ended.err or "apt" in ended.err):
        pytest.skip(ended.errors[0])
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "t.json").read_text())
    assert [system["name"] for system in found["systems"]] == ["prior", "policy"]
    assert (tmp_path / f"{name}-quick" / "task.html").stat().st_size > 1000


class TestTemplates:
    def test_columns_make_the_prompt(self):
        rows = templated([{"prompt": "2 + 2", "hint": "four"}], "Q: {{ prompt }} ({{ hint }})\nA:", "prompt")
        assert rows == [{"source": "2 + 2", "prompt": "Q: 2 + 2 (four)\nA:", "hint": "four"}]
        assert templated(["x"], "Q: {{ prompt }}", "prompt") == [{"source": "x", "prompt": "Q: x"}]
        assert templated([{"q": "x"}], "Q: {{ q }}", "prompt") == [{"q": "x", "prompt": "Q: x"}]
        own = {"prompt": "x", "source": "a book"}
        assert templated([own], "Q: {{ prompt }}", "prompt") == [{"source": "a book", "prompt": "Q: x"}]
        assert templated(["x"], None, "prompt") == ["x"]

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            ("{{ prompt", "template is no Jinja2 template"),
            ("Q:", "names no column"),
            ("{{ answer }}", "names the column 'answer', but row 1 has prompt"),
            ("{{ prompt.a.b }}", "does not fit row 1"),
        ],
    )
    def test_refusals(self, template, says):
        with pytest.raises(tl.InputError, match=says):
            templated(["x"], template, "prompt")
