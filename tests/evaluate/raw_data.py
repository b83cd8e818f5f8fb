"""Small data sets of the harness's tasks, in the forms in which they lie around and in the published schema."""

import json
import pathlib

from tests.tiny import write_trec

QUESTIONS = (
    ("Is ice cold?", ("yes", "no", "sometimes", "nobody knows that at all")),
    ("Who wrote Hamlet?", ("the king", "Galileo", "Shakespeare", "one long string of cliches")),
    ("How far is it from Denver to Aspen?", ("one", "two", "three hundred kilometres", "four")),
    ("What is an atom?", ("a city", "a number", "a question", "part of everything there is")),
)


def write_lines(path: pathlib.Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def instruction_rows(shift: int = 0) -> list[dict]:
    """ARC in the instruction form."""
    rows = []
    for number, (question, choices) in enumerate(QUESTIONS):
        listed = " ".join(f"Answer{index}: {choice}" for index, choice in enumerate(choices, start=1))
        formats = "/".join(f"answer{index}" for index in range(1, len(choices) + 1))
        text = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {formats}"
        answer = f"answer{(number + shift) % len(choices) + 1}"
        rows.append({"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer})
    return rows


def gsm8k_rows(start: int = 0) -> list[dict]:
    return [
        {
            "question": f"{n} and {n + 1} are how many?",
            "answer": f"{n}+{n + 1}=<<{n}+{n + 1}={2 * n + 1}>>\n#### {2 * n + 1}",
        }
        for n in range(start, start + 5)
    ]


def winogrande_rows() -> list[dict]:
    row = {"option1": "trophy", "option2": "suitcase", "answer": "1"}
    return [row | {"sentence": f"The {size} trophy does not fit, as the _ is too big."} for size in ("red", "blue")]


def hellaswag_rows(split: str) -> list[dict]:
    fields = {"ctx_a": f"A man of the {split} is sitting on a roof.", "ctx_b": "he", "activity_label": "Roofing"}
    return [
        fields | {"endings": ["sleeps. [title] Well", "falls.", "sings.", "eats."], "label": str(n)} for n in range(4)
    ]


def mmlu_rows(subjects) -> list[dict]:
    row = {"question": "Is ice cold?", "choices": ["yes", "no", "both", "neither"], "answer": 0}
    return [row | {"subject": subject} for subject in subjects]


def write_raw(folder: pathlib.Path) -> pathlib.Path:
    """arc_challenge, gsm8k and trec."""
    for split, shift in (("train", 0), ("test", 1)):
        (folder / "arc_challenge").mkdir(parents=True, exist_ok=True)
        (folder / "arc_challenge" / f"{split}.json").write_text(json.dumps(instruction_rows(shift)))
        write_lines(folder / "gsm8k" / f"{split}.jsonl", gsm8k_rows(5 * shift))
    write_trec(folder / "trec")
    return folder
