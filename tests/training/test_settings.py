"""Settings from Python: wrong names and types are refused like those of the command line; the page is current."""

import runpy
from pathlib import Path

import pytest
from runs_made import small_config

import idml_jax
from idml_jax import main
from idml_jax.errors import UserError
from idml_jax.training import recipes, settings
from idml_jax.training.config import default_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("data.imagesize", 32, r"config.data.imagesize is no setting; did you mean config.data.image_size\?"),
        ("imagesize", 32, r"did you mean config.data.image_size\?"),
        ("data.learning_rate", 0.1, r"did you mean config.optim.learning_rate\?"),
        ("wholly", 1, "config.wholly is no setting; there are batch_size, "),
        ("batch_size", None, "config.batch_size = None must be a whole number"),
        ("data.flip", None, "config.data.flip = None must be True or False"),
        ("data.mean", ("a",), "config.data.mean, in part = 'a' must be a number"),
    ],
)
@pytest.mark.parametrize("door", ["train", "fit", "eval"])
def test_wrong_settings_are_refused_in_one_line(door, field, value, message, image_folder, finished, tmp_path):
    config = small_config(image_folder)
    group, _, name = field.rpartition(".")
    (config[group] if group else config)[name] = value
    call = {
        "train": lambda: idml_jax.train_and_evaluate(config, tmp_path / "run"),
        "fit": lambda: idml_jax.fit(config, tmp_path / "run"),
        "eval": lambda: idml_jax.evaluate_checkpoint(finished[0], config),
    }[door]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "word,message",
    [
        ("optim.lr=3", "config.optim.lr is no setting; did you mean config.optim.learning_rate?"),
        ("lr=3", "config.lr is no setting; did you mean config.optim.learning_rate?"),
        ("optim.foo=3", "config.optim.foo is no setting; config.optim has accumulate, cached_features, "),
        ("num_epochs=3", "config.num_epochs is no setting; did you mean config.epochs?"),
        ("seed.x=3", "config.seed.x is no setting; did you mean config.seed?"),
        ("loss=arcface", "config.loss is a group of settings; did you mean config.loss.name?"),
        ("data=3", "config.data is a group of settings; did you mean config.data.name?"),
    ],
)
def test_unknown_settings_of_the_command_line_are_named(word, message, command_line, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main.parse(["main", "--config=glyphs", f"--workdir={tmp_path / 'run'}", f"--config.{word}"], None)
    assert capsys.readouterr().err.startswith(f"error: {message}") and not (tmp_path / "run").exists()


def test_settings_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="the settings are dict, not a ConfigDict"):
        idml_jax.train_and_evaluate({}, tmp_path / "run")
    incomplete = default_config()
    del incomplete.optim
    with pytest.raises(UserError, match="config.optim is missing; start from"):
        settings.check_known(incomplete)


def test_the_settings_of_the_package_are_known():
    for name in recipes.names():
        settings.check_known(recipes.get_config(name))


def test_the_page_of_settings_is_current():
    written = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == written, "python docs/settings_page.py"
    assert settings.HELP.read_text() == settings.as_text() + "\n", "python docs/settings_page.py"
    assert all(setting.meaning or setting.choices for setting in settings.table())
