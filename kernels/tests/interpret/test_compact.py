"""Compaction, kernel against specification."""

import pytest
from verification_cases import assert_compacts

from specdec_kernels.triton.compact import compact


@pytest.mark.parametrize("shape", [(3, 5), (2, 40)], ids=str)  # heads and dimension, in one piece and in several
def test_compaction_moves_what_is_kept_and_touches_no_committed_slot(shape):
    assert_compacts(compact, shape)
