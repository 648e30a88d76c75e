"""A divided step is the step of one process: every engine, every source, in double precision, with threads for processes."""

import threading
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from test_fit import PROMPTS, WithKL, llama_target, tabular, weights
from tiltlm.inference import divided
from tiltlm.inference.catalogue import training_engines
from tiltlm.inference.monitor import Monitor
from tiltlm.lm.view import View
from tiltlm.world import ALONE, World, entered

ENGINES = training_engines()


@dataclass(frozen=True)
class Thread(World):
    """One of several threads that stand for processes."""

    slots: object = None
    barrier: object = None

    def exchange(self, value):
        self.slots[self.rank] = value
        self.barrier.wait(200)
        found = list(self.slots)
        self.barrier.wait(200)
        return found

    def sum_(self, tensors):
        for tensor, parts in zip(tensors, zip(*self.exchange([t.clone() for t in tensors]), strict=True), strict=True):
            tensor.copy_(sum(parts))


def together(works):
    """Each work in a thread, all of them in one world; what they came to."""
    size = len(works)
    slots, barrier, ends = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        try:
            with entered(Thread(rank, size, slots, barrier)):
                ends[rank] = works[rank]()
        except BaseException as error:
            ends[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [end for end in ends if isinstance(end, BaseException)]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause, and not that another waited in vain
    return ends


def run_of(engine, source=None, beside=None, **changes):
    """A training run that is ready to start; what is random in its making is done, for threads share torch's generator."""
    world = tabular(("0", "1", "2"))
    needs = engine.claim.needs
    if needs <= {"log_q", "kl", "values"}:
        policy = world.prior.policy(lora=None, values="values" in needs)
    else:
        policy = world.prior.critic(lora=None)
    engine = replace(engine, group=3) if engine.group > 1 else engine
    given = {"steps": 3, "batch": 3, "lr": 1e-2, "warmup": 0, **changes}
    source = source(world) if source is not None else None

    def work():
        trained = tl.fit(
            world.target, world.prompts, engine, source=source, policy=policy, monitor=Monitor(quiet=True), **given
        )
        return {**weights(trained), **({} if beside is None else beside(trained))}

    return work


def require_as_one(make, size=2, tolerance=1e-11):
    before = make()
    expected = before()
    for found in together([make() for _ in range(size)]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, rtol=0, atol=tolerance)


def decoded(world):
    return tl.Decoded(tl.Importance(n=6))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine(name):
    engine = ENGINES[name]
    tolerance = 1e-11 if engine.claim.needs <= {"log_q", "kl"} else 2e-5  # value heads are in single precision
    require_as_one(lambda: run_of(engine, decoded if engine.claim.data == "given" else None), tolerance=tolerance)


def given(world):
    draws = world.prior.draw(world.prompts, 4, torch.Generator().manual_seed(3))
    return tl.Given(world.target.score(draws))


def pool(world):
    draws = world.prior.draw(world.prompts, 6, torch.Generator().manual_seed(3))
    return tl.Pool(world.target.score(draws))


SOURCES = {
    "replay": (tl.VarGrad(updates=2), lambda world: tl.Replay(old=2)),
    "lagging": (tl.FDivergence(), lambda world: tl.Lagging(every=1, adaptive=False)),
    "pool": (tl.VarGrad(), pool),
    "given": (tl.SFT(), given),
    "from the prior": (tl.VarGrad(), lambda world: tl.FromPrior()),
    "of a walk": (tl.SFT(), lambda world: tl.Decoded(tl.MCMC(steps=3))),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source(name):
    engine, source = SOURCES[name]
    require_as_one(lambda: run_of(engine, source))


@pytest.mark.parametrize("changes", [{"micro_tokens": 3}, {"certify_every": 1, "patience": 1}, {"batch": 2}], ids=str)
@pytest.mark.parametrize("engine", [tl.RLOO(), WithKL(updates=2)], ids=lambda e: type(e).__name__)
def test_micro_batches_certificates_and_uneven_shares(engine, changes):
    require_as_one(lambda: run_of(engine, **changes))


def test_as_many_processes_as_prompts():
    require_as_one(lambda: run_of(tl.TrajectoryBalance()), size=3)


def test_a_held_out_reward_is_asked_of_each_process_for_its_own_completions():
    asked = {}

    def gold(completion_ids):
        asked[threading.get_ident()] = asked.get(threading.get_ident(), 0) + len(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    require_as_one(lambda: run_of(tl.RLOO(), gold=gold))
    assert sorted(asked.values()) == [9, 18, 27]  # 3 steps × 3 prompts × 3: one process; one of the prompts, and two


def test_each_process_draws_for_its_own_prompts_alone(monkeypatch):
    drawn = {}

    def spied(self, prompts, n, rng, part):
        drawn.setdefault(threading.get_ident(), []).append(len(part))
        return draw_part(self, prompts, n, rng, part)

    draw_part = View.draw_part
    monkeypatch.setattr(View, "draw_part", spied)
    together([run_of(tl.RLOO()) for _ in range(2)])
    assert sorted(map(set, drawn.values()), key=max) == [{1}, {2}]  # of three prompts a step


def test_a_generator_serves_one_process():
    def make():
        world = tabular(("0", "1"))
        prior = replace(world.prior, generator=object())
        target = replace(world.target, prior=prior)
        return lambda: tl.fit(target, world.prompts, policy=world.prior.policy(lora=None), batch=2, steps=1)

    with pytest.raises(tl.InputError, match="generator is set, but 2 processes were launched"):
        together([make(), make()])


def test_dropped_completions_leave_the_same_batch():
    """The evidence drops all completions of one prompt, so that a process may have no row at all."""

    def some(world):
        def judge(prompts, completion_ids):
            return [
                None if prompt == "0" else -float(len(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)
            ]

        return world.prior * tl.Reward(judge, beta=0.5, on_error="drop")

    def make():
        world = tabular(("0", "1"))
        target, policy = some(world), world.prior.policy(lora=None)
        given = {"steps": 2, "batch": 2, "lr": 1e-2, "warmup": 0, "monitor": Monitor(quiet=True)}
        return lambda: weights(tl.fit(target, world.prompts, tl.RLOO(group=3), policy=policy, **given))

    require_as_one(make)


# --- what the test catches ---


def averaged(world, optimiser):
    """As DDP would: the mean over processes, of a loss that is of the whole batch already."""
    sums = divided_sum(world, optimiser)
    for master in optimiser.masters.values():
        master.grad /= world.size
    return sums


def with_the_engines_own(world, optimiser):
    """Also what every process has whole."""
    divided_sum(world, optimiser)
    own = [value.grad for name, value in optimiser.masters.items() if name.startswith("engine:")]
    world.sum_(own)


divided_sum = divided.sum_gradients


def every_other(draws, size):
    """Rows of a prompt in several processes."""
    return [torch.arange(rank, len(draws), size) for rank in range(size)]


@pytest.mark.parametrize("wrong", [averaged, with_the_engines_own], ids=lambda w: w.__name__)
def test_a_wrong_sum_is_seen(monkeypatch, wrong):
    monkeypatch.setattr(divided, "sum_gradients", wrong)
    with pytest.raises(AssertionError):
        # clipping and Adam would hide a factor, so each weight's own size is looked at after a step of neither
        require_as_one(
            lambda: run_of(tl.TrajectoryBalance(), clip=1e9, steps=4, lr=1e-1, engine_lr=1e-1), tolerance=1e-9
        )


def test_how_rows_are_shared_does_not_matter_to_the_loss(monkeypatch):
    monkeypatch.setattr(divided, "shares", every_other)
    require_as_one(lambda: run_of(tl.RLOO()))


# --- the parts ---


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_neighbours_and_nearly_equal(count, size):
    found = [World(rank, size).share(count) for rank in range(size)]
    assert [i for some in found for i in some] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_part_of_the_prompts_gets_what_a_draw_of_all_gives():
    prior = llama_target().prior
    prompts, draws, after = prior.encode(PROMPTS), [], set()
    for part in (range(3), range(2), range(2, 3)):
        rng = torch.Generator().manual_seed(0)
        draws.append(prior.draw_part(prompts, 2, rng, part))
        after.add(float(torch.rand((), generator=rng)))
    assert len(after) == 1  # whatever is random next is the same everywhere
    whole, first, last = draws
    assert first.texts + last.texts == whole.texts
    assert first.prompt_index.tolist() == [0, 0, 1, 1]
    assert last.prompts.texts == (PROMPTS[2],)


def test_alone_nothing_is_exchanged():
    assert ALONE.every(lambda: 3) == [3]
    assert ALONE.of_main(4) == 4
    assert ALONE.main_first(lambda: 5) == 5


def test_the_main_process_goes_first():
    order = []

    def work():
        from tiltlm.world import join

        world = join()
        world.main_first(lambda: order.append(world.rank))

    together([work] * 3)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [tl.InputError("no"), FloatingPointError("nan"), KeyboardInterrupt(), TypeError("bug")], ids=repr
)
def test_an_error_in_one_process_is_raised_in_all(error):
    raised = []

    def work():
        from tiltlm.world import join

        world = join()

        def fails():
            if world.rank == 1:
                raise error

        try:
            world.every(fails)
        except BaseException as found:
            raised.append(found)

    together([work] * 3)
    assert len(raised) == 3
    assert error in raised
    others = [found for found in raised if found is not error]
    assert {type(found) for found in others} == {tl.InputError if isinstance(error, TypeError) else type(error)}
    assert all(str(error) in str(found) for found in others)
