"""Sequence to sequence: text written from text. Translations are scored by BLEU and chrF, summaries by ROUGE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.model.text_to_text import build_text_to_text, decoder_start, generation_config
from dstrain.recipe.schema import SequenceToSequenceRecipe
from dstrain.tasks.batching import LENGTH_MULTIPLE, encoded, padded
from dstrain.tasks.example_task import Answer, ExampleTask, Head, Row
from dstrain.tasks.splits import SplitReader, Splits
from dstrain.tasks.text_pairs import TextPair, read_text_pairs, written
from dstrain.tasks.writing_scores import (
    Judge,
    bleu_scores,
    rouge_scores,
    summary_baselines,
    translation_baselines,
)

NOTHING = -100  # label of a position that has no loss
PARTITIONED = 3  # the ZeRO stage under which a forward pass needs all ranks


class TextRow(Row):
    """A source in `ids`; `target` are the ids to be written, int32 (tokens,), the last one ends the text."""

    @property
    def tokens(self) -> int:
        """See `Row`: both sides."""
        return len(self.ids) + len(self.target)


class Writer(Head):
    """A Transformers model that writes text."""

    def __init__(self, model: PreTrainedModel, label_smoothing: float) -> None:
        super().__init__(model)
        self._label_smoothing = label_smoothing

    def forward(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of all target tokens, and number that are the likeliest, both fp32 scalars.

        Args:
            labels: int64 (rows, target tokens), `NOTHING` where a target has ended.
            inputs: `input_ids` and `attention_mask`, int64 (rows, source tokens).
        """
        logits = self.model(**inputs, decoder_input_ids=self.shifted(labels), use_cache=False).logits
        logits = logits.float().flatten(0, 1)  # (rows × target tokens, vocab_size)
        targets = labels.flatten()
        loss = nn.functional.cross_entropy(
            logits, targets, ignore_index=NOTHING, reduction="sum", label_smoothing=self._label_smoothing
        )
        return loss, (logits.detach().argmax(dim=-1) == targets).sum(dtype=torch.float32)

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder sees before each label, int64 (rows, target tokens); padding where a target has ended."""
        before = labels.roll(1, dims=1)
        before[:, 0] = decoder_start(self.model.config)
        return before.masked_fill(before == NOTHING, self.model.config.pad_token_id)


class SequenceToSequence(ExampleTask[TextPair]):
    """The `sequence_to_sequence` task on one rank."""

    auto_model = AutoModelForSeq2SeqLM
    text_to_text = True
    module: Writer
    _recipe: SequenceToSequenceRecipe

    def read(self) -> tuple[Splits[TextPair], SplitReader]:
        """See `ExampleTask`."""
        return read_text_pairs(self._recipe.data)

    def build(self) -> Head:
        """See `ExampleTask`."""
        recipe = self._recipe
        model = build_text_to_text(recipe.model, recipe.train.seed, self.encoder)
        model.generation_config = generation_config(model.config, recipe.decoding, recipe.data.target_length)
        language, train_targets = recipe.data.language, [pair.targets[0] for pair in self.splits.train]
        self._judge = (
            Judge(bleu_scores, language, translation_baselines(train_targets))
            if recipe.data.target == "translation"
            else Judge(rouge_scores, language, summary_baselines(language))
        )
        return Writer(model, recipe.loss.label_smoothing)

    def make_rows(self, split: str, examples: list[TextPair]) -> list[Row]:
        """See `ExampleTask`: one row an example, towards its first target."""
        data = self._recipe.data
        sources = source_ids(self.encoder, [one.source for one in examples], data.source_prefix, data.sequence_length)
        # A decoder that begins with the token that begins a text is not asked to write it once more.
        begun = int(self.encoder.begin == (decoder_start(self.model.config),))
        targets = encoded(self.encoder, (one.targets[0] for one in examples), data.target_length + begun)
        return [
            TextRow(source, target[begun:], number, 1 + data.target_length, len(target) - begun)
            for number, (source, target) in enumerate(zip(sources, targets, strict=True))
        ]

    def notes_on_rows(self) -> list[str]:
        """See `ExampleTask`."""
        data, train = self._recipe.data, self.rows["train"]
        full = {
            f"sources fill data.sequence_length={data.sequence_length}": sum(
                len(row.ids) == data.sequence_length for row in train
            ),
            f"targets fill data.target_length={data.target_length}": sum(
                len(row.target) == data.target_length for row in train
            ),
        }
        return [
            f"data.train: {count:,} of {len(train):,} {words}; longer ones were cut"
            for words, count in full.items()
            if count
        ]

    def labels_of(self, rows: Sequence[Row], width: int) -> Tensor:
        """See `ExampleTask`: int64 (rows, target tokens)."""
        longest = max(len(row.target) for row in rows)
        width = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self._recipe.data.target_length)
        labels = np.full((len(rows), width), NOTHING, np.int64)
        for number, row in enumerate(rows):
            labels[number, : len(row.target)] = row.target
        return torch.from_numpy(labels)

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """See `ExampleTask`: how many tokens the model writes, and which."""
        inputs = self.inputs(rows)
        found = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            synced_gpus=self._recipe.train.zero.stage == PARTITIONED and self.runtime.world_size > 1,
        )
        ids = found[:, 1:].cpu().numpy()  # without what the decoder begins with
        answers = np.zeros((len(rows), 1 + self._recipe.data.target_length))
        answers[:, 0], answers[:, 1 : 1 + ids.shape[1]] = ids.shape[1], ids
        return list(answers)

    def scores(self, split: str, answers: list[Answer]) -> dict[str, Any]:
        """See `ExampleTask`."""
        texts = [written(self.encoder, answer[1 : 1 + int(answer[0])].astype(np.int64)) for answer in answers]
        return self._judge.scores(split, self.splits.named()[split], texts)

    def described(self, example: TextPair) -> tuple[int, str, str]:
        """See `ExampleTask`."""
        return example.line, " | ".join(example.targets), example.source

    @classmethod
    def rebuilt(cls, recipe: Any, seed: int, config: dict[str, Any]) -> PreTrainedModel:
        """See `Task`."""
        return build_text_to_text(recipe.model, seed, load_document_tokenizer(recipe.tokenizer))

    @staticmethod
    def training_logits(model: PreTrainedModel, documents: Sequence[Tensor]) -> list[Tensor]:
        """See `Task`. The documents share one padded batch, each the source and the target: (tokens, vocab_size)."""
        rows = [document.numpy().astype(np.int32) for document in documents]
        inputs = padded(rows, model.config.pad_token_id, max(map(len, rows)))
        logits = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
        return [logits[number, : len(row)] for number, row in enumerate(rows)]

    @classmethod
    def logits_alone(cls, model: PreTrainedModel, document: Tensor) -> Tensor:
        """See `Task`."""
        logits: Tensor = model(input_ids=document[None], decoder_input_ids=document[None]).logits[0]
        return logits

    @staticmethod
    def save_extras(recipe: Any, folder: Path) -> None:
        """See `ExampleTask`; and how the model is to write, which Transformers goes by too."""
        ExampleTask.save_extras(recipe, folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        generation_config(config, recipe.decoding, recipe.data.target_length).save_pretrained(folder)


def source_ids(encoder: DocumentTokenizer, sources: Sequence[str], prefix: str, length: int) -> list[NDArray[np.int32]]:
    """The ids of sources behind the prefix that the model expects, at most `length` of each."""
    return encoded(encoder, (prefix + source for source in sources), length)
