"""What is damaged, and what reads it: shards, checkpoints, configuration, packages."""

from pathlib import Path

from tests.fuzzing.checkpoint_targets import checkpoint_targets
from tests.fuzzing.config_targets import config_targets
from tests.fuzzing.package_targets import package_targets
from tests.fuzzing.pool import Target
from tests.fuzzing.shard_targets import shard_targets


def all_targets(under: Path) -> list[Target]:
    """Every target, with the sound material that it damages made below `under`."""
    return [*shard_targets(under), *checkpoint_targets(under), *config_targets(under), *package_targets()]
