"""torch-rechub's models on a user's history: attention over it, sequence models, retrieval with negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models import matching, ranking
from torch_rechub.models.generative.hstu import HSTUModel

from .data import ROWS, Data, generator, histories
from .rechub import HIDDEN, inputs
from .registry import Inputs, recipe

Made = tuple[nn.Module, Inputs]


def _profile(data: Data, width: int, stop: int) -> list[Any]:
    """Sparse fields C6 to C<stop-1> of the user."""
    return [SparseFeature(f"C{i}", data.rows(ROWS[i]), width) for i in range(6, stop)]


def _item(data: Data, width: int, rows: int) -> Any:
    return SparseFeature("item", data.rows(rows), width)


def _sequence(data: Data, name: str, rows: int, width: int, table: str | None, **kw: Any) -> Any:
    pooling = kw.pop("pooling", "concat")
    return SequenceFeature(name, data.rows(rows), width, pooling=pooling, shared_with=table, **kw)


def _pairs(data: Data, width: int, prefix: str) -> list[Any]:
    """A history of items and one of their categories, on the candidate's tables; 0 is padding."""
    return [
        _sequence(data, f"{prefix}_item", 100_000, width, "item", padding_idx=0),
        _sequence(data, f"{prefix}_cate", 10_000, width, "cate", padding_idx=0),
    ]


def _candidate(data: Data, width: int) -> list[Any]:
    rows = {"item": data.rows(100_000), "cate": data.rows(10_000)}
    return [SparseFeature(name, n, width, padding_idx=0) for name, n in rows.items()]


def din(data: Data) -> Made:
    """DIN: an attention unit over a history of 100."""
    user, item, past = _profile(data, 16, 18), _candidate(data, 16), _pairs(data, 16, "h")
    unit = {"dims": [64, 32], "activation": "dice", "use_softmax": False}
    model = ranking.DIN(user, past, item, {"dims": HIDDEN}, unit)
    return model, inputs(user + item, history=[(f, 100) for f in past])


def bst(data: Data) -> Made:
    """BST: one transformer layer over a history of 50 and the candidate."""
    user, item, past = _profile(data, 32, 18), _candidate(data, 32), _pairs(data, 32, "h")
    model = ranking.BST(
        user, past, item, {"dims": HIDDEN}, nhead=8, dropout=0.1, num_layers=1, max_seq_len=51
    )
    return model, inputs(user + item, history=[(f, 50) for f in past])


def dien(data: Data) -> Made:
    """DIEN: GRUs over a history of 50, with negative samples."""
    user, item, past = _profile(data, 16, 18), _candidate(data, 16), _pairs(data, 16, "h")
    negatives = _pairs(data, 16, "n")
    model = ranking.DIEN(user, past, negatives, item, {"dims": HIDDEN})
    return model, inputs(user + item, history=[(f, 50) for f in past + negatives])


def youtube_dnn(data: Data) -> Made:
    """YoutubeDNN: a mean-pooled history, 20 sampled negatives."""
    user, item = _profile(data, 32, 14), _item(data, 32, 100_000)
    past = _sequence(data, "h_item", 100_000, 32, "item", pooling="mean", padding_idx=0)
    negatives = _sequence(data, "neg", 100_000, 32, "item")
    model = matching.YoutubeDNN([*user, past], [item], [negatives], {"dims": [128, 64, 32]})
    return model, inputs([*user, item], history=[(past, 50), (negatives, 20)])


def sasrec(data: Data) -> Made:
    """SASRec: two causal transformer blocks over 50 items."""
    first = _sequence(data, "seq", 50_000, 64, None)
    others = [_sequence(data, name, 50_000, 64, "seq") for name in ("pos", "neg")]
    model = matching.SASRec([first, *others], max_len=50, dropout_rate=0.2, num_blocks=2, num_heads=2)
    return model, inputs([], history=[(f, 50) for f in (first, *others)])


def _retrieval(data: Data, width: int) -> tuple[list[Any], Any, Any, Any]:
    """Profile, item, history of 50 and negatives of the sequence-to-item retrieval models."""
    past, negatives = (_sequence(data, name, 50_000, width, "item") for name in ("h_item", "neg"))
    return _profile(data, width, 10), _item(data, width, 50_000), past, negatives


def gru4rec(data: Data) -> Made:
    """GRU4Rec: a GRU over 50 items."""
    user, item, past, negatives = _retrieval(data, 64)
    model = matching.GRU4Rec(user, [past], [item], [negatives], {"dims": [128, 64]})
    return model, inputs([*user, item], history=[(past, 50), (negatives, 20)])


def mind(data: Data) -> Made:
    """MIND: capsules over 50 items."""
    user, item, past, negatives = _retrieval(data, 32)
    model = matching.MIND(user, [past], [item], [negatives], max_length=50, interest_num=4)
    return model, inputs([*user, item], history=[(past, 50), (negatives, 20)])


def comirec(data: Data) -> Made:
    """ComiRec with self-attention over 50 items."""
    user, item, past, negatives = _retrieval(data, 32)
    model = matching.ComirecSA(user, [past], [item], [negatives], interest_num=4)
    return model, inputs([*user, item], history=[(past, 50), (negatives, 20)])


def hstu(data: Data) -> Made:
    """HSTU, 4 layers over 100 items; logits over all items at each position dominate its time."""
    rows = data.rows(20_000)
    model = HSTUModel(
        vocab_size=rows, d_model=64, n_heads=2, n_layers=4, dqk=32, dv=32, max_seq_len=100, dropout=0.1
    )

    def make(batch: int) -> tuple[Tensor, Tensor]:
        draw = generator(batch)
        items, _ = histories(rows, batch, 100, draw)
        return items, torch.randint(0, 1_000_000, (batch, 100), generator=draw)

    return model, make


recipe("rechub.DIN", din)
recipe("rechub.BST", bst, (1, 64, 256, 1024))
recipe("rechub.DIEN", dien, (1, 64, 256, 1024))
recipe("rechub.YoutubeDNN", youtube_dnn)
recipe("rechub.SASRec", sasrec, (64, 128, 512))  # it fails in eager with one sample
recipe("rechub.GRU4Rec", gru4rec, (1, 64, 256, 1024))
recipe("rechub.MIND", mind, (1, 64, 256, 1024))
recipe("rechub.ComirecSA", comirec, (1, 64, 256, 1024))
recipe("rechub.HSTU", hstu, (1, 16, 64))
