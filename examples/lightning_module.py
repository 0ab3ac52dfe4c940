"""A Lightning module over nnfast's layers and optimizer.

python examples/lightning_module.py    (needs lightning)
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import nnfast.nn as nn  # nnfast: was `import torch.nn as nn`
import nnfast.optim as optim  # nnfast: was `import torch.optim as optim`


class Encoder(lightning.LightningModule):
    """Tells whether the sum of a sequence's numbers is above zero."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        numbers, above = batch
        loss = self.loss(self.head(self.encode(self.embed(numbers)).mean(dim=1)), above)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    lightning.seed_everything(0)
    numbers = torch.randn(1024, 16, 1)
    data = DataLoader(TensorDataset(numbers, (numbers.sum(dim=(1, 2)) > 0).long()), batch_size=32)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Encoder(), data)
    print(f"loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
