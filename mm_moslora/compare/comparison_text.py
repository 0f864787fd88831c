"""The plan and the results of a comparison in sentences, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mm_moslora.compare.comparison_plan import ALL, LOSS, ComparisonSettings, short_names, tuning_cells
from mm_moslora.reporting.verdicts import (
    AGAINST,
    UNJUDGED,
    above_controls,
    arms_sentence,
    difference_of,
    mood_of_arms,
    verdict_of_nats,
)
from mm_moslora.utils.text_format import aligned


def plan_lines(settings: ComparisonSettings) -> list[str]:
    """The plan as text."""
    tuning = len(tuning_cells(settings))
    reported = len(settings.arms) * settings.seeds
    names = short_names([*settings.tasks, *settings.validation])
    by = "held-out loss" if LOSS in settings.validation else ", ".join(names[task] for task in settings.validation)
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    lines = [f"{len(settings.arms)} arms: " + ", ".join(arm.name for arm in settings.arms)]
    if tuning:
        lines.append(
            f"{tuning} runs choose each arm's learning rate among {rates} by {by} on the validation split "
            f"({settings.tuning_seeds} seed{'s' * (settings.tuning_seeds > 1)} of their own)"
        )
        if several := [arm.name for arm in settings.arms if arm.alternatives]:
            lines.append(f"they choose between the values of {', '.join(several)}, too")
        if settings.grow and len(settings.rates) > 2:
            lines.append(
                f"up to {settings.grow} further rates for an arm whose best rate lies at an edge of the grid "
                "(--grow 0: none)"
            )
    else:
        lines.append(f"learning rate {rates} for every arm, not tuned: a difference may come from it")
    lines.append(
        f"{reported} runs with {settings.seeds} new seed{'s' * (settings.seeds > 1)} each are measured on "
        + ", ".join(names[task] for task in settings.tasks)
    )
    lines.append(f"every run has the same number of steps; the other arms are compared with {settings.reference_arm}")
    if settings.controls:
        lines.append(
            "reported runs are also measured with a plain picture and with another item's picture (--no-controls: not)"
        )
    if settings.seeds == 1:
        lines.append("one seed cannot show the variation between seeds")
    return lines


def says(results: Mapping[str, Any]) -> dict[str, Any]:
    """Conclusions and caveats: `verdicts` with their moods, `remarks`, and `says` with both."""
    tasks = list(dict.fromkeys(row["task"] for row in results["comparisons"]))
    column = ALL if ALL in tasks else None
    verdicts = [
        {"mood": mood, "text": text}
        for task in ([column] if column else dict.fromkeys(name for arm in results["arms"] for name in arm["tasks"]))
        for mood, text in above_controls(
            results["arms"], task, alone=bool(column) or len(tasks) < 2, requested=results["settings"]["controls"]
        )
    ]
    shown = [row for row in results["comparisons"] if column in (None, row["task"])]
    verdicts += [{"mood": mood_of_arms(row), "text": arms_sentence(row)} for row in shown]
    remarks = []
    measured = [arm["name"] for arm in results["arms"] if any(seed["status"] == "ok" for seed in arm["seeds"])]
    if not results["comparisons"] and not (results["settings"]["reference"] in measured and len(measured) > 1):
        remarks.append("No comparison yet: the reference, or every other arm, has no measured run.")
    remarks += [text for row in shown if (text := nats_sentence(row))]
    remarks += [
        f"{task}: no likelihood: {reason}." for task, reason in results["settings"].get("no_likelihood", {}).items()
    ]
    for arm in results["arms"]:
        remarks += _arm_sentences(arm, results, measured)
    remarks += [
        f"{failure['arm']} at learning rate {failure['rate']:g}, seed {failure['seed']}, {failure['status']}: "
        f"{failure['reason']}"
        for failure in results["failures"]
    ]
    if results["settings"]["tuning_seeds"] == 0:
        remarks.append("The learning rate was not tuned: a difference between arms may come from it.")
    elif len(results["settings"]["rates"]) == 2:
        remarks.append("Of two learning rates the best is always an edge of the grid; with three or more it grows.")
    return {"verdicts": verdicts, "remarks": remarks, "says": [*(item["text"] for item in verdicts), *remarks]}


def _arm_sentences(arm: Mapping[str, Any], results: Mapping[str, Any], measured: Sequence[str]) -> list[str]:
    lines = [f"{arm['name']}: {remark}" for remark in arm["remarks"]]
    grown = [rate for rate in arm["grid"] if rate not in results["settings"]["rates"]]
    if grown:
        lines.append(f"{arm['name']}: its grid grew by {', '.join(f'{rate:g}' for rate in grown)}.")
    if arm["rate"] is not None and (alternatives := arm.get("alternatives")):
        values = ", ".join(
            f"{each['name']} " + ("without a rate that works" if each["value"] is None else f"{each['value']:.4g}")
            for each in alternatives
        )
        lines.append(f"{arm['name']}: the tuning runs chose {arm['chosen']} ({values}).")
    if arm["edge"]:
        lines.append(
            f"{arm['name']} was best at {arm['rate']:g}, an edge of the grid; the best may lie outside. Widen --lr or "
            "raise --grow."
        )
    if arm.get("last_value"):
        lines.append(
            f"{arm['name']} was best at {arm['last_value']}, the last value on offer; the best may lie beyond."
        )
    lines += _uncertain(arm, results["settings"]["tuning_seeds"])
    if arm["rate"] is None:
        tried = len({point["rate"] for point in arm["curve"]}) == len(arm["grid"])
        done = tried and all(alternative["over"] for alternative in arm.get("alternatives", ()))
        lines.append(
            f"{arm['name']}: no learning rate of the grid worked; the arm is left out."
            if done
            else f"{arm['name']}: its learning rate is not chosen yet."
        )
    wanted = results["settings"]["seeds"]
    good = [seed for seed in arm["seeds"] if seed["status"] == "ok"]
    if arm["seeds"] and len(good) < wanted:
        lines.append(f"{arm['name']}: {len(good)} of {wanted} seeds were measured; the missing ones may be the worst.")
    compared = {results["settings"]["reference"], *(row["arm"] for row in results["comparisons"])}
    if good and results["settings"]["reference"] in measured and arm["name"] not in compared:
        lines.append(f"{arm['name']}: none of its seeds was measured with the reference; it is not compared.")
    worse = [s["seed"] for s in arm["seeds"] if (s["last_loss"] or 0) > (s["first_loss"] or math.inf)]
    if worse:
        lines.append(f"{arm['name']}: the training loss went up over the run (seed {', '.join(map(str, worse))}).")
    return lines


def _uncertain(arm: Mapping[str, Any], seeds: int) -> list[str]:
    """Sentences where another rate, or another value, was nearer to the chosen one than means of runs lie apart."""
    rates = {
        f"{rate:g}": fmean(point["value"] for point in points)
        for rate in arm["grid"]
        if (points := [p for p in arm["curve"] if p["rate"] == rate]) and all(p["status"] == "ok" for p in points)
    }
    values = {each["name"]: each["value"] for each in arm.get("alternatives", ()) if each["value"] is not None}
    spread = arm.get("spread")
    if arm["rate"] is None or not spread:
        return []
    lines = []
    for kind, tried, chosen in (("rates", rates, f"{arm['rate']:g}"), ("values", values, str(arm.get("chosen")))):
        others = {name: value for name, value in tried.items() if name != chosen}
        if chosen not in tried or not others:
            continue
        other = min(others, key=lambda name: abs(others[name] - tried[chosen]))
        gap = abs(others[other] - tried[chosen])
        if gap < spread * math.sqrt(2 / seeds):
            lines.append(
                f"{arm['name']}: the {kind} {chosen} and {other} differ by {gap:.2g} in what chose between them, and "
                f"runs of one rate by {spread:.2g} (standard deviation). The intervals take the choice as known; raise "
                "--tune-seeds."
            )
    return lines


def table(results: Mapping[str, Any]) -> str:
    """The result for the terminal."""
    tasks = list(dict.fromkeys(name for arm in results["arms"] for name in arm["tasks"]))
    reference = results["settings"]["reference"]
    difference = [f"- {reference}", "95 %", "half-width", "p (Holm)"]
    head = ["arm", "lr", "seeds", *tasks, *difference, "parameters", "s/step", "GiB"]
    lines = aligned(head, [_cells(arm, tasks, results) for arm in results["arms"]])
    settings, chosen = results["settings"], ""
    over = "documents and seeds" if settings["seeds"] > 1 else "documents"
    if settings["tuning_seeds"]:
        by = "held-out loss" if settings["validation"] == [LOSS] else ", ".join(settings["validation"])
        chosen = f"; rates chosen by {by}"
    lines.append(f"Mean percent ± standard error over {over}{chosen}.")
    lines += [f"{task} is {score}." for task, score in settings.get("scores", {}).items()]
    lines += _nats_table(results)
    lines += ["", *control_lines(results)]
    return "\n".join([*lines, "", *(f"- {line}" for line in results["says"])])


def _nats_table(results: Mapping[str, Any]) -> list[str]:
    """Log-likelihoods of the reference answers by pictures; empty where no arm has any."""
    columns = list(dict.fromkeys(name for arm in results["arms"] for name, measures in arm["nats"].items() if measures))
    if not columns:
        return []
    rows = [
        [arm["name"], _PICTURES[mode], *(_nats_mean(arm["nats"].get(column, {}).get(mode)) for column in columns),
         *nats_cells(nats_between(results, (arm["name"], columns[-1]), mode))]
        for arm in results["arms"]
        for mode in dict.fromkeys(mode for measures in arm["nats"].values() for mode in measures)
    ]  # fmt: skip
    head = ["arm", "pictures", *columns, f"- {results['settings']['reference']}", "95 %", "p (Holm)"]
    return ["", "Log-likelihood of the reference answer, nats:", *aligned(head, rows)]


_PICTURES = {"own": "own", "wrong_image": "another item's", "blind": "plain"}


def _nats_mean(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return "-"
    return f"{measure['mean']:.4f} ± " + ("unknown" if measure["stderr"] is None else f"{measure['stderr']:.4f}")


def nats_between(results: Mapping[str, Any], subject: tuple[str, str], mode: str = "own") -> Mapping[str, Any] | None:
    """The difference in nats between an arm (and column) and the reference; `mode`: `own`, or a control's name."""
    rows = [row for row in results["comparisons"] if (row["arm"], row["task"]) == subject]
    return rows[0].get("nats", {}).get(mode) if rows else None


def nats_cells(difference: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Difference, interval and p-value in nats."""
    if difference is None:
        return "", "", ""
    if difference["low"] is None:
        return f"{difference['difference']:+.4f}", "unknown", "-"
    interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    p = "-" if difference["p_corrected"] is None else f"{difference['p_corrected']:.2g}"
    return f"{difference['difference']:+.4f}", interval, p


def nats_sentence(row: Mapping[str, Any]) -> str:
    """A difference in nats as a sentence; empty where there is none."""
    difference = row.get("nats", {}).get("own")
    if difference is None:
        return ""
    subject = f"{row['arm']} against {row['reference']}, log-likelihood of the reference answer on {row['task']}"
    value, interval, p = nats_cells(difference)
    left = f"; {difference['left_out']} documents lack one and are left out" if difference["left_out"] else ""
    match verdict_of_nats(row):
        case "error unknown":
            return (
                f"{subject}: {value} nats; all documents differ alike, or are of one picture, so the error is "
                f"unknown{left}."
            )
        case "nothing follows":
            return (
                f"{subject}: no conclusion from {value} nats [{interval}], since neither is above its controls{left}."
            )
        case "more likely" | "less likely" as words:
            return f"{subject}: {words}, {value} nats [{interval}], corrected p {p}{left}."
        case "one seed":
            left = f", for this one seed{left}"
    return f"{subject}: not shown to differ, {value} nats [{interval}], corrected p {p}{left}."


def control_lines(results: Mapping[str, Any]) -> list[str]:
    """Differences of every arm from its controls, a line per arm and column."""
    return [
        f"{arm['name']}{f', {column}' if len(arm['controls']) > 1 else ''}: "
        + "; ".join(
            f"{less.points} against {AGAINST[row['name']]}"
            for row in controls["rows"]
            if (less := difference_of(row)) is not None
        )
        for arm in results["arms"]
        for column, controls in arm["controls"].items()
    ]


def _cells(arm: Mapping[str, Any], tasks: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    last = tasks[-1] if tasks else None
    row = next((r for r in results["comparisons"] if r["arm"] == arm["name"] and r["task"] == last), None)
    good = [seed for seed in arm["seeds"] if seed["status"] == "ok"]
    means = [arm["tasks"].get(task) for task in tasks]
    cost = ["-", "-", "-"]
    if measured := arm["cost"]:
        cost = [f"{measured['trainable']:,}", f"{measured['step_seconds']:.2f}", f"{measured['memory_gib']:.1f}"]
    return [
        arm["name"],
        "-" if arm["rate"] is None else f"{arm['rate']:g}",
        str(len(good)),
        *(f"{100 * one['mean']:.1f} ± {100 * one['stderr']:.1f}" if one else "-" for one in means),
        *_difference_cells(row),
        *cost,
    ]


def _difference_cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", "", ""]
    interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return [
        f"{100 * row['difference']:+.1f}",
        interval,
        f"{50 * (row['high'] - row['low']):.1f}",
        "-" if row["verdict"] in UNJUDGED else f"{row['p_corrected']:.2g}",
    ]
