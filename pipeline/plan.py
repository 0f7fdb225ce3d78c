"""From a measured run to other clusters: bytes, step time, scaling, time and cost to train, on paper.

    python -m pipeline.plan run=runs/first servers=[2,8,32] bandwidth=[1gbit,10gbit]
    python -m pipeline.plan run=runs/first beside=[runs/alexnet] algorithm=[ring,tree,parameter_server]
    python -m pipeline.plan run=runs/first bandwidth=[100mbit] methods=[local,local_int8]
    python -m pipeline.plan model=resnet50 images_per_second=350 batch_per_rank=64 bandwidth=[25gbit]

A run on one rank alone serves too; of a model that was not run, when gradients are ready is an estimate.

Left in `<run_root>/<name>/`: forecast.json, .csv, its pictures as .png and .svg, and report.html.
"""

from pipeline.config.plan import PlanConfig
from pipeline.core.cli import run_command


def plan(config: PlanConfig) -> int:
    """Read the runs, forecast every cluster, write the report. Returns the exit code."""
    from pipeline.core.terminal import Terminal
    from pipeline.forecasting.document import forecast
    from pipeline.forecasting.sources import read_sources, with_measured_links
    from pipeline.reporting.forecast import forecast_sentences, forecast_table, methods_table, write_forecast

    config = with_measured_links(config)
    result = forecast(config, read_sources(config))
    report = write_forecast(result, config.directory)

    for table in filter(None, (forecast_table(result), methods_table(result))):
        Terminal().print(table.to_rich())
    for sentence in forecast_sentences(result):
        print(sentence)
    print(f"Report: {report}")
    return 0


if __name__ == "__main__":
    run_command("plan", PlanConfig, plan)
