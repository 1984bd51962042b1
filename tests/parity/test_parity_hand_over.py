"""Every row of the hand-over table, held to one bound. Needs the packages themselves: `make parity` installs them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.parity import hand_over

LIMIT = 2e-5  # float32, of the largest number compared (at least 1)


@pytest.mark.parametrize(
    ("project", "family"),
    [(project, family) for project, (_, families) in hand_over.PROJECTS.items() for family in families],
)
def test_states_and_outputs_agree(project: str, family: str) -> None:
    if find_spec(project) is None:
        pytest.skip(f"{project} is not installed: `make parity` installs it")
    rows = list(hand_over.PROJECTS[project][0](family))
    assert len(rows) >= 3
    for shown in rows:
        assert shown.gap <= LIMIT * max(1.0, shown.scale), shown
