"""Every Python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[0])
def test_readme_code_runs(block):
    scope: dict = {}
    exec(block, scope)
    drafters = [scope[name]() for name in ("RepeatLast", "Stutter") if name in scope]
    if drafters:  # those of the README are exact too
        from specdec.rules import SiblingRejection
        from specdec.testing import assert_lossless

        assert_lossless(SiblingRejection(), drafters=drafters)
