"""What the callback for TRL makes of a trainer's batches: a bigram model in torch, and batches of several kinds."""

from types import SimpleNamespace

import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.integrations.trl import displacement_callback, pair_logps

torch = pytest.importorskip("torch")
VOCABULARY = 7
ROWS = [([1, 2], [3], [4, 5]), ([2], [6, 1, 3], [4])]
TABLE = torch.log_softmax(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), -1)
VIRTUAL = 3


class Bigram(torch.nn.Module):
    """Logits of the next token from the last; ``virtual`` positions before those of the row, as prompt tuning has."""

    device = torch.device("cpu")

    def __init__(self, virtual=0):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.9)
        self.virtual = virtual

    def forward(self, input_ids, attention_mask, use_cache, pixel_values=None):
        logits = self.dropout(TABLE)[input_ids]
        if pixel_values is not None:
            logits = logits * pixel_values[:, None, None]
        before = torch.randn(len(input_ids), self.virtual, VOCABULARY)
        return SimpleNamespace(logits=torch.cat([before, logits], 1))


def padded(rows, value):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def of_dpo(rows, **more):
    (prompt, *sides) = rows[0]
    return {
        "input_ids": padded([prompt + side for side in sides], 0),
        "attention_mask": padded([[1] * len(prompt + side) for side in sides], 0),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(side) for side in sides], 0),
        "ref_chosen_logps": torch.zeros(1),
        **more,
    }


def of_cpo(rows):
    (prompt, *sides) = rows[0]
    batch = {"prompt": ["a text"]}
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        batch[f"{name}_input_ids"] = torch.tensor([prompt + side])
        batch[f"{name}_attention_mask"] = torch.ones(1, len(prompt + side), dtype=torch.long)
        batch[f"{name}_labels"] = torch.tensor([[-100] * len(prompt) + side])
    return batch


def trainer(collator, virtual=0, rows=ROWS):
    return SimpleNamespace(
        model=Bigram(virtual), data_collator=collator, eval_dataset=rows, args=SimpleNamespace(output_dir="unused")
    )


def by_hand():
    return np.array(
        [
            [sum(float(TABLE[a, b]) for a, b in zip([p[-1], *y[:-1]], y, strict=True)) for y in sides]
            for p, *sides in ROWS
        ]
    )


@pytest.mark.parametrize("collator", [of_dpo, of_cpo])
@pytest.mark.parametrize("virtual", [0, VIRTUAL])
def test_each_response_is_summed(collator, virtual):
    """Virtual tokens of an adapter shift the logits, and are no tokens of the row."""
    logps, tokens = pair_logps(trainer(collator, virtual))
    np.testing.assert_allclose(logps, by_hand(), rtol=1e-6)
    assert tokens.tolist() == [[1, 2], [3, 1]]


def test_what_else_a_model_reads_reaches_it():
    """Pictures: without them the log-probabilities would be of another question."""
    with_picture = pair_logps(trainer(lambda rows: of_dpo(rows, pixel_values=torch.tensor([2.0, 3.0]))))[0]
    assert np.abs(with_picture - by_hand()).min() > 0.01


def test_the_model_is_left_as_it_was():
    one = trainer(of_dpo)
    one.model.train()
    one.model.dropout.eval()
    before = torch.get_rng_state()
    pair_logps(one)
    assert one.model.training and not one.model.dropout.training and torch.equal(before, torch.get_rng_state())
    with pytest.raises(KeyError):
        pair_logps(trainer(lambda rows: {}[0]))


def test_batches_of_another_kind_are_refused_before_the_training():
    def of_kto(rows):
        return {"completion_input_ids": torch.ones(1, 3), "label": [True]}

    with pytest.raises(ChesError, match=r"batches of SimpleNamespace \(completion_input_ids, label\) are not those of"):
        displacement_callback(trainer(of_kto))
    with pytest.raises(ChesError, match="the eval_dataset is one set without a name; leave held_out away"):
        displacement_callback(trainer(of_dpo), held_out="a")
    with pytest.raises(ChesError, match=r"eval_dataset has no set 'c'; choose one with held_out=\.\.\.: 'a', 'b'"):
        displacement_callback(trainer(of_dpo, rows={"a": ROWS, "b": ROWS}), held_out="c")
