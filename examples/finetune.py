"""A model of Hugging Face's and its Trainer: nnfast comes in with one line, and the optimizer with another.

python examples/finetune.py    (needs transformers and accelerate; the weights are random, nothing is downloaded)
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import nnfast
import nnfast.optim


class Parity(torch.utils.data.Dataset):
    """Texts of 32 words, labelled by whether the first and the last are the same."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict:
        words = torch.randint(2, 1000, (32,), generator=torch.Generator().manual_seed(index))
        words[-1] = words[0] if index % 2 else words[-1]
        return {"input_ids": words, "labels": torch.tensor(int(words[0] == words[-1]))}


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    model = BertForSequenceClassification(config)
    model = nnfast.accelerate(model)  # nnfast
    print(nnfast.report(model))
    optimizer = nnfast.optim.AdamW(model.parameters(), lr=1e-3)  # nnfast: was torch.optim.AdamW
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=16, report_to=[], save_strategy="no", use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=Parity(), optimizers=(optimizer, None))
        print(f"loss {trainer.train().training_loss:.4f}")
    nnfast.restore(model)  # nnfast: the classes that Hugging Face made, for whoever takes the model from here


if __name__ == "__main__":
    main()
