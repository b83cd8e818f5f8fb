"""Trains TREC with LoRA, DyLoRA and MatryoshkaLoRA in PyTorch: an independent check of the rank-accuracy curves.

The program shares no code with the package. It uses transformers' Llama and tokenizer, its own training loop, and a
profile p [R] in y = W x + ((x A) * p) B. One run trains one method with one learning rate and one seed, and prints one
JSON line.

    python benchmarks/independent_trec.py --model MODEL_FOLDER --data TREC_FOLDER --method matryoshka \
        --learning_rate 0.003

The read-outs at rank r of S are `prefix`, which is s_r for i <= r; `nested`, the sum of s_q over q in S with
i <= q <= r; `masked`, P_i for i <= r; and `svd`, the first r pairs of the balanced SVD of A diag(p) B, where p is the
profile of training (s_R for LoRA and DyLoRA). Nested and masked are measured for matryoshka only.

`--boundary` says how a question and an answer become tokens where a tokenizer merges characters across the boundary.
`harness` takes the prompt's own tokens, then the tail of the tokens of prompt + answer (as lm-evaluation-harness does).
`separate` tokenizes prompt and answer separately. `whole` splits the tokens of prompt + answer at the prompt's length.
With `whole` the last prompt token can give the answer away: before " abbreviation" tinystories-656k ends "Type:" with
the token ":", and before all other answers with ":_". A trained model therefore predicts " abbreviation" after ":"
whatever the question is.
"""

import argparse
import json
import math
import pathlib
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

RANKS = (1, 2, 4, 8, 16, 32)
BATCH_SIZE = 32
CHOICES = {
    "ABBR": " abbreviation",
    "ENTY": " entity",
    "DESC": " description",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}
SCALES = {"none": lambda rank: 1.0, "rank": lambda rank: 1.0 / rank, "sqrt": lambda rank: rank**-0.5}


def profile(rule):
    """Returns the profile [R] with p_i = rule(i), where i counts from 1."""
    return torch.tensor([float(rule(i)) for i in range(1, RANKS[-1] + 1)])


def prefix(rank, scale):
    """Returns the profile [R] of the prefix read-out."""
    return profile(lambda i: scale(rank) if i <= rank else 0)


def nested(rank, scale):
    """Returns the profile [R] of the nested read-out."""
    return profile(lambda i: sum(scale(inner) for inner in RANKS if i <= inner <= rank))


def masked(rank, scale):
    """Returns the profile [R] of the masked read-out; at the largest rank it is the diagonal P."""
    return profile(lambda i: sum(scale(outer) for outer in RANKS if outer >= i) if i <= rank else 0)


# Method -> the rule for the profile of a training step, and the rule for the profile that the SVD read-out keeps.
METHODS = {
    "lora": (lambda scale, draws: prefix(RANKS[-1], scale), prefix),
    "dylora": (lambda scale, draws: prefix(int(draws.choice(RANKS)), scale), prefix),
    "matryoshka": (lambda scale, draws: masked(RANKS[-1], scale), masked),
}


class Adapted(nn.Module):
    """A frozen linear layer with the factors a [D, R] and b [R, F]; its profile [R] is set from outside."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.empty(linear.in_features, RANKS[-1]).uniform_(-1, 1) / math.sqrt(RANKS[-1]))
        self.b = nn.Parameter(torch.zeros(RANKS[-1], linear.out_features))
        self.profile = None

    def forward(self, x):
        return self.linear(x) + ((x @ self.a) * self.profile) @ self.b


def adapt(model):
    """Wraps q, k, v, o, gate, up and down of every layer, and returns the wrappers."""
    model.requires_grad_(False)
    wrapped = []
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    wrapped.append(Adapted(child))
                    setattr(parent, name, wrapped[-1])
    return wrapped


def set_profile(wrapped, value):
    """Sets the profile [R] of every wrapper."""
    for module in wrapped:
        module.profile = value


def read_questions(path):
    """Reads a raw TREC file and returns a list of (prompt, index of the right choice)."""
    rows = []
    for line in pathlib.Path(path).read_text(encoding="latin-1").splitlines():
        label, question = line.split(" ", 1)
        rows.append((f"Question: {question.strip()}\nType:", list(CHOICES).index(label.split(":")[0])))
    return rows


def encode(tokenizer, prompt, answer, boundary):
    """Returns the tokens of the prompt, with BOS first, and the tokens of the answer."""
    start = [tokenizer.bos_token_id]

    def tokens(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    alone, whole = tokens(prompt), tokens(prompt + answer)
    border = len(alone)
    if boundary == "whole":
        return start + whole[:border], whole[border:]
    return start + alone, whole[border:] if boundary == "harness" else tokens(answer)


def train(model, wrapped, examples, arguments, scale):
    """Trains on (prompt, answer + EOS) pairs by AdamW with linear decay to zero, and returns the loss of every step."""
    draws = np.random.default_rng(arguments.seed)
    order = np.concatenate([draws.permutation(len(examples)) for _ in range(arguments.epochs)])
    batches = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    parameters = [parameter for module in wrapped for parameter in (module.a, module.b)]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        rows = [examples[index] for index in batch]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        targets = torch.full((len(rows), length), -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)  # At the place that predicts it.
        set_profile(wrapped, METHODS[arguments.method][0](scale, draws))
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        at = targets >= 0
        loss = functional.cross_entropy(model.lm_head(hidden[at]), targets[at])
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in parameters))
        for parameter in parameters:
            parameter.grad *= min(1.0, arguments.clip / max(norm, 1e-30))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * (1 - step / len(batches))
        optimizer.step()
        losses.append(loss.item())
    return losses


def pack(encoded, batch_size=25):
    """Packs every question and its choices into a row that holds the shared stem once, then a branch per choice.

    Args:
      encoded: for every question a list of (prompt tokens, answer tokens), one pair per choice.
      batch_size: the number of questions in a batch.

    Returns:
      Batches of (tokens [B, T], positions [B, T], mask [B, 1, T, T] float, spots) where `spots` lists
      (row, choice, position that predicts the token, token).
    """
    batches = []
    for start in range(0, len(encoded), batch_size):
        rows, spots = [], []
        for row, choices in enumerate(encoded[start : start + batch_size]):
            prompts = [prompt for prompt, _ in choices]
            stem = next(
                (i for i, column in enumerate(zip(*prompts, strict=True)) if len(set(column)) > 1),
                len(prompts[0]),
            )
            tokens, positions, branches = list(prompts[0][:stem]), list(range(stem)), [-1] * stem
            for choice, (prompt, answer) in enumerate(choices):
                path = list(range(stem)) + [len(tokens) + i for i in range(len(prompt) + len(answer) - stem)]
                tokens += (prompt + answer)[stem:]
                positions += range(stem, len(prompt) + len(answer))
                branches += [choice] * (len(prompt) + len(answer) - stem)
                spots += [(row, choice, path[len(prompt) + i - 1], token) for i, token in enumerate(answer)]
            rows.append((tokens, positions, branches))
        length = max(len(tokens) for tokens, _, _ in rows)
        tokens, positions = torch.zeros(2, len(rows), length, dtype=torch.long)
        mask = torch.full((len(rows), 1, length, length), torch.finfo(torch.float32).min)
        for row, (row_tokens, row_positions, row_branches) in enumerate(rows):
            size = len(row_tokens)
            tokens[row, :size], positions[row, :size] = torch.tensor(row_tokens), torch.tensor(row_positions)
            branch = torch.tensor(row_branches)
            seen = torch.ones(size, size, dtype=torch.bool).tril()
            seen &= (branch[None] == -1) | (branch[None] == branch[:, None])
            mask[row, 0, :size, :size].masked_fill_(seen, 0.0)
        batches.append((tokens, positions, mask, torch.tensor(spots)))
    return batches


@torch.no_grad()
def score(model, batches):
    """Returns the summed log-likelihood of every choice, [questions, choices]."""
    scores = []
    for tokens, positions, mask, spots in batches:
        hidden = model.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        row, choice, place, target = spots.T
        likelihood = torch.log_softmax(model.lm_head(hidden[row, place]), -1)[torch.arange(len(target)), target]
        total = torch.zeros(len(tokens), len(CHOICES))
        scores.append(total.index_put_((row, choice), likelihood, accumulate=True))
    return torch.cat(scores).numpy()


def summarise(scores, labels):
    """Returns the accuracy, the mean -log p of the right choice and answer, and how often each choice is taken."""
    taken = scores.argmax(1)
    shifted = scores - scores.max(1, keepdims=True)
    normal = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return {
        "accuracy": round(float((taken == labels).mean()), 4),
        "choice_nll": round(float(-normal[np.arange(len(labels)), labels].mean()), 4),
        "answer_nll": round(float(-scores[np.arange(len(labels)), labels].mean()), 4),
        "taken": np.bincount(taken, minlength=len(CHOICES)).tolist(),
    }


def aurac(accuracies):
    """Returns the area under the curve over log2 rank by trapezoids, divided by the length of the axis."""
    x = np.log2(RANKS)
    return round(float(np.sum((x[1:] - x[:-1]) * (np.add(accuracies[1:], accuracies[:-1]) / 2)) / (x[-1] - x[0])), 4)


@torch.no_grad()
def distances(wrapped, value, reference):
    """Returns the norm of A diag(p) B, its distance from the reference (both RMS over modules), and their cosine."""
    square, apart, inner, other = 0.0, 0.0, 0.0, 0.0
    for module in wrapped:
        read, trained = (module.a * value) @ module.b, (module.a * reference) @ module.b
        square, apart = square + float((read**2).sum()), apart + float(((read - trained) ** 2).sum())
        inner, other = inner + float((read * trained).sum()), other + float((trained**2).sum())
    cosine = inner / math.sqrt(square * other) if square * other else 0.0
    return {
        "norm": round(math.sqrt(square / len(wrapped)), 4),
        "distance": round(math.sqrt(apart / len(wrapped)), 4),
        "cosine": round(cosine, 4),
    }


@torch.no_grad()
def squeeze(wrapped, value):
    """Replaces the factors of every module by the balanced SVD of A diag(p) B."""
    for module in wrapped:
        left, singular, right = torch.linalg.svd((module.a.double() * value.double()) @ module.b.double())
        root = singular[: RANKS[-1]].sqrt()
        module.a.copy_(left[:, : RANKS[-1]] * root)
        module.b.copy_(root[:, None] * right[: RANKS[-1]])


def curve(model, wrapped, batches, labels, rule, reference):
    """Measures one read-out at every rank of S."""
    points = []
    for rank in RANKS:
        set_profile(wrapped, rule(rank))
        points.append(summarise(score(model, batches), labels) | distances(wrapped, rule(rank), reference))
    accuracies = [point["accuracy"] for point in points]
    return {"accuracies": accuracies, "aurac_log2": aurac(accuracies), "points": points}


def main():
    """Reads the command line, trains, and prints the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Llama model")
    parser.add_argument("--data", required=True, help="the folder of train_5500.label and TREC_10.label")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--learning_rate", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--scaling", choices=SCALES, default="none")
    parser.add_argument("--boundary", choices=("harness", "separate", "whole"), default="harness")
    parser.add_argument("--clip", type=float, default=1.0)
    arguments = parser.parse_args()
    start, scale = time.perf_counter(), SCALES[arguments.scaling]
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager").eval()
    wrapped, answers = adapt(model), list(CHOICES.values())
    train_rows, test_rows = (
        read_questions(pathlib.Path(arguments.data) / name) for name in ("train_5500.label", "TREC_10.label")
    )
    pairs = [encode(tokenizer, prompt, answers[label], arguments.boundary) for prompt, label in train_rows]
    examples = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in pairs]
    labels = np.array([label for _, label in test_rows])
    batches = pack([[encode(tokenizer, prompt, a, arguments.boundary) for a in answers] for prompt, _ in test_rows])

    set_profile(wrapped, prefix(RANKS[-1], scale))
    base = summarise(score(model, batches), labels)
    losses = train(model, wrapped, examples, arguments, scale)
    trained = time.perf_counter() - start

    full = METHODS[arguments.method][1]
    reference = full(RANKS[-1], scale)
    rules = {"prefix": prefix, "nested": nested, "masked": masked} if full is masked else {"prefix": prefix}
    curves = {
        name: curve(model, wrapped, batches, labels, lambda rank, rule=rule: rule(rank, scale), reference)
        for name, rule in rules.items()
    }
    pieces = [(m.a.norm(dim=0) * m.b.norm(dim=1)).detach() for m in wrapped]
    squeeze(wrapped, reference)
    ones = torch.ones(RANKS[-1])
    curves["svd"] = curve(model, wrapped, batches, labels, lambda rank: prefix(rank, SCALES["none"]), ones)
    record = {name: getattr(arguments, name) for name in ("method", "learning_rate", "seed", "epochs", "scaling")}
    record |= {
        "boundary": arguments.boundary,
        "model": pathlib.Path(arguments.model).name,
        "steps": len(losses),
        "first_loss": round(losses[0], 4),
        "training_loss": round(float(np.mean(losses[-50:])), 4),
        "base": base,
        "curves": curves,
        "column_norms": [round(value, 4) for value in torch.stack(pieces).pow(2).mean(0).sqrt().tolist()],
        "train_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
