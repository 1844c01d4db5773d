"""What records can do beyond holding fields: a run's series, and the texts of a sample."""

from __future__ import annotations

from typing import Any

from rewardsignal._records import Record


class Series(Record):
    """The metrics of a run by name."""

    __slots__ = ()

    metrics: list[Any]

    def names(self) -> list[str]:
        """Every metric that a row has, in the order of their first rows."""
        return list(dict.fromkeys(name for row in self.metrics for name in row.metrics))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps of a metric and its values at them. Raises KeyError for one that no row has."""
        pairs = [(row.step, row.metrics[name]) for row in self.metrics if name in row.metrics]
        if not pairs:
            raise KeyError(f"{name}: this run has {', '.join(self.names()) or 'no metrics yet'}")
        return [step for step, _ in pairs], [value for _, value in pairs]

    def plot(self, *names: str, ax: Any = None) -> Any:
        """Draw metrics over the steps, by default the loss; returns matplotlib's axes.

        Needs the extra `plot`: pip install 'rewardsignal[plot]'.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            message = "Plots need the extra `plot`: pip install 'rewardsignal[plot]'"
            raise ImportError(message) from error
        if ax is None:
            _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name in names or ("loss",):
            steps, values = self.series(name)
            ax.plot(steps, values, label=name, marker="." if len(steps) < 50 else None)
        ax.set_xlabel("step")
        ax.set_title(self["run_id"])
        ax.legend()
        ax.grid(alpha=0.3)
        return ax


class Outputs(Record):
    """The texts of a sample."""

    __slots__ = ()

    samples: list[list[Any]]

    def __getitem__(self, key: Any) -> Any:
        """A field by its name; by an index, the text of that prompt's first sample."""
        if isinstance(key, int):
            return self.samples[key][0].text
        return super().__getitem__(key)

    @property
    def texts(self) -> list[str]:
        """Of all samples, one prompt after the other."""
        return [sample.text for samples in self.samples for sample in samples]
