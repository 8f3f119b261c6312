"""What a scan found, in memory or in a run's folder: one object for both.

It stands here, and not beside `Effects`, because its methods need what stands above these: the
summary, which is analysis, and the store. `jaxmed.scan` and `open_run` make it.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jaxmed.analysis import summary
from jaxmed.question.effects import Effects, Sizes, Totals
from jaxmed.store.results import Results
from models.errors import InputError
from models.sites import Site

if TYPE_CHECKING:
    import pandas


class Findings(Mapping[str, Effects]):
    """Effects by granularity, coarse to fine: `found["neuron"].nie`.

    Those of a run's folder are read when they are first asked for, and kept.

    Attributes:
        run: what was asked, as `run.json` has it.
        sizes: how many units there are.
    """

    def __init__(self, run: dict, sizes: Sizes, effects: Mapping[str, Effects]):
        self.run = run
        self.sizes = sizes
        self._source = effects
        self._read: dict[str, Effects] = {}

    def __getitem__(self, granularity: str) -> Effects:
        if granularity not in self._source:
            raise KeyError(f"no effects of '{granularity}'; there are those of {', '.join(self)}")
        if granularity not in self._read:
            self._read[granularity] = self._source[granularity]
        return self._read[granularity]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def totals(self) -> Totals:
        """Which pairs these are, and what was measured of them: te, y_base, y_source."""
        return self[next(iter(self))].totals

    def summary(self) -> "pandas.DataFrame":
        """Mean, interval, p and q value of every unit and estimand: the rows of `summary.parquet`.

        Its columns are as `analysis.summary.summarise` says. A folder's own file is read where it
        is up to date.
        """
        import pandas

        return self._summary.to_pandas(types_mapper={pa.int32(): pandas.Int32Dtype()}.get)

    @functools.cached_property
    def _summary(self) -> pa.Table:
        kept = summary.kept_summary(self._source) if isinstance(self._source, Results) else None
        return summary.summarise(self) if kept is None else kept

    def top(
        self, count: int = 20, *, estimand: str = "nie", granularity: str | None = None
    ) -> "pandas.DataFrame":
        """The summary's rows of the units with the largest |mean|, the largest first.

        The residual stream has no rank, as the whole of it at the last token of the last layer is
        TE by definition; nor has what a screen has only estimated.

        Args:
            count: how many, of each granularity.
            estimand: "nie", "tie", "nde" or "int".
            granularity: the one whose units are ranked; by default all, one after the other.

        Raises:
            InputError: there is no such estimand or granularity.
        """
        import pandas

        if estimand not in summary.SUMMARISED:
            raise InputError(f"estimand={estimand!r}: not one of {', '.join(summary.SUMMARISED)}")
        names = list(self) if granularity is None else [granularity]
        if granularity is not None and granularity not in self:
            raise InputError(f"granularity={granularity!r}: not one of {', '.join(self)}")
        rows = self.summary()
        whole = (rows["granularity"] == "token") & (rows["site"] == Site.RESIDUAL)
        rows = rows.loc[(rows["estimand"] == estimand) & rows["exact"] & ~whole]
        rows = rows.sort_values("mean", key=abs, ascending=False, kind="stable")
        ranked = [rows.loc[rows["granularity"] == name].head(count) for name in names]
        return pandas.concat(ranked, ignore_index=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a results folder, which `open_run` and `launch.report` read.

        Args:
            folder: a local path or gs://bucket/path; made if it is missing, and must be empty.

        Raises:
            InputError: the folder is not empty or cannot be made.
        """
        if isinstance(self._source, Results):
            self._source.copy(folder)
            return
        totals = self.totals
        results = Results.create(folder, self.run, self.sizes, totals.pair_ids, self)
        for index in range(len(totals.pair_ids)):
            for granularity, effects in self.items():
                results.write(
                    index,
                    granularity,
                    effects.nie[index],
                    effects.tie[index],
                    effects.done[index],
                )
            results.write_totals(
                index,
                y_base=float(totals.y_base[index]),
                y_source=float(totals.y_source[index]),
                te=float(totals.te[index]),
            )
        results.finish()

    def __repr__(self) -> str:
        run, te = self.run, self.totals.te
        unit = run.get("metric_unit", "")
        asked = f"{run['metric']} ({unit}), positions={run['positions']}"
        mean = f"mean TE {np.nanmean(te):.4g} {unit}" if np.isfinite(te).any() else "no TE yet"
        count = f"{len(te)} pair{'' if len(te) == 1 else 's'}"
        lines = [f"Findings of {count}: {asked}; {mean}"]
        width = max(map(len, self))
        lines += [f"  {name:{width}}  {effects.described()}" for name, effects in self.items()]
        return "\n".join(lines)


def open_run(folder: str | os.PathLike) -> Findings:
    """What a run of `launch.mediate`, finished or not, has found, or what `save` wrote.

    The folder, a local path or gs://bucket/path, is only read. What the run has not yet computed is
    NaN, and `done` says so.

    Raises:
        InputError: it is no results folder, or a file in it is damaged (and which).
    """
    results = Results.open(folder)
    return Findings(results.run, results.sizes, results)
