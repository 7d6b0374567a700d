"""Train the small Mamba that ships inside the package, from a folder of plain-text books.

One file, two CPU cores, an hour or so: the script cleans the books, trains a byte-level BPE on them, trains a
Mamba-1 language model whose arithmetic is that of transformers' MambaForCausalLM, and writes checkpoints and a
Hugging Face folder. One book is held out whole, from the tokenizer too; its bits per byte are measured on the file
as it is, with the recurrent state carried from its first token to its last. The learning rate follows the clock
(--minutes), so that it reaches zero on time on a busy machine; --resume continues from the last checkpoint with the
optimizer, the random state and the position in the data. Matrix products run in bfloat16, the selective scan and the
convolution are numba kernels with hand-written gradients, the matrices are trained with Muon and the rest with AdamW.

    python tools/train.py train  --corpus books/ --hold-out litbank_120_treasure_island.txt --out run/ --minutes 85
    python tools/train.py export --corpus books/ --hold-out litbank_120_treasure_island.txt --out run/ --to model/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

EOS = "<|endoftext|>"
D_STATE = 16  # one 512-bit register of float32, fixed at compile time so that the inner loops vectorise
SCAN_CHANNELS = 8  # channels that one pass of the scan takes through time
D_CONV = 4  # taps of the convolution

# ----------------------------------------------------------------------------------------------------------- the text

WIDTH = 72  # columns to which hard-wrapped paragraphs are refilled
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "\u00a0": " "})


def detokenize(text: str) -> str:
    """Undo the word-level tokenization of the NLTK editions (one sentence a line, a space before every mark)."""
    text = re.sub(r" ''", "''", text)
    text = re.sub(r"''\s+``", "''\n\n``", text)  # a closing quote, then an opening one: two speakers
    text = text.replace("`` ", '"').replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" ('(?:s|ll|d|m|re|ve)\b|n't\b)", r"\1", text, flags=re.I)
    text = re.sub(r" ?-- ?", "--", text)
    lines = [line.strip() for line in text.split("\n")]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.startswith('"') or not line or sum(map(len, paragraphs[-1])) > 600:
            paragraphs.append([])
        if line:
            paragraphs[-1].append(line)
    return "\n\n".join(" ".join(p) for p in paragraphs if p)


def refill(paragraph: str) -> str:
    """A prose paragraph wrapped to WIDTH columns; verse, contents and other indented matter as it is."""
    lines = paragraph.split("\n")
    prose = len(lines) == 1 or (not any(line.startswith("  ") for line in lines[1:]) and min(map(len, lines[:-1])) >= 45)
    if not prose:
        return "\n".join(line.rstrip() for line in lines)
    return textwrap.fill(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def clean(raw: str) -> str:
    """Plain ASCII quotes and dashes, no italics marks, front matter cut at the first long paragraph, lines refilled."""
    text = raw.replace("\r\n", "\n").translate(QUOTES).replace("_", "")
    if text.count(" ,") > 100:
        text = detokenize(text)
    parts = re.split(r"(\n\n+)", text)
    for start in range(0, len(parts), 2):
        if len(parts[start]) >= 400 and not parts[start].startswith("  "):
            break
    else:
        start = 0
    blocks = [
        ("\n" * min(len(part), 4)) if i % 2 else refill(part) for i, part in enumerate(parts[start:]) if part.strip() or i % 2
    ]
    return "".join(blocks).strip() + "\n"


def read_books(corpus: Path, hold_out: str) -> dict[str, str]:
    """Every .txt of the folder except the one held out, cleaned."""
    names = sorted(p.name for p in corpus.glob("*.txt"))
    if hold_out not in names:
        raise SystemExit(f"{corpus / hold_out}: no such book; --hold-out names a file of --corpus")
    return {name: clean((corpus / name).read_text(encoding="utf-8")) for name in names if name != hold_out}


def train_tokenizer(books: dict[str, str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books.values(), trainer)
    return tokenizer


class Stream:
    """The books as `batch` parallel streams of consecutive chunks; another order and another cut in every epoch."""

    def __init__(self, books: list[np.ndarray], batch: int, length: int, seed: int) -> None:
        self.books, self.batch, self.length, self.seed = books, batch, length, seed
        self.chunks = (sum(map(len, books)) - 1) // (batch * length)

    def epoch(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number])
        joined = np.concatenate([self.books[i] for i in rng.permutation(len(self.books))])
        return np.roll(joined, int(rng.integers(len(joined))))

    def __call__(self, epoch: int, chunk: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(epoch, chunk, inputs, targets) from the given position on, without end."""
        while True:
            data = self.epoch(epoch)
            span = self.chunks * self.length
            rows = np.stack([data[i * span : i * span + span + 1] for i in range(self.batch)])
            for c in range(chunk, self.chunks):
                cut = torch.from_numpy(rows[:, c * self.length : (c + 1) * self.length + 1].astype(np.int64))
                yield epoch, c, cut[:, :-1], cut[:, 1:]
            epoch, chunk = epoch + 1, 0


# -------------------------------------------------------------------------------------------------------- the kernels

_1, _0, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(k)) for k in (3, 4, 5, 6))
_LOW, _STEP = np.float32(-20), np.float32(1 / 64)
jit: Any = numba.njit(fastmath=True, parallel=True, cache=True, error_model="numpy")
inline: Any = numba.njit(fastmath=True, inline="always", error_model="numpy")


@inline
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) for x <= 0, floored at exp(-20): a polynomial for exp(x/64), squared six times; vectorises."""
    x = max(x, _LOW) * _STEP
    p = _1 + x * (_1 + x * (_HALF + x * (_C3 + x * (_C4 + x * (_C5 + x * _C6)))))
    p *= p
    p *= p
    p *= p
    p *= p
    p *= p
    return p * p


@inline
def _sigmoid(x):  # type: ignore[no-untyped-def]
    e = _exp(-abs(x))
    s = _1 / (_1 + e)
    return s if x >= _0 else e * s


@jit
def conv_forward(x, w, bias, out):  # type: ignore[no-untyped-def]
    """out[t] = silu(bias + sum_k w[k] x[t+k]), x padded in front by D_CONV-1 rows."""
    batch, length, width = out.shape
    for b in numba.prange(batch):
        for t in range(length):
            for d in range(width):
                p = bias[d] + w[0, d] * x[b, t, d] + w[1, d] * x[b, t + 1, d]
                p += w[2, d] * x[b, t + 2, d] + w[3, d] * x[b, t + 3, d]
                out[b, t, d] = p * _sigmoid(p)


@jit
def conv_backward(x, w, bias, gout, gx, gw):  # type: ignore[no-untyped-def]
    """gx (rows of the padding included) and gw[b]: D_CONV rows for the taps, one for the bias."""
    batch, length, width = gout.shape
    for b in numba.prange(batch):
        g = np.zeros((length + 2 * D_CONV - 2, width), np.float32)  # gradient before silu, zeros on both sides
        for t in range(length):
            for d in range(width):
                p = bias[d] + w[0, d] * x[b, t, d] + w[1, d] * x[b, t + 1, d]
                p += w[2, d] * x[b, t + 2, d] + w[3, d] * x[b, t + 3, d]
                s = _sigmoid(p)
                g[t + D_CONV - 1, d] = gout[b, t, d] * s * (_1 + p * (_1 - s))
        for t in range(length + D_CONV - 1):
            for d in range(width):
                acc = w[0, d] * g[t + 3, d] + w[1, d] * g[t + 2, d]
                gx[b, t, d] = acc + w[2, d] * g[t + 1, d] + w[3, d] * g[t, d]
        for t in range(length):
            for k in range(D_CONV):
                for d in range(width):
                    gw[b, k, d] += g[t + D_CONV - 1, d] * x[b, t + k, d]
            for d in range(width):
                gw[b, D_CONV, d] += g[t + D_CONV - 1, d]


@jit
def scan_forward(u, delta, a, bm, cm, skip, h, y):  # type: ignore[no-untyped-def]
    """h = exp(delta a) h + delta u B, y = C.h + skip u; h (batch, width, D_STATE) is updated in place."""
    batch, length, width = u.shape
    for b in numba.prange(batch):
        for d0 in range(0, width, SCAN_CHANNELS):
            for t in range(length):
                for d in range(d0, d0 + SCAN_CHANNELS):
                    dl = delta[b, t, d]
                    du = dl * u[b, t, d]
                    acc = _0
                    for n in range(D_STATE):
                        hn = _exp(dl * a[d, n]) * h[b, d, n] + du * bm[b, t, n]
                        h[b, d, n] = hn
                        acc += hn * cm[b, t, n]
                    y[b, t, d] = acc + skip[d] * u[b, t, d]


@jit
def scan_backward(u, delta, a, bm, cm, skip, h0, gy, gu, gdelta, ga, gbm, gcm, gskip):  # type: ignore[no-untyped-def]
    """Gradients of scan_forward; the states are recomputed, SCAN_CHANNELS channels at a time. ga, gskip: one row a sequence."""
    batch, length, width = u.shape
    for b in numba.prange(batch):
        hs = np.empty((length + 1, SCAN_CHANNELS, D_STATE), np.float32)
        decay = np.empty((length, SCAN_CHANNELS, D_STATE), np.float32)
        g = np.empty((SCAN_CHANNELS, D_STATE), np.float32)
        for d0 in range(0, width, SCAN_CHANNELS):
            for i in range(SCAN_CHANNELS):
                for n in range(D_STATE):
                    hs[0, i, n] = h0[b, d0 + i, n]
                    g[i, n] = _0
            for t in range(length):
                for i in range(SCAN_CHANNELS):
                    dl = delta[b, t, d0 + i]
                    du = dl * u[b, t, d0 + i]
                    for n in range(D_STATE):
                        e = _exp(dl * a[d0 + i, n])
                        decay[t, i, n] = e
                        hs[t + 1, i, n] = e * hs[t, i, n] + du * bm[b, t, n]
            for t in range(length - 1, -1, -1):
                for i in range(SCAN_CHANNELS):
                    d = d0 + i
                    dl, x, dy = delta[b, t, d], u[b, t, d], gy[b, t, d]
                    du = dl * x
                    s1 = _0
                    s2 = _0
                    for n in range(D_STATE):
                        gcm[b, t, n] += dy * hs[t + 1, i, n]
                    for n in range(D_STATE):
                        gn = g[i, n] + dy * cm[b, t, n]
                        e = gn * decay[t, i, n]
                        g[i, n] = e
                        e *= hs[t, i, n]
                        s1 += gn * bm[b, t, n]
                        s2 += e * a[d, n]
                        gbm[b, t, n] += gn * du
                        ga[b, d, n] += e * dl
                    gu[b, t, d] = s1 * dl + dy * skip[d]
                    gdelta[b, t, d] = s2 + s1 * x
                    gskip[b, d] += dy * x


class ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        w = weight.detach()[:, 0].t().contiguous()
        ctx.save_for_backward(x, w, bias)
        out = x.new_empty(x.shape[0], x.shape[1] - D_CONV + 1, x.shape[2])
        conv_forward(x.numpy(), w.numpy(), bias.detach().numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w, bias = ctx.saved_tensors
        gx, gw = torch.empty_like(x), x.new_zeros(x.shape[0], D_CONV + 1, x.shape[2])
        gout = grads[0].contiguous().numpy()
        conv_backward(x.numpy(), w.numpy(), bias.detach().numpy(), gout, gx.numpy(), gw.numpy())
        total = gw.sum(0)
        return gx, total[:D_CONV].t().unsqueeze(1).contiguous(), total[D_CONV]


class SelectiveScan(torch.autograd.Function):
    """y and the state after the last step; no gradient flows into the state that came in."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, h0: Tensor) -> Any:
        tensors = [t.detach().contiguous() for t in (u, delta, a, b, c, d, h0)]
        ctx.save_for_backward(*tensors)
        h, y = h0.clone(), torch.empty_like(tensors[0])
        scan_forward(*(t.numpy() for t in tensors[:6]), h.numpy(), y.numpy())
        ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, d, h0 = ctx.saved_tensors
        gu, gdelta, gb, gc = (torch.zeros_like(t) for t in (u, delta, b, c))
        ga, gd = a.new_zeros(u.shape[0], *a.shape), d.new_zeros(u.shape[0], *d.shape)
        inputs = (u, delta, a, b, c, d, h0, grads[0].contiguous(), gu, gdelta, ga, gb, gc, gd)
        scan_backward(*(t.numpy() for t in inputs))
        return gu, gdelta, ga.sum(0), gb, gc, gd.sum(0), None


conv_silu: Any = ConvSilu.apply
selective_scan: Any = SelectiveScan.apply

# ---------------------------------------------------------------------------------------------------------- the model

States = list[tuple[Tensor, Tensor]]  # for each layer: the last D_CONV-1 inputs of the convolution, and h


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Mixer(nn.Module):
    """Parameters have the names and shapes of transformers' MambaMixer."""

    def __init__(self, d_model: int, d_inner: int, dt_rank: int, n_layer: int) -> None:
        super().__init__()
        self.d_inner, self.dt_rank = d_inner, dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, D_CONV, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * D_STATE, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, D_STATE + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(n_layer)
            nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
            dt = torch.exp(torch.empty(d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u, z = self.in_proj(x).split(self.d_inner, -1)
        window = torch.cat([state[0], u.float()], 1)
        u = conv_silu(window, self.conv1d.weight, self.conv1d.bias)
        dt, b, c = self.x_proj(u).split([self.dt_rank, D_STATE, D_STATE], -1)
        delta = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias)
        y, h = selective_scan(u, delta, -torch.exp(self.A_log), b.float(), c.float(), self.D, state[1])
        return self.out_proj(y * F.silu(z)), (window[:, 1 - D_CONV :].detach(), h)


class Layer(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dt_rank: int, n_layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = Mixer(d_model, d_inner, dt_rank, n_layer)


class Backbone(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, n_layer: int, d_inner: int, dt_rank: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, d_inner, dt_rank, n_layer) for _ in range(n_layer))
        self.norm_f = RMSNorm(d_model)


class Mamba(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, n_layer: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = {"vocab_size": vocab_size, "d_model": d_model, "n_layer": n_layer}
        self.d_inner, self.dt_rank, self.dropout = 2 * d_model, math.ceil(d_model / 16), dropout
        self.backbone = Backbone(vocab_size, d_model, n_layer, self.d_inner, self.dt_rank)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)

    def new_state(self, batch: int) -> States:
        width = self.d_inner
        return [(torch.zeros(batch, D_CONV - 1, width), torch.zeros(batch, width, D_STATE)) for _ in self.backbone.layers]

    def forward(self, tokens: Tensor, state: States) -> tuple[Tensor, States]:
        x = self.backbone.embeddings(tokens)
        new: States = []
        for layer, before in zip(self.backbone.layers, state, strict=True):
            y, after = layer.mixer(layer.norm(x), before)  # type: ignore[operator]
            x = x + F.dropout(y.float(), self.dropout, self.training)
            new.append(after)
        x = self.backbone.norm_f(x)
        return F.linear(x, self.backbone.embeddings.weight), new


def bits_per_byte(model: Mamba, tokenizer: Tokenizer, text: str) -> float:
    """All of the text after one end token, float32, the state carried through; total bits over UTF-8 bytes."""
    tokens = torch.tensor([tokenizer.encode(EOS + text).ids])
    training = model.training
    model.eval()
    total, state = 0.0, model.new_state(1)
    with torch.no_grad():
        for i in range(0, tokens.shape[1] - 1, 2048):
            cut = tokens[:, i : i + 2049]
            logits, state = model(cut[:, :-1], state)
            total += F.cross_entropy(logits[0], cut[0, 1:], reduction="none").double().sum().item()
    model.train(training)
    return total / math.log(2) / len(text.encode())


# ------------------------------------------------------------------------------------------------------- the training


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps in bfloat16; matrices of one shape go through together."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalize(m: Tensor) -> Tensor:
        x = m.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = x.mT.contiguous()
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            s = x @ x.mT
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
        result: Tensor = x.mT.float() if tall else x.float()
        return result

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # in_proj is two square-ish matrices, one for u and one for z: each is made orthogonal for itself
                halves = update.chunk(2) if update.shape[0] >= 4 * update.shape[1] else (update,)
                targets = p.data.chunk(2) if len(halves) == 2 else (p.data,)
                for half, target in zip(halves, targets, strict=True):
                    shapes.setdefault((half.shape[0], half.shape[1]), []).append((half, target))
            for (rows, columns), pairs in shapes.items():
                updates = self.orthogonalize(torch.stack([u for u, _ in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for update, (_, target) in zip(updates, pairs, strict=True):
                    target.add_(update, alpha=-group["lr"] * scale)


def optimizers(model: Mamba, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    matrices, decayed, undecayed = [], [], []
    for name, p in model.named_parameters():
        if name.endswith(("in_proj.weight", "out_proj.weight", "x_proj.weight")):
            matrices.append(p)
        elif name.endswith(("embeddings.weight", "dt_proj.weight")):
            decayed.append(p)
        else:
            undecayed.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    built = [
        Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(groups, lr=lr * 0.15, betas=(0.9, 0.98), eps=1e-10),
    ]
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return built


def schedule(progress: float, warmup: float = 0.01, flat_until: float = 0.35) -> float:
    """A short warm-up, a plateau, then linear to zero; progress is the share of the time budget that is used."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return min(1.0, max(0.0, (1 - progress) / (1 - flat_until)))


def save(path: Path, payload: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    torch.save(payload, scratch)
    os.replace(scratch, path)


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    resumed = torch.load(checkpoint, weights_only=True) if args.resume else None
    torch.manual_seed(args.seed)
    books = read_books(args.corpus, args.hold_out)
    held_out = (args.corpus / args.hold_out).read_bytes().decode()[: args.slice]
    if not args.resume:
        train_tokenizer(books, args.vocab).save(str(out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = [np.array(tokenizer.encode(EOS + text).ids, np.int32) for text in books.values()]
    stream = Stream(ids, args.batch, args.length, args.seed)

    model = Mamba(tokenizer.get_vocab_size(), args.d_model, args.layers, args.dropout)
    opts = optimizers(model, args.lr, args.weight_decay)
    step, used, epoch, chunk, state = 0, 0.0, 0, 0, model.new_state(args.batch)
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        for optimizer, saved in zip(opts, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(resumed["rng"])
        step, used, epoch, chunk = (resumed[k] for k in ("step", "seconds", "epoch", "chunk"))
        state = [(c, h) for c, h in resumed["state"]]
    n_tokens, n_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in books.values())
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{len(books)} books, {n_bytes} bytes, {n_tokens} tokens; {n_params} parameters", flush=True)

    model.train()
    budget, started = args.minutes * 60.0, time.monotonic() - used
    losses: list[float] = []
    next_eval, next_save = used + args.eval_every, used + args.save_every
    batches = stream(epoch, chunk)
    while True:
        used = time.monotonic() - started
        done = used >= budget or step == args.steps
        if losses and (done or used >= next_eval):
            quick = bits_per_byte(model, tokenizer, held_out)
            record = {
                "step": step, "minutes": round(used / 60, 2), "epoch": round(epoch + chunk / stream.chunks, 3),
                "tokens": step * args.batch * args.length, "loss": round(float(np.mean(losses)), 4),
                "lr": round(schedule(used / budget), 4), "held_out_slice": round(quick, 4),
            }  # fmt: skip
            print(json.dumps(record), flush=True)
            losses.clear()
            next_eval = used + args.eval_every
        if done or used >= next_save:
            payload = {
                "model": model.state_dict(), "sizes": model.sizes, "optimizers": [o.state_dict() for o in opts],
                "rng": torch.get_rng_state(), "step": step, "seconds": used, "epoch": epoch, "chunk": chunk,
                "state": [list(s) for s in state], "tokens": step * args.batch * args.length,
            }  # fmt: skip
            save(checkpoint, payload)
            next_save = used + args.save_every
        if done:
            break
        epoch, chunk, inputs, targets = next(batches)
        if chunk == 0:
            state = model.new_state(args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(inputs, state)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = schedule(used / budget)
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        step, chunk = step + 1, chunk + 1


# --------------------------------------------------------------------------------------------------------- the export


def config(model: Mamba, dtype: str) -> dict[str, Any]:
    """What transformers' MambaConfig writes."""
    return {
        "architectures": ["MambaForCausalLM"],
        "bos_token_id": 0,
        "conv_kernel": D_CONV,
        "dtype": dtype,
        "eos_token_id": 0,
        "expand": 2,
        "hidden_act": "silu",
        "hidden_size": model.sizes["d_model"],
        "initializer_range": 0.1,
        "intermediate_size": model.d_inner,
        "layer_norm_epsilon": 1e-05,
        "model_type": "mamba",
        "num_hidden_layers": model.sizes["n_layer"],
        "pad_token_id": 0,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "state_size": D_STATE,
        "tie_word_embeddings": True,
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": model.dt_rank,
        "time_step_scale": 1.0,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": model.sizes["vocab_size"],
    }


def export(args: argparse.Namespace) -> None:
    """Round the weights to --dtype, measure the whole held-out book with them, write the Hugging Face folder."""
    out, to = Path(args.out), Path(args.to)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = Mamba(**saved["sizes"])
    dtype = getattr(torch, args.dtype)
    weights = {name: value.to(dtype).contiguous() for name, value in saved["model"].items()}
    model.load_state_dict(weights)
    text = (args.corpus / args.hold_out).read_bytes().decode()
    result = bits_per_byte(model, tokenizer, text)
    to.mkdir(parents=True, exist_ok=True)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    (to / "model.safetensors").chmod(0o644)  # the library leaves it readable by its owner only
    (to / "config.json").write_text(json.dumps(config(model, args.dtype), indent=2) + "\n")
    tokenizer.save(str(to / "tokenizer.json"))
    figures = {"bits_per_byte": round(result, 4), "dtype": args.dtype, "held_out_bytes": len(text.encode())}
    figures |= {key: saved[key] for key in ("step", "tokens", "epoch", "chunk", "seconds")}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--corpus", type=Path, required=True, help="folder of .txt books")
    common.add_argument("--hold-out", required=True, help="the book that is never trained on: a file name")
    common.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the tokenizer")
    common.add_argument("--threads", type=int, default=2)
    p = commands.add_parser("train", parents=[common], help="train, or go on training")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--minutes", type=float, default=85.0, help="time budget, what was used before --resume included")
    p.add_argument("--steps", type=int, default=-1, help="stop earlier, after this many steps")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--d-model", type=int, default=256)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes 0.15 of it")
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--slice", type=int, default=60_000, help="characters of the held-out book for the quick figure")
    p.add_argument("--eval-every", type=float, default=180.0, help="seconds")
    p.add_argument("--save-every", type=float, default=180.0, help="seconds")
    p.set_defaults(run=train)
    p = commands.add_parser("export", parents=[common], help="write the checkpoint as a Hugging Face folder")
    p.add_argument("--to", type=Path, required=True)
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    p.set_defaults(run=export)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numba.set_num_threads(min(args.threads, os.cpu_count() or 1))
    args.run(args)


if __name__ == "__main__":
    main()
