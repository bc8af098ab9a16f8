"""A drafter on the target's states: it mixes three states of the position before the root, and goes on by itself below it."""

import torch

from certificates.cases import llama  # of tests/: a float64 Llama over 4 tokens
from specdec.drafters import TreeDrafter, TreeDraftRun
from specdec.testing import assert_drafter
from specdec.trees import Widths


class FeatureDrafter(TreeDrafter):
    states = (0, 1, -1)  # what layer 0, layer 1 and the LM head read

    def __init__(self, model, tree):
        super().__init__(tree)
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.mix = torch.nn.Linear(3 * self.head.in_features, self.head.in_features).to(self.head.weight)

    def start(self, target, batch, last=None):
        return FeatureRun(self, batch, last)


class FeatureRun(TreeDraftRun):
    def __init__(self, drafter, batch, last):
        super().__init__(drafter, batch, last)
        # [batch, hidden]: zeros before a text's first token, of which nobody tells
        self.before = drafter.mix.weight.new_zeros(len(batch), drafter.mix.out_features)

    def read(self, states, start, count):
        # states: [batch, n, 3, hidden], of which row b has count[b]; the last of them is wanted
        found = self.drafter.mix(states[torch.arange(len(count)), count - 1].flatten(1))
        self.before = torch.where(count[:, None] > 0, found, self.before)

    def score(self, frontier):
        if frontier.topology.depth == 0:
            self.hidden = self.before[:, None]  # [batch, 1 + nodes so far, hidden]: first the state before the root
        parents = frontier.topology.parents[:, -frontier.tokens.shape[1] :, None] + 1  # the root's is -1
        hidden = torch.tanh(self.hidden.take_along_dim(parents, 1) + self.drafter.embed(frontier.tokens))
        self.hidden = torch.cat([self.hidden, hidden], 1)
        return self.drafter.head(hidden)


model = llama(seed=0, layers=2)
assert_drafter(FeatureDrafter(model, Widths([2, 1])), model, [(0, 1, 0), (2,)])
