"""The training loop: set up, look, iterate, keep the best, look again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tempflow.algorithms.base import Algorithm
from tempflow.config import OWN_REWARD, Config, to_yaml
from tempflow.data.prompts import Prompt, load_prompts
from tempflow.data.sampler import prompts_for
from tempflow.evaluate import pictures
from tempflow.evaluate.suite import Report, draw, evaluate, fixed_prompts
from tempflow.models import load
from tempflow.models.protocol import Model
from tempflow.rewards import build, from_function
from tempflow.rewards.protocol import Reward
from tempflow.train.display import Display
from tempflow.train.records import Records
from tempflow.train.step import Clock, Counter, Setting, collect, update
from tempflow.train.weights import Average, Trainable, frozen_copy

GRID = 24
"""Pictures in the before/after grid."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, the held-out scores before and after, what it cost, and the trained model."""

    folder: Path
    metric: str
    before: Report
    after: Report
    yardstick: tuple[float, Report] | None
    best_iteration: int
    counter: Counter
    seconds: float
    model: Model

    @property
    def last_line(self) -> str:
        """`held-out strict score: 0.41 -> 0.66 (+0.25), 9.8 min, 71312 forwards`."""
        a, b = self.before.mean(self.metric), self.after.mean(self.metric)
        label = {"shapes_strict": "strict score", "shapes": "graded score"}.get(self.metric, self.metric)
        minutes = f"{self.seconds / 60:.1f} min"
        return f"held-out {label}: {a:.2f} -> {b:.2f} ({b - a:+.2f}), {minutes}, {self.counter.forwards} forwards"


def train(
    config: Config,
    *,
    model: Model | None = None,
    reward: Reward | Callable | Sequence[Reward | Callable] | None = None,
    prompts: Sequence[str | Prompt] | None = None,
    test_prompts: Sequence[str | Prompt] | None = None,
    algorithm: Algorithm | None = None,
    quiet: bool = False,
) -> Run:
    """Trains as `config` says; objects given here take the place of what it names.

    `reward`: a `Reward`, a function of (images, prompts) → scores, or several; their sum is then what the best weights
    are chosen and reported by, unless `evaluation.metric` names one of them. `prompts` are also used for validation,
    and for the held-out test unless `test_prompts` is given. Everything is checked before the first forward: raises
    ValueError for bad input, GuardError when a guard stops the run (the best weights so far are saved).
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    algorithm = algorithm or config.algorithm.build()
    rewards = _rewards(config, reward)
    if reward is not None and config.evaluation.metric not in {r.name for r in rewards}:
        config = config.replace(evaluation=config.evaluation.model_copy(update={"metric": OWN_REWARD}))
    if reward is None:
        algorithm = replace(algorithm, credit=replace(algorithm.credit, reward_weights=config.reward_weights))
    extra = {config.evaluation.metric} - {OWN_REWARD, *(r.name for r in rewards)}
    judges = rewards + [build(name) for name in sorted(extra)]
    train_set = _prompts(prompts, config.data.train)
    validation = fixed_prompts(_prompts(prompts, config.data.validation), config.evaluation.validation_prompts)
    test = fixed_prompts(
        _prompts(test_prompts if test_prompts is not None else prompts, config.data.test),
        config.evaluation.test_prompts,
    )
    size = (config.model.height, config.model.width)
    model = model or prepare_model(config)
    setting = Setting(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(algorithm.steps, size),
        size=size,
        guidance=config.model.guidance,
        rewards=rewards,
        seed=config.seed,
        rollout_rows=config.rollout_rows,
        train_rows=config.train_rows,
        updates=config.optimizer.updates_per_iteration,
        max_grad_norm=config.optimizer.max_grad_norm,
        reference=frozen_copy(model.network) if "reference" in algorithm.objective.weight_sets else None,
    )
    model.noise_shape(size)
    return _Session(config, setting, judges, train_set, validation, test, quiet).run()


def prepare_model(config: Config) -> Model:
    """Loads the model and marks what is trained."""
    m = config.model
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model = load(m.path, revision=m.revision, dtype=m.dtype, device=device)
    if m.training == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # LoRA's initial weights are a function of the run's seed
            model.add_lora(m.lora_rank, m.lora_alpha)
    else:
        model.train_fully()
    return model


def _rewards(config: Config, given: Reward | Callable | Sequence[Reward | Callable] | None) -> list[Reward]:
    if given is None:
        return [build(r.name) for r in config.rewards]
    items = given if isinstance(given, Sequence) else [given]
    return [item if isinstance(item, Reward) else from_function(item) for item in items]


def _prompts(given: Sequence[str | Prompt] | None, source: str) -> Sequence[Prompt]:
    if given is None:
        return load_prompts(source)
    if len(given) == 0:
        raise ValueError("prompts: the list is empty; at least one prompt is needed")
    return [p if isinstance(p, Prompt) else Prompt(p, {}) for p in given]


class _Session:
    """The state of one run while it goes on."""

    def __init__(
        self,
        config: Config,
        setting: Setting,
        judges: Sequence[Reward],
        train_set: Sequence[Prompt],
        validation: Sequence[Prompt],
        test: Sequence[Prompt],
        quiet: bool,
    ) -> None:
        self.config, self.setting, self.judges = config, setting, judges
        self.train_set, self.validation, self.test = train_set, validation, test
        self.model = setting.model
        self.trainable = Trainable(self.model.network)
        self.average = Average(self.trainable, config.optimizer.ema_decay)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trainable.masters,
            lr=o.learning_rate,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )
        self.counter = Counter()
        self.records = Records(Path(config.output), to_yaml(config))
        self.display = Display(config.name, config.iterations, quiet)
        self.best = (float("-inf"), 0, self.trainable.state())

    def run(self) -> Run:
        """Before, the iterations, after."""
        before, grid_before = self._look(self.test), self._grid()
        yardstick = self._yardstick()
        self._validate(0)
        started = time.perf_counter()
        with self.display:
            self.display.say(
                f"before: held-out {self.config.evaluation.metric} {before.mean(self.config.evaluation.metric):.3f}"
            )
            try:
                for iteration in range(self.config.iterations):
                    self._iterate(iteration)
            finally:
                seconds = time.perf_counter() - started
                score, best_iteration, weights = self.best
                self.trainable.load(weights)
                self.model.save(str(self.records.folder / "model"))
        after, grid_after = self._look(self.test), self._grid()
        run = Run(
            self.records.folder,
            self.config.evaluation.metric,
            before,
            after,
            yardstick,
            best_iteration,
            self.counter,
            seconds,
            self.model,
        )
        prompts = [p.text for p in self.test[:GRID]]
        pictures.before_after(grid_before, grid_after, prompts, run.folder / "before_after.png")
        self.records.summary(run, score)
        try:
            pictures.curve(self.records.evaluations, self.config.evaluation.metric, run.folder / "curve.png")
        except ImportError as error:
            self.display.say(f"no curve.png: {error}")
        self.display.summary(run)
        return run

    def _iterate(self, iteration: int) -> None:
        clock = Clock()
        for group in self.optimizer.param_groups:
            warmup = self.config.optimizer.warmup_iterations
            group["lr"] = self.config.optimizer.learning_rate * min(1.0, (iteration + 1) / (warmup + 1))
        kinds = [str(p.metadata.get("kind", "")) for p in self.train_set]
        chosen = prompts_for(
            iteration,
            self.train_set,
            self.config.data.prompts_per_iteration,
            self.config.seed,
            strata=kinds if all(kinds) else None,
        )
        experience = collect(self.setting, [self.train_set[i] for i in chosen], iteration, self.counter, clock)
        metrics = update(
            self.setting,
            experience,
            self.trainable,
            self.average,
            self.optimizer,
            iteration,
            self.counter,
            clock,
        )
        self.records.iteration(iteration + 1, metrics, self.counter, clock)
        every = self.config.evaluation.every
        if iteration + 1 == self.config.iterations or (every and (iteration + 1) % every == 0):
            self._validate(iteration + 1)
        self.display.advance(iteration + 1, metrics, self.records.evaluations[-1])

    def _validate(self, iteration: int) -> None:
        """The averaged weights on the validation prompts; the best so far is kept."""
        with self.average.applied():
            report = self._look(self.validation)
            score = report.mean(self.config.evaluation.metric)
            if score > self.best[0]:
                self.best = (score, iteration, self.trainable.state())
        self.records.evaluation(iteration, report, self.counter)

    def _yardstick(self) -> tuple[float, Report] | None:
        """The untrained model with the guidance that suits it best on validation, and its test report."""
        values = self.config.evaluation.yardstick
        if not values:
            return None
        metric = self.config.evaluation.metric
        best = max(values, key=lambda g: self._look(self.validation, g).mean(metric))
        return best, self._look(self.test, best)

    def _look(self, prompts: Sequence[Prompt], guidance: float | None = None) -> Report:
        e = self.config.evaluation
        weights = self.setting.algorithm.credit.reward_weights
        return evaluate(
            self.model,
            prompts,
            self.judges,
            total=dict.fromkeys((r.name for r in self.setting.rewards), 1.0) if weights is None else weights,
            steps=e.steps,
            guidance=e.guidance if guidance is None else guidance,
            seed=e.seed,
            size=self.setting.size,
            rows=self.setting.rollout_rows,
        )

    def _grid(self) -> torch.Tensor:
        e = self.config.evaluation
        return draw(
            self.model,
            [p.text for p in self.test[:GRID]],
            steps=e.steps,
            guidance=e.guidance,
            seed=e.seed,
            size=self.setting.size,
            rows=self.setting.rollout_rows,
        )
