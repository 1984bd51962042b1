"""transformers' Trainer on our models: a short run on a little text learns it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import statewise

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'statewise[hf]'")
pytest.importorskip(
    "accelerate", reason="accelerate, which Trainer needs, is not installed: pip install 'statewise[hf]'"
)

from transformers import Trainer, TrainingArguments

from statewise.bridges import hf

TEXT = b"what a recurrent model remembers has the same size after a word and after a book. " * 8


class Lines(torch.utils.data.Dataset[dict[str, Any]]):
    """Windows of several lengths into the text, as bytes."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = index * 5 % 200, 24 + index % 9
        return {"input_ids": list(TEXT[start : start + length])}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # the name older releases know
@pytest.mark.parametrize("family", ["rwkv7", "mamba2"])
def test_fifty_steps_lower_the_loss(family: str, tmp_path: Path) -> None:
    model = hf.wrap(statewise.create(family, vocab_size=256, num_layers=2, width=64))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=50,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=25,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Lines(),
        data_collator=collate,
    )
    before = trainer.evaluate(Lines())["eval_loss"]
    assert before == pytest.approx(math.log(256), rel=0.1), "an untrained model knows nothing"
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 50
    assert losses[0] == pytest.approx(before, rel=0.1), "the loss is a mean over steps, however they are accumulated"
    after = trainer.evaluate(Lines())["eval_loss"]
    assert after < 0.5 * before
    # A checkpoint of the run opens as any directory, and the run goes on from it.
    last = tmp_path / "checkpoint-50"
    again = hf.StatewiseForCausalLM.from_pretrained(last)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    middle = dict(Trainer(model=again, args=trainer.args, eval_dataset=Lines(), data_collator=collate).evaluate())
    assert middle["eval_loss"] == pytest.approx(after, rel=1e-6)
