# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The diagonal
#
# LoRA asks for a rank before training. A *nested* adapter does not: it is trained once at rank $R$, and its first $r$
# columns of $A$ with the first $r$ rows of $B$ are meant to be a good adapter of rank $r$, for every $r$ in a list $S$.
#
# [LoRA](https://arxiv.org/abs/2106.09685), [DyLoRA](https://arxiv.org/abs/2210.07558) and
# [MatryoshkaLoRA](https://arxiv.org/abs/2605.07850) are the same network. They differ in one diagonal matrix between
# the two factors.
# This notebook draws that matrix, shows what each prefix receives from it, and checks the algebra with numbers.
#
# You need to know LoRA. Everything runs on random numbers in a few seconds; no model is loaded and none is trained.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import NullFormatter

from mlora_jax.core import (
    POLICIES,
    SCALINGS,
    RankHierarchy,
    aurac,
    draw_step,
    initialize_factors,
    p_scaled_product,
    powers_of_two,
    squeeze,
    summarize,
)

# The identities below are checked to float32 rounding, which an accelerator's default matmul does not give.
jax.config.update("jax_default_matmul_precision", "highest")
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

BLACK, BLUE, ORANGE, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
# White is kept for "exactly zero"; darker is more.
SHADES = ListedColormap(plt.get_cmap("YlGnBu")(np.linspace(0.2, 1.0, 256)))
SHADES.set_bad("white")

# %% [markdown]
# ## 1. One formula
#
# A frozen weight $W \in \mathbb{R}^{D \times F}$, two factors $A \in \mathbb{R}^{D \times R}$ and
# $B \in \mathbb{R}^{R \times F}$, and a vector $p \in \mathbb{R}^{R}$, the **rank profile**:
#
# $$ y = xW + \big((xA) \odot p\big)\,B \;=\; x\,\big(W + A\,P\,B\big), \qquad P = \operatorname{diag}(p). $$
#
# The product $A P B$ is a sum of $R$ rank-one matrices, and $p_i$ is the weight of the $i$-th:
#
# $$ A P B = \sum_{i=1}^{R} p_i \; a_i b_i^{\top}, \qquad
#    a_i = \text{column } i \text{ of } A, \quad b_i^{\top} = \text{row } i \text{ of } B. $$
#
# So $p_i = 0$ removes column $i$, and a profile that is zero beyond $r$ is an adapter of rank $r$.
# "Column $i$" below means the pair $(a_i, b_i)$.

# %%
D, F, R = 64, 48, 32
key_a, key_b, key_x = jax.random.split(jax.random.key(0), 3)
A, _ = initialize_factors(key_a, D, F, R)
# Training starts with B = 0, where every profile gives the same function; a random B stands for a later moment.
B = jax.random.normal(key_b, (R, F)) / np.sqrt(F)
x = jax.random.normal(key_x, (5, D))
identity = jnp.eye(D)


def product(p, a=A, b=B):
    """The matrix A diag(p) B, [D, F]."""
    return np.asarray(p_scaled_product(identity, a, b, p))


def relative_distance(matrix, reference):
    return np.linalg.norm(matrix - reference) / np.linalg.norm(reference)


one_column = np.zeros(R)
one_column[2] = 0.5
print("only p_3 = 0.5: rank of A P B =", np.linalg.matrix_rank(product(one_column)))
print("distance to 0.5 a_3 b_3^T    =", relative_distance(product(one_column), 0.5 * np.outer(A[:, 2], B[2])))

# %% [markdown]
# ## 2. Three methods, three diagonals
#
# $S$ is the list of ranks we train for; here the powers of two up to $R = 32$. Rank $r$ has a scale $s_r$, by one of
# three rules: `none` ($s_r = 1$), `rank` ($s_r = 1/r$, LoRA's usual rule) and `sqrt` ($s_r = 1/\sqrt r$).
#
# | method | profile while training |
# |---|---|
# | LoRA | $p_i = s_R$ for every $i$ |
# | DyLoRA | draw $b$ from $S$; $p_i = s_b$ for $i \le b$, else $0$ |
# | MatryoshkaLoRA | $p_i = \sum_{r \in S,\; r \ge i} s_r$ |
#
# (MatryoshkaLoRA may also weight the ranks, $p_i = \sum w_r s_r$. We keep every $w_r = 1$.)
#
# Here is $P$ itself, for the rule `none`. LoRA's diagonal is flat. One draw of DyLoRA stops at $b$. MatryoshkaLoRA's
# is a staircase: column 1 belongs to all six ranks of $S$ and weighs 6; columns 17 to 32 belong to rank 32 only and
# weigh 1.

# %%
S = powers_of_two(R)
plain = RankHierarchy(S)
pictures = {
    "LoRA": plain.lora(),
    "DyLoRA, one draw (b = 8)": plain.prefix(8),
    "MatryoshkaLoRA": plain.matryoshka(),
}
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for panel, (title, p) in zip(panels, pictures.items(), strict=True):
    matrix = np.diag(np.asarray(p))
    image = panel.imshow(
        np.ma.masked_equal(matrix, 0), cmap=SHADES, vmin=0, vmax=6, extent=(0.5, R + 0.5, R + 0.5, 0.5)
    )
    panel.set(title=title, xlabel="column of P", xticks=[1, 8, 16, 32], yticks=[1, 8, 16, 32])
    panel.spines[:].set_visible(True)
panels[0].set_ylabel("row of P")
figure.colorbar(image, ax=panels, label="entry of P (white: 0)")
plt.show()

# %% [markdown]
# Only the diagonal matters, so from here on $P$ is a strip: one row per method, one cell per column $i$. The numbers
# are the weights $p_i$. DyLoRA is shown as four draws and as the average of 5000 draws.


# %%
def draw_strips(panel, profiles, labels, norm):
    """One row of cells per profile [N, R]; every run of equal weights carries its number."""
    profiles = np.asarray(profiles)
    extent = (0.5, profiles.shape[1] + 0.5, len(profiles) - 0.5, -0.5)
    image = panel.imshow(np.ma.masked_equal(profiles, 0), cmap=SHADES, norm=norm, aspect="auto", extent=extent)
    for row, profile in enumerate(profiles):
        starts = np.flatnonzero(np.diff(profile, prepend=np.nan))
        for first, end in zip(starts, [*starts[1:], len(profile)], strict=True):
            value = profile[first]
            red, green, blue, _ = SHADES(norm(value)) if value else (1, 1, 1, 1)
            ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            number = f"{value:.2g}".replace("0.", ".")
            panel.text((first + end + 1) / 2, row, number, ha="center", va="center", fontsize=7.5, color=ink)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_yticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    panel.grid(which="minor", axis="y", color="white", linewidth=3)
    panel.tick_params(which="minor", length=0)
    panel.set_xticks(S)
    panel.spines[:].set_visible(True)
    return image


hierarchies = {scaling: RankHierarchy(S, scaling) for scaling in SCALINGS}
draws = jax.jit(jax.vmap(plain.sample_prefix))(jax.random.split(jax.random.key(1), 5000))
drawn = np.count_nonzero(draws, axis=1)  # b of every draw; the same draws are shown under every rule
average = {scaling: sum(np.mean(drawn == r) * np.asarray(h.prefix(r)) for r in S) for scaling, h in hierarchies.items()}

figure, panels = plt.subplots(3, 1, figsize=(10, 7.2), sharex=True, layout="constrained")
norm = LogNorm(vmin=0.005, vmax=6)
for panel, (scaling, h) in zip(panels, hierarchies.items(), strict=True):
    rows = [h.lora(), *(h.prefix(b) for b in drawn[:4]), average[scaling], h.matryoshka()]
    labels = ["LoRA", *(f"DyLoRA, b = {b}" for b in drawn[:4]), "DyLoRA, average", "MatryoshkaLoRA"]
    image = draw_strips(panel, rows, labels, norm)
    panel.set_title(f"scaling {scaling}", loc="left")
panels[-1].set_xlabel("column i")
bar = figure.colorbar(image, ax=panels, label="weight of the column, p_i (log scale; white: 0)")
bar.set_ticks([0.01, 0.03, 0.1, 0.3, 1, 3, 6], labels=["0.01", "0.03", "0.1", "0.3", "1", "3", "6"])
bar.minorticks_off()
plt.show()

# %% [markdown]
# Two things to see.
#
# - Under `rank` and `sqrt` the first columns get heavier still *relative to the last*: 6 : 1 under `none`, 17 : 1 under
#   `sqrt`, 63 : 1 under `rank`.
# - DyLoRA's average has the shape of MatryoshkaLoRA's diagonal. Its expectation is exactly $P / |S|$: each rank of $S$
#   is drawn with probability $1/|S|$ and then puts $s_b$ on its first $b$ columns.
#
# The function is linear in $p$, so DyLoRA's *average function* is MatryoshkaLoRA's function divided by $|S|$. The
# training is still another one. DyLoRA lowers the average of the losses of its prefixes; MatryoshkaLoRA lowers the loss
# of one sum of prefixes.

# %%
print("scaling   p_1 / p_32   largest error of: average of 5000 draws = P / |S|   (relative to p_1)")
for scaling, h in hierarchies.items():
    P = np.asarray(h.matryoshka())
    gap = np.abs(average[scaling] * len(S) - P).max() / P[0]
    print(f"{scaling:8s}  {P[0] / P[-1]:10.1f}   {gap:.3f}")
    expectation = np.mean([h.prefix(r) for r in S], axis=0)
    np.testing.assert_allclose(expectation * len(S), P, rtol=1e-6)

# %% [markdown]
# ## 3. What each prefix receives
#
# After training we want an adapter of rank $r$. It keeps the first $r$ columns. But with which weights? There are three
# read-outs:
#
# | read-out | weight of column $i \le r$ | in words |
# |---|---|---|
# | `prefix` | $s_r$ | the paper's, and the default: an ordinary LoRA adapter of rank $r$ |
# | `nested` | $\sum_{q \in S,\; i \le q \le r} s_q$ | the training sum, as if the ranks above $r$ did not exist |
# | `masked` | $P_i$ | the training diagonal, cut off at $r$ |
#
# All are zero for $i > r$. The figure shows them next to the weights that MatryoshkaLoRA puts on the same columns while
# training (thick grey; pale beyond $r$). Both axes are logarithmic. `masked` always lies on the grey line; `nested`
# starts on `prefix` at $r = 1$ and ends on the grey line at $r = R$.

# %%
edges = np.arange(R + 1) + 0.5
figure, panels = plt.subplots(3, len(S), figsize=(11, 6.2), sharex=True, sharey="row", layout="constrained")
for row, (scaling, h) in zip(panels, hierarchies.items(), strict=True):
    for panel, r in zip(row, S, strict=True):
        training = np.asarray(h.matryoshka())
        if r < R:
            panel.stairs(training[r:], edges[r:], baseline=None, color="0.9", linewidth=6)
        panel.stairs(training[:r], edges[: r + 1], baseline=None, color="0.72", linewidth=7, label="training")
        lines = {
            "prefix": (h.prefix(r), ORANGE, "-", 2.2),
            "nested": (h.nested(r), BLUE, "--", 2.2),
            "masked": (h.masked(r), BLACK, ":", 1.6),
        }
        for label, (p, color, style, width) in lines.items():
            values = np.asarray(p)[:r]
            panel.stairs(values, edges[: r + 1], baseline=None, color=color, ls=style, lw=width, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks([1, 4, 16, 32], ["1", "4", "16", "32"])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.margins(y=0.12)
    row[0].set_ylabel(f"scaling {scaling}\nweight of column i")
for panel, r in zip(panels[0], S, strict=True):
    panel.set_title(f"r = {r}")
for panel in panels[-1]:
    panel.set_xlabel("column i")
handles, labels = panels[0, -1].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# **The training function is not the read-out function.** With $P$, training fits $A P B$. The paper then reads out
# $s_r A_{:,1:r} B_{1:r}$. Even at $r = R$ the weights differ in every column that also belongs to a smaller rank.
# `nested` and `masked` do agree with training at $r = R$. Below that, all three are parts of the trained sum (`prefix`
# is one term of it), and training never evaluates a part alone.
#
# The other two methods, for comparison:
#
# - DyLoRA trains exactly what it reads out: the draw $b = r$ *is* `prefix(r)`.
# - LoRA trains `prefix(R)` and nothing below it. Under `rank` and `sqrt` the weights even change with $r$: `prefix(1)`
#   multiplies column 1 by $s_1 = 1$, training by $s_{32}$.
#
# How far apart are training and read-out at full rank? For independent random factors the rank-one terms are nearly
# orthogonal and equally long, so the distance is that of the two profiles:
#
# $$ \frac{\lVert A P B - s_R A B \rVert}{\lVert A P B \rVert} \;\approx\;
#    \frac{\lVert p - s_R \mathbf 1\rVert}{\lVert p \rVert}. $$
#
# The cosine between the two matrices says how much of the difference a single factor could repair: 1 would mean "only
# the length is wrong".

# %%
print("scaling   distance at r = R   its estimate   cosine   |read-out| / |trained|")
for scaling, h in hierarchies.items():
    p, flat = np.asarray(h.matryoshka()), np.asarray(h.prefix(R))
    trained, read_out = product(p), product(flat)
    estimate = relative_distance(flat, p)
    sizes = np.linalg.norm(read_out), np.linalg.norm(trained)
    cosine = np.vdot(trained, read_out) / (sizes[0] * sizes[1])
    distance = relative_distance(read_out, trained)
    print(f"{scaling:8s}  {distance:17.3f}   {estimate:12.3f}   {cosine:6.3f}   {sizes[0] / sizes[1]:22.3f}")
    assert relative_distance(product(h.nested(R)), trained) < 1e-6
    assert relative_distance(product(h.masked(R)), trained) < 1e-6

# %% [markdown]
# A distance of 1 would be as far as no adapter at all. Under `rank` the read-out at full rank keeps 7 % of the length
# of what was trained: almost the base model.
#
# These are random factors. Trained factors are not independent, and a function can differ much and still answer the
# same. How much the choice costs in accuracy is a question for an experiment; that there *is* a choice is not.

# %% [markdown]
# ## 4. The identity
#
# Why that diagonal? Exchange the two sums, over columns and over ranks:
#
# $$ \big((xA) \odot p\big) B = \sum_{i} \Big(\sum_{r \in S,\, r \ge i} s_r\Big) (x a_i)\, b_i^{\top}
#    = \sum_{r \in S} s_r \sum_{i \le r} (x a_i)\, b_i^{\top} = \sum_{r \in S} s_r \,(x A_{:,1:r})\, B_{1:r}. $$
#
# One product with $P$ holds the sum of all the scaled prefix adapters. It costs what LoRA costs: $R$ multiplications
# per token more, instead of $|S|$ products.

# %%
a, b, inputs = np.asarray(A), np.asarray(B), np.asarray(x)
print("scaling   relative difference between the P-product and the sum of scaled prefix products")
for scaling, h in hierarchies.items():
    with_diagonal = p_scaled_product(x, A, B, h.matryoshka())
    by_hand = sum(h.scale(r) * (inputs @ a[:, :r]) @ b[:r] for r in S)
    difference = relative_distance(with_diagonal, by_hand)
    print(f"{scaling:8s}  {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## 5. Which columns learn
#
# Take the gradient of a loss $\ell(y)$ with $g = \partial \ell / \partial y$. For one token
#
# $$ \frac{\partial \ell}{\partial a_i} = p_i \,(b_i^{\top} g)\, x, \qquad
#    \frac{\partial \ell}{\partial b_i} = p_i \,(x^{\top} a_i)\, g . $$
#
# The weight $p_i$ multiplies both. A column with $p_i = 0$ learns nothing from that step, exactly.
#
# A *policy* says which profiles a step uses, and `POLICIES` is the table of them. The step's loss is the mean over its
# profiles. We fit $y = x M$ by least squares, take the gradient with `jax.grad`, and measure its length column by
# column. A profile is an argument of the compiled function, so one executable serves all policies.
#
# `dylora_original` draws $b$ from $1..R$, as the original code does. `dylora_frozen` moves only column $b$.
# `matryoshka_exact` averages the losses of all prefixes in $S$. `sandwich` uses the smallest, the largest and one
# random prefix.

# %%
key_inputs, key_target, key_policy = jax.random.split(jax.random.key(5), 3)
inputs = jax.random.normal(key_inputs, (256, D))
target = inputs @ jax.random.normal(key_target, (D, F)) / np.sqrt(D)


def loss(factors, p):
    return jnp.mean((p_scaled_product(inputs, *factors, p) - target) ** 2)


gradient_at = jax.jit(jax.grad(loss))


def column_gradients(profiles):
    """Length of the gradient of every column of A and of every row of B, [2, R]; profiles [N, R]."""
    # The gradient of the mean loss is the mean of the gradients.
    grad_a, grad_b = (np.mean(parts, axis=0) for parts in zip(*(gradient_at((A, B), p) for p in profiles), strict=True))
    return np.stack([np.linalg.norm(grad_a, axis=0), np.linalg.norm(grad_b, axis=1)])


steps = [("lora", 0), *(("dylora", n) for n in range(4)), ("matryoshka", 0)]
steps += [("dylora_original", 0), ("dylora_frozen", 0), ("matryoshka_exact", 0), ("sandwich", 0)]
rows, labels = [], []
for name, step in steps:
    draw = draw_step(POLICIES[name], plain, key_policy, step, accumulation=1)
    profiles = np.asarray(draw.profiles[0, :, 0])  # [N, R], alike for all examples
    gradient = column_gradients(profiles) * np.asarray(draw.update_mask)  # [2, R]
    b = np.count_nonzero(profiles[-1])
    if name == "dylora":
        assert (gradient[:, :b] > 0).all() and (gradient[:, b:] == 0).all()
    rows.append(gradient)
    labels.append(name if name in ("lora", "matryoshka", "matryoshka_exact") else f"{name}, b = {b}")
gradients = np.stack(rows, axis=1)  # [2, policies, R]

figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), sharey=True, layout="constrained")
norm = LogNorm(vmin=gradients[gradients > 0].min(), vmax=gradients.max())
for panel, values, title in zip(panels, gradients, ["columns of A", "rows of B"], strict=True):
    extent = (0.5, R + 0.5, len(labels) - 0.5, -0.5)
    image = panel.imshow(np.ma.masked_equal(values, 0), cmap=SHADES, norm=norm, aspect="auto", extent=extent)
    panel.set_title(title)
    panel.set_xlabel("column i")
    panel.set_xticks(S)
    panel.spines[:].set_visible(True)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_yticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    panel.grid(which="minor", axis="y", color="0.6", linewidth=0.6)
    panel.tick_params(which="minor", length=0)
figure.colorbar(image, ax=panels, label="length of the gradient\n(log scale; white: exactly 0)")
plt.show()

# %% [markdown]
# - LoRA: all columns learn about alike. Nothing makes column 1 more important than column 32.
# - DyLoRA: white beyond $b$. Columns 17 to 32 learn at one step in six.
# - MatryoshkaLoRA and `matryoshka_exact`: every column learns at every step, the first ones most. The exact form costs
#   six forward passes here, the diagonal one.
# - `sandwich`: every column at every step too, because the largest prefix is always among its three.
# - `dylora_frozen`: one column at a time.
#
# A gradient of zero is not yet standing still: an optimizer with momentum goes on moving such a column. `Draw`
# therefore also has an `update_mask`, which `dylora_frozen` uses to hold the other columns in place.

# %% [markdown]
# ## 6. Ordering the columns after training
#
# One can also order the columns afterwards. `squeeze` keeps the function and takes the singular value decomposition
#
# $$ A P B = U \operatorname{diag}(\sigma) V^{\top}, \qquad A' = U \operatorname{diag}(\sqrt{\sigma}), \quad
#    B' = \operatorname{diag}(\sqrt{\sigma})\, V^{\top}, \qquad \sigma_1 \ge \sigma_2 \ge \dots $$
#
# By the theorem of Eckart and Young the first $r$ columns of $A'$ and rows of $B'$ are then the best rank-$r$
# approximation of $A P B$: no other matrix of rank $r$ is nearer in the Frobenius norm. The scale is now inside the
# factors, so the squeezed adapter is read out with scale 1.

# %%
whole = product(plain.lora())
squeezed, squeezed_hierarchy = squeeze({"a": A, "b": B}, {"p": plain.lora()})
ranks = np.arange(1, R)
errors = {
    "prefix of A B, as it is": [relative_distance(product(plain.prefix(r)), whole) for r in ranks],
    "prefix after squeeze": [
        relative_distance(product(squeezed_hierarchy.prefix(r), squeezed["a"], squeezed["b"]), whole) for r in ranks
    ],
}
sigma = np.linalg.svd(whole, compute_uv=False)
optimum = np.sqrt([(sigma[r:] ** 2).sum() / (sigma**2).sum() for r in ranks])
np.testing.assert_allclose(errors["prefix after squeeze"], optimum, atol=1e-5)
all_of_it = product(squeezed_hierarchy.prefix(R), squeezed["a"], squeezed["b"])
print(f"full rank: the squeezed adapter differs from A B by {relative_distance(all_of_it, whole):.1e}")

figure, panel = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
panel.plot(ranks, errors["prefix of A B, as it is"], color=BLACK, label="prefix of A B, as it is")
panel.plot(ranks, errors["prefix after squeeze"], color=ORANGE, label="prefix after squeeze")
panel.plot(ranks, optimum, "o", color=BLUE, markersize=4, fillstyle="none", label="best possible (SVD by NumPy)")
panel.set(xlabel="rank r", ylabel="distance to A B, relative", xlim=(0, R), ylim=(0, 1.05), xticks=S)
panel.legend(frameon=False)
plt.show()

# %% [markdown]
# This is the best that a prefix can do *for this function, in this norm*. It does not say that the prefix answers
# questions well. But it makes LoRA followed by `squeeze` the comparison that a nested method has to win.

# %% [markdown]
# ## 7. One number for a whole curve
#
# Reading the adapter out at every $r$ of $S$ gives a curve of accuracies $a_1, \dots, a_n$ at ranks
# $r_1 < \dots < r_n$. AURAC is the area under it by trapezoids, divided by the length of the rank axis:
#
# $$ \mathrm{AURAC} = \frac{1}{x_n - x_1} \sum_{k=1}^{n-1} (x_{k+1} - x_k)\,\frac{a_k + a_{k+1}}{2}, \qquad
#    x = r \;\text{ or }\; x = \log_2 r . $$
#
# So it is a mean height. The axis decides which ranks count: on the linear axis half of the length lies between ranks
# 16 and 32; on the log axis each doubling counts the same. The two curves below are invented.

# %%
curves = {
    "good early": ([0.30, 0.45, 0.54, 0.59, 0.61, 0.62], BLUE, "o-", dict(color=BLUE, alpha=0.15)),
    "good late": (
        [0.05, 0.08, 0.16, 0.44, 0.78, 0.82],
        ORANGE,
        "s--",
        dict(facecolor="none", edgecolor=ORANGE, hatch="//", alpha=0.45),
    ),
}
positions = {"linear": (np.array(S), "rank r"), "log2": (np.log2(S), "rank r (log2 axis)")}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
for panel, (axis, (where, axis_label)) in zip(panels, positions.items(), strict=True):
    for name, (accuracies, color, style, fill) in curves.items():
        label = f"{name}: AURAC {aurac(accuracies, S, axis):.3f}"
        panel.plot(where, accuracies, style, color=color, label=label, clip_on=False, zorder=3)
        panel.fill_between(where, accuracies, linewidth=0, **fill)
    panel.set_xticks(where, S)
    panel.set(title=f'axis="{axis}"', xlabel=axis_label, ylim=(0, 0.9), xlim=(where[0], where[-1]))
    panel.legend(loc="lower right", framealpha=1)
panels[0].set_ylabel("accuracy")
plt.show()

print("curve         linear   log2    mean")
for name, (accuracies, *_) in curves.items():
    summary = summarize(accuracies, S)
    print(f"{name:12s}  {summary.linear:.3f}    {summary.log2:.3f}   {summary.mean:.3f}")

# %% [markdown]
# The order of the two curves depends on the axis. Report both, and the plain mean.
#
# ## To take away
#
# 1. LoRA, DyLoRA and MatryoshkaLoRA are one formula with three diagonals.
# 2. MatryoshkaLoRA's diagonal sums all scaled prefixes in one product, at LoRA's cost.
# 3. What it trains, $A P B$, is not what the paper reads out, $s_r A_{:,1:r} B_{1:r}$. Always name the read-out.
# 4. $p_i$ also multiplies the gradient of column $i$; where it is zero, the column does not learn.
# 5. `squeeze` orders any trained adapter optimally for its own function. Compare with it.
