"""What tests make drafters of: one function, or another drafter whose trees they change."""

from specdec.drafters import Drafter, DraftRun


class Proposing(Drafter):
    """Keeps nothing of a run. Override `spec` and `propose(batch, coins)`."""

    def propose(self, batch, coins):
        raise NotImplementedError

    def start(self, target, batch, last=None):
        return _Run(self, batch)


class _Run(DraftRun):
    def propose(self, coins):
        return self.drafter.propose(self.batch, coins)


def editing(run, edit):
    """A drafter's run, just begun, that proposes `edit(tree)` in place of each tree."""
    propose = run.propose
    run.propose = lambda coins: edit(propose(coins))
    return run


class Edited(Drafter):
    """Another drafter with `edit(tree)` in place of each tree."""

    def __init__(self, inner, edit):
        self.inner, self.edit = inner, edit

    def spec(self, sampling):
        return self.inner.spec(sampling)

    def start(self, target, batch, last=None):
        return editing(self.inner.start(target, batch), self.edit)
