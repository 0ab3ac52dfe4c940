"""The models whose steps are measured: a GPT written over `nn`, and others' models with random weights."""

from collections.abc import Callable

import torch

HEAD = 64


def gpt(nn, layers: int, width: int, vocabulary: int, context: int, fused_loss: bool = False) -> torch.nn.Module:
    """A GPT-2, written as anyone would with ``nn`` and ``F``, which are torch's or nnfast's.

    ``forward(tokens, targets)`` is the loss. Above 256 words the head shares the embedding's weight, as GPT-2's does.

    Args:
        fused_loss: take the head and the loss by ``F.linear_cross_entropy``, in one call.
    """
    F = nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = (
                t.view(batch, length, -1, HEAD).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, dim=-1)
            )
            attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(attention.transpose(1, 2).reshape(batch, length, width))
            return x + self.mlp(self.norm2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            if vocabulary > 256:
                torch.nn.init.normal_(self.head.weight, std=0.02)
                self.token.weight = self.head.weight

        def forward(self, tokens, targets):
            x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
            x = self.norm(self.blocks(x))
            if fused_loss:
                return F.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
            return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())

    return GPT()


def tokens(vocabulary: int, batch: int, length: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that draws a batch: tokens, and the next ones as targets."""

    def draw():
        window = torch.randint(vocabulary, (batch, length + 1))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    return draw


class _WithLoss(torch.nn.Module):
    """A model of transformers as a function of its batch that gives the loss."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs, labels):
        return self.model(**{self.name: inputs}, labels=labels).loss


def bert_base() -> torch.nn.Module:
    """BERT-base that classifies a text in two, as it is fine-tuned; random weights, no dropout."""
    import transformers

    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _WithLoss(transformers.BertForSequenceClassification(config), "input_ids")


def vit_base() -> torch.nn.Module:
    """ViT-B/16 that classifies an image of 224 x 224 in a thousand; random weights."""
    import transformers

    return _WithLoss(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), "pixel_values")
