"""What ranks must agree on: every key of the configuration, and whatever else makes another run."""

import copy
import dataclasses
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.ledger.exchange import StoreExchange
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.compute import Compute
from pipeline.core.trees import flat
from pipeline.core.typed import is_path, leaf_hints
from pipeline.training import same_run
from pipeline.training.same_run import Difference, config_facts, facts_of, find_differences, may_differ, refusal

CPU = Compute("cpu", "fp32", False, "as asked")
CONFIGS = {
    "train": compose("train", TrainConfig, ["name=first", "data.root=shards", "trainer.max_steps=4"]),
    "evaluate": compose("evaluate", EvaluateConfig, ["name=first", "data.root=shards", "checkpoint=run"]),
}
FIELDS = [(command, key) for command, config in CONFIGS.items() for key in flat(dataclasses.asdict(config))]
LEFT_OUT = {"model.metaparameters"}  # empty here: a key below it is tested by itself


def with_another(config: Any, key: str) -> Any:
    """The configuration with another value at a key, past all rules of what is possible."""
    changed = copy.deepcopy(config)
    *groups, name = key.split(".")
    owner = changed
    for group in groups:
        owner = getattr(owner, group)
    value = getattr(owner, name)
    other = {"x": 1} if isinstance(value, dict) else not value if isinstance(value, bool) else (value, "other")
    object.__setattr__(owner, name, other)
    return changed


def test_no_key_is_left_out() -> None:
    """The schema has no key that the tests below do not come to, but those of a model's variants."""
    for command, config in CONFIGS.items():
        told = {key for of, key in FIELDS if of == command}
        known = {key for key, _ in leaf_hints(type(config)) if not key.startswith("model.metaparameters.")}
        assert known == told - LEFT_OUT


@pytest.mark.parametrize(("command", "key"), FIELDS)
def test_another_value_of_a_key_is_refused_or_said_to_be_harmless(command: str, key: str) -> None:
    config = CONFIGS[command]
    mine, theirs = map(config_facts, (config, with_another(config, key)))
    found = find_differences([mine, theirs])
    if key in may_differ(type(config)):
        assert found == [] and may_differ(type(config))[key]
        return
    if key in LEFT_OUT:
        assert {difference.key for difference in found} == {key, f"{key}.x"}
        return
    (difference,) = found
    assert difference.key == key
    said = refusal(found)
    assert key in said and f"{difference.values[0]} on rank 0" in said and "on rank 1" in said


def test_what_may_differ_is_few_and_in_the_schema() -> None:
    keys = dict(leaf_hints(TrainConfig))
    assert same_run.MAY_DIFFER.keys() <= keys.keys()
    assert {key for key, hint in keys.items() if is_path(hint)} == {
        *("run_root", "data.root", "data.cache_dir", "init.checkpoint")
    }


@pytest.mark.parametrize("name", same_run.VARIABLES)
def test_a_variable_that_changes_arithmetic_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    mine = facts_of("train", CONFIGS["train"], CPU, 2)
    monkeypatch.setenv(name, "7")
    (difference,) = find_differences([mine, facts_of("train", CONFIGS["train"], CPU, 2)])
    assert (difference.key, difference.values) == (f"variable {name}", ("null", '"7"'))


def test_command_arithmetic_packages_and_code_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    mine = facts_of("train", CONFIGS["train"], CPU, 2)
    bf16 = dataclasses.replace(CPU, precision="bf16")
    assert [one.key for one in find_differences([mine, facts_of("ready", CONFIGS["train"], CPU, 3)])] == [
        "command",
        "the number of ranks",
    ]
    assert [one.key for one in find_differences([mine, facts_of("train", CONFIGS["train"], bf16, 2)])] == ["arithmetic"]
    assert {"the version of python", "the version of torch", "the code of pipeline/train.py"} <= mine.keys()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "train.py").write_text("pass\n")
    monkeypatch.setattr(same_run, "CODE_ROOT", tmp_path)
    found = find_differences([mine, facts_of("train", CONFIGS["train"], CPU, 2)])
    assert found and all(one.key.startswith("the code of pipeline/") for one in found)
    assert len(refusal(found)) < 1000


def test_machines_of_several_kinds_are_told_what_to_set() -> None:
    said = refusal([Difference(same_run.CPU_KEY, ('"AVX512"', '"AVX2"'))])
    assert "ATEN_CPU_CAPABILITY=avx2 for every rank" in said


def test_ranks_are_named_by_what_they_have() -> None:
    values = (*["1"] * 9, "2", None)
    assert str(Difference("seed", values)) == (
        "seed is 1 on ranks 0, 1, 2, 3, 4, ... (9 of them), 2 on rank 9, not there on rank 10"
    )
    assert len(str(Difference("x", ("long" * 10_000, "y")))) < 200


class FakeStore:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 30)
            return self.values[key].encode()

    def delete_key(self, key: str) -> None:
        self.values.pop(key)


def compare_all(facts_by_rank: list[dict[str, str]]) -> list[list[Difference]]:
    """What each rank, a thread here, comes to know."""
    store, results = FakeStore(), [[] for _ in facts_by_rank]

    def work(rank: int) -> None:
        exchange = StoreExchange(rank, len(facts_by_rank), name="run", store=store)  # type: ignore[arg-type]
        for _ in range(2):
            results[rank] = same_run.compare(exchange, facts_by_rank[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(facts_by_rank))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and set(store.values) <= {
        key for key in store.values if key.endswith("0")
    }
    return results


facts = st.dictionaries(st.sampled_from("abc"), st.sampled_from("12"), max_size=3)


@given(st.lists(facts, min_size=1, max_size=4))
def test_every_rank_comes_to_the_same_list(facts_by_rank: list[dict[str, str]]) -> None:
    expected = find_differences(facts_by_rank)
    assert compare_all(facts_by_rank) == [expected] * len(facts_by_rank)
    assert (expected == []) == all(one == facts_by_rank[0] for one in facts_by_rank)
