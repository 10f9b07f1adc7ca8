"""The training loop: before, the iterations, after; and how a run is kept and put back."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.lesson import POLICY
from tempflow.config import OWN_REWARD, Config, to_yaml
from tempflow.data.pictures import Pictures
from tempflow.data.sampler import prompts_for
from tempflow.evaluate import pictures
from tempflow.folder import put, seal
from tempflow.models import resolved_device
from tempflow.models.protocol import Model
from tempflow.request import Prompt
from tempflow.rewards import SafeReward
from tempflow.rewards.protocol import Reward, prepare
from tempflow.train import checkpoint
from tempflow.train.build import (
    PromptsLike,
    borrowed_baseline,
    by_stream,
    check_before_loading,
    check_guided,
    composed,
    context_of,
    encode_ahead,
    guidance_kind,
    judges_of,
    pictures_of,
    prepare_model,
    prompt_sets,
    prompt_sources,
    rewards_of,
    settled,
    takes_sources,
)
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.display import Display, Interrupt, Interrupted
from tempflow.train.evaluator import Evaluator
from tempflow.train.experience import (
    check_advantages,
    check_scored,
    credit,
    rollout_metrics,
    tell_broken,
)
from tempflow.train.gradients import check_gradients
from tempflow.train.grids import on_grid, with_grid
from tempflow.train.guards import GuardError, Guards
from tempflow.train.identity import Identity, check_new, identity
from tempflow.train.parallel import World, joined
from tempflow.train.records import Records, Run, cost, steps_of, summary_table
from tempflow.train.source import Collected, collect, source_of
from tempflow.train.state import (
    Baseline,
    baseline_facts,
    baseline_of,
    check_reference,
    check_resumable,
    learner_facts,
    learner_tensors,
    load_learner,
    looks_of,
    resumable,
)
from tempflow.train.track import Tracker, open_trackers
from tempflow.train.update import learn, lessons
from tempflow.train.weights import Learner

GRID = 24
"""Pictures in the before/after grid."""

SHOWN = 8
"""Pictures that trackers are given at a time."""

DISK = (OSError, SafetensorError)
"""What a full or broken disk raises."""


class Trainer:
    """One run. `run` does it all; `restore` puts it where a checkpoint left it."""

    def __init__(
        self,
        config: Config,
        context: Context,
        learners: Mapping[str, Learner],
        eval_rewards: Sequence[Reward],
        prompts: Mapping[str, Sequence[Prompt]],
        records: Records,
        display: Display,
        trackers: Sequence[Tracker],
        baseline: Baseline | None = None,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.records, self.display, self.trackers = records, display, trackers
        self.interrupt = Interrupt()
        alone = context.world.size == 1  # several ranks agree between iterations, so that none waits for another
        self.context = replace(context, pause=self.interrupt.check) if alone else context
        self.world, self.model, self.learners = context.world, context.model, learners
        self.policy = learners[POLICY]
        self.evaluator = Evaluator(config, self.context, eval_rewards, self._say)
        counter = Counter(guided=context.guidance.rows > 1)
        self.counter, self.guards = counter, Guards(config.guards, records.alarms, self._say)
        self.done, self.seconds = 0, 0.0
        self.best: tuple[float, int] | None = None
        self.baseline = baseline
        self.told = set[tuple[str, int]]()  # ways in which samples broke that have been said
        self.whole = False  # whether the state is one between two iterations, from which a run can go on
        self.kept: int | None = None  # the iteration that the newest checkpoint is of
        self.writer = checkpoint.Writer(behind=config.checkpoint.background and alone)

    # ------------------------------------------------------------------------------------------------------- going
    def run(self) -> Run:
        """The run's result.

        Raises Interrupted, after everything was kept, when that was asked for; GuardError when a guard stops the run,
        or the disk does not take what is written; else what the model or a reward raised. What was whole is kept first.
        """
        with self.interrupt, self.display:
            try:
                return self._run()
            except Interrupted:
                if self.whole and self.kept != self.done:
                    self._keep(best=False)
                self._settle()
                self._say(f"stopped after {self.done} of {self.config.iterations} iterations; nothing is lost")
                self._say(f"to go on: {self.records.go_on}")
                raise
            except Exception as error:
                self._leave(error)
                if isinstance(error, DISK):
                    raise GuardError(f"{_short(error)}. Free some space or mend the disk, then go on") from error
                raise
            finally:
                self.writer.close()
                for tracker in self.trackers:
                    tracker.close()

    def _run(self) -> Run:
        if self.baseline is None:
            test = self.prompts["test"]
            self.display.doing(f"test of the untrained model, {len(test)} pictures")
            self.baseline = Baseline(
                self.evaluator.evaluate(test, "test", training=False),
                self.evaluator.strips(test[:GRID]),
                self.evaluator.yardstick(self.prompts),
            )
        metric = self.config.evaluation.metric
        self._say(f"before: held-out {metric} {self.baseline.before.mean(metric):.3f}")
        if self._due(self.done):
            self._keep(best=self._validate())
        while self.done < self.config.iterations:
            self._iterate()
            if self.world.any(self.interrupt.asked):
                self.whole = True
                raise self.interrupt.interrupted()
        self._use_best()
        return self._finish(self.baseline)

    def _leave(self, error: Exception) -> None:
        """After a fault: keeps what is whole, saves the best weights where a guard stopped the run, says how to go on.

        What fails on top of the fault is said, no more: the fault is the news.
        """
        unkept = self.whole and self.kept != self.done and self.world.size == 1
        steps = [self._settle, *([lambda: self._keep(best=False), self._settle] if unkept else [])]
        if isinstance(error, GuardError) and self.baseline is not None:
            steps.append(self._use_best)
        for step in steps:
            try:
                step()
            except Exception as further:
                self._say(f"then: {_short(further)}")
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            rows = f"rollout_rows (now {self.config.rollout_rows}) and train_rows (now {self.config.train_rows})"
            self._say(f"memory is short: smaller {rows} take less; --allow-changes lets a resumed run have them")
        self._say(f"stopped after {self.done} of {self.config.iterations} iterations by {type(error).__name__}")
        self._say(f"to go on, once that is mended: {self.records.go_on}")

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Around work that leaves the run's state as it is: if it fails, the state can be kept."""
        self.whole = self.baseline is not None
        yield
        self.whole = False

    def _iterate(self) -> None:
        iteration, clock, started = self.done, Clock(), time.perf_counter()
        before = (replace(self.counter), self.guards.state, self.records.sizes())
        rate = self.config.optimizer.rate(iteration, self.config.iterations)
        for name, factor in {POLICY: 1.0, **{role.name: role.rate for role in self.context.algorithm.roles}}.items():
            for group in self.learners[name].optimizer.param_groups:
                group["lr"] = rate * factor
        try:
            metrics = self.train_step(iteration, clock)
        except (Exception, Interrupted):
            if self.whole:
                self.counter, self.guards.state, sizes = before  # the iteration will be done anew, from its start
                self.records.cut(sizes)
            raise
        self.done += 1
        self.seconds += time.perf_counter() - started
        self.records.iteration(self.done, metrics, self.counter, clock)
        if (spent := clock.seconds.get("compile", 0.0)) >= 1:
            self._say(f"compile: {spent:.0f} s of iteration {self.done} (model.compile); kept for other runs here")
        for tracker in self.trackers:
            tracker.log({**metrics, **cost(self.counter)}, self.done)
        better = self._validate() if self._due(self.done) else False
        if self.config.track.images_every and self.done % self.config.track.images_every == 0:
            self._show()
        if better or self.done % self.config.checkpoint.every == 0 or self.done == self.config.iterations:
            self._keep(best=better)
        self.display.advance(self.done, metrics, self.records.evaluations[-1])

    def train_step(self, iteration: int, clock: Clock) -> dict[str, float]:
        """One iteration: roll out and score, give credit, all phases' updates and what follows roles; its metrics."""
        context, number = self.context.at(iteration), iteration + 1  # as records count
        prompts = self._prompts(iteration)
        found = source_of(context, prompts, iteration, clock).collected(
            lambda: self._credited(context, prompts, iteration, clock)
        )
        given = lessons(context, prompts, iteration, found.experience, found.advantages, found.skip)
        try:
            learned = learn(context, prompts, given, self.learners, self.counter, clock, self.guards)
        except Interrupted:  # only where no role has moved
            self.whole = True
            raise
        for learner in self.learners.values():
            learner.sets.update()
        metrics = {**found.metrics, **learned}
        self.guards.update(number, metrics)
        self.records.steps(number, found.steps)
        return metrics

    def _credited(self, context: Context, prompts: Sequence[Prompt], iteration: int, clock: Clock) -> Collected:
        """The iteration's experience, scored and credited."""
        with self._untouched():
            experience = collect(context, prompts, iteration, self.counter, clock)
            tell_broken(experience, prompts, self._say, self.told)
            check_scored(context, experience, iteration + 1)
            advantages = [credit(context, experience, phase) for phase in context.algorithm.phases]
            for given in advantages:
                check_advantages(given, iteration + 1)
        first, own = experience.of(context.algorithm.first), advantages[context.algorithm.place]
        rule = first.rule(context.algorithm.credit)
        return Collected(
            experience=experience,
            advantages=advantages,
            skip=self.guards.rollout(iteration + 1, experience.signals),
            metrics=rollout_metrics(first, own.advantage),
            steps=steps_of(rule, *first.credited, own),
        )

    def _prompts(self, iteration: int) -> list[Prompt]:
        """The iteration's prompts; the same for a resumed run as for an unbroken one."""
        pool, data = self.prompts["train"], self.config.data
        return [pool[i] for i in prompts_for(iteration, pool, data.prompts_per_iteration, self.config.seed)]

    def _due(self, done: int) -> bool:
        """Whether the weights after `done` iterations are to be validated and have not been."""
        every = self.config.evaluation.every
        wanted = done in (0, self.config.iterations) or (every > 0 and done % every == 0)
        return wanted and not (self.records.evaluations and self.records.evaluations[-1]["iteration"] == done)

    def _validate(self) -> bool:
        """Judges the averaged weights on the validation prompts; whether they are the best so far."""
        started = time.perf_counter()
        with self._untouched(), self._evaluated():
            report = self.evaluator.evaluate(self.prompts["validation"], "validation", training=True)
        score = report.mean(self.config.evaluation.metric)
        better = self.best is None or math.isnan(self.best[0]) or score > self.best[0]
        if better:
            self.best = (score, self.done)
        gold = {name: report.mean(name) for name in self.config.evaluation.gold}
        self.records.evaluation(self.done, report, self.counter)
        for tracker in self.trackers:
            tracker.log({f"validation/{name}": report.mean(name) for name in report.scores.names}, self.done)
        self.seconds += time.perf_counter() - started
        self.guards.validation(self.done, report.mean(OWN_REWARD), gold)
        return better

    # -------------------------------------------------------------------------------------------------- looking
    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Inside, the network computes with the weights that are judged and kept: the average, if there is one."""
        if self.policy.average is None:
            yield
            return
        with self.policy.average.applied():
            yield

    def _show(self) -> None:
        """The averaged weights' pictures of the first validation prompts, for the trackers."""
        prompts = self.prompts["validation"][:SHOWN]
        with self._evaluated():
            strips = self.evaluator.strips(prompts)
        for tracker in self.trackers:
            shown = zip(prompts, strips, strict=True)
            tracker.images("validation", [(p.text, picture.numpy()) for p, picture in shown], self.done)

    def _say(self, line: str) -> None:
        if self.world.first:
            self.display.say(line)

    # -------------------------------------------------------------------------------------------------- keeping
    def _keep(self, best: bool) -> None:
        """A checkpoint of the run as it stands between two iterations. Raises GuardError when it cannot be written."""
        assert self.baseline is not None
        tensors = dict[str, Mapping[str, Tensor]]()
        for name, learner in self.learners.items():
            tensors |= learner_tensors(name, learner)
        try:
            self.writer.save(
                self.records.folder,
                self.done,
                tensors | {"looks": looks_of(self.baseline)},
                {
                    "counter": asdict(self.counter),
                    "roles": {name: learner_facts(learner) for name, learner in self.learners.items()},
                    "best": self.best,
                    "seconds": self.seconds,
                    "guards": self.guards.state,
                    "looks": baseline_facts(self.baseline),
                    "records": self.records.sizes(),
                    "config": to_yaml(self.config),
                    "identity": self.records.identity.to_json(),
                },
                best=best,
                keep=self.config.checkpoint.keep,
                first=self.world.first,
                wait=self.world.wait,
            )
        except DISK as error:
            raise self._unwritten(error) from error
        self.kept = self.done

    def _settle(self) -> None:
        """What is being written behind the run is there. Raises GuardError when it could not be written."""
        try:
            self.writer.settle()
        except DISK as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> GuardError:
        last, self.kept = self.done if self.kept is None else self.kept, None
        number = self.done if not self.config.checkpoint.background else last
        return GuardError(
            f"checkpoint of iteration {number} could not be written: {error}. Older ones are whole; free some "
            f"space, then: {self.records.go_on}"
        )

    def restore(self, saved: checkpoint.Saved) -> None:
        """Goes on from a checkpoint; what the records say of later iterations is taken back."""
        state, tensors = saved.state, saved.tensors
        for name, learner in self.learners.items():
            load_learner(name, learner, tensors, state["roles"].get(name, {}))
        self.counter = Counter(**state["counter"])
        self.done, self.seconds, self.guards.state = state["iteration"], state["seconds"], state["guards"]
        self.kept = self.done
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.baseline = baseline_of(state["looks"], tensors["looks"])
        if self.world.first:
            self.records.cut(state["records"])
        self.world.wait()  # the others read what is left
        if not self.world.first:
            self.records.cut(state["records"])

    def _use_best(self) -> None:
        """The network takes the best weights so far, and they are saved as the run's model."""
        self._settle()
        weights, shards = checkpoint.best_weights(self.records.folder, self._say), self.context.shards
        self.policy.trainable.load(weights)
        if self.world.first:
            fresh = self.records.folder / ".model.new"
            shutil.rmtree(fresh, ignore_errors=True)
            self.model.save(str(fresh), None if shards is None else shards.whole_with(weights))
            seal(fresh, "model")
            put(fresh, self.records.folder / "model")
        self.world.wait()

    def _finish(self, baseline: Baseline) -> Run:
        """After: the test once more, pictures, summary."""
        assert self.best is not None
        test = self.prompts["test"]
        self.display.doing(f"test of the trained model, {len(test)} pictures")
        after = self.evaluator.evaluate(test, "test", training=True)
        grid_after = self.evaluator.strips(test[:GRID])
        run = Run(
            folder=self.records.folder,
            metric=self.config.evaluation.metric,
            before=baseline.before,
            after=after,
            yardstick=baseline.yardstick,
            best_iteration=self.best[1],
            counter=self.counter,
            seconds=self.seconds,
            model=self.model,
        )
        if self.world.first:
            texts = [p.text for p in test[:GRID]]
            pictures.before_after(baseline.grid, grid_after, texts, run.folder / "before_after.png")
            self.records.summary(run, self.best[0])
            try:
                pictures.curve(self.records.evaluations, run.metric, run.folder / "curve.png")
            except ImportError as error:
                self._say(f"no curve.png: {error}")
            self._show_summary(run)
        return run

    def _show_summary(self, run: Run) -> None:
        """The table at the end, and the one line that says it all."""
        self.display.console.print(summary_table(run, self.config.name))
        self._say(f"best validation at iteration {run.best_iteration}; pictures, curve and model in {run.folder}")
        if run.yardstick is not None:
            guidance, report = run.yardstick
            self._say(f"yardstick: untrained with its best guidance, {guidance:g}: {report.mean(run.metric):.3f}")
        self._say(run.last_line)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, eq=False)
class Given:
    """Objects that take the place of what a configuration names: the arguments of `train` of the same names."""

    model: Model | None = None
    reward: Reward | Callable | Sequence[Reward | Callable] | None = None
    prompts: PromptsLike | None = None
    test_prompts: PromptsLike | None = None
    algorithm: Algorithm | None = None

    @property
    def named(self) -> dict[str, object]:
        """Those that are there, by name."""
        listed = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: item for name, item in listed.items() if item is not None}


@dataclass(frozen=True, eq=False)
class LookedAt:
    """A run as far as it can be told without its model: what was found, and nothing that stands in its way."""

    config: Config
    algorithm: Algorithm
    rewards: Sequence[SafeReward]
    judges: Sequence[SafeReward]
    prompts: Mapping[str, Sequence[Prompt]]
    pictures: Pictures
    identity: Identity


def looked_at(
    config: Config, given: Given, world: World, resume: bool, say: Callable[[str], None] = lambda line: None
) -> LookedAt:
    """Looks up and checks all that a run needs beside its model; loads no weights.

    Raises ValueError and ImportError, naming the field, for what would stop it.
    """
    config, folder, own = settled(config), Path(config.output), given.reward is None
    check_resumable(folder, config, [*given.named]) if resume else check_new(folder, world.first)
    algorithm = given.algorithm or config.algorithm.build()
    config.guards.check(algorithm.name, algorithm.compared)
    rewards = rewards_of(config, given.reward)
    if not own and config.evaluation.metric not in {*config.evaluation.gold, *(r.name for r in rewards)}:
        config = config.replace(evaluation=config.evaluation.model_copy(update={"metric": OWN_REWARD}))
    algorithm = composed(config, algorithm, own, [r.name for r in rewards])
    draws = partial(takes_sources, config, given.model)
    sources = prompt_sources(config, given.prompts, given.test_prompts, algorithm.reads, draws)
    sets = prompt_sets(config, sources, say, partial(guidance_kind, config, given.model))
    pictures = pictures_of(config, algorithm, sets["train"], own=given.prompts is not None)
    config = with_grid(config, algorithm, given.model)
    depends = identity(config, algorithm, sources, given.named)
    judges = judges_of(config, rewards, sets)
    check_gradients(config, algorithm, given.model, rewards, own)
    check_before_loading(config, algorithm, given.model, own, world, say)
    return LookedAt(config, algorithm, rewards, judges, sets, pictures, depends)


def train(
    config: Config,
    *,
    model: Model | None = None,
    reward: Reward | Callable | Sequence[Reward | Callable] | None = None,
    prompts: PromptsLike | None = None,
    test_prompts: PromptsLike | None = None,
    algorithm: Algorithm | None = None,
    quiet: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
) -> Run:
    """Trains as `config` says; objects given here take the place of what it names.

    `reward`: a `Reward`, a function of (images, prompts) or (images, prompts, metadata) → scores, or several; their sum
    is then what the best weights are chosen and reported by, unless `evaluation.metric` names one of them or of
    `evaluation.gold`. `prompts`: texts, `Prompt`s or mappings with a "prompt"; they are also used for validation, and
    for the held-out test unless `test_prompts` is given. Where the algorithm takes given samples, the pictures that the
    training prompts name are looked for beside `config.data.train`; those of `prompts`, in the working directory.

    `resume`: go on with the run in `config.output` from its newest whole checkpoint (from the start, if it died before
    the first); `allow_changes`: with another configuration than it was started with. A resumed run ends as the
    uninterrupted one would have, bitwise on a CPU. Under torchrun every process calls this alike.

    A run owns its folder: `config.output` must be new, empty, or that of the run that is gone on with. It also records
    what it depends on (`train.identity`), and is gone on with by nothing else: what differs is named.

    Everything is checked before the first forward. Raises ValueError for bad input, CheckpointError where there is
    nothing to resume, GuardError when a guard stops the run (the best weights so far are saved), and Interrupted after
    SIGTERM, SIGHUP or Ctrl-C, when the run's state has been kept. Interrupted is a SystemExit: a script that does not
    catch it ends without a traceback, with status 143, 129 or 130.
    """
    return train_run(config, Given(model, reward, prompts, test_prompts, algorithm), quiet, resume, allow_changes)


def train_run(config: Config, given: Given, quiet: bool, resume: bool, allow_changes: bool) -> Run:
    """`train` with the objects as one."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    try:
        with joined(resolved_device(config.device)) as world:
            return _train(config, given, world, quiet, resume, allow_changes)
    except KeyboardInterrupt:  # before the run could keep anything, or a second Ctrl-C: at once
        print("tempflow: interrupted", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None


def _train(config: Config, given: Given, world: World, quiet: bool, resume: bool, allow_changes: bool) -> Run:
    display, folder = Display(config.name, config.iterations, quiet or not world.first), Path(config.output)
    ready = looked_at(config, given, world, resume, display.say)
    config, algorithm, own = ready.config, ready.algorithm, ready.identity
    saved = resumable(folder, config, own, allow_changes, display.say) if resume else None
    baseline = borrowed_baseline(config, own, display.say) if saved is None else None
    check_reference(config, algorithm)
    prepare(*ready.judges)
    model = prepare_model(config, world, display.say) if given.model is None else on_grid(config, given.model)
    encode_ahead(config, model, [prompt for part in ready.prompts.values() for prompt in part], world)
    by_config = given.reward is None
    algorithm = by_stream(config, algorithm, model, ready.prompts["train"][0]) if by_config else algorithm
    context, learners = context_of(
        config, model, algorithm, ready.rewards, not by_config, ready.pictures, world, display.say
    )
    check_guided(config, algorithm, context.guidance, model, ready.prompts["train"][0])
    world.wait()  # all have read what the records will write over
    with closing(Records(folder, to_yaml(config), own, resumed=resume, write=world.first)) as records:
        dumped = config.model_dump(mode="json")
        trackers = open_trackers(config.track, config.name, folder, dumped) if world.first else []
        trainer = Trainer(config, context, learners, ready.judges, ready.prompts, records, display, trackers, baseline)
        if saved is not None:
            trainer.restore(saved)
        elif resume:
            records.cut({})
        return trainer.run()
