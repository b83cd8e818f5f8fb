"""Writes an adapter for other programs: `python -m experiments.export RUN_OR_ADAPTER --to peft --rank 1,8,32`.

RUN_OR_ADAPTER is the workdir of a run (with `--trial NAME` if it has several), or the folder of an adapter. `--to`
takes one of these forms:

    peft         a PEFT adapter, which PEFT and vLLM load beside the base
    hf           base and adapter in one Hugging Face folder
    safetensors  a smaller adapter in the form of this project

Each rank becomes a folder of its own. One rank is written to `--output DIR` itself, and several are written to
DIR/rank-R. Without `--output` they are written to the folder `exports` of the run or adapter. `--ranks-for vllm` pads
each adapter with zeros to a rank that vLLM accepts; without `--rank` it writes all accepted ranks below R, and R.
`--allocation RUN/ranks.csv` takes ranks per layer that `experiments.ranks` has found.
"""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

from absl import app, flags, logging

from mlora_jax.cli import adapter_flags, deploy_flags
from mlora_jax.cli.adapter_flags import READOUT, TRIAL
from mlora_jax.cli.deploy_flags import MODEL, OUTPUT, RANK, base_folder, base_name, chosen_ranks, find_adapter
from mlora_jax.compilation_cache import use_compilation_cache
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.readouts import fitted_profile
from mlora_jax.interop import RANKS_FOR as ACCEPTED
from mlora_jax.interop import accepted_rank, export_adapter, export_merged, export_peft
from mlora_jax.models.hub import hub_id
from mlora_jax.models.text_file import decode_text
from mlora_jax.training.adapter_file import read_adapter, read_description, trained_profile
from mlora_jax.training.readout_files import find_readout

FORMS = ("peft", "hf", "safetensors")

flags.adopt_module_key_flags(adapter_flags)
flags.adopt_module_key_flags(deploy_flags)
TO = flags.DEFINE_enum("to", None, list(FORMS), "Form to write.")
RANKS_FOR = flags.DEFINE_enum("ranks-for", None, list(ACCEPTED), "Program whose ranks to pad to; only for --to peft.")
flags.DEFINE_alias("ranks_for", "ranks-for")
ALLOCATION = flags.DEFINE_string("allocation", None, "ranks.csv with ranks per layer; --rank selects its rows.")
MAX_SHARD_SIZE = flags.DEFINE_string(
    "max_shard_size", None, "Largest size of a weight file of --to hf, like 5GB; by default that of the base."
)


def main() -> None:
    """Parses the command line and writes. Bad input ends the command with a message of one line."""
    flags.mark_flag_as_required("to")
    try:
        app.run(_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _run(arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(arguments) != 2:
        raise ValueError(f"name one run's or adapter's folder: export RUN_OR_ADAPTER --to peft; got {arguments[1:]}")
    for name, value, form in (("ranks-for", RANKS_FOR.value, "peft"), ("max_shard_size", MAX_SHARD_SIZE.value, "hf")):
        if value is not None and TO.value != form:
            raise ValueError(f"--{name} is of --to {form} only, got --to {TO.value}")
    given = pathlib.Path(arguments[1])
    folder = _adapter_folder(given)
    description, found = read_description(folder), find_readout(folder, READOUT.value)
    adapter, hierarchy, _ = read_adapter(found.folder)
    ranks = _ranks(hierarchy)
    if not description.get("finite", True):
        logging.warning("training of the adapter in %s failed: it is the last finite one", folder)
    options = {
        "readout": found.name,
        "trained_profile": trained_profile(description, hierarchy),
        "profiles": found.profiles,
        "description": {
            "exported_from": {**{name: description.get(name) for name in ("trial", "task")}, "readout": READOUT.value}
        },
    }
    if found.profiles:
        for rank in ranks:
            fitted_profile(found.profiles, rank)  # raises before anything is written
    chosen = {rank: _allocation(ALLOCATION.value, rank) if ALLOCATION.value else rank for rank in ranks}
    with use_compilation_cache():
        for rank, target in _targets(given, folder, ranks).items():
            print(_WRITERS[str(TO.value)](target, folder, description, adapter, hierarchy, chosen[rank], options))


def _adapter_folder(given: pathlib.Path) -> pathlib.Path:
    if (given / "adapter.json").is_file():
        if TRIAL.value is not None:
            raise ValueError("--trial names an adapter of a run: give the run's folder, or the adapter's alone")
        return given
    if not given.is_dir():
        raise FileNotFoundError(f"there is no folder {given}")
    return find_adapter(str(given), TRIAL.value)


def _ranks(hierarchy) -> list[int]:
    """Returns the ranks of --rank, or without it the ranks below R that the program of --ranks-for accepts, and R."""
    if RANK.value is None and RANKS_FOR.value is None:
        raise ValueError("--rank is missing, for example --rank 1,8,32")
    if RANK.value is None:
        whole = hierarchy.max_rank
        return [*(rank for rank in ACCEPTED[str(RANKS_FOR.value)] if rank < whole), whole]
    lowest = 0 if TO.value == "hf" else 1
    return [check_rank(r, "--rank", low=lowest, high=hierarchy.max_rank) for r in chosen_ranks(RANK.value)]


def _targets(given: pathlib.Path, folder: pathlib.Path, ranks: Sequence[int]) -> dict[int, pathlib.Path]:
    """Returns a dictionary: rank -> the folder to write."""
    name = f"rank-{{rank}}{'-per-layer' if ALLOCATION.value else ''}"
    if OUTPUT.value is not None:
        out = pathlib.Path(OUTPUT.value)
        return {rank: out / name.format(rank=rank) if len(ranks) > 1 else out for rank in ranks}
    out = given / "exports" / (folder.name if folder != given else "")
    form = "-".join(filter(None, (TO.value, RANKS_FOR.value, READOUT.value)))
    return {rank: out / f"{form}-{name.format(rank=rank)}" for rank in ranks}


def _allocation(path: str, budget: int) -> dict[str, tuple[int, ...]]:
    """Reads from a ranks.csv the ranks per layer that need as many parameters as the uniform rank `budget`."""
    table = io.StringIO(decode_text(pathlib.Path(path).read_bytes(), path), newline="")
    rows = [row for row in csv.DictReader(table) if row.get("kind") == "allocated"]
    found = {row["rank"]: row for row in rows}
    if str(budget) not in found:
        raise ValueError(f"{path} has no ranks per layer for rank {budget}; it has {', '.join(found) or 'none'}")
    row = found[str(budget)]
    if row["readout"] != READOUT.value:
        raise ValueError(f"the ranks in {path} are for the read-out {row['readout']}: give --readout {row['readout']}")
    modules = (entry.split(": ") for entry in row["ranks"].split("; "))
    return {module: tuple(map(int, ranks.split())) for module, ranks in modules}


def _write_peft(target, folder, description: Mapping, adapter, hierarchy, rank, options: Mapping) -> str:
    # PEFT loads the base from here by default. The id of a model of the hub is valid on any machine, a folder is not.
    base = base_name(folder, description)
    if not MODEL.value and hub_id(base) is None:
        base = str(base_folder(folder, description))
    export_peft(target, adapter, hierarchy, rank, base_model=base, ranks_for=RANKS_FOR.value, **options)
    return f"PEFT adapter in {target}{_hint(rank)}"


def _hint(rank) -> str:
    if RANKS_FOR.value != "vllm":
        return ""
    largest = rank if isinstance(rank, int) else max(max(ranks) for ranks in rank.values())
    return f"; serve it by vllm serve BASE --enable-lora --max-lora-rank {accepted_rank(largest, 'vllm')} or more"


def _write_merged(target, folder, description: Mapping, adapter, hierarchy, rank, options: Mapping) -> str:
    base = base_folder(folder, description)
    export_merged(target, adapter, hierarchy, rank, base_model=base, max_shard_size=MAX_SHARD_SIZE.value, **options)
    return f"merged model in {target}"


def _write_adapter(target, folder, description: Mapping, adapter, hierarchy, rank, options: Mapping) -> str:
    export_adapter(target, adapter, hierarchy, rank, base_model=base_name(folder, description), **options)
    return f"adapter in {target}"


_WRITERS = {"peft": _write_peft, "hf": _write_merged, "safetensors": _write_adapter}

if __name__ == "__main__":
    main()
