"""Results of finished runs in a file of JSON lines: a study can go on elsewhere, and its tables can be made again.

A line holds the run (its folder below the study's, such as ``noise/omniglot/noise60/ism+mixup/seed3``), the settings
that all runs of that call had beside their own (``--set``), the version of jax, and the final metrics.
"""

import json
from importlib.metadata import version
from pathlib import Path

Metrics = dict[str, float]
Name = tuple[str, tuple[str, ...]]


class Kept:
    """The file's runs; without a file none, and nothing is written."""

    def __init__(self, file: Path | None, settings: list[str]):
        self.file = file
        self.settings = tuple(sorted(settings))
        self.metrics: dict[Name, Metrics] = {}
        if file and file.exists():
            for line in map(json.loads, file.read_text().splitlines()):
                self.metrics[line["run"], tuple(line["set"])] = line["metrics"]

    def __contains__(self, run: str) -> bool:
        return (run, self.settings) in self.metrics

    def of(self, row: str) -> dict[str, Metrics]:
        """The metrics of the runs of a row (a folder) by seed."""
        start = f"{row}/seed"
        return {
            run.removeprefix(start): metrics
            for (run, settings), metrics in self.metrics.items()
            if run.startswith(start) and settings == self.settings
        }

    def add(self, run: str, result: Path) -> None:
        """Appends a finished run, from its ``result.json``; a run that is there already is left as it is."""
        if not self.file or run in self or not result.exists():
            return
        final = json.loads(result.read_text())["final"]
        # The metrics of risk scores, AUROC(uncertainty) and the like, are dozens; a table of these reads none of them.
        metrics = {k: round(v, 6) for k, v in final.items() if "(" not in k and isinstance(v, float)}
        self.metrics[run, self.settings] = metrics
        line = {"run": run, "set": self.settings, "jax": version("jax"), "metrics": metrics}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
