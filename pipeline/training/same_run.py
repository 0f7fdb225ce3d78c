"""All ranks are the same run, or none of them begins: what must agree, compared before the process group is made.

Ranks that are started by hand, by torchrun or on several servers may be told different things, or run different code.
They would still meet, exchange gradients and end well, with weights that no single command makes. So each rank lists
what it is as texts by key (`facts`), and all compare them: through the ranks' store, for with another backend or model
on one rank a collective would hang.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.comm.ledger.exchange import StoreExchange
from pipeline.core.compute import Compute
from pipeline.core.trees import flat, plain
from pipeline.core.typed import is_path, leaf_hints
from pipeline.run.provenance import CODE_ROOT, versions

Facts = Mapping[str, str]
"""What a rank is, by key: each value as JSON text."""

NUM_SHOWN = 5  # differences, or ranks, that a sentence names
LONGEST_VALUE = 80  # characters of a value in a sentence

MAY_DIFFER = {
    "data.cache_bytes": "how much a server's own disk may hold",
    "data.num_workers": "which pictures a rank reads, and their pixels, do not depend on who reads them",
    "cluster.devices": "not used where the ranks are started by somebody else",
    "cluster.num_threads": "cores differ; what all ranks compute alike does not depend on them",
}
"""Keys that may have another value on another rank, and why; beside these, every key that is a path."""
PATHS_MAY_DIFFER = "a place on a server; what lies there is compared"

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "KMP_DETERMINISTIC_REDUCTION",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_DISTRIBUTED_DEBUG",
)
"""Variables of the environment that change arithmetic, or what torch exchanges."""
CPU_KEY = "CPU instructions that torch uses"


# --- what a rank is ---


def facts_of(command: str, config: Any, compute: Compute, world_size: int) -> dict[str, str]:
    """List what must be the same on all ranks before anything is opened.

    Args:
        command: name of the command that runs, for ranks may have been given different ones.
        config: its configuration, a dataclass.
        compute: arithmetic as resolved on this rank: `auto` may choose another on another machine.
        world_size: number of ranks that this one was told.
    """
    return {
        "command": json.dumps(command),
        **config_facts(config),
        "the number of ranks": str(world_size),
        **{f"the version of {name}": json.dumps(version) for name, version in versions().items()},
        **{f"variable {name}": json.dumps(os.environ.get(name)) for name in VARIABLES},
        **_arithmetic(compute),
        **_code(),
    }


def config_facts(config: Any) -> dict[str, str]:
    """List the keys of a configuration that must agree, with their values."""
    allowed = may_differ(type(config))
    leaves = flat(dataclasses.asdict(config))
    return {key: json.dumps(plain(value)) for key, value in leaves.items() if key not in allowed}


def may_differ(schema: type[Any]) -> dict[str, str]:
    """Return the keys of a configuration that may differ from rank to rank, with the reason."""
    keys = dict(leaf_hints(schema))
    paths = {key: PATHS_MAY_DIFFER for key, hint in keys.items() if is_path(hint)}
    return paths | {key: reason for key, reason in MAY_DIFFER.items() if key in keys}


def _arithmetic(compute: Compute) -> dict[str, str]:
    settings = {
        "arithmetic": compute.arithmetic,
        "backend": compute.backend,
        "default type of torch": str(torch.get_default_dtype()),
        "precision of float32 matrix products": torch.get_float32_matmul_precision(),
    }
    if compute.accelerator == "cpu":  # the optimiser's last bit may differ between sets of instructions
        settings[CPU_KEY] = torch.backends.cpu.get_cpu_capability()
    return {key: json.dumps(value) for key, value in settings.items()}


def _code() -> dict[str, str]:
    """Return a hash of each file of this program."""
    files = sorted((CODE_ROOT / "pipeline").rglob("*.py"))
    return {
        f"the code of {path.relative_to(CODE_ROOT)}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in files
    }


def state_facts(
    state: Mapping[str, torch.Tensor], checkpoint_sha256: str | None, source_sha256: str | None = None
) -> dict[str, str]:
    """List what a model in training is made of.

    Args:
        state: Its weights, whose shapes are listed.
        checkpoint_sha256: Of the weights it goes on from; None: from none.
        source_sha256: Of the code of its factory; None: it is a library's.
    """
    shapes = {f"the shape of {name}": f"{list(value.shape)} of {value.dtype}" for name, value in state.items()}
    code = {} if source_sha256 is None else {"the code of the model": source_sha256[:12]}
    return {"the SHA-256 of the checkpoint": json.dumps(checkpoint_sha256), **code, **shapes}


# --- comparing ---


@dataclass(frozen=True)
class Difference:
    """A key on which the ranks do not agree."""

    key: str
    values: tuple[str | None, ...]
    """Of each rank; None: it does not have the key."""

    def __str__(self) -> str:
        ranks_with: dict[str, list[int]] = {}
        for rank, value in enumerate(self.values):
            ranks_with.setdefault(_shown(value), []).append(rank)
        said = [f"{value} on {_ranks(ranks)}" for value, ranks in ranks_with.items()]
        return f"{self.key} is {', '.join(said[:NUM_SHOWN])}{', ...' if len(said) > NUM_SHOWN else ''}"


def find_differences(facts_by_rank: Sequence[Facts]) -> list[Difference]:
    """Return the keys that have not the same value everywhere, in the order of rank 0's."""
    keys = dict.fromkeys(key for facts in facts_by_rank for key in facts)
    found = (Difference(key, tuple(facts.get(key) for facts in facts_by_rank)) for key in keys)
    return [difference for difference in found if len(set(difference.values)) > 1]


def compare(exchange: StoreExchange, facts: Facts) -> list[Difference]:
    """Return on which keys the ranks differ, the same list on every rank. Collective.

    A digest travels; the facts themselves only where it differs.
    """
    text = json.dumps(facts)
    in_order = json.dumps(facts, sort_keys=True)
    digests = exchange.gather(hashlib.sha256(in_order.encode()).hexdigest())
    is_same = None if digests is None else json.dumps(len(set(digests)) == 1)
    if json.loads(exchange.share(is_same)):
        return []
    texts = exchange.gather(text)
    found = None if texts is None else find_differences([json.loads(of_rank) for of_rank in texts])
    told = exchange.share(None if found is None else json.dumps([[one.key, one.values] for one in found]))
    return [Difference(key, tuple(values)) for key, values in json.loads(told)]


def sentence(differences: Sequence[Difference]) -> str:
    """Say in clauses where the ranks differ."""
    more = len(differences) - NUM_SHOWN
    return "; ".join(map(str, differences[:NUM_SHOWN])) + (f"; and {more} more" if more > 0 else "")


def refusal(differences: Sequence[Difference]) -> str:
    """Say what differs, and what to do."""
    remedy = "start every rank with the same command and environment, from the same code and packages."
    if any(difference.key == CPU_KEY for difference in differences):
        remedy += " On machines of several kinds set ATEN_CPU_CAPABILITY=avx2 for every rank."
    return f"The ranks are not the same run: {sentence(differences)}: {remedy}"


def _shown(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:NUM_SHOWN]))
    if len(ranks) > NUM_SHOWN:
        return f"ranks {named}, ... ({len(ranks)} of them)"
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
