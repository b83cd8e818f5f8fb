"""The language model that lm-evaluation-harness evaluates: an adapter at one rank, or several adapters and ranks.

The harness builds the requests and scores the answers. This module computes the answers as the harness's Hugging Face
backend does, without torch or transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from mlora_jax.evaluate.generation import Generator, warn_once
from mlora_jax.evaluate.loading import Loaded, load_adapted
from mlora_jax.evaluate.scoring import Request, Scorer
from mlora_jax.models import Tokenizer

logger = logging.getLogger(__name__)

MODEL_NAME = "mlora_jax"
MAX_GEN_TOKS = 256  # the limit for tasks that state none, as in the Hugging Face backend
# Options that change nothing when the likeliest token is taken.
SAMPLING_ONLY = ("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
CONTINUED = "MLORA_JAX_CONTINUES_HERE "  # appended to a message that is to be continued, to find its end

# (texts of the request or None, token ids of the context, token ids of the continuation)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class Variant(NamedTuple):
    """A model under evaluation: an adapter and its profile: [R], or what `set_profile` takes."""

    adapter: Any
    p: Any


class NestedLM(TemplateLM):
    """The harness's view of a decoder with an adapter at one rank.

    On the same checkpoint it equals the harness's Hugging Face backend in token ids, truncation on the left, stop
    strings and the parts that are cut from a generated text.

    Args:
      scorer: the scorer of the adapted decoder.
      generator: the generator of the adapted decoder.
      tokenizer: the decoder's tokenizer.
      variant: the adapter and the profile to evaluate.
      max_length: the model's context, in tokens.
      name: the name of the model in results and request caches.
      seed: the seed of sampled generation.

    Attributes:
      truncated: the number of requests so far that were cut on the left to fit into the context.
    """

    def __init__(
        self,
        scorer: Scorer,
        generator: Generator,
        tokenizer: Tokenizer,
        variant: Variant,
        *,
        max_length: int,
        name: str = MODEL_NAME,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scorer, self.generator, self.tokenizer = scorer, generator, tokenizer
        self.max_length, self.name, self.seed = max_length, name, seed
        self.truncated = 0
        self._variants: tuple[Variant, ...] = (Variant(*variant),)

    @classmethod
    def load(cls, **options: Any) -> NestedLM:
        """Loads a model from files; the options are those of `mlora_jax.evaluate.loading.load_adapted`."""
        return cls.of(load_adapted(**options))

    @classmethod
    def of(cls, loaded: Loaded) -> NestedLM:
        """The language model of a loaded model, at the rank for which it was loaded."""
        shapes: dict[str, Any] = {"batch_size": loaded.batch_size, "pad_multiple": loaded.pad_multiple}
        trees = loaded.graphdef, loaded.base, loaded.profile
        eos = {*loaded.eos} - {*loaded.tokenizer.shown_stops}  # `generate_until` looks for those itself
        return cls(
            Scorer(*trees, max_length=loaded.max_length, **shapes),
            Generator(
                *trees,
                max_length=loaded.max_length,
                eos=sorted(eos),
                ends=loaded.eos,
                settings=loaded.settings,
                **shapes,
            ),
            loaded.tokenizer,
            Variant(loaded.adapter, loaded.p),
            max_length=loaded.max_length,
            name=loaded.name,
            seed=loaded.seed,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> NestedLM:
        """Loads the model that the harness asks for with `--model_args`, which are the options of `load`.

        Of the harness's own options for models, only the batch size is used, unless `--model_args` has one; "auto"
        stands for the default of this package. The harness's `--device` is ignored, because it is never empty: jax
        chooses the device, by the environment variable JAX_PLATFORMS.
        """
        size = (additional_config or {}).get("batch_size")
        options = {"batch_size": int(str(size))} if str(size).isdecimal() else {}
        return cls.load(**(options | dict(arg_dict)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> NestedLM:
        """Loads the model like `create_from_arg_obj`, from a string "key=value,key=value"."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def variant(self) -> Variant:
        """The adapter and the profile under evaluation."""
        return self._variants[0]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the names of the harness's request caches."""
        return self.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The model's entry in the harness's record of the run."""
        leaves = jax.tree.leaves(self.variant.adapter)
        return {"model_name": self.name, "adapter_parameters": sum(leaf.size for leaf in leaves)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text. BOS comes first if the tokenizer adds it and the text does not begin with it.

        Raises:
          ValueError: the text has a token that the tokenizer knows and the model lacks.
        """
        ids = self.tokenizer.encode(string, bos=add_special_tokens is None)
        self.tokenizer.check_known(ids, name=f"the text {string[:40]!r}")
        return [*self.tokenizer.opening, *ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat as text that ends where the assistant begins, or else where the last message continues."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._render(without, add_generation_prompt)  # some templates know no system turn

    def _render(self, chat: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.tokenizer.render_chat(chat, add_generation_prompt=True)
        *before, last = chat
        marked, mark = [*before, {**last, "content": last["content"] + CONTINUED}], CONTINUED.strip()
        text, found, rest = self.tokenizer.render_chat(marked, add_generation_prompt=False).rpartition(mark)
        if not found:
            raise ValueError(f"the chat template leaves the last message out: {last['content'][:60]!r}")
        # A template that strips messages removed the space of the marker, and would remove that of the message, too.
        return text if rest.startswith(CONTINUED[len(mark) :]) else text.rstrip()

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        (answers,) = self._score(requests)
        for (texts, *_ids), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, each from its own beginning, in windows of the context's length."""
        (totals,) = self._roll(requests)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts that answer the contexts, up to the first stop string.

        Raises:
          ValueError: an option of generation is not supported, or there is no room for a context.
        """
        (texts,) = self._generate(requests)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _score(self, requests: Sequence[TokenRequest]) -> list[list[tuple[float, bool]]]:
        """For every variant, the answers to all requests, which are prepared once."""
        for texts, context, continuation in requests:
            if not context or not continuation:
                raise ValueError(f"nothing to score: no token of the continuation, or none before it, in {texts!r}")
        prepared = self.scorer.prepare([Request(tuple(context), tuple(rest)) for _, context, rest in requests])
        self.truncated += prepared.truncated
        answers = []
        for variant in self._variants:
            scores = self.scorer.score(prepared, *variant)
            if broken := int(np.sum(~np.isfinite(scores.log_likelihoods))):
                logger.warning("%d of %d log-likelihoods are not finite", broken, len(requests))
            pairs = zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True)
            answers.append([*pairs])
        return answers

    def _roll(self, requests: Sequence[Instance]) -> list[list[float]]:
        """For every variant, the log-likelihoods of all texts."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = []
        for answers in self._score(windows):
            sums = np.zeros(len(requests))
            np.add.at(sums, owners, [value for value, _ in answers])
            totals.append(sums.tolist())
        return totals

    def _generate(self, requests: Sequence[Instance]) -> list[list[str]]:
        """For every variant, the generated texts of all requests."""
        texts = [[""] * len(requests) for _ in self._variants]
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(options_key(request), []).append(number)
        for numbers in alike.values():
            contexts = [requests[number].args[0] for number in numbers]
            made = self._answer(contexts, _arguments(requests[numbers[0]])[1])
            for each, answers in zip(texts, made, strict=True):
                for number, text in zip(numbers, answers, strict=True):
                    each[number] = text
        return texts

    def _answer(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[list[str]]:
        """For every variant, the answers to contexts that share their options of generation."""
        options = cast("dict[str, Any]", normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        count, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        sampling = {key: options.pop(key) for key in ("temperature", "top_p") if key in options}
        unknown = [name for name in options if sampled or name not in SAMPLING_ONLY]
        if unknown:
            raise ValueError(f"generation options {', '.join(unknown)} are not supported; temperature and top_p are")
        own = self.generator.settings
        if own.max_new_tokens not in (None, count):
            warn_once(
                f"{own.file}: max_new_tokens={own.max_new_tokens} is not applied: the task's limit of {count} tokens "
                f"holds, which lm-eval's Hugging Face backend would replace by this"
            )
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"max_gen_toks={count} leaves no room for a context in the model's {self.max_length} tokens"
            )
        # For generation, the backend looks for BOS at the beginning of a text, not for the prefix that replaces BOS.
        opens = None if self.tokenizer.bos_id is not None else True
        encoded = [self.tok_encode(text, opens) or [self.prefix_token_id] for text in contexts]
        self.truncated += sum(len(ids) > room for ids in encoded)
        prompts = [ids[-room:] for ids in encoded]

        # The backend's texts keep an ordinary token that stops them; the generator would leave it out if it knew it.
        shown = {*self.tokenizer.shown_stops}

        def ends(ids: list[int]) -> bool:
            if not shown.isdisjoint(ids):
                return True
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            return any(term and term in text for term in until)

        settings: dict[str, Any] = {"max_new_tokens": count, "stop": ends}
        if sampled:
            settings |= {"seed": self.seed} | {key: float(value) for key, value in sampling.items()}
        made = _generate_variants(self.generator, prompts, self._variants, mixed=not sampled, settings=settings)
        finish = lambda ids: postprocess_generated_text(self.tokenizer.decode(ids), until, None)  # noqa: E731
        return [[finish(ids) for ids in answers] for answers in made]


register_model(MODEL_NAME)(NestedLM)  # the untyped decorator would hide the class from type checkers


def _arguments(request: Instance) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", request.args)  # the type that is inferred for it is an empty tuple


def _generate_variants(
    generator: Generator, prompts: Sequence[Sequence[int]], variants: Sequence[Variant], *, mixed: bool, settings: dict
) -> list[list[list[int]]]:
    """For every variant, the answers to all prompts. With `mixed`, variants of one adapter may share batches."""
    groups: dict[Any, list[int]] = {}
    for index, (adapter, p) in enumerate(variants):
        together = mixed and not isinstance(p, Mapping) and np.ndim(p) == 1
        groups.setdefault(id(adapter) if together else (index,), []).append(index)
    made: list[list[list[int]]] = [[] for _ in variants]
    for members in groups.values():
        adapter, p = variants[members[0]]
        if len(members) > 1:
            p = np.repeat(np.stack([np.asarray(variants[index].p) for index in members]), len(prompts), axis=0)
        answers = generator.generate(adapter, [*prompts] * len(members), p, **settings)
        for position, index in enumerate(members):
            made[index] = answers[position * len(prompts) : (position + 1) * len(prompts)]
    return made


def options_key(request: Instance) -> str:
    """A request's options of generation, as a string that serves as a key."""
    return json.dumps(_arguments(request)[1], sort_keys=True, default=str)
