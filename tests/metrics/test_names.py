"""Every metric that a run writes is declared: meaning, unit, direction, and where it is shown."""

import json
from pathlib import Path

import pytest

from idml_jax.metrics import names

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())["results"]


def keys_of(result):
    records = [result[part] for part in ("untrained", "final", "best")] + result["history"]
    return {key for record in records for key in record}


@pytest.mark.parametrize("run", sorted(GOLDEN))
def test_every_metric_of_a_result_is_described(run):
    keys = keys_of(GOLDEN[run])
    assert len(keys) > 20
    for key in keys:
        row = names.describe(key)
        assert row.meaning.endswith(".") and row.unit and row.better in ("higher", "lower", "neither")


def test_every_row_has_a_name_of_its_own_and_is_found_by_it():
    assert len({row.name for row in names.TABLE}) == len(names.TABLE)
    for row in names.TABLE:
        example = row.name.replace("{k}", "3").replace("{", "").replace("}", "")
        assert names.describe(example) == row, example
    for unknown in ("R@", "R@x", "R-AUROC(a)_middle", "loss_of_sleep"):
        with pytest.raises(KeyError):
            names.describe(unknown)


def test_what_is_shown_is_known():
    for listed in (names.shown(), names.compared()):
        assert len(set(listed)) == len(listed) and all(names.describe(name) for name in listed)
    assert names.shown()[0] == "NMI" and {"answered", "R-AUROC(uncertainty)", "mean_u"} < set(names.shown())
    assert names.compared()[0] == "top1" and {"R@1", "MAP@R", "corrupted/R@1"} < set(names.compared())
