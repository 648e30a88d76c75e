"""One run: a recipe, its folder, and the steps plan → train → certify, each of which finds what the others left.

The folder holds `recipe.json`, `plan.json`, `prior/` (the prior's draws), `checkpoints/`, `metrics.jsonl`,
`policy/` (adapter or model), `certificate.json`, `samples.json` and `report.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from safetensors import SafetensorError
from torch import Generator

from tiltlm.data.spec import Progress
from tiltlm.diagnostics.certificate import Certificate, certify, exact_samples
from tiltlm.diagnostics.frontier import Plan, plan
from tiltlm.errors import InputError
from tiltlm.evidence.moments import Moment
from tiltlm.evidence.preferences import Preferences
from tiltlm.evidence.reward import Reward
from tiltlm.evidence.running.calls import TextFunction
from tiltlm.inference.catalogue import make_trainer
from tiltlm.inference.checkpoint import refuse_earlier
from tiltlm.inference.fit import fit
from tiltlm.inference.monitor import Monitor
from tiltlm.lm.given import demonstrations, preferences
from tiltlm.lm.load import LanguageModel, load
from tiltlm.lm.view import ModelPrior
from tiltlm.records import Draws, Prompts, Scored
from tiltlm.report.card import model_card
from tiltlm.report.folder import is_trained
from tiltlm.store import load_scored, save_scored
from tiltlm.target import Target
from tiltlm.workflow.about import About, about, digest, refuse_others_policy, say_if_mended, say_if_of_another
from tiltlm.workflow.files import require_writable_folder, unwritable, write_json, write_text
from tiltlm.workflow.generators import generator_of
from tiltlm.workflow.inputs import read_completions, read_prompts, reward_name, reward_of
from tiltlm.workflow.moments import load_moments, solve_moments
from tiltlm.workflow.policies import policy_folder, read_policy, trained_beta
from tiltlm.workflow.recipe import Recipe, with_versions
from tiltlm.workflow.references import parts_of, require_references
from tiltlm.workflow.rewards import FunctionLoader
from tiltlm.workflow.samples import side_by_side, signs_of_hacking
from tiltlm.workflow.sources import source_of, teacher_of
from tiltlm.workflow.start import model_of
from tiltlm.workflow.templates import templated
from tiltlm.workflow.training import lora_of, training_of
from tiltlm.workflow.uncertainty import check_uncertainty, uncertain_evidence
from tiltlm.world import join


@dataclass(frozen=True, eq=False)
class Run:
    """A recipe in action."""

    recipe: Recipe
    progress: Progress | None = None

    @cached_property
    def lm(self) -> LanguageModel:
        model = model_of(self.recipe.model, self.progress)
        return load(model, dtype=self.recipe.dtype, device=self.recipe.device)

    @cached_property
    def prior(self) -> ModelPrior:
        r = self.recipe
        return self.lm.prior(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            stop=tuple(r.stop),
            chat=r.chat,
            column=r.column,
            adapter=r.prior_adapter,
            generator=generator_of(r),
        )

    @cached_property
    def prompts(self) -> Prompts:
        return self.prior.encode(self.rows) if self.recipe.prompts is not None else self.given.draws.prompts

    @cached_property
    def rows(self) -> Sequence[Any]:
        """The prompts' rows, with the prompt that the recipe's template makes."""
        r = self.recipe
        read = [] if r.prompts is None else read_prompts(r.prompts, r.column, r.columns, progress=self.progress)
        return templated(read, r.template, r.column)

    @cached_property
    def given(self) -> Scored:
        """The completions of the recipe's `data`, with their preferences if it has any."""
        rows = self._given_rows
        compared = "chosen" in rows[0] and not self.recipe.imitates
        return preferences(self.prior, rows) if compared else demonstrations(self.prior, rows)

    @cached_property
    def _given_rows(self) -> Sequence[Any]:
        return [] if self.recipe.data is None else read_completions(self.recipe.data, self.recipe.columns)

    @cached_property
    def _load(self) -> FunctionLoader:
        return FunctionLoader(self.recipe)

    @cached_property
    def _reward(self) -> tuple[TextFunction, str] | None:
        """Checked, with a hash of its code; parts that need the recipe's model have only its name."""
        return None if self.recipe.reward is None else reward_of(self.recipe.reward, self.recipe.model, self._load)

    @property
    def reward_code(self) -> str:
        """A hash of what the reward is made of."""
        return "" if self._reward is None else self._reward[1]

    @cached_property
    def reward_function(self) -> TextFunction:
        """The reward with the recipe's model in the parts that need it."""
        assert self.recipe.reward is not None
        return reward_of(self.recipe.reward, self.lm, self._load)[0]

    def close(self) -> None:
        """End what rewards and the generator hold, processes and files; a later step takes them anew."""
        if "_load" in self.__dict__:
            self._load.close()
        if "prior" in self.__dict__ and self.prior.generator is not None:
            self.prior.generator.close()

    def check(self) -> None:
        """Read the cheap inputs first, so that a typing error shows before a model is loaded."""
        r = self.recipe
        _ = self.rows, self._given_rows, self._reward, self._moment_codes, self.engine, teacher_of(r), generator_of(r)
        require_references(parts_of(r), self.rows, str(r.prompts))
        if r.uncertainty is not None:
            check_uncertainty(r, self._reward and self._reward[0])
        if r.gold is not None:
            reward_of(r.gold, r.model, self._load, "gold")

    @cached_property
    def engine(self) -> Any:
        """The training engine, with the recipe's settings."""
        r = self.recipe
        return make_trainer(r.engine, r.group, r.max_new_tokens, r.options)

    @cached_property
    def gold(self) -> Reward | None:
        """The held-out reward, in its own units."""
        r = self.recipe
        if r.gold is None:
            return None
        function = reward_of(r.gold, self.lm, self._load, "gold")[0]
        return Reward(function, name=reward_name(r.gold), on_error=r.on_error)

    @cached_property
    def _moment_codes(self) -> tuple[str, ...]:
        """Checked, as hashes of what they are made of; parts that need the recipe's model have only its name."""
        return load_moments(self.recipe.moments, self.recipe.model)[1]

    @cached_property
    def _moments(self) -> tuple[Moment, ...]:
        return load_moments(self.recipe.moments, self.lm)[0]

    @cached_property
    def _matched(self) -> Any:
        """The evidence of the moments, in nats, at the recipe's beta."""
        r = self.recipe
        base = self.prior if r.reward is None else self._rewarded(self.chosen_beta())
        key = self._key(r.reward, self.reward_code, r.beta, r.moments, self._moment_codes)
        return solve_moments(base, self._moments, lambda: self._drawn, r.samples, r.folder, key)

    @cached_property
    def _uncertain(self) -> Any:
        """The evidence of a learned reward with its uncertainty."""
        key = self._key(self.recipe.seed, self.reward_code, self.recipe.uncertainty_options)
        return uncertain_evidence(self.recipe, self.reward_function, self.prompts, lambda: self._drawn, key)

    def target(self, beta: float) -> Target:
        """The target at a temperature. Moments are matched at the recipe's own, where their weights are in nats."""
        if not self.recipe.moments:
            return self._rewarded(beta)
        base: Any = self.prior if self.recipe.reward is None else self._rewarded(beta)
        return base * (self.chosen_beta() * self._matched).at(beta)

    def _rewarded(self, beta: float) -> Target:
        """Of the reward alone, or of whatever reward made the preferences."""
        r = self.recipe
        if r.reward is None or self._reward is None:
            return self.prior * Preferences(beta)
        if r.uncertainty is not None:
            return self.prior * self._uncertain.at(beta)
        function, name = self.reward_function, reward_name(r.reward)
        return self.prior * Reward(function, beta=beta, bounds=r.bounds, name=name, on_error=r.on_error)

    # --- plan ---

    def plan(self) -> Plan:
        """Predict the frontier; keeps the prior's draws and `plan.json`."""
        self.check()
        folder = self.recipe.folder
        require_writable_folder(folder)
        refuse_others_policy(folder, self.about)
        found = self._planned
        if not is_trained(folder):  # else it is the policy's
            self._write_recipe()
        self._write_plan()
        return found

    @cached_property
    def _planned(self) -> Plan:
        r = self.recipe
        found = plan(
            self.target(r.beta or 1.0),
            self.prompts,
            samples=r.samples,
            beta=r.beta,
            kl_budget=r.kl_budget,
            reward_goal=r.reward_goal,
            scored=self._prior_draws(r.beta or 1.0),
            gold=self.gold,
        )
        if not r.has_temperature and not r.moments:
            found = replace(found, chosen=None)
        return found

    def chosen_beta(self) -> float:
        """The recipe's beta, or the one that its budget or goal asks for."""
        r = self.recipe
        if r.beta is not None:
            return r.beta
        if r.moments:  # alone: evidence in nats
            return 1.0
        if not r.has_temperature:
            raise InputError("beta is missing; give --beta, or --kl-budget or --reward-goal to have it chosen")
        chosen = self._planned.chosen
        assert chosen is not None
        return chosen.beta

    def _prior_draws(self, beta: float) -> Scored:
        """The prior's draws, scored at `beta`; from the run's folder if they are there, where they are at beta = 1."""
        r, key = self.recipe, self._draws_key()
        scored = load_scored(r.folder / "prior", key, self.prompts)
        if scored is None:
            scored = self.target(1.0).score(self._drawn)
            save_scored(scored, r.folder / "prior", key)
        return scored.at(beta)

    @cached_property
    def _drawn(self) -> Draws:
        r = self.recipe
        drawing = self.reporting(self.prior, "prior draws", len(self.prompts) * r.samples)
        return drawing.draw(self.prompts, r.samples, Generator().manual_seed(r.seed))

    def _draws_key(self) -> str:
        r = self.recipe
        evidence = self._matched.identity if r.moments else self._uncertain.identity if r.uncertainty else None
        return self._key(r.samples, r.seed, r.reward, self.reward_code, evidence)

    def _key(self, *parts: Any) -> str:
        """A hash of the prior, the prompts and what else something depends on."""
        common = self.about["prior"], self.about["prompts"], self.recipe.on_error, self.recipe.bounds
        return digest(*common, *parts)

    # --- train ---

    def prepare(self, *, resume: bool = False) -> float:
        """All that can be wrong before training: inputs, the folder, the temperature; returns the beta.

        A resumed run leaves `recipe.json` and `plan.json` as they are until its settings have been found to be the same. Of
        several processes the main one goes first, and the others find its draws and moments in the folder.
        """
        return join().main_first(lambda: self._prepare(resume))

    def _prepare(self, resume: bool) -> float:
        self.check()
        r = self.recipe
        require_writable_folder(r.folder)
        if not resume:
            refuse_earlier(r.folder)
        learns_only = r.imitates and not r.has_temperature and not r.certify_every
        beta = 1.0 if learns_only else self.chosen_beta()  # what is learned does not depend on it
        if resume:
            say_if_mended(r.folder, self.about)
        else:
            self._write_recipe()
            if r.beta is None and (r.has_temperature or r.moments):
                self._write_plan()
        return beta

    def train(self, *, resume: bool = False, monitor: Monitor | None = None) -> float:
        """Train the policy, write it as an adapter (or a model) with a model card; returns the beta."""
        beta = self.prepare(resume=resume)
        r, world = self.recipe, join()
        prior_draws = world.main_first(lambda: self._prior_draws(beta)) if r.certify_every else None
        monitor = monitor or Monitor(out=r.folder, trackers=r.trackers, config=r.model_dump())
        target = world.main_first(lambda: self.target(beta))
        policy = fit(
            target,
            self.prompts if r.data is None else self.given.draws.prompts,
            self.engine,
            source=source_of(r, self.engine.claim, lambda: self.given),
            lora=lora_of(r),
            start=r.start,
            out=r.folder,
            resume=resume,
            monitor=monitor,
            prior_draws=prior_draws,
            gold=self.gold,
            settings=training_of(r),
        )
        self._write_recipe()
        world.each(lambda: self._save_policy(policy, beta) if world.main else None)
        return beta

    def _save_policy(self, policy: Any, beta: float) -> None:
        folder = self.recipe.folder / "policy"
        try:
            policy.save(folder)
        except (OSError, SafetensorError) as error:
            raise unwritable(folder, error) from error
        said = None if self.recipe.imitates and not self.recipe.has_temperature else beta
        self._write("policy/tiltlm.json", {"beta": said, "recipe": self._recorded})
        write_text(self.recipe.folder / "policy" / "README.md", model_card(self.recipe.folder))

    # --- certify ---

    def certify(self, policy: str | None = None) -> Certificate:
        """Certify the run's policy, another adapter, or the prior ("prior").

        The certificate and samples are written into the run's folder, unless they would replace those of its own policy.
        """
        self.check()
        r = self.recipe
        require_writable_folder(r.folder)
        sampler, folder = self.sampler(policy), policy_folder(r.folder, policy)
        trained = trained_beta(folder)
        beta = trained if r.beta is None and trained is not None else self.chosen_beta()
        target = self.target(beta)
        if folder is not None:
            say_if_of_another(folder, self.about)
        prior_draws = self._prior_draws(beta)
        certificate = certify(
            self.reporting(sampler, "policy draws", len(self.prompts) * r.samples),
            target,
            self.prompts,
            samples=r.samples,
            prior_draws=prior_draws,
            exact_budget=r.exact_budget,
            gold=self.gold,
            seed=r.seed + 1,
        )
        has_policy = (r.folder / "policy" / "tiltlm.json").exists()
        if policy is None or not has_policy:
            self._write("certificate.json", {**certificate.as_dict(), "about": self.about})
            self._write_samples(target, prior_draws, certificate)
        if policy is None and has_policy:
            write_text(r.folder / "policy" / "README.md", model_card(r.folder))
        return certificate

    def sampler(self, policy: str | None) -> Any:
        """The run's policy, that of another folder, or the prior ("prior")."""
        folder = policy_folder(self.recipe.folder, policy)
        return self.prior if folder is None else read_policy(folder, self.prior, self.recipe.dtype, self.recipe.device)

    def _write_samples(self, target: Target, prior_draws: Scored, certificate: Certificate) -> None:
        """What the report shows of the draws."""
        exact, _ = exact_samples(target, self.prompts, prior_draws, 0, Generator().manual_seed(self.recipe.seed))
        rows = side_by_side(target, self.prompts, prior_draws, exact, certificate.scored)
        self._write("samples.json", {"prompts": rows})
        self._write("hacking.json", signs_of_hacking(target, certificate, prior_draws, self.gold))

    # --- files ---

    @cached_property
    def about(self) -> About:
        """What the files that this run writes are about."""
        return about(self, self._moment_codes)

    @property
    def _recorded(self) -> dict[str, Any]:
        return {**with_versions(self.recipe), "about": self.about}

    def _write_recipe(self) -> None:
        self._write("recipe.json", self._recorded)

    def _write_plan(self) -> None:
        self._write("plan.json", {**self._planned.as_dict(), "about": self.about})

    def reporting(self, sampler: Any, what: str, count: int) -> Any:
        """A sampler with a bar for `count` completions, where there are bars."""
        return sampler if self.progress is None else replace(sampler, progress=self.progress(what, count))

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        if join().main:
            write_json(self.recipe.folder / name, values)
