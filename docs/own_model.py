"""A language model of one's own on the block pool: prefill, then decode, against dense attention.

Run it: python docs/own_model.py
"""

import torch

from kvkernels import BlockAllocator, KVLayout, KVPool
from kvkernels.nn import PagedAttention, PagedBatch

VOCAB, WIDTH, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 256, 128, 2, 4, 2, 32
BLOCK_SIZE = 16


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.query = torch.nn.Linear(WIDTH, NUM_HEADS * HEAD_DIM, bias=False)
        self.key = torch.nn.Linear(WIDTH, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.value = torch.nn.Linear(WIDTH, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.attention = PagedAttention(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
        self.out = torch.nn.Linear(NUM_HEADS * HEAD_DIM, WIDTH, bias=False)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[num_tokens, WIDTH]` to query, key and value, `[num_tokens, heads, HEAD_DIM]`."""
        hidden = self.norm(hidden)
        query = self.query(hidden).view(-1, NUM_HEADS, HEAD_DIM)
        key = self.key(hidden).view(-1, NUM_KV_HEADS, HEAD_DIM)
        value = self.value(hidden).view(-1, NUM_KV_HEADS, HEAD_DIM)
        return query, key, value

    def forward(self, hidden: torch.Tensor, pool: KVPool, layer: int, batch: PagedBatch):
        query, key, value = self.project(hidden)
        caches = pool.key_cache(layer), pool.value_cache(layer)
        return hidden + self.out(self.attention(query, key, value, *caches, batch).flatten(1))

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.transpose(0, 1)[None] for part in self.project(hidden))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return hidden + self.out(out[0].transpose(0, 1).flatten(1))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.position = torch.nn.Embedding(512, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(NUM_LAYERS))

    def embed(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        return self.embedding(tokens) + self.position(torch.arange(start, start + len(tokens)))

    def forward(self, tokens: torch.Tensor, start: int, pool: KVPool, batch: PagedBatch):
        hidden = self.embed(tokens, start)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, pool, index, batch)
        return hidden @ self.embedding.weight.T

    def forward_dense(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens, 0)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            hidden = layer.forward_dense(hidden)
        return hidden @ self.embedding.weight.T


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    layout = KVLayout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32)
    pool, allocator = KVPool(layout, num_blocks=8), BlockAllocator(8)

    tokens = torch.randint(VOCAB, (40,))
    blocks = allocator.allocate(-(-len(tokens) // BLOCK_SIZE))
    batch = PagedBatch.build([blocks], [len(tokens)], [len(tokens)], BLOCK_SIZE)
    logits = model(tokens, 0, pool, batch)  # prefill: the whole prompt at once
    error = (logits - model.forward_dense(tokens)).abs().max()

    for _ in range(20):  # decode: one token at a time, the rest is read from the pool
        tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
        if len(tokens) > len(blocks) * BLOCK_SIZE:
            blocks += allocator.allocate(1)
        batch = PagedBatch.build([blocks], [len(tokens)], [1], BLOCK_SIZE)
        logits = model(tokens[-1:], len(tokens) - 1, pool, batch)
        error = max(error, (logits[-1] - model.forward_dense(tokens)[-1]).abs().max())

    allocator.release(blocks)
    print(f"{len(tokens)} tokens, largest difference from dense attention {error:.1e}")


if __name__ == "__main__":
    main()
