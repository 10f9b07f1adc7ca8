"""The state of one run while it goes on: before, the iterations, after; and how it is kept and put back."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from safetensors import SafetensorError

from tempflow.config import OWN_REWARD, Config, to_yaml
from tempflow.core.follow import Ema
from tempflow.data.prompts import Prompt
from tempflow.data.sampler import prompts_for
from tempflow.evaluate import pictures
from tempflow.folder import put, seal
from tempflow.rewards.protocol import Reward
from tempflow.train import checkpoint, guards
from tempflow.train.display import Display
from tempflow.train.faults import check_credit, check_scored, tell_broken
from tempflow.train.followers import Followers
from tempflow.train.gallery import Gallery
from tempflow.train.interrupt import Interrupt, Interrupted
from tempflow.train.kept import Looks, described, kept_tensors, optimizer_of, restored
from tempflow.train.learn import update
from tempflow.train.records import Records, Run, cost
from tempflow.train.setting import Clock, Counter, Setting
from tempflow.train.step import collect, credit, rollout_metrics
from tempflow.train.steps import steps_of
from tempflow.train.track import Tracker
from tempflow.train.watcher import Watcher
from tempflow.train.weightsets import Trainable, WeightSet

GRID = 24
"""Pictures in the before/after grid."""

SHOWN = 8
"""Pictures that trackers are given at a time."""

DISK = (OSError, SafetensorError)
"""What a full or broken disk raises."""


class Session:
    """One run. `run` does it all; `restore` puts it where a checkpoint left it."""

    def __init__(
        self,
        config: Config,
        setting: Setting,
        trainable: Trainable,
        followers: Followers,
        judges: Sequence[Reward],
        prompts: Mapping[str, Sequence[Prompt]],
        records: Records,
        display: Display,
        trackers: Sequence[Tracker],
        looks: Looks | None = None,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.records, self.display, self.trackers = records, display, trackers
        self.interrupt = Interrupt()
        alone = setting.world.size == 1  # several ranks agree between iterations, so that none waits for another
        self.setting = replace(setting, pause=self.interrupt.check) if alone else setting
        self.world, self.model, self.trainable, self.followers = setting.world, setting.model, trainable, followers
        self.average = WeightSet(trainable, Ema(config.optimizer.ema_decay)) if config.optimizer.ema_decay else None
        self.gallery = Gallery(config, self.setting, judges, self._say)
        self.optimizer = optimizer_of(config, trainable)
        counter = Counter(guided=setting.guidance != 1)
        self.counter, self.watcher = counter, Watcher(config.guards, records.alarms, self._say)
        self.done, self.seconds = 0, 0.0
        self.best: tuple[float, int] | None = None
        self.looks = looks
        self.told = set[tuple[str, int]]()  # ways in which samples broke that have been said
        self.whole = False  # whether the state is one between two iterations, from which a run can go on
        self.kept: int | None = None  # the iteration that the newest checkpoint is of

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
                self._say(f"stopped after {self.done} of {self.config.iterations} iterations; nothing is lost")
                self._say(f"to go on: {self.records.go_on}")
                raise
            except Exception as error:
                self._leave(error)
                if isinstance(error, DISK):
                    raise guards.GuardError(f"{_short(error)}. Free some space or mend the disk, then go on") from error
                raise
            finally:
                for tracker in self.trackers:
                    tracker.close()

    def _run(self) -> Run:
        if self.looks is None:
            test = self.prompts["test"]
            self.display.doing(f"test of the untrained model, {len(test)} pictures")
            self.looks = Looks(
                self.gallery.look(test, "test", training=False),
                self.gallery.drawn(test[:GRID]),
                self.gallery.yardstick(self.prompts),
            )
        metric = self.config.evaluation.metric
        self._say(f"before: held-out {metric} {self.looks.before.mean(metric):.3f}")
        if self._due(self.done):
            self._keep(best=self._validate())
        while self.done < self.config.iterations:
            self._iterate()
            if self.world.any(self.interrupt.asked):
                self.whole = True
                raise self.interrupt.interrupted()
        self._use_best()
        return self._finish(self.looks)

    def _leave(self, error: Exception) -> None:
        """After a fault: keeps what is whole, saves the best weights where a guard stopped the run, says how to go on.

        What fails on top of the fault is said, no more: the fault is the news.
        """
        unkept = self.whole and self.kept != self.done and self.world.size == 1
        steps = [lambda: self._keep(best=False)] if unkept else []
        if isinstance(error, guards.GuardError) and self.looks is not None:
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
        self.whole = self.looks is not None
        yield
        self.whole = False

    def _iterate(self) -> None:
        iteration, clock, started = self.done, Clock(), time.perf_counter()
        before = (replace(self.counter), self.watcher.state, self.records.sizes())
        warm = min(1.0, (iteration + 1) / (self.config.optimizer.warmup_iterations + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * warm
        try:
            metrics = self._learn(iteration, clock)
        except (Exception, Interrupted):
            if self.whole:
                self.counter, self.watcher.state, sizes = before  # the iteration will be done anew, from its start
                self.records.cut(sizes)
            raise
        self.done += 1
        self.seconds += time.perf_counter() - started
        self.records.iteration(self.done, metrics, self.counter, clock)
        for tracker in self.trackers:
            tracker.log({**metrics, **cost(self.counter)}, self.done)
        better = self._validate() if self._due(self.done) else False
        if self.config.track.images_every and self.done % self.config.track.images_every == 0:
            self._show()
        if better or self.done % self.config.checkpoint.every == 0 or self.done == self.config.iterations:
            self._keep(best=better)
        self.display.advance(self.done, metrics, self.records.evaluations[-1])

    def _learn(self, iteration: int, clock: Clock) -> dict[str, float]:
        """One iteration's experience and updates; its metrics."""
        config, setting = self.config, self.setting
        pool = self.prompts["train"]
        chosen = [pool[i] for i in prompts_for(iteration, pool, config.data.prompts_per_iteration, config.seed)]
        self._gathered()
        with self._untouched():
            experience = collect(setting, chosen, iteration, self.counter, clock)
            tell_broken(experience, chosen, self._say, self.told)
            check_scored(setting, experience, iteration + 1)
            given = credit(setting, experience)
            check_credit(given, iteration + 1)
        seen = rollout_metrics(experience, given.advantage)
        skip = self.watcher.rollout(iteration + 1, experience.signals)
        sets = (self.trainable, self.average, self.optimizer)
        try:
            learned = update(setting, experience, given, *sets, iteration, self.counter, clock, self.watcher, skip)
        except Interrupted:  # only before the first step of the optimizer
            self.whole = True
            raise
        self.followers.update()
        self.watcher.update(iteration + 1, seen | learned)
        rule = experience.rule(setting.algorithm.credit)
        self.records.steps(iteration + 1, steps_of(rule, *experience.credited, given))
        return seen | learned

    def _due(self, done: int) -> bool:
        """Whether the weights after `done` iterations are to be validated and have not been."""
        every = self.config.evaluation.every
        wanted = done in (0, self.config.iterations) or (every > 0 and done % every == 0)
        return wanted and not (self.records.evaluations and self.records.evaluations[-1]["iteration"] == done)

    def _validate(self) -> bool:
        """Judges the averaged weights on the validation prompts; whether they are the best so far."""
        started = time.perf_counter()
        with self._untouched(), self._evaluated():
            report = self.gallery.look(self.prompts["validation"], "validation", training=True)
        score = report.mean(self.config.evaluation.metric)
        better = self.best is None or math.isnan(self.best[0]) or score > self.best[0]
        if better:
            self.best = (score, self.done)
        gold = {name: report.mean(name) for name in self.config.evaluation.gold}
        self.records.evaluation(self.done, report, self.counter)
        for tracker in self.trackers:
            tracker.log({f"validation/{name}": report.mean(name) for name in report.scores.names}, self.done)
        self.seconds += time.perf_counter() - started
        self.watcher.validation(self.done, report.mean(OWN_REWARD), gold)
        return better

    # -------------------------------------------------------------------------------------------------- looking
    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Inside, the network computes with the weights that are judged and kept: the average, if there is one."""
        if self.average is None:
            yield
            return
        self._scattered()
        with self.average.applied():
            try:
                yield
            finally:
                self._scattered()

    def _show(self) -> None:
        """The averaged weights' pictures of the first validation prompts, for the trackers."""
        prompts = self.prompts["validation"][:SHOWN]
        with self._evaluated():
            media = self.gallery.drawn(prompts)
        for tracker in self.trackers:
            tracker.images("validation", [(p.text, m.numpy()) for p, m in zip(prompts, media, strict=True)], self.done)

    def _gathered(self) -> None:
        """A sharded network computes without exchange until the next update."""
        if self.setting.shards is not None:
            self.setting.shards.gather()

    def _scattered(self) -> None:
        """A sharded network's parts are what counts again: they may be changed."""
        if self.setting.shards is not None:
            self.setting.shards.scatter()

    def _say(self, line: str) -> None:
        if self.world.first:
            self.display.say(line)

    # -------------------------------------------------------------------------------------------------- keeping
    def _keep(self, best: bool) -> None:
        """A checkpoint of the run as it stands between two iterations. Raises GuardError when it cannot be written."""
        assert self.looks is not None
        self._scattered()
        try:
            checkpoint.save(
                self.records.folder,
                self.done,
                kept_tensors(self.trainable, self.average, self.optimizer, self.looks) | self.followers.tensors(),
                {
                    "counter": asdict(self.counter),
                    "followers": self.followers.updates(),
                    "average_updates": 0 if self.average is None else self.average.updates,
                    "best": self.best,
                    "seconds": self.seconds,
                    "guards": self.watcher.state,
                    "looks": described(self.looks),
                    "records": self.records.sizes(),
                    "config": to_yaml(self.config),
                    "identity": self.records.identity.to_json(),
                },
                best=best,
                keep=self.config.checkpoint.keep,
                world=self.world,
            )
        except DISK as error:
            raise guards.GuardError(
                f"checkpoint of iteration {self.done} could not be written: {error}. Older ones are whole; free some "
                f"space, then: {self.records.go_on}"
            ) from error
        self.kept = self.done

    def restore(self, saved: checkpoint.Saved) -> None:
        """Goes on from a checkpoint; what the records say of later iterations is taken back."""
        state, tensors = saved.state, saved.tensors
        self.trainable.load(tensors[checkpoint.WEIGHTS])
        if self.average is not None:
            self.average.load(tensors[checkpoint.AVERAGE], state["average_updates"])
        self.followers.load(tensors, state["followers"])
        checkpoint.load_optimizer(self.optimizer, self.trainable.names, tensors.get(checkpoint.OPTIMIZER, {}))
        self.counter = Counter(**state["counter"])
        self.done, self.seconds, self.watcher.state = state["iteration"], state["seconds"], state["guards"]
        self.kept = self.done
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.looks = restored(state["looks"], tensors["looks"])
        if self.world.first:
            self.records.cut(state["records"])
        self.world.wait()  # the others read what is left
        if not self.world.first:
            self.records.cut(state["records"])

    def _use_best(self) -> None:
        """The network takes the best weights so far, and they are saved as the run's model."""
        weights, shards = checkpoint.best_weights(self.records.folder, self._say), self.setting.shards
        if shards is not None:
            shards.scatter()
        self.trainable.load(weights)
        self._gathered()
        if self.world.first:
            fresh = self.records.folder / ".model.new"
            shutil.rmtree(fresh, ignore_errors=True)
            self.model.save(str(fresh), None if shards is None else shards.whole_with(weights))
            seal(fresh, "model")
            put(fresh, self.records.folder / "model")
        self.world.wait()

    def _finish(self, looks: Looks) -> Run:
        """After: the test once more, pictures, summary."""
        assert self.best is not None
        test = self.prompts["test"]
        self.display.doing(f"test of the trained model, {len(test)} pictures")
        after, grid_after = self.gallery.look(test, "test", training=True), self.gallery.drawn(test[:GRID])
        run = Run(
            folder=self.records.folder,
            metric=self.config.evaluation.metric,
            before=looks.before,
            after=after,
            yardstick=looks.yardstick,
            best_iteration=self.best[1],
            counter=self.counter,
            seconds=self.seconds,
            model=self.model,
        )
        if self.world.first:
            texts = [p.text for p in test[:GRID]]
            pictures.before_after(looks.grid, grid_after, texts, run.folder / "before_after.png")
            self.records.summary(run, self.best[0])
            try:
                pictures.curve(self.records.evaluations, run.metric, run.folder / "curve.png")
            except ImportError as error:
                self._say(f"no curve.png: {error}")
            self.display.summary(run)
        return run


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
