"""The sentences above the tables: what was averaged, what was chosen on which split, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from mlora_jax.report.choice import Choice, shared_seeds
from mlora_jax.report.folders import config_differences
from mlora_jax.report.rows import CurveRow, MergedRuns, Setting

CHOSEN_ON = {
    "validation": "the validation split, held out of the training rows",
    "test": "this same test split, which flatters it",
}
UNDECIDED = {
    "validation": "No learning rate is chosen, for want of accuracies on a validation split, and every one is listed",
    "test": "No learning rate is chosen, for want of accuracies on the test split, and every one is listed",
}


def name_runs(merged: MergedRuns) -> str:
    """Returns a sentence that lists the folders of the runs."""
    return f"Runs: {', '.join(str(folder.path) for folder in merged.folders)}."


def describe_runs(merged: MergedRuns) -> list[str]:
    """Returns sentences about the runs as a whole: their sources and differences, and what was cut or failed."""
    folders = merged.folders
    notes = []
    if merged.number:
        notes.append(f"{'; '.join(f'{name}: {path}' for name, path in folders[0].sources.items())}.")
    differences = config_differences(folders)
    if differences:
        told = "; ".join(f"{name}: {', '.join(values)}" for name, values in differences.items())
        notes.append(f"Runs differ in {told}.")
    base = [folder.base["test"] for folder in folders]
    if len(set(base)) > 1:
        found = ", ".join(f"{value:.3f} in {folder.path}" for value, folder in zip(base, folders, strict=True))
        notes.append(f"The base's accuracy differs between the runs: {found}; the first is shown.")
    for folder in folders:
        where = f" of {folder.path}" if len(folders) > 1 else ""
        if folder.truncated:
            cut = ", ".join(f"{cut} of {folder.items[split]} {split} items" for split, cut in folder.truncated.items())
            notes.append(f"Prompts cut on the left to fit config.data.max_length or the context: {cut}{where}.")
        if folder.not_compared and folder.task == folder.config["data"]["task"]:
            notes.append(f"Not compared{where}: {'; '.join(folder.not_compared.values())}.")
        if folder.unfinished:
            notes.append(f"{len(folder.unfinished)} of {len(folder.planned)} trials{where} are not finished.")
    if merged.failed:
        notes.append(f"Failed, the loss is not finite: {', '.join(merged.failed)}.")
    if not merged.rows:
        notes.append(f"No trial finished. Accuracy of the base: {merged.base['test']:.3f}.")
    return notes


def describe_setting(setting: Setting, merged: MergedRuns, choice: Choice) -> str:
    """Returns the caption of the table of one setting."""
    rows = [row for row in merged.rows if row.setting == setting]
    chosen, left_out, undecided = (
        [row for row in some if row.setting == setting] for some in (choice.chosen, choice.left_out, choice.undecided)
    )
    seeds = sorted({seed for row in rows for seed in row.seeds})
    name = str(setting)
    if any(row.setting.ranks != setting.ranks and str(row.setting) == name for row in merged.rows):
        name += f", S = {', '.join(map(str, setting.ranks))}"
    sentences = [
        f"{name}. Accuracy on the test split; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
        + ("; mean ± standard deviation over seeds." if len(seeds) > 1 else ".")
    ]
    if chosen:
        sentences.append(describe_choice(choice))
        if unlike := [row.label for row in chosen if _have_unlike_seeds(row, rows, choice)]:
            sentences.append(
                "Learning rates with unlike seeds were compared by the seeds that all of them have, if there are any: "
                f"{', '.join(unlike)}."
            )
    if undecided:
        sentences.append(f"{UNDECIDED[choice.split]}: {', '.join(dict.fromkeys(row.label for row in undecided))}.")
    everyone = {*seeds, *(seed for row in rows for seed in row.absent)}
    if left_out:
        sentences.append(
            "Not chosen among, since they lack more seeds than another learning rate: "
            f"{_name_with_absent(left_out, everyone)}."
        )
    short = [row for row in rows if set(row.seeds) != everyone and row not in left_out]
    if short:
        sentences.append(f"Means over the seeds that finished: {_name_with_absent(short, everyone)}.")
    return " ".join(sentences)


def describe_choice(choice: Choice) -> str:
    """Returns a sentence that names the split on which the learning rates were chosen."""
    return (
        "Each row with several learning rates is at the one with its highest mean AURAC (log2) on "
        f"{CHOSEN_ON[choice.split]}."
    )


def describe_differences(rows: Iterable[CurveRow]) -> str:
    """Returns the caption of the table of pairwise differences of one setting."""
    rows = list(rows)
    alone = [row.label for row in rows if row.test.log2.deviation is None]
    sentences = [
        "Differences of AURAC (log2) on the test split, row less column.",
        "Bold: clear, the bands mean ± one standard deviation over seeds do not overlap.",
    ]
    if alone:
        sentences.append(f"In brackets: a row of one seed has no spread, so nothing can be said: {', '.join(alone)}.")
    return " ".join(sentences)


def _have_unlike_seeds(chosen: CurveRow, rows: Iterable[CurveRow], choice: Choice) -> bool:
    able = [row for row in rows if row.group == chosen.group and row not in choice.left_out]
    return any(row.seeds != shared_seeds(able) for row in able)


def _name_with_absent(rows: Iterable[CurveRow], everyone: set[int]) -> str:
    return ", ".join(f"{row.label} at {row.learning_rate:g} ({_absent(row, everyone)})" for row in rows)


def _absent(row: CurveRow, everyone: set[int]) -> str:
    kinds = {"failed": row.failed, "missing": sorted(everyone - set(row.seeds) - set(row.failed))}
    return "; ".join(
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))} {kind}"
        for kind, seeds in kinds.items()
        if seeds
    )
