"""Run folders from untrusted sources are read or refused in one line."""

import json
import random
import shutil

import pytest

from idml_jax.errors import UserError
from idml_jax.inference import model
from idml_jax.reporting.record import read_record
from idml_jax.runtime import checkpoint
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.config import default_config
from idml_jax.training.config_checks import validate

VALUES = [None, True, -1, 0, 3, 1e308, "x", "", [], ["x"], {}, {"a": {}}, "\udce9", 2**70, [[1]], float("nan")]
RECORD = {
    "untrained": {"R@1": 0.2},
    "final": {"R@1": 0.5, "NMI": None},
    "best": {"step": 4, "R@1": 0.5, "P(u_blur>u)": 0.9},
    "history": [{"step": 2, "R@1": 0.3}],
    "config": {"epochs": 2},
}


def changed(value, draw):
    """A JSON value with one part replaced, renamed or taken away."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if draw.random() < 0.1:
            return {**value, draw.choice(("", "x", "a.b", "<b>", "get", "update")): value[name]}
        return {**value, name: changed(value[name], draw)}
    if isinstance(value, list | tuple) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return [*value[:place], changed(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)


def damaged(text, draw):
    """The bytes of a text with a part removed or overwritten."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.choice((1, 2, 5))):
        place = draw.randrange(max(1, len(data)))
        if draw.random() < 0.3:
            del data[place:]
        else:
            data[place : place + draw.randrange(9)] = draw.choice(
                (b"\x00", b"\xff\xfe", b"[" * 2000, b'"', b"}", b"9" * 5000)
            )
    return bytes(data)


def fuzz_run(folder, count, seed):
    """Reads changed folders; returns how many were read and how many refused."""
    draw, found = random.Random(seed), {"read": 0, "refused": 0}
    config = json.dumps(default_config().to_dict())
    rows = [json.dumps({"step": i, "train/loss": 1.0 / (i + 1), "eval/R@1": 0.5}) for i in range(5)]
    good = {"config.json": config, "result.json": json.dumps(RECORD), "metrics.jsonl": "\n".join(rows)}
    for number in range(count):
        chosen = draw.choice(list(good))
        for name, text in good.items():
            data = text.encode()
            if name == chosen:
                parts = [json.loads(line) for line in text.splitlines()]
                if draw.random() < 0.6:
                    place = draw.randrange(len(parts))
                    parts[place] = changed(parts[place], draw)
                    data = "\n".join(map(json.dumps, parts)).encode()
                else:
                    data = damaged(text, draw)
            (folder / name).write_bytes(data)
        try:
            settings = workdir_lib.read(folder)
            validate(settings)
            history, result = read_record(folder, warning=lambda line: None)
        except UserError as error:
            assert str(error), number
            found["refused"] += 1
            continue
        found["read"] += 1
        assert all(isinstance(v, int | float) for row in [*history, *result.values()] for v in row.values())
        assert all("step" in row for row in history)
    return found


def test_changed_folders_are_read_or_refused(tmp_path):
    found = fuzz_run(tmp_path, 100, 0)
    assert min(found.values()) >= 15, found


@pytest.mark.slow
def test_many_changed_folders_are_read_or_refused(tmp_path):
    found = fuzz_run(tmp_path, 2000, 1)
    assert min(found.values()) >= 300, found


@pytest.mark.parametrize("name", ["²", "\u0661", "1²", "-1", "1.5", "x", "01 ", ""])
def test_only_numbers_are_steps(tmp_path, name):
    (tmp_path / "7").mkdir()
    (tmp_path / (name or "y")).mkdir()
    assert checkpoint.steps_of(tmp_path) == [7]


@pytest.mark.parametrize("damage", ["truncated", "state missing"])
def test_a_damaged_best_checkpoint_is_named_with_the_other_ones(finished, tmp_path, damage):
    """None is taken in its place without a word: the metrics of ``result.json`` are of the best one."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    folder = checkpoint.find_state(run, default_config().eval.best_metric)
    steps = sorted(int(entry.name) for entry in (run / "checkpoints").iterdir() if entry.name.isdecimal())
    others = [step for step in steps if step != int(folder.parent.name)]
    if damage == "truncated":
        for file in (path for path in folder.rglob("*") if path.is_file()):
            file.write_bytes(file.read_bytes()[:100])
    else:
        shutil.rmtree(folder)
    advice = f"move it away to use that of step {others[-1]}" if others else "there is no other one"
    with pytest.raises(UserError, match=rf"{folder.parent}: .* damaged or incomplete; {advice}"):
        model.load(run)
    folder.parent.rename(tmp_path / "aside")
    if others:
        assert model.load(run).step in others
