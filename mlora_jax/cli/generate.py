"""Answers prompts at any rank of an adapter: `python -m experiments.generate --run DIR --rank 8 --prompt "Once upon"`.

The adapter is that of a trial of a run, or the one in a folder given by `--adapter FOLDER`. `--rank 0,4,8` answers each
prompt at each of these ranks, all in the same batches; rank 0 is the base model. `--prompts FILE` answers every line of
a file. If the file's name ends in .jsonl, each line is a JSON object {"prompt": ...}; otherwise each line is a prompt.

`--kv FOLDER --kv_budget 0.4` answers with a smaller KV cache. FOLDER is what `experiments.kv_cache` wrote for the base.

The settings in the base's generation_config.json that change logits, such as repetition_penalty, are applied as in
transformers. The flags alone decide whether and how tokens are drawn: do_sample, temperature, top_k, top_p and similar
settings of the file are not applied, and a warning names them if tokens are drawn.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from absl import app, flags, logging

from mlora_jax.cli import adapter_flags, deploy_flags
from mlora_jax.cli.adapter_flags import READOUT, TRIAL
from mlora_jax.cli.deploy_flags import OUTPUT, RANK, base_folder, chosen_ranks, find_adapter
from mlora_jax.cli.number_flags import define_float, define_integer
from mlora_jax.disk import naming
from mlora_jax.kv_cache.ranks import RATES
from mlora_jax.models.text_file import check_text, read_lines

flags.adopt_module_key_flags(adapter_flags)
flags.adopt_module_key_flags(deploy_flags)
RUN = flags.DEFINE_string("run", None, "Folder of a run, which was its --workdir.")
ADAPTER = flags.DEFINE_string("adapter", None, "Folder of an adapter, instead of --run.")
PROMPT = flags.DEFINE_string("prompt", None, "Prompt to answer.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts, instead of --prompt.")
MAX_NEW_TOKENS = define_integer("max_new_tokens", 128, "Largest number of tokens of an answer.")
TEMPERATURE = define_float("temperature", 0.0, "Temperature at which tokens are drawn; 0 takes the likeliest token.")
TOP_P = define_float("top_p", 1.0, "Tokens are drawn from the likeliest ones that together have this probability.")
SEED = define_integer("seed", 0, "Seed of the draws.")
STOP = flags.DEFINE_multi_string("stop", [], "String that ends an answer; may be given several times.")
BATCH_SIZE = define_integer("batch_size", 32, "Largest number of answers that are made at the same time.")
KV = flags.DEFINE_string("kv", "", "Folder of projections of keys and values, for a smaller KV cache.")
KV_BUDGET = define_float("kv_budget", None, "Fraction of the full cache's bytes that the cache may take, with --kv.")
KV_RATES = flags.DEFINE_enum("kv_rates", "searched", list(RATES), "How the ranks of the cache follow from its budget.")

# The lengths of prompts and answers are padded to a multiple of this: few shapes compile, and padding stays small.
PAD_MULTIPLE = 32


def main() -> None:
    """Parses the command line and answers. Bad input ends the command with a message of one line."""
    flags.mark_flag_as_required("rank")
    try:
        app.run(_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _run(arguments: Sequence[str]) -> None:
    if arguments[1:]:
        raise ValueError(
            f"what is {' '.join(arguments[1:])!r}? Options begin with --, and values with spaces need quotes"
        )
    logging.set_verbosity(logging.WARNING)
    ranks = chosen_ranks(RANK.value or ())
    from mlora_jax.compilation_cache import use_compilation_cache

    _one_of(run=RUN.value, adapter=ADAPTER.value)
    _one_of(prompt=PROMPT.value, prompts=PROMPTS.value)
    if TRIAL.value is not None and RUN.value is None:
        raise ValueError("--trial names an adapter of a run: give --run, or --adapter alone")
    prompts = [check_text(PROMPT.value or "", "--prompt")] if PROMPTS.value is None else read_prompts(PROMPTS.value)
    folder = pathlib.Path(str(ADAPTER.value)) if RUN.value is None else find_adapter(RUN.value, TRIAL.value)
    with use_compilation_cache():
        records = _answer(folder, prompts, ranks)
    if OUTPUT.value is not None:
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        with naming(OUTPUT.value):
            pathlib.Path(OUTPUT.value).write_text(lines, encoding="utf-8")
        print(f"{len(records)} answers in {OUTPUT.value}")
        return
    for record in records:
        if len(records) > 1:
            print(f"--- rank {record['rank']}: {record['prompt']}")
        print(record["answer"])


def _one_of(**values: str | None) -> None:
    if sum(value is not None for value in values.values()) != 1:
        raise ValueError(f"give either {' or '.join(f'--{name}' for name in values)}")


def read_prompts(path: str) -> list[str]:
    """Returns the prompts of a file, without the lines that are empty.

    Args:
      path: the file. If its name ends in .jsonl, each line is {"prompt": str}; otherwise each line is a prompt.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not text or has another form, and the message gives its number; or the file has no prompt.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    prompts = []
    for number, line in read_lines(file):
        if not line.strip():
            continue
        if file.suffix.lower() == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError):
                line = None
            if not isinstance(line, str):
                raise ValueError(f'{path}, line {number}: it must be an object like {{"prompt": "text"}}')
        prompts.append(check_text(line, f"{path}, line {number}: the prompt"))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _load_base(folder: pathlib.Path, description: Mapping):
    """Returns the frozen base of an adapter, its tokenizer, and its settings for generation.

    The base has the dtype and the quantisation of the run, or is as stored if the adapter is not in a run. Its cache
    is that of `--kv`.
    """
    from mlora_jax.evaluate.loading import with_cache_budget
    from mlora_jax.models import Tokenizer, load_decoder, quantize_decoder
    from mlora_jax.models.generation_config import read_generation_settings
    from mlora_jax.models.json_file import read_json_object

    base = base_folder(folder, description)
    config = pathlib.Path(RUN.value or folder) / "config.json"
    options = read_json_object(config)["model"] if RUN.value and config.is_file() else {}
    model = load_decoder(base, dtype=options.get("dtype") or None)
    model = with_cache_budget(model, KV.value, KV_BUDGET.value, KV_RATES.value)
    quantization = options.get("quantization")
    model = quantize_decoder(model, quantization) if quantization else model
    return model, Tokenizer.load(base), read_generation_settings(base)


def _encode(prompts: Sequence[str], tokenizer, context: int) -> list[list[int]]:
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        name = "the prompt" if PROMPTS.value is None else f"prompt {number} of {PROMPTS.value}"
        if not ids:
            raise ValueError(f"{name} has no tokens, and an answer needs something to follow")
        tokenizer.check_known(ids, name=name)
        if len(ids) >= context:
            raise ValueError(
                f"{name} has {len(ids)} tokens, which leaves no room for an answer in the model's context of "
                f"{context} tokens: shorten it"
            )
    return encoded


def _answer(folder: pathlib.Path, prompts: Sequence[str], ranks: Sequence[int]) -> list[dict]:
    """Returns a record for each prompt and rank; all ranks of the first prompt come first."""
    import numpy as np

    from mlora_jax.core.hierarchy import check_rank
    from mlora_jax.evaluate import Generator, StopStrings
    from mlora_jax.training.adapter_file import load_adapted, read_description, trained_profile
    from mlora_jax.training.readout_files import find_readout

    description = read_description(folder)
    for rank in ranks:
        check_rank(rank, f"--rank for the adapter in {folder}", low=0, high=description["rank"])
    found = find_readout(folder, READOUT.value)
    model, tokenizer, settings = _load_base(folder, description)
    settings.check()
    context = model.config.max_position_embeddings
    encoded = _encode(prompts, tokenizer, context)
    graphdef, base, adapter, profile, hierarchy, _ = load_adapted(found.folder, model)
    ends = StopStrings(tokenizer, STOP.value)
    reading = found.read(adapter, hierarchy, trained_profile(description, hierarchy))
    if not description.get("finite", True):
        logging.warning("training of the adapter in %s failed: it is the last finite one", folder)
    if reading.norms is not None:
        raise ValueError(
            f"the read-out {READOUT.value!r} gives every layer a rank of its own, with which answers at several ranks "
            "cannot be made at once; export the adapter at one rank, or take the read-out 'ordered'"
        )
    generator = Generator(
        graphdef,
        base,
        profile,
        max_length=context,
        batch_size=BATCH_SIZE.value,
        pad_multiple=PAD_MULTIPLE,
        eos=tokenizer.eos_ids,
        settings=settings,
    )
    asked = [(number, rank) for number in range(len(prompts)) for rank in ranks]
    answers = generator.generate(
        reading.adapter,
        [encoded[number] for number, _ in asked],
        np.stack([reading.layer_profile(rank) for _, rank in asked]),
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        stop=ends,
        numbers=[number for number, _ in asked],  # an answer does not depend on which other ranks are asked for
    )
    return [
        {"prompt": prompts[number], "rank": rank, "answer": ends.text(made), "tokens": len(made)}
        for (number, rank), made in zip(asked, answers, strict=True)
    ]


if __name__ == "__main__":
    main()
