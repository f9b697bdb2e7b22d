"""The ledger of lemon nodes decays."""

from pathlib import Path

import pytest

from slurm import lemons

DAY_S = 86_400.0


def test_a_failure_excludes_for_a_half_life_and_repeated_ones_for_longer(tmp_path: Path) -> None:
    ledger = tmp_path / "lemons.jsonl"
    assert lemons.excluded(ledger) == []
    lemons.add(ledger, "node007", "gpus: 7 answer", now_s=0.0)
    for _ in range(4):
        lemons.add(ledger, "node009", "clock", now_s=0.0)
    ledger.write_text(ledger.read_text() + '{"time_s": 0, "no')  # torn by a kill
    assert lemons.excluded(ledger, now_s=1.0) == ["node007", "node009"]
    assert lemons.excluded(ledger, now_s=(lemons.HALF_LIFE_DAYS + 0.1) * DAY_S) == ["node009"]
    assert lemons.weights(ledger, now_s=lemons.HALF_LIFE_DAYS * DAY_S) == pytest.approx(
        {"node009": 2.0, "node007": 0.5}
    )
    assert lemons.excluded(ledger, now_s=(3 * lemons.HALF_LIFE_DAYS + 0.1) * DAY_S) == []
