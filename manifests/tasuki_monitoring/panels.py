"""The few kinds of panels that the dashboards are made of, and the queries in them."""

import string
from typing import NamedTuple

from grafana_foundation_sdk.builders import (
    common as common_builders,
    dashboard as boards,
    prometheus,
    stat as stat_panels,
    timeseries as timeseries_panels,
)
from grafana_foundation_sdk.cog import builder
from grafana_foundation_sdk.models import common, dashboard

PANEL_HEIGHT = 8
STAT_HEIGHT = 4
_DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")

Panel = builder.Builder[dashboard.Panel]


class Query(NamedTuple):
    """PromQL and the legend of its series."""

    expr: str
    legend: str


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Per second, summed over pods; a counter that never counted is a zero."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}{{{labels}}}[$__rate_interval])) or vector(0)"


def share(part: str, whole: str, labels: str = "") -> str:
    """Rate of `part` over rate of `whole`, 0 while nothing happens."""
    above, below = (f"sum(rate({name}{{{labels}}}[$__rate_interval]))" for name in (part, whole))
    return f"({above} or vector(0)) / ({below} > 0) or vector(0)"


def mean(histogram: str, labels: str = "") -> str:
    """Mean of a histogram's observations, 0 while there are none."""
    return share(f"{histogram}_sum", f"{histogram}_count", labels)


def quantiles(histogram: str, labels: str = "", of: tuple[int, ...] = (50, 95, 99)) -> list[Query]:
    """Percentiles of a histogram over all pods; gaps where nothing was observed."""
    buckets = f"sum by (le) (rate({histogram}_bucket{{{labels}}}[$__rate_interval]))"
    return [Query(f"histogram_quantile({q / 100:g}, {buckets})", f"p{q}") for q in of]


def graph(title: str, unit: str, text: str, *queries: Query, span: int = 8) -> Panel:
    """Lines over time; `text` says what they mean and when to worry."""
    legend = (
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    panel = (
        timeseries_panels.Panel()
        .title(title)
        .description(text)
        .datasource(_DATASOURCE)
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(tooltip)
        .height(PANEL_HEIGHT)
        .span(span)
    )
    for letter, query in zip(string.ascii_uppercase, queries, strict=False):
        panel = panel.with_target(_target(letter, query))
    return panel


def figure(title: str, unit: str, text: str, expr: str, *, worry: float | None = None) -> Panel:
    """One number; red from `worry` on."""
    steps = [dashboard.Threshold(value=None, color="green")]
    if worry is not None:
        steps.append(dashboard.Threshold(value=worry, color="red"))
    thresholds = boards.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
    return (
        stat_panels.Panel()
        .title(title)
        .description(text)
        .datasource(_DATASOURCE)
        .unit(unit)
        .thresholds(thresholds)
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .height(STAT_HEIGHT)
        .span(6)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target("A", Query(expr, "")))
    )


def board(
    uid: str, title: str, text: str, variables: tuple[tuple[str, str], ...] = ()
) -> boards.Dashboard:
    """An empty dashboard with its variables: the data source, then (name, query) each."""
    made = (
        boards.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["tasuki"])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(
            boards.DashboardLink("tasuki")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["tasuki"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(boards.DatasourceVariable("datasource").type("prometheus"))
    )
    for name, query in variables:
        made = made.with_variable(
            boards.QueryVariable(name)
            .query(query)
            .datasource(_DATASOURCE)
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .include_all(True)
            .all_value(".*")
            .current(dashboard.VariableOption(text="All", value="$__all"))
        )
    return made


def deployments(metric: str) -> tuple[tuple[str, str], ...]:
    """Variables that choose InferenceDeployments by a metric of their pods."""
    within = f'{metric}{{namespace=~"$namespace"}}'
    return (
        ("namespace", f"label_values({metric}, namespace)"),
        ("deployment", f"label_values({within}, tasuki_dev_deployment)"),
    )


def _target(letter: str, query: Query) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
    return made.ref_id(letter).range()
