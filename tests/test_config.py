import math
from functools import reduce
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tempflow import algorithms
from tempflow.algorithms import ALGORITHMS, tempflow_grpo
from tempflow.cli.options import assign
from tempflow.cli.parse import runs_of
from tempflow.config import (
    Config,
    ModelConfig,
    Stages,
    algorithm_config,
    load_config,
    load_stages,
    parse_config,
    to_yaml,
)
from tempflow.core.cost import Cost
from tempflow.core.dynamics import ModelJump
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.cost import latent_shape, run_cost
from tempflow.data.prompts import load_prompts
from tempflow.media import Size
from tempflow.recipes import RECIPES
from tempflow.recipes.zoo import ENTRIES
from tempflow.strict import ConfigError, leaves

LEAST = {"name": "run", "iterations": 20, "algorithm": {"name": "tempflow_grpo"}}


def config(**changes) -> Config:
    return parse_config(LEAST | changes)


def fault(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- wrong configs
def alg(name: str = "tempflow_grpo", **parameters) -> dict:
    return {"algorithm": {"name": name, **parameters}}


WRONG = [
    # unknown fields
    ({"foo": 1}, "foo: unknown field; there are name, seed, iterations"),
    ({"iteration": 1}, "iteration: unknown field; did you mean 'iterations'?"),
    (alg(sedes=2), "algorithm.sedes: unknown field; did you mean 'seeds'?"),
    (alg(group=2), "algorithm.group: unknown field; did you mean 'branches'?"),
    (alg("flow_grpo", seeds=2), "algorithm.seeds: unknown field"),
    ({"optimizer": {"learning_rat": 1.0}}, "optimizer.learning_rat: unknown field; did you mean 'learning_rate'?"),
    ({"rewards": [{"nam": "shapes"}]}, "rewards.0.nam: unknown field; did you mean 'name'?"),
    # missing, and of another type
    ({"iterations": None}, "iterations: None is not a whole number"),
    ({"iterations": "ten"}, "iterations: 'ten' is not a whole number"),
    ({"iterations": 2.5}, "iterations: 2.5 is not a whole number"),
    ({"iterations": True}, "iterations: True is not a whole number"),
    ({"name": 3}, "name: 3 is not a text (in YAML, quote it)"),
    ({"model": 3}, "model: 3 is not a mapping of fields"),
    ({"algorithm": "tempflow_grpo"}, "algorithm: 'tempflow_grpo' is not a mapping of fields"),
    (
        {"algorithm": {"seeds": 2}},
        f"algorithm.name: missing; nearest valid: one of {', '.join(ALGORITHMS)}",
    ),
    ({"algorithm": {"name": ["x"]}}, "algorithm.name: ['x'] is not a text"),
    (alg(seeds="2"), "algorithm.seeds: '2' is not a whole number; the default is 4"),
    (
        {"optimizer": {"learning_rate": "fast"}},
        "optimizer.learning_rate: 'fast' is not a number; the default is 0.0001",
    ),
    ({"rewards": "shapes"}, "rewards: 'shapes' is not a list"),
    # ranges
    ({"iterations": 0}, "iterations: 0 must be ≥ 1; nearest valid: 1"),
    ({"threads": 0}, "threads: 0 must be ≥ 1; nearest valid: 1"),
    ({"rollout_rows": 0}, "rollout_rows: 0 must be ≥ 1; nearest valid: 1"),
    ({"rollout_leaves": 0}, "rollout_leaves: 0 must be ≥ 1; nearest valid: 1"),
    ({"train_rows": -4}, "train_rows: -4 must be ≥ 1; nearest valid: 1"),
    ({"model": {"guidance": 0.5}}, "model.guidance: 0.5 must be ≥ 1.0; nearest valid: 1.0"),
    ({"model": {"lora_rank": 0}}, "model.lora_rank: 0 must be ≥ 1; nearest valid: 1"),
    ({"model": {"height": 0}}, "model.height: 0 must be ≥ 1; nearest valid: 1"),
    ({"data": {"prompts_per_iteration": 0}}, "data.prompts_per_iteration: 0 must be ≥ 1; nearest valid: 1"),
    ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate: 0 must be above 0.0; the default is 0.0001"),
    ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: inf is not a finite number"),
    ({"optimizer": {"ema_decay": 1.0}}, "optimizer.ema_decay: 1.0 must be below 1.0; the default is 0.0"),
    ({"optimizer": {"ema_decay": -0.1}}, "optimizer.ema_decay: -0.1 must be ≥ 0.0; nearest valid: 0.0"),
    ({"evaluation": {"steps": 0}}, "evaluation.steps: 0 must be ≥ 1; nearest valid: 1"),
    ({"evaluation": {"guidance": 0.0}}, "evaluation.guidance: 0.0 must be ≥ 1.0; nearest valid: 1.0"),
    # names and choices
    ({"model": {"dtype": "int8"}}, "model.dtype: 'int8' is not one of auto, float32, bfloat16, float16"),
    ({"model": {"training": "LoRA"}}, "model.training: 'LoRA' is not one of full, lora; nearest valid: 'lora'"),
    (alg("tempflow_grp"), "algorithm.name: 'tempflow_grp' is no known algorithm; nearest valid: 'tempflow_grpo'"),
    (alg(weight="noise"), "algorithm.weight: 'noise' is not one of noise_aware, uniform, rectified; nearest valid: "),
    (alg("flow_grpo", kl_form="exac"), "algorithm.kl_form: 'exac' is not one of exact, drift, velocity"),
    ({"device": "gpu"}, "device: 'gpu' is no device; nearest valid: 'cuda'"),
    ({"device": "cuda:x"}, "device: 'cuda:x' is no device; nearest valid: 'cuda"),
    ({"name": "a b/c"}, "name: 'a b/c' names a folder too"),
    ({"name": "../up"}, "nearest valid: 'up'"),
    ({"rewards": [{"name": "shape"}]}, "rewards.0.name: 'shape' is no known reward; nearest valid: 'shapes'"),
    ({"rewards": [{"name": "os:system"}]}, "rewards.0.name: 'os:system': a configuration names known rewards only"),
    ({"evaluation": {"metric": "strict"}}, "evaluation.metric: 'strict' is no known reward; nearest valid: 'shapes_st"),
    ({"data": {"train": "shapes:trian"}}, "data.train: 'shapes:trian' names no split of the shapes world; nearest"),
    ({"data": {"test": "a.pdf"}}, "data.test: 'a.pdf' is neither 'shapes:SPLIT' nor a .txt, .jsonl,"),
    # what takes several fields
    ({"rewards": []}, "rewards: [] leaves nothing to learn from; nearest valid: [{name: shapes}]"),
    ({"rewards": [{"name": "shapes"}] * 2}, "rewards: 'shapes' is named twice"),
    ({"rewards": [{"name": "shapes", "weight": 0.0}]}, "rewards: all weights are 0"),
    ({"rewards": [{"name": "shapes", "weight": math.nan}]}, "rewards.0.weight: nan is not a finite number"),
    ({"model": {"revision": "main"}}, "model.revision: 'main' is for hub ids, 'shapes' has none; nearest valid: null"),
    (
        {"optimizer": {"updates_per_iteration": 1729}},
        "optimizer.updates_per_iteration: 1729 updates share 1728 trained edges of an iteration; nearest valid: 1728",
    ),
    # geometry, as the algorithm's own function says it
    (alg(branches=0), "algorithm.branches: 0 must be at least 1; nearest valid: 1"),
    (alg(branches=1), "algorithm.branches: 1 must be at least 2, or a seed's group has nothing to compare with"),
    (alg(steps=1), "algorithm.steps: 1 must be at least 2"),
    (alg(branch_steps=10), "algorithm.branch_steps: 10 must be in 1 … 9; nearest valid: 9"),
    (alg(noise_level=0.0), "algorithm.noise_level: 0.0 must be finite and above 0; 0.7 is usual"),
    (alg(kl=-1.0), "algorithm.kl: -1.0 must be"),
    (alg("flow_grpo", group=1), "algorithm.group: 1 must be at least 2, or there is nothing to compare with"),
]


@pytest.mark.parametrize("changes,message", WRONG)
def test_wrong_configurations_say_what_is_wrong(changes, message):
    said = fault(**changes)
    assert said.startswith(message) or message in said
    assert len(said.splitlines()) == 1 and "validation error" not in said


def test_all_faults_are_told_at_once():
    said = fault(iterations=0, device="gpu", model={"guidance": 0.0}, rewards=[{"name": "shape"}])
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "iterations",
        "device",
        "model.guidance",
        "rewards.0.name",
    ]


def test_missing_fields_are_named():
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x"})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["iterations", "algorithm"]


@pytest.mark.parametrize("given", [None, 3, "x", ["name"]])
def test_what_is_no_mapping(given):
    with pytest.raises(ConfigError, match="a configuration is a mapping of fields"):
        parse_config(given)


def test_python_users_get_the_same_checks():
    with pytest.raises(ValidationError, match="sedes: unknown field; did you mean 'seeds'"):
        Config(name="x", iterations=1, algorithm={"name": "tempflow_grpo", "sedes": 1})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        config().iterations = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- right configs
def test_yaml_round_trip_of_every_recipe(tmp_path: Path):
    for recipe in RECIPES.values():
        made = recipe()
        (tmp_path / "c.yaml").write_text(to_yaml(made), encoding="utf-8")
        read = load_stages if isinstance(made, Stages) else load_config
        assert read(tmp_path / "c.yaml") == made


@settings(deadline=None, max_examples=40)
@given(
    rate=st.floats(1e-12, 1e3),
    clip=st.floats(1e-9, 0.5),
    seed=st.integers(-(2**40), 2**40),
    threads=st.none() | st.integers(1, 64),
    weights=st.tuples(st.floats(-5, 5), st.floats(0.1, 5)),
)
def test_yaml_round_trip_of_numbers(rate, clip, seed, threads, weights):
    made = config(
        seed=seed,
        threads=threads,
        optimizer={"learning_rate": rate},
        rewards=[{"name": n, "weight": w} for n, w in zip(("shapes", "jpeg_compressibility"), weights, strict=True)],
        **alg(seeds=2, clip=clip, clip_high=None),
    )
    from tempflow.config.files import _Loader

    assert parse_config(yaml.load(to_yaml(made), _Loader)) == made
    assert parse_config(yaml.safe_load(to_yaml(made))) == made  # any YAML reader will do


def test_numbers_as_people_write_them(tmp_path: Path):
    text = "name: x\niterations: 3\nalgorithm: {name: tempflow_grpo, clip: 1e-3, kl: 0, eps: 1.5E-05}\n"
    (tmp_path / "c.yml").write_text(text)
    made = load_config(tmp_path / "c.yml")
    assert dict(made.algorithm)["clip"] == 1e-3 and dict(made.algorithm)["kl"] == 0.0
    assert dict(made.algorithm)["eps"] == 1.5e-5


def test_defaults():
    made = config()
    assert made.output == "runs/run" and made.size == Size(32, 32) and made.reward_weights == {"shapes": 1.0}
    assert config(output="elsewhere").output == "elsewhere"
    assert (made.optimizer.learning_rate, made.optimizer.beta1, made.optimizer.beta2) == (1e-4, 0.9, 0.99)
    assert config(evaluation={"metric": "reward"}).evaluation.metric == "reward"
    assert config(model={"path": "org/model", "revision": "main"}).model.revision == "main"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_fields_are_the_function_s_parameters(name):
    made = parse_config(LEAST | {"algorithm": {"name": name}}).algorithm
    built, direct = made.build(), ALGORITHMS[name]()
    assert (built.credit, built.objective, built.dynamics) == (direct.credit, direct.objective, direct.dynamics)
    assert built.plan(0, 0) is direct.plan(0, 0) if built.rolls_out else built.phases == direct.phases
    for field, info in algorithm_config(name).model_fields.items():
        assert info.description, f"{field} is not described in the docstring's Args"


def test_parameters_reach_the_algorithm():
    built = config(
        **alg(seeds=2, branches=3, steps=5, std_group="batch", clip=1e-2, weight="uniform")
    ).algorithm.build()
    direct = tempflow_grpo(seeds=2, branches=3, steps=5, std_group="batch", clip=1e-2, weight="uniform")
    assert (built.credit, built.phases) == (direct.credit, direct.phases)
    assert built.plan(0, 0) is direct.plan(0, 0)


THIRD_PARTY = '''
from tempflow.algorithms import tempflow_grpo

def my_grpo(noise: float, seeds: int = 3):
    """Mine.

    Args:
        noise: how much,
            in units.
        seeds: how many.
    """
    return tempflow_grpo(noise_level=noise, seeds=seeds)
'''


def test_a_third_party_s_algorithm_is_configured_by_its_signature(monkeypatch, tmp_path):
    (tmp_path / "third_party_grpo.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    points = EntryPoints([EntryPoint("my_grpo", "third_party_grpo:my_grpo", "tempflow.algorithms")])
    monkeypatch.setattr(algorithms, "entry_points", points.select)
    algorithm_config.cache_clear()
    try:
        made = config(**alg("my_grpo", noise=0.5))
        assert made.algorithm.build().dynamics == tempflow_grpo(noise_level=0.5).dynamics
        assert algorithm_config("my_grpo").model_fields["noise"].description == "how much, in units."
        assert "noise: 0.5" in to_yaml(made)
        assert fault(**alg("my_grpo")).startswith("algorithm.noise: missing")
    finally:
        algorithm_config.cache_clear()


NO_PLACES = (
    "name",
    "device",
    "model.revision",
    "model.accept_licence",
    "model.attention",
    "model.lora_targets",
    "evaluation.metric",
    "evaluation.gold",
    "track.project",
    "algorithm.name",
)
"""Texts that name nothing on the disk."""


@pytest.mark.parametrize("name", ["tempflow_grpo", "drm_grpo", "vipo", "perceptual_entropy"])
def test_home_is_read_in_every_field_that_may_name_a_place(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    fields = leaves(Config, alg(name))
    texts = [
        path for path, field in fields.items() if "str" in str(field.annotation) and "dict" not in str(field.annotation)
    ]
    places = [
        path for path in texts if path not in NO_PLACES and not path.startswith(("rewards.", "evaluation.rewards."))
    ]
    assert {"output", "model.path", "model.start", "data.train", "evaluation.before"} <= {*places}
    tree = {**LEAST, **alg(name)}
    for path in places:
        assign(tree, path, "~/p.txt")
    made = parse_config(tree).model_dump()
    assert parse_config({**LEAST, "model": {"start": ["~/a", "b"]}}).model.starts == ("/home/me/a", "b")
    for path in places:
        assert reduce(dict.__getitem__, path.split("."), made) == "/home/me/p.txt", path


# -------------------------------------------------------------------------------------------------------- files
BROKEN_FILES = [
    ("name: x\nname: y\n", "c.yaml is not YAML: 'name' is given twice"),
    ("name: [x\n", "c.yaml is not YAML:"),
    ("name: !!python/object/apply:os.system ['true']\n", "c.yaml is not YAML: could not determine a constructor"),
    ("", "c.yaml: a configuration is a mapping of fields, not NoneType"),
    ("- name: x\n", "c.yaml: a configuration is a mapping of fields, not list"),
    (
        "name: x\niterations: 3\nalgorithm: {name: flow_grpo, group: 1}\n",
        "c.yaml: algorithm.group: 1 must be at least 2",
    ),
]


@pytest.mark.parametrize("text,message", BROKEN_FILES)
def test_broken_files(tmp_path: Path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert message in str(caught.value)


def test_missing_and_oversized_files(tmp_path: Path):
    (tmp_path / "shapes.yaml").write_text("x" * (2**20 + 1))
    with pytest.raises(ConfigError, match=r"shape\.yaml is no file; nearest valid: .*shapes\.yaml"):
        load_config(tmp_path / "shape.yaml")
    with pytest.raises(ConfigError, match="has 1048577 bytes; a configuration has at most 1048576"):
        load_config(tmp_path / "shapes.yaml")


# ------------------------------------------------------------------------------------------------------ recipes
def test_recipes_are_named_as_in_the_list_and_their_embedded_prompts_exist():
    for name, recipe in RECIPES.items():
        made = recipe()
        assert recipe.__name__ == name and made.name == name.replace("_", "-") and made.output == f"runs/{made.name}"
        for _, run in runs_of(made):
            for source in (run.data.train, run.data.validation, run.data.test):
                assert not source.startswith("shapes:") or load_prompts(source)


def test_every_algorithm_has_a_recipe_on_shapes():
    """Those that start from pictures on disk, make few-step students or climb a reward's gradient have no row on the
    leaderboard; nor have those of tokens, whose world is another."""
    tokens = {name for name, make in ALGORITHMS.items() if isinstance(make().dynamics, ModelJump)}
    rolls_out = {name for name, make in ALGORITHMS.items() if make().rolls_out} - tokens
    assert {entry.algorithm["name"] for entry in ENTRIES} == rolls_out - {"diffusion_dpo", "sft", "rtdmd"}
    ours = [recipe for name, recipe in RECIPES.items() if name.startswith(("leaderboard_", "shapes_"))]
    named = {run.algorithm.name for recipe in ours for _, run in runs_of(recipe())}
    assert named == ALGORITHMS.keys()


def test_the_sd35_recipe_has_the_papers_settings():
    made = RECIPES["sd35_medium_tempflow"]()
    told = {
        "path": "stabilityai/stable-diffusion-3.5-medium",
        "dtype": "bfloat16",
        "height": 512,
        "width": 512,
        "guidance": 4.5,
        "training": "lora",
        "lora_rank": 32,
        "lora_alpha": 64,
    }
    assert made.model == ModelConfig(**told)  # and nothing else is set
    assert made.algorithm.build().objective == tempflow_grpo().objective
    assert made.algorithm.build().plan(0, 0).cost().forwards == 1116
    assert (made.optimizer.learning_rate, made.optimizer.updates_per_iteration) == (3e-4, 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("segment_matching", {"cost": (0, 0, 4, 16), "rate": 3e-5, "prompts": 72, "side": 512, "useful": True}),
        ("dmd2", {"cost": (44, 0, 11, 2), "rate": 3e-5, "prompts": 72, "side": 512, "useful": True}),
        ("dp_dmd", {"cost": (21, 0, 9, 12), "rate": 1e-5, "prompts": 32, "side": 1024, "useful": True}),
        ("rats", {"cost": (32, 16, 64, 384), "rate": 3e-5, "prompts": 16, "side": 512, "useful": True}),
        ("opd", {"cost": (0, 0, 10, 20), "rate": 3e-5, "prompts": 72, "side": 512, "useful": False}),
    ],
)
def test_recipes_of_students_have_the_published_settings(name: str, told: dict):
    made = RECIPES[f"sd35_medium_{name}"]()
    cost = sum((p.cost(made.algorithm.steps, None) for p in made.algorithm.build().phases), Cost(0, 0, 0))
    m, e = made.model, made.evaluation
    assert (cost.forwards, cost.leaves, cost.trained_edges, cost.alone) == told["cost"]
    assert (made.optimizer.learning_rate, made.data.prompts_per_iteration) == (told["rate"], told["prompts"])
    assert (m.guidance, e.guidance, e.steps, m.height) == (1, 1, made.algorithm.steps, told["side"])
    assert (m.grid == "useful") == told["useful"] and m.path == "stabilityai/stable-diffusion-3.5-medium"
    assert m.training == "full" if name == "dp_dmd" else (m.lora_rank, m.lora_alpha) == (32, 64)


PUBLISHED = {  # forwards, trained edges and leaves of a prompt; prompts; evaluation's steps; guidance; EMA; path
    "flux1_dev_flow_grpo": ((144, 120, 24), 48, 28, 3.5, 0.9, "black-forest-labs/FLUX.1-dev"),
    "qwen_image_flow_grpo": ((160, 32, 16), 32, 50, 4.0, 0.0, "Qwen/Qwen-Image"),
    "z_image_flow_grpo": ((160, 16, 16), 48, 40, 5.0, 0.9, "Tongyi-MAI/Z-Image"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_other_families_have_the_published_settings(name: str):
    made = RECIPES[name]()
    cost, prompts, steps, guidance, ema, path = PUBLISHED[name]
    m, o = made.model, made.optimizer
    of_prompt = made.algorithm.build().plan(0, 0).cost()
    assert (of_prompt.forwards, of_prompt.trained_edges, of_prompt.leaves) == cost
    assert (made.data.prompts_per_iteration, made.evaluation.steps) == (prompts, steps)
    assert (m.path, m.guidance, made.evaluation.guidance) == (path, guidance, guidance)
    assert (m.height, m.width, m.training, m.lora_rank, m.lora_alpha) == (512, 512, "lora", 64, 128)
    assert (o.learning_rate, o.beta2, o.weight_decay, o.updates_per_iteration, o.ema_decay) == (
        3e-4, 0.999, 1e-4, 2, ema,
    )  # fmt: skip


def test_the_sana_recipe_has_sol_rls_settings():
    made = RECIPES["sana_sol_rl"]()
    built, draft = made.algorithm.build(), made.algorithm.build().draft
    assert draft is not None and (draft.pool, draft.steps, built.steps) == (96, 6, 10)
    assert built.plan(0, 0).cost().leaves == 24 and made.data.prompts_per_iteration == 48
    assert (made.model.height, made.model.guidance, made.evaluation.guidance, made.evaluation.steps) == (1024, 1, 1, 40)
    assert (made.optimizer.updates_per_iteration, made.optimizer.max_grad_norm, made.train_rows) == (1, 1.0, 16)


@pytest.mark.parametrize("name,guidance", [("cogview4_flow_grpo", 5.0), ("lumina2_flow_grpo", 4.0)])
def test_what_nobody_published_has_flow_grpos_settings_and_says_so(name: str, guidance: float):
    made, sd35 = RECIPES[name](), RECIPES["sd35_medium_tempflow"]()
    assert "nobody published" in (RECIPES[name].__doc__ or "")
    assert made.model.guidance == made.evaluation.guidance == guidance
    assert made.optimizer == sd35.optimizer and made.data == sd35.data
    assert made.algorithm.build().plan(0, 0).cost().leaves == 24


# --------------------------------------------------------------------------------------------------------- cost
def test_cost_of_the_papers_settings():
    cost = run_cost(config(iterations=3, data={"prompts_per_iteration": 2}, evaluation={"steps": 7}))
    assert (cost.first.forwards, cost.first.leaves, cost.first.trained_edges) == (2232, 432, 432)
    assert cost.total == cost.first * 3 and [phase.others for phase in cost.phases] == ["reference"] and not cost.guided
    assert cost.forwards == 3 * (2232 + 2 * 432)
    assert cost.equivalents == 3 * (2232 + 3 * 432 + 432)  # the policy with gradient, the reference without
    assert (cost.validation, cost.test) == (120 * 7, 504 * 7)
    free = run_cost(config(model={"guidance": 2.0}, **alg("flow_grpo", kl=0.0)))
    assert free.forwards == 20 * 8 * (240 + 216) and free.guided and not free.beside
    assert free.equivalents == 20 * 8 * (2 * 240 + (3 + 1) * 216)  # the empty prompt's row has no gradient
    judged = run_cost(config(**alg("drm_grpo", kl=0.0)))
    assert judged.equivalents == judged.total.forwards + (3 + 1) * judged.total.trained_edges  # the latent reward's row


def test_cost_adds_up_over_iterations_that_differ():
    made = config(iterations=15, **alg(branch_steps=2))
    algorithm = made.algorithm.build()
    each = [algorithm.cost(i, 8).forwards for i in range(15)]
    assert len(set(each)) > 1 and run_cost(made).total.forwards == sum(each)


@pytest.mark.parametrize("algorithm", [alg(steps=4, seeds=2, branches=3), alg("flow_grpo", steps=4, group=5)])
def test_stored_states_are_those_of_a_real_forest(algorithm):
    made = config(iterations=1, data={"prompts_per_iteration": 3}, **algorithm)
    built = made.algorithm.build()
    plans = [built.plan(0, slot) for slot in range(3)]
    shape = latent_shape(made)
    assert shape == (8, 8, 8)
    forest = rollout(plans, built.dynamics, shifted(4), lambda x, s, r: torch.zeros_like(x), Noise(0), shape=shape)
    nodes = forest.drop_leaf_states().nodes
    cost = run_cost(made)
    assert (cost.stored_nodes, cost.state_bytes) == (len(nodes), nodes[0].nbytes)


def test_latent_shape_reads_the_folder_s_json_only(tmp_path: Path):
    made = config(model={"path": str(tmp_path), "height": 512, "width": 768})
    assert latent_shape(made) is None and run_cost(made).state_bytes is None
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    for part, text in (("transformer", '{"in_channels": 16}'), ("vae", '{"block_out_channels": [1, 2, 3, 4]}')):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(text)
    assert latent_shape(made) == (16, 64, 96)
    assert run_cost(made).state_bytes == 4 * 16 * 64 * 96
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vae.config\.json does not say 'block_out_channels'"):
        latent_shape(made)


def test_the_learning_rate_rises_and_falls():
    def rates(**options):
        made = config(optimizer={"learning_rate": 1.0, **options}).optimizer
        return [made.rate(iteration, 6) for iteration in range(6)]

    assert rates() == [1.0] * 6
    assert rates(warmup_iterations=2) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert rates(decay="linear") == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(decay="linear", warmup_iterations=2) == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])
    cosine = rates(decay="cosine")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]) and cosine[-1] > 0
    assert rates(warmup_iterations=9) == pytest.approx([(n + 1) / 10 for n in range(6)])


def test_faults_of_a_section_name_its_field_with_the_section() -> None:
    run = config(algorithm={"name": "sol_rl"})
    for section, said, told in (
        ("model", "height: 33 must be a multiple of 16", "model.height: 33 must be a multiple of 16"),
        ("model", "height, width: 4×2 must be 2×2", "model.height, width: 4×2 must be 2×2"),
        ("algorithm", "draft_precision: 'fp4'", "algorithm.draft_precision: 'fp4'"),
        ("evaluation", "steps: 9", "evaluation.steps: 9"),
        ("model", "model.height: 3", "model.height: 3"),
        ("model", "draft_precision: 'fp4'", "draft_precision: 'fp4'"),
        ("model", "the height: 3", "the height: 3"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$") as plain, run.naming("data"):
            raise ValueError(said)
        with pytest.raises(ValueError, match=f"^{told}$"), run.naming(section):
            raise plain.value


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (3, "model.start: a text or several are meant (in YAML, quoted), not 3; nearest valid: ''"),
        ({"a": 1}, "model.start: a text or several are meant (in YAML, quoted), not {'a': 1}; nearest valid: ''"),
        (["a", 3], "model.start: a text or several are meant (in YAML, quoted), not 3; nearest valid: ''"),
        (["a", "b", "a"], "model.start: 'a' stands in it twice; nearest valid: once"),
    ],
)
def test_a_start_is_a_place_or_several(given, line):
    with pytest.raises(ConfigError) as caught:
        parse_config({**LEAST, "model": {"start": given}})
    assert str(caught.value) == line
    with pytest.raises(ConfigError, match=r"^model.grid: "):  # a field of one value, not a section, given a mapping
        parse_config({**LEAST, "model": {"grid": {"a": 1}}})
    for same, start in (("", ""), ([], ""), (["a"], "a"), (["a", "b"], ("a", "b"))):
        made = parse_config({**LEAST, "model": {"start": same}})
        assert made.model.start == start and made.model.starts == tuple(start and [*start])
    with pytest.raises(
        ConfigError, match=r"^model.start: a mean is of whole networks, and training is 'lora'; nearest"
    ):
        parse_config({**LEAST, "model": {"start": ["a", "b"], "training": "lora"}})
