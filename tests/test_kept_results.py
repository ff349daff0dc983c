"""Results of studies in files: kept, found again, told apart by their settings; published tables are made of them."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"


@pytest.fixture(scope="module")
def kept():
    spec = importlib.util.spec_from_file_location("kept", EXPERIMENTS / "kept.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Kept


def result_of(folder, **final):
    path = folder / "result.json"
    path.write_text(json.dumps({"final": final}))
    return path


def test_a_finished_run_is_kept_once_and_found_by_row_and_seed(kept, tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    first = kept(file, [])
    first.add("noise/set/plain/seed0", result_of(tmp_path, **{"R@1": 0.1234567, "AURC(uncertainty)": 0.5}))
    first.add("noise/set/plain/seed0", result_of(tmp_path, **{"R@1": 0.9}))
    first.add("noise/set/plain/seed10", result_of(tmp_path, **{"R@1": 0.25}))
    first.add("noise/set/plain+mixup/seed0", result_of(tmp_path, **{"R@1": 0.75}))
    again = kept(file, [])
    assert again.of("noise/set/plain") == {"0": {"R@1": 0.123457}, "10": {"R@1": 0.25}}
    assert "noise/set/plain/seed0" in again and "noise/set/plain/seed1" not in again
    assert len(file.read_text().splitlines()) == 3


def test_runs_with_other_settings_are_other_runs(kept, tmp_path):
    file = tmp_path / "runs.jsonl"
    kept(file, ["b=2", "a=1"]).add("row/seed0", result_of(tmp_path, **{"R@1": 0.5}))
    assert kept(file, ["a=1", "b=2"]).of("row") == {"0": {"R@1": 0.5}}
    assert kept(file, []).of("row") == {}


@pytest.fixture(scope="module")
def label_noise():
    sys.path.insert(0, str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location("label_noise", EXPERIMENTS / "label_noise.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_counts_only_for_the_settings_that_it_had(label_noise, tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"config": {"optim": {"learning_rate": 0.002}, "eval": {"ks": [1, 2]}, "task": "x"}}))
    for wanted in ([], ["optim.learning_rate=0.002", "task=x"], ["eval.ks=(1, 2)"], ["optim.learning_rate=2e-3"]):
        assert label_noise.made_with(result, wanted)
    for wanted in (["optim.learning_rate=0.004"], ["task=x", "eval.ks=(1,)"]):
        assert not label_noise.made_with(result, wanted)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("plain+mixup", None),
        ("ism+mixup", "plain+mixup"),
        ("plain", "plain+mixup"),  # without Mixup
        ("ism", "plain"),
        ("contrastive/plain+mixup", None),
        ("contrastive/ism+mixup", "contrastive/plain+mixup"),
        ("contrastive/ism+mixup, negatives stopped", "contrastive/plain+mixup"),
        ("plain, prism", "plain+mixup"),
        ("ism, prism", "plain, prism"),
        ("plain, rate x 0.5", "plain+mixup"),
        ("released", "plain+mixup"),
    ],
)
def test_which_row_a_row_is_compared_with(label_noise, name, expected):
    rows = ("plain+mixup", "ism+mixup", "plain", "ism", "contrastive/plain+mixup", "plain, prism", "plain, rate x 0.5")
    assert label_noise.peer(name, {row: {} for row in rows}) == expected


@pytest.mark.parametrize(
    "words", [("damage", "omniglot"), ("rates", "birds_imagenet"), ("controls", "omniglot_classes")]
)
def test_tables_that_cannot_be_are_refused(label_noise, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["label_noise.py", f"--table={words[0]}", f"--data={words[1]}", "--list"])
    with pytest.raises(SystemExit):
        label_noise.main()
    assert f"--table={words[0]} is for --data=" in capsys.readouterr().err


def test_without_a_file_or_a_result_nothing_is_written(kept, tmp_path):
    kept(None, []).add("row/seed0", result_of(tmp_path, **{"R@1": 0.5}))
    kept(tmp_path / "runs.jsonl", []).add("row/seed0", tmp_path / "missing.json")
    assert not (tmp_path / "runs.jsonl").exists()


SETS = {"Omniglot": "omniglot", "glyphs": "glyphs", "birds": "birds_lite"}
SHARES = (0, 20, 40, 60)


def page_row(start, page="wrong_labels"):
    """The cells of the row of a page that starts so."""
    lines = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"| {start} |"))
    return [cell.strip("* ") for cell in line.strip("| ").split("|")]


def cell(found, metric):
    values = [100 * run[metric] for run in found.values()]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def gains(plain, other, metric="R@1"):
    return [100 * (other[seed][metric] - plain[seed][metric]) for seed in sorted(plain.keys() & other.keys())]


def gain(plain, other, metric="R@1"):
    values = gains(plain, other, metric)
    shown = f"{statistics.mean(values):+.1f} ({error(values):.1f})"
    return shown.replace("+0.0", "0.0").replace("-0.0 ", "0.0 ")


def error(values):
    return statistics.stdev(values) / len(values) ** 0.5


@pytest.fixture(scope="module")
def published(kept):
    return kept(EXPERIMENTS / "results" / "label_noise.jsonl", [])


def both(published, name, share):
    return (published.of(f"noise/{SETS[name]}/noise{share}/{metric}+mixup") for metric in ("plain", "ism"))


@pytest.mark.parametrize("row", [f"{name} | {share} %" for name in SETS for share in SHARES])
def test_the_table_of_wrong_labels_is_that_of_the_kept_runs(published, row):
    name, noise, seeds, *cells = page_row(row)
    plain, ism = both(published, name, noise.split()[0])
    assert len(plain) == len(ism) == int(seeds)
    length = statistics.mean(run["uncertainty_mean"] for run in ism.values())
    expected = [
        cell(plain, "R@1"), cell(ism, "R@1"), gain(plain, ism), cell(plain, "MAP@R"), cell(ism, "MAP@R"),
        f"{length:.2f}",
    ]  # fmt: skip
    assert cells == expected


@pytest.mark.parametrize("share", SHARES)
def test_the_gains_over_all_sets_are_those_of_the_kept_runs(published, share):
    of_sets = [gains(*both(published, name, share)) for name in SETS]
    mean = statistics.mean(map(statistics.mean, of_sets))
    deviation = sum(error(values) ** 2 for values in of_sets) ** 0.5 / len(of_sets)
    every = [value for values in of_sets for value in values]
    above = f"{sum(value > 0 for value in every)} of {len(every)}"
    assert page_row(f"all three | {share} %")[2:] == [above, f"{mean:+.1f} ({deviation:.1f})"]


def of_row(published, table, row, share=60, data="omniglot"):
    """The runs of a row of Omniglot with 60 % wrong labels, or others."""
    row = row.replace(" ", "_").replace(",", "").replace("/", "-")
    return published.of(f"{table}/{data}/noise{share}/{row}")


def loss_row(published, loss):
    """The cells of a loss with the plain and the introspective metric, of the seeds that both have."""
    if loss.startswith("proxy_anchor"):
        table, ends = ("more", ("plain", "ism")) if "without" in loss else ("noise", ("plain+mixup", "ism+mixup"))
        found = [of_row(published, table, end) for end in ends]
    else:
        found = [of_row(published, "more", f"{loss}/{metric}+mixup") for metric in ("plain", "ism")]
    seeds = sorted(found[0].keys() & found[1].keys())
    plain, ism = ({seed: runs[seed] for seed in seeds} for runs in found)
    length = statistics.mean(run["uncertainty_mean"] for run in ism.values())
    return [str(len(seeds)), cell(plain, "R@1"), cell(ism, "R@1"), gain(plain, ism), f"{length:.2f}"]


def form_row(published, form):
    """The cells of a form of the metric, its differences to the plain metric over the seeds that both have."""
    default = form == "relative, tau 5, the default"
    found = of_row(published, "noise", "ism+mixup") if default else of_row(published, "more", form)
    gained = gain(of_row(published, "noise", "plain+mixup"), found)
    length = statistics.mean(run["uncertainty_mean"] for run in found.values())
    return [str(len(found)), cell(found, "R@1"), gained, cell(found, "MAP@R"), f"{length:.2f}"]


FORMS = ("relative, tau 5, the default", "tau 1", "tau 2", "tau 20", "absolute, tau 2", "released")


@pytest.mark.parametrize("form", FORMS)
def test_the_table_of_forms_with_wrong_labels_is_that_of_the_kept_runs(published, form):
    assert page_row(f"form: {form}")[1:] == form_row(published, form)


LOSSES_WITH_WRONG_LABELS = (
    "proxy_anchor", "proxy_anchor, without Mixup", "proxy_nca", "contrastive", "triplet_semihard",
    "margin_distance_weighted", "multi_similarity", "fast_ap",
)  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES_WITH_WRONG_LABELS)
def test_the_table_of_losses_with_wrong_labels_is_that_of_the_kept_runs(published, loss):
    assert page_row(f"60 %, {loss}")[1:] == loss_row(published, loss)


@pytest.mark.parametrize(
    "row",
    [
        "plain, rate x 0.7", "plain, rate x 0.5", "plain, loss x 0.7", "plain, prism", "plain, prism after 4 epochs",
        "ism, prism after 4 epochs", "ism, u without effect", "plain, margin 0", "plain, margin 0.2",
    ],
)  # fmt: skip
def test_the_table_of_controls_is_that_of_the_kept_runs(published, row):
    plain = published.of("noise/omniglot/noise60/plain+mixup")
    found = of_row(published, "controls", row)
    assert page_row(row)[1:] == [str(len(found)), cell(found, "R@1"), gain(plain, found), cell(found, "MAP@R")]


def damage_row(published, percent):
    """The cells of a share of damaged training images: pairs of runs, their means, their mean difference."""
    names = [f"damage/glyphs/noise0/{metric}+mixup_damaged_{percent}_%" for metric in ("plain", "ism")]
    plain, ism = both(published, "glyphs", 0) if percent == 30 else map(published.of, names)
    seeds = sorted(plain.keys() & ism.keys())
    means = [f"{100 * statistics.mean(found[seed]['R@1'] for seed in seeds):.1f}" for found in (plain, ism)]
    values = gains(plain, ism)
    told = f" ({error(values):.1f})" if len(values) > 1 else ""
    return [str(len(seeds)), *means, f"{statistics.mean(values):+.1f}{told}"]


@pytest.mark.parametrize("percent", [0, 30, 60, 90])
def test_the_table_of_damage_is_that_of_the_kept_runs(published, percent):
    assert page_row(f"damaged: {percent} %")[1:] == damage_row(published, percent)


def alive_row(published, remedy):
    """The cells of a setting against a vanishing u under multi-similarity, with wrong and with clean labels."""
    cells = []
    for share in (60, 0):
        plain = of_row(published, "more", "multi_similarity/plain+mixup", share)
        table, name = ("alive", f", {remedy}") if remedy != "without any" else ("more", "")
        found = of_row(published, table, f"multi_similarity/ism+mixup{name}", share)
        if not found:
            return [*cells, "-", "-", "-"]
        length = statistics.mean(run["uncertainty_mean"] for run in found.values())
        cells += [cell(found, "R@1"), gain(plain, found), f"{length:.2f}"]
    return cells


REMEDIES = (
    "without any", "negatives stopped", "negatives stopped, attenuation 0.1", "negatives stopped, attenuation 1",
    "attenuation 0.1", "prior by confusion 0.1", "scalar", "scalar, negatives stopped, attenuation 0.1",
)  # fmt: skip


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_table_of_settings_that_keep_u_alive_is_that_of_the_kept_runs(published, remedy):
    assert page_row(remedy, "introspection")[1:] == alive_row(published, remedy)


@pytest.mark.parametrize("remedy", [REMEDIES[3], REMEDIES[7]])
@pytest.mark.parametrize("loss", ["margin_distance_weighted", "fast_ap"])
def test_the_table_of_a_living_u_under_other_losses_is_that_of_the_kept_runs(published, loss, remedy):
    assert page_row(f"{loss}, {remedy}", "introspection")[1:] == alive_under(published, loss, remedy)


def alive_under(published, loss, remedy):
    """The cells of a setting against a vanishing u under another loss, with 60 % wrong labels."""
    plain = of_row(published, "more", f"{loss}/plain+mixup")
    found = of_row(published, "alive", f"{loss}/ism+mixup, {remedy}")
    length = statistics.mean(run["uncertainty_mean"] for run in found.values())
    assert plain.keys() == found.keys() == {"0", "1", "2"}
    return [cell(plain, "R@1"), cell(found, "R@1"), gain(plain, found), f"{length:.2f}"]


RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)


def rate_row(published, rate):
    """The cells of a learning rate with 60 % wrong labels, on held-out classes."""
    plain, ism = (of_row(published, "rates", f"{metric}+mixup, rate {rate:g}") for metric in ("plain", "ism"))
    return [str(len(plain.keys() & ism.keys())), cell(plain, "R@1"), cell(ism, "R@1"), gain(plain, ism)]


@pytest.mark.parametrize("rate", RATES)
def test_the_table_of_rates_is_that_of_the_kept_runs(published, rate):
    assert page_row(f"60 %, rate {rate:g}")[1:] == rate_row(published, rate)


def class_row(published, share, row):
    """The cells of a classifier of the characters: top-1 on clean test images."""
    plain, found = (of_row(published, "more", name, share, "omniglot_classes") for name in ("plain", row))
    return [str(len(found)), cell(found, "top1"), *(["-"] if row == "plain" else [gain(plain, found, "top1")])]


@pytest.mark.parametrize("row", ["plain", "ism", "plain, label smoothing"])
@pytest.mark.parametrize("share", [0, 60])
def test_the_table_of_classifiers_is_that_of_the_kept_runs(published, share, row):
    assert page_row(f"classifier, {share} %: {row}")[1:] == class_row(published, share, row)


@pytest.mark.parametrize("rate, shown", [(0.001, "26.6 ± 2.0"), (0.004, "32.4 ± 1.0")])
def test_the_rates_of_multi_similarity_are_those_of_the_kept_runs(kept, rate, shown):
    runs = kept(EXPERIMENTS / "results" / "label_noise.jsonl", [f"optim.learning_rate={rate}"])
    found = of_row(runs, "more", "multi_similarity/plain+mixup")
    assert len(found) == 3 and cell(found, "R@1") == shown
    assert shown in (ROOT / "docs" / "introspection.md").read_text()
