"""Level verification, which looks at all nodes of a depth together."""

from specdec.rules.level.rule import LevelVerification

__all__ = ["LevelVerification"]
