"""Pictures to verified WebDataset shards.

python -m pipeline.prepare source=builtin out=shards/builtin
python -m pipeline.prepare source=ILSVRC2012/ out=shards/imagenet devkit=ILSVRC2012_devkit_t12.tar.gz short_side=256
python -m pipeline.prepare verify=true out=shards/imagenet         read it all, and say what is wrong
"""

from pipeline.config.prepare import PrepareConfig
from pipeline.core.cli import run_command


def prepare(config: PrepareConfig) -> None:
    """Write the shards that `config` asks for and say what they are, or verify those that are there.

    Raises:
        DataError: the source, the pictures or the output directory are not as they must be.
        ConfigError: more processes than this machine takes.
    """
    from pipeline.run.launch.limits import check_count

    check_count("num_workers", config.num_workers)
    if config.verify:
        from pipeline.data.prepare.verify import verify_shards

        verify_shards(config)
    else:
        from pipeline.data.prepare.write import prepare_shards

        prepare_shards(config)


if __name__ == "__main__":
    run_command("prepare", PrepareConfig, prepare)
