"""The W&B dashboards of a project: a workspace of panels and a report page, built from code.

    python -m pipeline.dashboard project=squeezewire                 # as files; nothing is sent
    python -m pipeline.dashboard project=squeezewire publish=true    # and saved to the server

Left in `<run_root>/<name>/`: workspace.json and report.json; after publishing published.json, by which the same command
again changes what it made before instead of making it anew.
"""

from pipeline.config.dashboard import DashboardConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import ExitCode


def dashboard(config: DashboardConfig) -> int:
    """Write both specifications; publish them if asked. Returns the exit code."""
    from pipeline.core.files import write_json_atomic
    from pipeline.reporting import wandb_pages
    from pipeline.run.directory import validate_name

    validate_name(config.name)
    workspace = wandb_pages.build_workspace(config.project, config.entity)
    report = wandb_pages.build_report(config.project, config.entity)

    config.directory.mkdir(parents=True, exist_ok=True)
    for page, file in ((workspace, "workspace.json"), (report, "report.json")):
        write_json_atomic(config.directory / file, wandb_pages.specification(page))
    print(f"Workspace: {config.directory / 'workspace.json'}\nReport: {config.directory / 'report.json'}")

    if config.publish:
        from pipeline.run.record.wandb_publish import publish

        for kind, url in publish(workspace, report, config.directory / "published.json").items():
            print(f"Published {kind}: {url}")
    else:
        print(
            f"Nothing was sent. To save both in the W&B project {config.project}, log in (`wandb login`, or"
            " WANDB_API_KEY) and run the same command with publish=true."
        )
    return ExitCode.DONE


if __name__ == "__main__":
    run_command("dashboard", DashboardConfig, dashboard)
