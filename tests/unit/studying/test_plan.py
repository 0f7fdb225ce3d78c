"""`study` before its first training: what it refuses, all at once, and what it is about to train."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.squeezenet import FIRE_LAYERS, STEMS, SqueezeNetConfig
from pipeline.config.study import StudyConfig, StudyPlan, Variant
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError, DataError
from pipeline.studying.plan import Plan, make_plan
from pipeline.studying.runs import steps_for_gigabytes
from tests.making.shards import write_shards

SMALL = "'model=squeezenet_small'"
BUDGET = ("study.budget.steps=4",)


def variant(name: str, *overrides: str) -> str:
    return f"{{name:{name},overrides:[{','.join(overrides)}]}}"


def configured(
    root: Path, shards: Path, *variants: str, more: tuple[str, ...] = ("study.budget.steps=4",)
) -> StudyConfig:
    where = ["name=s", f"run_root='{root}'", f"data.root='{shards}'", "data.size=32"]
    small = "study.overrides=[batch.global_size=12]"
    return compose("study", StudyConfig, [*where, f"study.variants=[{','.join(variants)}]", small, *more])


@given(st.integers(1, 9), st.integers(1, 9))
def test_parts_have_each_variant_once(num_variants: int, num_parts: int) -> None:
    variants = tuple(Variant(name=f"v{number}") for number in range(num_variants))
    parts = range(1, min(num_parts, num_variants) + 1)
    chosen = [StudyPlan(variants=variants, part=f"{number}/{num_parts}").chosen for number in parts]
    assert sorted(variant.name for part in chosen for variant in part) == [variant.name for variant in variants]


@pytest.mark.parametrize("part", ["0/2", "3/2", "half", "4/4"])
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"study.part={part}") + "|such as 2/4"):
        StudyPlan(variants=tuple(Variant(name=name) for name in "abc"), part=part)


def test_every_fault_is_told_before_anything_starts(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = (
        variant("twice", SMALL),
        variant("twice", SMALL),
        variant("lucky", SMALL, "'seed=3'"),
        variant("other", SMALL, "'data.augment.flip=false'"),
        variant("odd", SMALL, "'batch.global_size=13'"),
        variant("coarse", "'model=alexnet'"),
        variant("greedy", SMALL, "'trainer.max_steps=9'"),
        variant("plain", SMALL, "'comm=powersgd'"),
        variant("misspelt", "'model=squeezenet_smal'"),
        variant("large", "'batch.global_size=600'", SMALL),
        variant("good", SMALL),
    )
    with pytest.raises(ConfigError, match=r"^9 faults in the study s, each told above: nothing was started"):
        make_plan(configured(tmp_path, shards, *variants))
    told = capsys.readouterr().err.splitlines()
    for said in (
        "Two variants share the name 'twice'",
        "lucky: seed is the study's own, and the same for all that is compared: set study.seeds",
        "other: data.augment.flip would differ between variants",
        "odd: batch.global_size=13 is not divisible by 2 ranks",
        "coarse: alexnet cannot take pictures of 32 x 32 pixels",
        "greedy: trainer.max_steps is the study's own, and the same for all that is compared: set study.budget",
        "plain: comm.powersgd_start_step=1000, but its runs have 4 steps",
        "misspelt: model='squeezenet_smal' does not exist. Did you mean 'squeezenet_small'?",
        "large: batch.global_size=600 is more than the 60 training pictures",
    ):
        assert len([line for line in told if line.startswith(f"error: {said}")]) == 1, said
    assert list(tmp_path.iterdir()) == []


def with_key(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of `train` as the study's own overrides."""
    of_train = [each for each in overrides if each.startswith("trainer.")]
    rest = tuple(each for each in overrides if each not in of_train)
    return (*rest, f"study.overrides=[batch.global_size=12,{','.join(of_train)}]") if of_train else rest


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "Nothing says how far to train"),
        (("study.budget.steps=4", "study.budget.seconds=9"), "has steps and seconds: keep one"),
        (("study.budget.gigabytes=-1",), "must be positive"),
        (("study.budget.steps=4", "study.seeds=[1,1]"), "names a seed twice"),
        (("study.budget.steps=4", "study.seeds=[]"), "leaves nothing to train"),
        (("study.budget.steps=4", "study.seeds=[-1]"), r"study.seeds=\[-1\] must be between 0 and"),
        (("study.budget.steps=4", "data.val_split=nope"), "no split 'nope' in these shards.* data.val_split="),
        (("study.budget.steps=4", "trainer.validate_every_steps=0"), "validate_every_steps=0 would validate nothing"),
        (("study.budget.steps=4", "study.variants=[{name:report.html}]"), "'report.html' ends like a file"),
        (("study.budget.steps=4", "study.variants=[{name:lock}]"), "'lock' is a file of the study's own"),
        (("study.budget.steps=4", "study.variants=[{name:a},{name:A}]"), "'a' and 'A' would share a directory"),
        (
            ("study.budget.steps=4", "study.variants=[{name:a,published:{source:b,top1:57.5}}]"),
            "top1=57.5 of 'b' must be a share",
        ),
        (("study.budget.steps=4", "study.targets=[80]"), "must be a fraction"),
        (("study.budget.steps=4", "data.root=null"), "data.root is not set"),
        (("study.budget.steps=4", "study.variants=[]"), "choose a file of conf/study/"),
        (("study.budget.steps=4", "study.only=[b]"), "study.only='b' is not one of a"),
        (("study.budget.steps=4", "cluster.devices=1"), "at least 2"),
    ],
)
def test_one_fault_is_a_sentence(shards: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(configured(tmp_path, shards, variant("a", SMALL), more=with_key(more)))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("steps=4", "comm.period=5 is longer than what its runs have of their 4 steps"),
        ("gigabytes=1", "with comm.period=5 a few steps do not tell how many a budget of gigabytes"),
        ("seconds=1", r"with comm.period=5 a few steps do not tell .*: set study.budget.steps or .epochs instead"),
    ],
)
def test_rounds_that_no_budget_fits_are_refused(shards: Path, tmp_path: Path, budget: str, said: str) -> None:
    local = variant("rarely", SMALL, "'comm=local'", "'comm.period=5'")
    more = ("study.budget.steps=null", f"study.budget.{budget}")
    with pytest.raises(ConfigError, match=f"rarely: {said}"):
        make_plan(configured(tmp_path, shards, local, more=more))


def test_without_shards_there_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make_plan(configured(tmp_path, tmp_path / "nowhere", variant("a", SMALL)))


def test_runs_that_were_told_something_else_are_not_gone_on_with(shards: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, shards, variant("a", SMALL))
    plan = make_plan(config)
    (planned,) = plan.variants
    told = plan.overrides(planned, "seed0", {"seed": 0, "trainer.max_steps": 4})
    record = config.directory / "a/seed0.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"overrides": told, "conditions": plan.conditions, "exit_code": None}))
    assert len(make_plan(config).variants) == 1

    with pytest.raises(ConfigError, match=r"a/seed0 was begun with other values of recipe\.lr, trainer\.max_steps"):
        longer = ("study.budget.steps=5",)
        make_plan(configured(tmp_path, shards, variant("a", SMALL, "'recipe.lr=0.5'"), more=longer))
    with pytest.raises(ConfigError, match=r"begun with other values of cluster\.devices, ranks:"):
        make_plan(configured(tmp_path, shards, variant("a", SMALL), more=("study.budget.steps=4", "cluster.devices=3")))
    with pytest.raises(ConfigError, match=r"begun with other values of cluster\.devices, lab\.bandwidth, .*launcher"):
        laboratory = ("study.budget.steps=4", "lab.servers=2", "lab.bandwidth=1gbit")
        make_plan(configured(tmp_path, shards, variant("a", SMALL), more=laboratory))
    older = [override for override in told if not override.startswith("cluster.timeout_seconds=")]
    record.write_text(json.dumps({"overrides": older, "exit_code": None}))
    assert len(make_plan(config).variants) == 1  # made before the key was there, which has its default
    with pytest.raises(ConfigError, match=r"other values of cluster\.timeout_seconds:"):
        make_plan(configured(tmp_path, shards, variant("a", SMALL), more=(*BUDGET, "cluster.timeout_seconds=500")))

    (config.directory / "a/seed0").mkdir()
    for unreadable in ("{}", "[]", "{", '{"overrides": 3}'):
        record.write_text(unreadable)
        with pytest.raises(ConfigError, match=r"a/seed0\.json says nothing .*remove .*/a"):
            make_plan(config)
    record.unlink()
    with pytest.raises(ConfigError, match="a/seed0 exists and was not made by a study"):
        make_plan(config)


@pytest.mark.parametrize("then", ["gigabytes=2", "gigabytes=0.5", "seconds=1", "steps=44"])
def test_another_budget_is_another_study(then: str, shards: Path, tmp_path: Path) -> None:
    def plan_for(budget: str) -> Plan:
        return make_plan(configured(tmp_path, shards, variant("a", SMALL), more=(f"study.budget.{budget}",)))

    plan = plan_for("gigabytes=1")
    told = plan.overrides(plan.variants[0], "seed0", {"seed": 0, "trainer.max_steps": 44})
    record = plan.config.directory / "a/seed0.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"overrides": told, "conditions": plan.conditions, "exit_code": 0}))
    assert plan_for("gigabytes=1.0").variants
    with pytest.raises(ConfigError, match=r"a/seed0 was begun with other values of study\.budget:"):
        plan_for(then)


def test_runs_on_other_pictures_are_not_set_beside_new_ones(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", train=(60,), val=(4,))
    config = configured(tmp_path, shards, variant("a", SMALL), more=(*BUDGET, "study.seeds=[0,1]"))
    plan = make_plan(config)
    told = plan.overrides(plan.variants[0], "seed0", {"seed": 0, "trainer.max_steps": 4})
    run = config.directory / "a/seed0"
    run.mkdir(parents=True)
    (run.parent / "seed0.json").write_text(
        json.dumps({"overrides": told, "conditions": plan.conditions, "exit_code": 0})
    )
    (run / "environment.json").write_text(json.dumps({"shards": {"sha256": plan.shards_sha256}}))
    assert make_plan(config).shards_sha256 == plan.shards_sha256
    shutil.rmtree(shards)
    write_shards(shards, train=(72,), val=(4,))
    with pytest.raises(ConfigError, match=rf"a/seed0 was trained on other pictures than are at {shards} now"):
        make_plan(config)


def test_an_epoch_is_whole_batches(shards: Path, tmp_path: Path) -> None:
    batches = (variant("a", SMALL), variant("b", SMALL, "'batch.global_size=16'"))
    plan = make_plan(configured(tmp_path, shards, *batches, more=("study.budget.epochs=2.5",)))
    assert [plan.num_steps(planned) for planned in plan.variants] == [12, 7]  # 60 pictures: 5 and 3 an epoch


# --- the studies that ship ---


def shipped(study: str, shards: Path, *more: str) -> Plan:
    return make_plan(compose("study", StudyConfig, [f"study={study}", f"data.root='{shards}'", *more]))


def parameters_by_the_paper(config: SqueezeNetConfig, num_classes: int) -> int:
    """Weights and biases of sections 3 and 5.1, layer by layer; bypasses of section 6."""
    conv1 = STEMS[config.stem]
    total, inputs = (conv1.kernel_size**2 * 3 + 1) * conv1.num_filters, conv1.num_filters
    for layer in FIRE_LAYERS:
        s, e1, e3 = vars(config.fire_widths(layer)).values()
        total += (inputs + 1) * s + (s + 1) * e1 + (9 * s + 1) * e3
        if config.bypass == "complex" and inputs != e1 + e3:
            total += (inputs + 1) * (e1 + e3)
        inputs = e1 + e3
    return total + (inputs + 1) * num_classes


def test_the_papers_sizes_are_its_formulas_and_its_table(shards: Path) -> None:
    plan = shipped("paper", shards, "study.overrides=[batch.global_size=12,model=squeezenet1_0_caffe]")
    sizes = {}
    for planned in plan.variants:
        metaparameters: dict[str, Any] = planned.facts.config.model.metaparameters
        counted = planned.facts.num_parameters_of_1000_classes
        assert counted == parameters_by_the_paper(SqueezeNetConfig(**metaparameters), 1000), planned.variant.name
        sizes[planned.variant.name] = counted
        published = planned.variant.published
        # The paper's 7.7 for the complex bypass does not follow from its description, which gives 6.4 (docs/study.md).
        if published is not None and published.megabytes is not None and planned.variant.name != "bypass=complex":
            digits = 1 if published.megabytes < 10 else 0
            printed = {round(counted * 4 / unit, digits) for unit in (10**6, 2**20)}  # the paper has both
            assert published.megabytes in printed, planned.variant.name
    assert (sizes["sr=0.125"], sizes["bypass=complex"], len(sizes)) == (1_248_424, 1_589_672, 11)


@pytest.mark.slow
@pytest.mark.parametrize(("study", "num_variants"), [("strategies", 14), ("models", 9), ("rarely", 8)])
def test_every_variant_of_a_study_that_ships_is_possible(study: str, num_variants: int, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", train=(1200,), val=(4,))
    assert len(shipped(study, shards, "study.budget.epochs=100").variants) == num_variants


# --- budgets ---


@given(st.floats(0.1, 1e4), st.floats(1e-4, 1.0), st.floats(1e-4, 1.0), st.integers(0, 50))
def test_a_budget_of_gigabytes_pays_for_its_steps_and_for_no_more(
    budget: float, plain: float, compressed: float, num_plain: int
) -> None:
    steps = steps_for_gigabytes(budget, plain, compressed, num_plain)

    def price(count: int) -> float:
        return min(count, num_plain) * plain + max(0, count - num_plain) * compressed

    assert price(steps) <= budget * (1 + 1e-9) < price(steps + 1) * (1 + 1e-8)
