"""A drafter with a model: it scores nodes, and any tree policy grows its trees."""

import torch

from specdec.drafters import TreeDrafter, TreeDraftRun
from specdec.testing import TabularTarget, assert_drafter
from specdec.trees import Widths


class Bigram(TreeDrafter):
    """Drafts from a table of what follows each token."""

    capturable_scores = True  # `score` does the same to the device in every step

    def __init__(self, table, tree):
        super().__init__(tree)
        self.table, self.models = table, (table,)

    def start(self, target, batch, last=None):
        return BigramRun(self, batch, last).begun(last)  # in the tensors of `last`, where graphs read them


class BigramRun(TreeDraftRun):
    def score(self, frontier):  # [batch, count, vocab] after frontier.tokens [batch, count]
        return self.drafter.table(frontier.tokens)


assert_drafter(Bigram(torch.nn.Embedding(3, 3), Widths([2, 1])), TabularTarget(3), [(0, 1, 0), (2,)])
