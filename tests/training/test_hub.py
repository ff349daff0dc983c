"""Weights by their names on the hub: a served repository, its cache, refusals, and a run from ``name=auto``."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import hub_served
import numpy as np
import pytest
from absl import flags
from safetensors import numpy as safetensors
from test_pretrained import random_variables, write

from idml_jax import main as main_lib
from idml_jax import pretrained
from idml_jax.errors import UserError
from idml_jax.models import naming
from idml_jax.training import weights
from idml_jax.training.workdir import read as read_config

pytest.importorskip("huggingface_hub")
TIMM = {
    "architecture": "vit_toy_patch8_16",
    "num_classes": 5,
    "global_pool": "token",
    "pretrained_cfg": {
        "input_size": [3, 16, 16],
        "crop_pct": 0.8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


@pytest.fixture(scope="module")
def tiny():
    """Variables of a small vision transformer."""
    return random_variables("vit_tiny", size=16, pooling="token")[1]


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """A hub with the repository owner/tiny-vit in timm's layout and others made of it."""
    folder = tmp_path_factory.mktemp("served")
    classifier = {"head.weight": np.ones((5, 24), np.float32), "head.bias": np.zeros(5, np.float32)}
    path = write(folder / "model.safetensors", tiny, lambda named: {**named, **classifier})
    content, config = path.read_bytes(), json.dumps(TIMM).encode()
    with hub_served.Hub() as hub:
        files = {"README.md": b"a licence", "config.json": config, "pytorch_model.bin": b"never read"}
        hub.repositories["owner/tiny-vit"] = {**files, "model.safetensors": content}
        named = sorted(safetensors.load_file(path).items())
        parts = {f"model-{i:05d}-of-00002.safetensors": dict(named[i - 1 :: 2]) for i in (1, 2)}
        index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
        hub.repositories["owner/sharded"] = {
            **{name: safetensors.save(part) for name, part in parts.items()},
            "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": config,
        }
        hub.repositories["owner/closed"] = hub.repositories["owner/licensed"] = hub.repositories["owner/tiny-vit"]
        hub.repositories["owner/texts"] = {"README.md": b"no weights"}
        hub.repositories["owner/two"] = {"a.safetensors": content, "b.safetensors": content}
        hub.private, hub.gated = {"owner/closed"}, {"owner/licensed"}
        yield hub


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    hub_served.use(monkeypatch, served, tmp_path / "home")
    served.asked.clear()
    return served


def same_trunk(loaded, tiny):
    one, other = naming.flatten(loaded["params"]["trunk"]), naming.flatten(tiny["params"]["trunk"])
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def downloads(hub):
    return [line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET /owner")]


def test_a_name_is_downloaded_once_and_then_read_without_a_network(hub, tiny, tmp_path, monkeypatch):
    for name in (
        "owner/tiny-vit",
        "hf://owner/tiny-vit",
        "owner/tiny-vit@main",
        "hf://owner/tiny-vit/model.safetensors",
    ):
        loaded, told = pretrained.load(name, tiny)
        same_trunk(loaded, tiny)
        assert "head.bias, head.weight (2 in total)" in told
    # The README and the .bin beside the weights stay where they are; everything else comes once.
    assert sorted(downloads(hub)) == ["config.json", "model.safetensors"]
    located = weights.locate("owner/tiny-vit")
    assert located.commit == hub.commit("owner/tiny-vit") and located.commit[:12] in located.name
    assert located.path.is_relative_to(tmp_path / "home")
    hub.asked.clear()
    hub_served.use(monkeypatch, hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    same_trunk(pretrained.load("owner/tiny-vit", tiny)[0], tiny)
    assert weights.locate("owner/tiny-vit") == located
    with pytest.raises(
        UserError, match=r"owner/sharded: no such .* not in the cache .* HF_HUB_OFFLINE forbids .*fetch owner/sharded"
    ):
        weights.locate("owner/sharded")
    assert hub.asked == []
    # Nor when the hub is down, with a word about it.
    monkeypatch.setattr(hub, "endpoint", "http://127.0.0.1:9")
    hub_served.use(monkeypatch, hub, tmp_path / "home")
    same_trunk(pretrained.load("owner/tiny-vit", tiny)[0], tiny)
    with pytest.raises(UserError, match=r"owner/two: .* downloaded from http://127.0.0.1:9 \(.*nothing is left"):
        weights.locate("owner/two")


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:owner/tiny-vit",
        "hf_hub:owner/tiny-vit@main",
        "HF://owner/tiny-vit",
        "hf://owner/tiny-vit@main/model.safetensors",
        "https://huggingface.co/owner/tiny-vit",
        "https://huggingface.co/owner/tiny-vit/",
        "https://huggingface.co/owner/tiny-vit/tree/main",
        "https://hf.co/owner/tiny-vit/blob/main/model.safetensors",
        "https://huggingface.co/owner/tiny-vit/resolve/main/model.safetensors?download=true",
    ],
)
def test_other_spellings_of_a_name(hub, name):
    located = weights.locate(name)
    assert located.path.name == "model.safetensors" and located.commit == hub.commit("owner/tiny-vit")


def test_the_index_names_its_pieces(hub, tiny):
    files = hub.repositories["owner/sharded"]
    index = json.loads(files["model.safetensors.index.json"])
    names = {f"model-{i:05d}-of-00002.safetensors": name for i, name in ((1, "a.safetensors"), (2, "b.safetensors"))}
    index["weight_map"] = {tensor: names[piece] for tensor, piece in index["weight_map"].items()}
    hub.repositories["owner/named"] = {
        **{new: files[old] for old, new in names.items()},
        "unused.safetensors": files["model-00001-of-00002.safetensors"],
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": files["config.json"],
    }
    same_trunk(pretrained.load("owner/named", tiny)[0], tiny)
    assert "unused.safetensors" not in downloads(hub)
    hub.repositories["owner/lacking"] = {
        k: v for k, v in hub.repositories["owner/named"].items() if k != "b.safetensors"
    }
    with pytest.raises(UserError, match=r"b.safetensors is missing, one of the 2 files"):
        weights.locate("owner/lacking")


def test_weights_in_several_files(hub, tiny):
    same_trunk(pretrained.load("owner/sharded", tiny)[0], tiny)
    located = weights.locate("owner/sharded")
    assert [file.name for file in located.files] == sorted(n for n in hub.repositories["owner/sharded"] if "-of-" in n)
    located.files[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is missing, one of the 2 files"):
        weights.locate(located.folder)


def test_readers_at_the_same_time_share_one_download(hub, tiny):
    """As several processes of a host do: the cache's locks are of files."""
    import huggingface_hub.file_download  # noqa: F401  once, not in every thread

    with ThreadPoolExecutor(3) as pool:
        for loaded, _ in pool.map(lambda _: pretrained.load("owner/tiny-vit", tiny), range(3)):
            same_trunk(loaded, tiny)
    assert downloads(hub).count("model.safetensors") == 1


def test_a_cut_download_leaves_no_weights_behind(hub, tiny, tmp_path, monkeypatch):
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "cut", {"model.safetensors"})
    with pytest.raises(
        UserError, match=r"owner/tiny-vit: .* cannot be downloaded .* run the same command again"
    ) as caught:
        pretrained.load("owner/tiny-vit", tiny)
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "home").rglob("*.safetensors")]
    hub.cut.clear()
    same_trunk(pretrained.load("owner/tiny-vit", tiny)[0], tiny)


@pytest.mark.parametrize(
    "name,token,message",
    [
        (
            "owner/tiny-vlt",
            "",
            r"tiny-vlt: no such file here, and http.* has no such repository .*\(401\); check the spelling",
        ),
        ("owner/tiny-vlt", "hf_mine", r"no such repository .*\(404\); check the spelling"),
        ("owner/closed", "", r"\(401\); check the spelling, or set HF_TOKEN"),
        ("owner/licensed", "", r"accept the licence: accept it at http.*/owner/licensed, then set HF_TOKEN"),
        ("owner/licensed", "hf_mine", r"accept the licence"),
        ("owner/tiny-vit@v2", "", r"the repository has no revision 'v2'"),
        ("hf://owner/tiny-vit/x.pth", "", r"has no such file; it has model.safetensors, pytorch_model.bin"),
        ("owner/texts", "", r"owner/texts: holds no weights"),
        ("owner/two", "", r"several files of weights \(a.safetensors, b.safetensors\); name one"),
        ("hf://owner", "", r"hf://owner: not a name on the hub; hf://owner/name"),
        ("hf://owner/tiny-vit/config.json", "", r"config.json is no file of weights; they come as .safetensors"),
        ("EfficientNet-Lite0", "", r"no such weights file .*; efficientnet_lite0 is the name of weights"),
        ("resnet50.a1_in1k", "", r"no such weights file .*; weights of timm .* timm/resnet50.a1_in1k"),
        (
            "owner/tiny-vit/model.safetensors",
            "",
            r"on the Hugging Face hub is named hf://owner/tiny-vit/model.safetensors",
        ),
        ("owner/x.safetensors", "", r"x.safetensors: no such weights file"),
    ],
)
def test_refusals_are_one_line_with_the_cure(hub, tmp_path, monkeypatch, name, token, message):
    hub_served.use(monkeypatch, hub, tmp_path / "home", **({"HF_TOKEN": token} if token else {}))
    with pytest.raises(UserError, match=message) as caught:
        weights.locate(name)
    assert "\n" not in str(caught.value)


def test_a_token_opens_what_is_closed(hub, tiny, tmp_path, monkeypatch):
    hub_served.use(monkeypatch, hub, tmp_path / "home", HF_TOKEN="hf_licensed")
    for name in ("owner/licensed", "owner/closed"):
        same_trunk(pretrained.load(name, tiny)[0], tiny)


def test_a_path_comes_before_a_name_and_the_package_is_asked_for(hub, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny-vit").mkdir(parents=True)
    write(tmp_path / "owner" / "tiny-vit" / "model.safetensors", tiny)
    same_trunk(pretrained.load("owner/tiny-vit", tiny)[0], tiny)
    assert hub.asked == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"owner/other: .* pip install idml_jax\[hub\]"):
        weights.locate("owner/other")


def test_the_command_fetches_and_shows(hub, tiny, tmp_path, capsys):
    out = tmp_path / "tiny.safetensors"
    pretrained.main(["fetch", "owner/tiny-vit", f"--out={out}"])
    assert "vit_tiny written to" in capsys.readouterr().out
    read = weights.read(out)
    assert read.network == "vit_tiny" and read.native.image_size == 16 and read.native.resize == 20
    same_trunk(pretrained.load(out, tiny, network="vit_tiny")[0], tiny)
    pretrained.main(["show", str(out)])
    told = capsys.readouterr().out
    for line in ("patch_embed.proj.weight  24 x 3 x 8 x 8", "vit_tiny", "16 px, shorter side 20 px", "(0.5, 0.5, 0.5)"):
        assert line in told, line
    for arguments, message in (
        (["fetch", "owner/tiny-vit", f"--out={out}"], "already exists"),
        (["fetch", "owner/tiny-vit", f"--out={tmp_path / 'x.pth'}"], "must end in .safetensors"),
    ):
        with pytest.raises(SystemExit):
            pretrained.main(arguments)
        assert message in capsys.readouterr().err


def test_a_run_takes_its_network_from_a_name_and_remembers_it(
    hub, image_folder, tmp_path, monkeypatch, capsys, command_line
):
    """Two steps through ``idml_jax.main``, embedding from the run, resuming, and other weights of the same name."""
    from idml_jax import embed

    run = tmp_path / "run"
    arguments = [
        "main", "--config=folder", f"--config.data.root={image_folder}", f"--workdir={run}", "--config.max_steps=2",
        "--config.model.init_from=owner/tiny-vit", "--config.model.name=auto", "--config.batch_size=32",
        "--config.eval.batch_size=32", "--config.model.embedding_dim=8", "--config.eval.ambiguity_images=0",
        "--config.eval.cluster=False", "--config.eval.untrained=False", "--config.log.tensorboard=False",
        "--config.data.resize=24", "--config.mixup.enabled=False",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)

    def train(*more):
        main_lib._main(main_lib.parse([*arguments, *more]))
        return capsys.readouterr().out

    told = train()
    assert "auto, from " in told and "model.name vit_tiny" in told and "data.resize stays 24" in told
    stored = read_config(run)
    assert (stored.model.name, stored.model.pooling, stored.data.image_size) == ("vit_tiny", "token", 16)
    assert stored.data.resize == 24 and stored.data.mean == (0.5, 0.5, 0.5) and stored.data.std == (0.25, 0.25, 0.25)
    origin = stored.model.init_origin
    assert stored.model.init_from == "owner/tiny-vit" and origin.commit == hub.commit("owner/tiny-vit")
    assert origin.file == "model.safetensors" and len(origin.sha256) == 64
    embed.main([f"--workdir={run}", f"--images={image_folder / 'test'}", f"--out={tmp_path / 'x.npz'}"])
    assert np.load(tmp_path / "x.npz")["semantic"].shape == (96, 8)
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)  # as in a new process
    hub.asked.clear()
    assert "this run is finished" in train() and hub.asked == []
