"""Forward passes over pieces of several sequences at once, as in continuous batching."""

import torch

from kvkernels.nn import PagedBatch
from kvkernels.nn.transformers_batch import BatchCache


class PackedModel:
    """A model and the pools that hold its sequences.

    Args:
        model: A model that uses kvkernels' attention.
        groups: Its layer groups, whose pools have room for all sequences.
        sequences: Token ids of each sequence.
    """

    def __init__(self, model, groups, sequences):
        self.model = model
        self.groups = groups
        self.sequences = sequences
        # Block ids in the order of allocation: they differ between sequences and groups.
        self._tables = []
        for group in groups:
            size = group.pool.layout.block_size
            free = torch.randperm(group.pool.num_blocks).tolist()
            self._tables.append(
                [[free.pop() for _ in range(-(-len(ids) // size))] for ids in sequences]
            )

    @torch.inference_mode()
    def run(self, pieces):
        """Logits of all tokens of each piece `(sequence, begin, end)`, in one forward pass."""
        batches = [
            PagedBatch.build(
                [tables[seq] for seq, _, _ in pieces],
                [end for _, _, end in pieces],
                [end - begin for _, begin, end in pieces],
                group.pool.layout.block_size,
            )
            for group, tables in zip(self.groups, self._tables, strict=True)
        ]
        tokens = [self.sequences[seq][begin:end] for seq, begin, end in pieces]
        positions = [torch.arange(begin, end) for _, begin, end in pieces]
        logits = self.model(
            input_ids=torch.cat(tokens)[None],
            position_ids=torch.cat(positions)[None],
            past_key_values=BatchCache(self.groups, batches),
            use_cache=True,
        ).logits
        return logits[0].split([len(ids) for ids in tokens])

    def run_whole(self):
        """Logits of each sequence, run alone and in one piece."""
        return [self.run([(seq, 0, len(ids))])[0] for seq, ids in enumerate(self.sequences)]

    def random_steps(self, rng, sizes):
        """Steps of random pieces that run every sequence from its start to its end.

        Args:
            rng: A `random.Random`.
            sizes: Numbers of tokens that a piece may have.
        """
        done = [0] * len(self.sequences)
        while waiting := [seq for seq, ids in enumerate(self.sequences) if done[seq] < len(ids)]:
            step = []
            for seq in rng.sample(waiting, rng.randint(1, len(waiting))):
                end = min(len(self.sequences[seq]), done[seq] + rng.choice(sizes))
                step.append((seq, done[seq], end))
                done[seq] = end
            yield step
