"""Journals of long jobs: every finished text is kept on disk, so that a job that was stopped can go on."""

from specdec.journal.entries import Kept, read
from specdec.journal.journal import Journal
from specdec.journal.settings import settings_of

__all__ = ["Journal", "Kept", "read", "settings_of"]
