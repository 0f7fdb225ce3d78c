"""Files to ship a trained network as: safetensors, ONNX, int8 ONNX, and a package to send over the air.

    python -m pipeline.export checkpoint=runs/first data.root=shards/mine max_bytes=400000
    python -m pipeline.export checkpoint=runs/second data.root=shards/mine base=runs/export/model.sqz name=second

Each file holds the model's name, classes and preprocessing, is read back, and is judged beside the weights it was made
from. Left in `<run_root>/<name>/`: the files, report.html, artefacts.json, artefacts.csv, and latest.json for devices,
all once the last is made; an export that is broken off leaves what was there before. Of an earlier export of that name
the files that are not made again go, but for those that this one is made from.
`evaluate` and `predict` read all of the files.
"""

from pipeline.config.export import ExportConfig
from pipeline.core.cli import run_command


def export(config: ExportConfig) -> int:
    """Write and judge the files; returns the exit code."""
    from pipeline.exporting import steps, tracking

    trained = steps.load(config)
    material = steps.find_pictures(config, trained)
    with steps.open_directory(config) as directory:
        with steps.unfinished(config, directory.path) as folder:
            artefacts = steps.write_artefacts(config, trained, material, folder)
            content = steps.write_tables(config, trained, material, artefacts, folder)
        steps.tell(trained, content, directory.path)
        tracking.mirror_artefacts(content, config.name, directory.path, config.tracking)
    return 0


if __name__ == "__main__":
    run_command("export", ExportConfig, export)
