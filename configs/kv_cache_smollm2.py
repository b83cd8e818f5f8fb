"""A smaller KV cache for SmolLM2-135M-Instruct.

    python -m experiments.kv_cache --config configs/kv_cache_smollm2.py --out DIR --config.data.train=TEXT

On one core of a Xeon a training step of 4 rows takes 27 s and a measurement of the search 2.4 s (processor time), so
training takes about 2 hours and the search about 1.5. A second start with other settings of the search trains nothing.

TEXT is a .json file with a list of texts, a .jsonl file of {"text": ...}, or a text file, which is one text.

model.path            a Hugging Face folder or hub id
model.dtype           the dtype of weights and compute; empty keeps the stored dtype
data.train            the file of the training text
data.held_out         the file of the text that ranks are searched on; empty takes the last documents of data.train
data.held_out_documents  how many of them, where data.held_out is empty
data.length           the number of tokens of a row; longer documents are cut into pieces
budgets               the fractions of the cache's bytes that are measured on the held-out text
levels                the number of ranks of the grid Hd/levels, 2 Hd/levels, ..., Hd
pca.texts             the number of training texts behind the principal components
train.steps           0 keeps the principal components
train.batch_size      the rows of a step
train.accumulation    the micro-batches of a step, each of which draws ranks of its own
train.learning_rate   of AdamW, reached after train.warmup_steps and falling to a tenth by a cosine
train.kl_weight       the weight of the divergence from the full model; the cross-entropy has the rest of 1
train.remat           what the backward pass computes again: none, dots or full
search.budget         the smallest fraction of the cache's bytes that is searched; 1 searches nothing
search.share          the fraction of the ranks that fall in a round of the search
search.rows           the rows of held-out text that ranks are searched on
search.batch_size     the rows that are measured at one time
seed                  of the order of the rows and of the drawn ranks
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns values for one CPU core and a few hours."""
    return ConfigDict(
        {
            "seed": 0,
            "levels": 8,
            "budgets": (1.0, 0.75, 0.6, 0.4, 0.25),
            "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "float32"},
            "data": {"train": "", "held_out": "", "held_out_documents": 50, "length": 512},
            "pca": {"texts": 64},
            "train": {
                "steps": 300,
                "batch_size": 4,
                "accumulation": 2,
                "learning_rate": 5e-3,
                "warmup_steps": 20,
                "beta1": 0.9,
                "beta2": 0.98,
                "weight_decay": 0.0,
                "clip": 1.0,
                "kl_weight": 0.25,
                "remat": "full",
            },
            "search": {"budget": 0.25, "share": 0.5, "rows": 1, "batch_size": 1},
        }
    )
