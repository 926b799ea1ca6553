"""Names over time: whether they still fit a catalogue that has grown, and how many a retraining changes."""

from components.artifacts import SidChurn, SidDrift
from components.metrics.drift import KEEP, rows
from components.pages.html import Html, number, percent, tag
from components.pages.page import Section, badge, facts, page, paragraph, table


def drift_page(report: SidDrift) -> Html:
    """Show what speaks for a full retraining, every figure beside its limit, and the levels."""
    figures = report.figures
    top = [
        ("items", number(figures["items"])),
        ("came since the last training", number(figures["newcomers"])),
        ("of the catalogue", percent(figures["new_share"])),
    ]
    checks = [[*line[:3], tag("span.warn", line[3]) if line[3] else ""] for line in rows(report)]
    why = [Section("What speaks for it", map(paragraph, report.reasons))] if report.reasons else []
    return page(
        "Names of new items",
        [
            *why,
            Section("Limits", [table(["what is looked at", "value", "limit", ""], checks, [1, 2])]),
            Section(
                "Levels",
                [_levels(report)],
                "Known: items of the last training. Distances are squared, 0 to 4, after so many codes.",
            ),
        ],
        "Newcomers are held against the items that the last training knew.",
        [badge(report.verdict, warn=report.verdict != KEEP), facts(top)],
    )


def _levels(report: SidDrift) -> Html:
    titles = [
        "level",
        "distance, known",
        "distance, newcomers",
        "perplexity, known",
        "perplexity, newcomers",
        "newcomers with a code that no known item has",
    ]
    return table(
        titles,
        [
            [number(level), *("" if value is None else f"{value:.3f}" for value in values), _share(unseen)]
            for level, *values, unseen in report.levels.iter_rows()
        ],
        range(1, len(titles)),
    )


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def churn_page(churn: SidChurn) -> Html:
    """Show how many names a retraining changed, and how many still differ after its codes took the old labels."""
    return page(
        "Names kept over a retraining",
        [
            Section(
                "Share of items whose name changed",
                [
                    table(
                        ["part of the name", "retrained", "under the old labels"],
                        [
                            [part, percent(before), percent(after)]
                            for part, before, after in churn.changes.iter_rows()
                        ],
                        [1, 2],
                    )
                ],
                "Which number a code has is arbitrary: new codes take the labels of the old ones that they share most "
                "items with.",
            )
        ],
        f"{churn.items:,} items had a name before.",
        [facts([("keep their whole name", percent(1 - churn.share("SID")))])],
    )
