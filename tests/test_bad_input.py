"""Bad input to every command: one clear line, a non-zero exit code, nothing changed and nothing half-written."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import archives_made as made
import numpy as np
import pytest
from PIL import Image

from idml_jax import evaluate, prepare, pretrained
from idml_jax import main as main_lib

ROOT = Path(__file__).resolve().parent.parent
FOLDER = f"--config={ROOT}/configs/folder.py:scratch"
SMALL = (
    FOLDER,
    "--config.batch_size=32",
    "--config.eval.batch_size=32",
    "--config.model.name=convnet4",
    "--config.model.embedding_dim=16",
    "--config.data.image_size=16",
    "--config.data.resize=16",
    "--config.log.tensorboard=False",
    "--workdir={tmp}/run",
)


class RunsCode:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def png(size=(8, 8), mode="L", fmt="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, fmt)
    return buffer.getvalue()


def huge_png(side=100_000):
    data = bytearray(png())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def images(tmp, bad=None, name="bad.png"):
    """A folder with train/ and test/, each with four classes of two images; one image is bad."""
    for split in ("train", "test"):
        for label in range(4):
            for i in range(8):
                save(tmp / "images" / split / f"c{label}" / f"{i}.png", png())
    if bad is not None:
        save(tmp / "images" / "train" / "c1" / name, bad)
    return tmp / "images"


def archive(tmp, name, files, **options):
    data = made.zip_bytes(files) if name.endswith(".zip") else made.tar_bytes(files, **options)
    return save(tmp / name, data)


def special(tmp, kind):
    with tarfile.open(tmp / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)


def zip_link(tmp):
    with zipfile.ZipFile(tmp / "x.zip", "w") as opened:
        info = zipfile.ZipInfo("a/1.jpg")
        info.external_attr = 0o120777 << 16
        opened.writestr(info, "/etc/passwd")


def cut(tmp, name):
    files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(3)}
    data = made.zip_bytes(files) if name.endswith(".zip") else made.tar_bytes(files)
    save(tmp / name, data[: len(data) // 2])


def cifar(tmp, batch):
    files, _ = made.cifar(False, False)
    files["cifar-10-batches-py/data_batch_3"] = batch
    made.write_files(tmp / "x", files)


def cub(tmp, **changes):
    files = made.cub()
    for name, data in changes.items():
        path = f"CUB_200_2011/{name}.txt"
        files[path] = data(files[path]) if callable(data) else data
        if files[path] is None:
            del files[path]
    made.write_files(tmp / "x", files)


def weights(tmp, **arrays):
    from safetensors.numpy import save_file

    save_file(arrays, tmp / "w.safetensors")


def torch_file(tmp, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp / "w.pth")


def run_json(tmp, content):
    save(tmp / "old" / "config.json", content)


def nothing(tmp):
    return None


# Arguments of the commands, where {tmp} is a folder that ``make`` has filled, and the expected messages.
CASES = {}


def case(name, arguments, message, make=nothing, door="main"):
    assert name not in CASES, name
    CASES[name] = (door, tuple(arguments), message, make)


def setting(override, message):
    case(f"--config.{override}", (*SMALL, "--config.data.root={folder}", f"--config.{override}"), message)


def training(name, message, make, *more):
    case(name, (*SMALL, "--config.data.root={tmp}/images", *more), message, make)


def starting(name, file, message, make):
    arguments = (*SMALL, "--config.data.root={folder}", "--config.model.init_from={tmp}/" + file)
    case(f"weights: {name}", arguments, message, make)


def storing(name, source, message, make, dataset="folder", *more):
    arguments = (f"--dataset={dataset}", f"--source={{tmp}}/{source}", "--data_dir={tmp}/sets", *more)
    case(f"prepare: {name}", arguments, message, make, "prepare")


def embeddings(name, message, make=None, *more, **arrays):
    make = make or (lambda tmp: np.savez(tmp / "x.npz", **arrays))
    arguments = ("--embeddings={tmp}/x.npz", "--out={tmp}/m.json", *more)
    case(f"embeddings: {name}", arguments, message, make, "evaluate")


# Flags and settings files.
case("nothing", (), "--workdir is missing")
case("no settings file named", ("--workdir={tmp}/run",), "--config is missing")
case("no such settings file", ("--config=no_such.py", "--workdir={tmp}/run"), "no_such.py")
case("no such variant", (FOLDER + ":slow", "--workdir={tmp}/run"), "slow")
case("no such mode", (FOLDER, "--workdir={tmp}/run", "--mode=test"), "mode.*train")
case("no such flag", (FOLDER, "--workdir={tmp}/run", "--epochs=3"), "epochs")
case("a stray word", (FOLDER, "--workdir={tmp}/run", "epochs=3"), "unexpected argument 'epochs=3'")
for title, text, answer in (
    ("syntax", "def get_config(:\n", "syntax"),
    ("no get_config", "x = 1\n", "get_config"),
    ("raises", "def get_config():\n    raise ValueError('no such thing')\n", "no such thing"),
    ("no settings", "def get_config():\n    return 3\n", "config"),
    ("binary", b"\x00\x01\x02", "null bytes|source"),
):
    case(
        f"settings file: {title}",
        ("--config={tmp}/c.py", "--workdir={tmp}/run"),
        answer,
        lambda tmp, text=text: save(tmp / "c.py", text),
    )
case(
    "workdir beneath a file",
    (*SMALL[:-1], "--config.data.root={folder}", "--workdir={tmp}/file/run"),
    "cannot be used as --workdir",
    lambda tmp: save(tmp / "file", "x"),
)
case(
    "workdir is a file",
    (*SMALL[:-1], "--config.data.root={folder}", "--workdir={tmp}/file"),
    "cannot be used as --workdir",
    lambda tmp: save(tmp / "file", "x"),
)
case("no root", SMALL, "config.data.root is empty")
for override, answer in (
    ("optim.lerning_rate=1", "lerning_rate"),
    ("epochs=many", "epochs"),
    ("epochs=1.5", "epochs"),
    ("model=3", "model"),
    ("batch_size=0", "config.batch_size = 0 must be at least 1"),
    ("batch_size=20", "multiple of the 8 devices"),
    ("batch_size=1024", "a batch of 1024 cannot be filled from 96 images"),
    ("optim.accumulate=3", r"multiple of config.optim.accumulate \(3\)"),
    ("loss.name=triplets", "config.loss.name = 'triplets'; known: .*proxy_anchor"),
    ("model.name=resnet51", "unknown model 'resnet51'; known: .*resnet50"),
    ("data.name=cubs", "unknown data set 'cubs'"),
    ("data.channels=2", r"config.data.channels = 2; known: 1 \(grey\), 3 \(colour\)"),
    ("data.mean=(0.5,)", "config.data.mean has 1 values for 3 channels"),
    ("data.std=(0.0,1.0,1.0)", "config.data.std .* must be above 0"),
    ("data.crop_scale=(0.9,0.2)", "config.data.crop_scale"),
    ("data.crop_scale=(0.9,)", "config.data.crop_scale"),
    ("data.crop_ratio=(0.9,0.2)", "config.data.crop_ratio"),
    ("data.corrupt=1.5", r"config.data.corrupt = 1.5 must be in \[0, 1\]"),
    ("data.corrupt_kinds=('fog',)", "config.data.corrupt_kinds .* must be some of crop, blur, noise, occlusion"),
    ("ism.ranking=-1.0", "config.ism.ranking"),
    ("ism.prior=-1.0", "config.ism.prior"),
    ("data.image_size=64", "config.data.resize .* must be at least config.data.image_size"),
    ("data.per_class=3", "config.data.per_class"),
    ("model.dtype=float16", "known: float32, bfloat16"),
    ("model.batchnorm=on", "known: frozen, frozen_statistics, live"),
    ("model.uncertainty_head=none", "needs an uncertainty head"),
    ("ism.variant=cubic", "known: relative, absolute, released"),
    ("ism.temperature=0.0", "must be above 0"),
    ("ism.temperature=nan", "must be above 0"),
    ("optim.learning_rate=nan", "config.optim.learning_rate"),
    ("optim.learning_rate=inf", "config.optim.learning_rate"),
    ("mixup.alpha=0.0", "mixup.alpha must be above 0"),
    ("memory.size=64", "a memory is for losses on pairs"),
    ("optim.schedule=linear", "known: step, cosine, constant"),
    ("optim.name=adam", "known: adamw, sgd"),
    ("eval.best_metric=R@3", "known: R@1, R@2, R@4, R@8, RP, MAP@R"),
    ("eval.ks=(0,)", "config.eval.ks"),
    ("eval.split=validation", "needs config.data.validation_classes"),
    ("debug=nan", "'nan' is not a check; known: nans"),
):
    setting(override, answer)

case(
    "a prior for what nothing teaches",
    (*SMALL, "--config.data.root={folder}", "--config.ism.enabled=False", "--config.ism.prior=0.1"),
    "config.ism.prior only keeps u alive",
)

# Folders and images.
case("no such folder", (*SMALL, "--config.data.root={tmp}/x"), "no such folder")
training("a file for a folder", "images", lambda tmp: save(tmp / "images", "x"))
training("no images", "holds no images", lambda tmp: (tmp / "images").mkdir())
training("images without classes", "outside class folders", lambda tmp: save(tmp / "images" / "1.png", png()))
training("one class", "1 class", lambda tmp: save(tmp / "images" / "a" / "1.png", png()))
training(
    "a class of one image",
    r"single image, the first .*c9/1\.png",
    lambda tmp: save(images(tmp) / "train" / "c9" / "1.png", png()),
)
training("a link to nowhere", r"c1/link\.png", lambda tmp: (images(tmp) / "train/c1/link.png").symlink_to("/no/such"))
for title, data, answer in (
    ("empty", b"", "the file is empty"),
    ("text", b"hello", "not an image"),
    ("html", b"<html>sign in</html>", "not an image"),
    ("cut short", made.jpeg(0, 0, 64)[:-300], "not a"),
    ("of 100,000 x 100,000 pixels", huge_png(), "100000 x 100000 pixels are more than the limit"),
    ("of floating point", png(mode="F", fmt="TIFF"), "floating point"),
    ("a pickle", pickle.dumps([1]), "not an image"),
):
    training(
        f"image: {title}",
        rf"c1/bad\.png: .*{answer}.*on_corrupt=skip|c1/bad\.png: .*{answer}",
        lambda tmp, data=data: images(tmp, data),
    )

# Folders of runs.
case("eval: no run", ("--mode=eval", "--workdir={tmp}/run"), "holds no run")
for title, text, answer in (
    ("no JSON", "{", "config.json is not valid JSON"),
    ("a list", "[1]", "config.json"),
    ("of a wrong type", '{"epochs": "many"}', "config.json.*epochs"),
    ("without checkpoints", '{"epochs": 2}', "config.data.root is empty|no checkpoints"),
):
    case(
        f"eval: settings {title}",
        ("--mode=eval", "--workdir={tmp}/old"),
        answer,
        lambda tmp, text=text: run_json(tmp, text),
    )
case(
    "another run's workdir",
    (*SMALL[:-1], "--config.data.root={folder}", "--workdir={tmp}/old"),
    "holds a run with other settings: ",
    lambda tmp: run_json(tmp, '{"epochs": 7}'),
)

# Weights.
starting("none", "w.safetensors", "no such weights file", nothing)
starting("another kind", "w.h5", "weights come as .safetensors", lambda tmp: save(tmp / "w.h5", "x"))
starting("text", "w.safetensors", "cannot be read as safetensors", lambda tmp: save(tmp / "w.safetensors", "hello"))
starting(
    "a header of 2^60 bytes",
    "w.safetensors",
    "cannot be read as safetensors",
    lambda tmp: save(tmp / "w.safetensors", struct.pack("<Q", 2**60) + b"{}"),
)
starting("of nothing", "w.safetensors", "holds no weights", lambda tmp: weights(tmp, **{"fc.weight": np.ones((2, 2))}))
starting(
    "another network",
    "w.safetensors",
    "does not fit the network",
    lambda tmp: weights(tmp, **{"conv1.weight": np.ones((2, 2), np.float32)}),
)
starting("an empty folder", "w", "neither weights of this package nor", lambda tmp: (tmp / "w").mkdir())
starting("a damaged folder", "w", "cannot be read", lambda tmp: save(tmp / "w" / "_METADATA", "{}"))
starting(
    "a pickle that runs code",
    "w.pth",
    "holds more than tensors and is refused",
    lambda tmp: torch_file(tmp, {"state_dict": RunsCode(tmp / "was_here")}),
)
starting(
    "a bare pickle that runs code",
    "w.pth",
    "refused|PyTorch",
    lambda tmp: save(tmp / "w.pth", pickle.dumps(RunsCode(tmp / "was_here"))),
)
case("convert: nothing to convert", ("convert", "{tmp}/none.pth", "{tmp}/out"), "no such weights", door="pretrained")
case(
    "convert: no such model",
    ("convert", "{tmp}/a", "{tmp}/out", "--model=resnet51"),
    "known: .*resnet50",
    door="pretrained",
)
case(
    "convert: the target is there",
    ("convert", "{tmp}/a", "{tmp}/out"),
    "already exists",
    lambda tmp: save(tmp / "out", "precious"),
    "pretrained",
)

# Embeddings and labels.
embeddings("none", "no such file", nothing)
embeddings("text", "not an .npz file", lambda tmp: save(tmp / "x.npz", "hello"))
embeddings(
    "a pickle that runs code",
    "not an .npz file",
    lambda tmp: save(tmp / "x.npz", pickle.dumps(RunsCode(tmp / "was_here"))),
)
embeddings("objects", "plain arrays", semantic=np.asarray([[object()]] * 2), labels=np.arange(2))
embeddings("labels alone", "needs the arrays semantic .*; it holds labels", labels=np.arange(4))
embeddings("no labels", "needs the arrays", semantic=np.ones((4, 2)))
embeddings("five labels for four", r"labels has the shape \(5,\)", semantic=np.ones((4, 2)), labels=np.arange(5))
embeddings("labels in a table", "labels", semantic=np.ones((4, 2)), labels=np.ones((4, 2), int))
embeddings("labels with NaN", "labels", semantic=np.eye(4), labels=np.asarray([0, 0, np.nan, 1]))
embeddings("a vector", "shape", semantic=np.ones(4), labels=np.arange(4))
embeddings("NaN", "finite|NaN", semantic=np.full((4, 2), np.nan), labels=np.arange(4))
embeddings("text for numbers", "semantic", semantic=np.asarray([["a", "b"]] * 4), labels=np.arange(4))
embeddings("one row", "single row", semantic=np.ones((1, 2)), labels=np.arange(1))
embeddings("no rows", "no rows", semantic=np.ones((0, 2)), labels=np.arange(0))
embeddings("ks of words", "--ks=a", None, "--ks=a", semantic=np.eye(4), labels=np.arange(4) // 2)
embeddings(
    "a gallery of another width",
    "3.*4|4.*3|dimension|shape",
    lambda tmp: (
        np.savez(tmp / "x.npz", semantic=np.eye(4), labels=np.arange(4) // 2),
        np.savez(tmp / "y.npz", semantic=np.eye(3), labels=np.arange(3) // 2),
    ),
    "--gallery={tmp}/y.npz",
)
embeddings(
    "a report into nowhere",
    "file",
    lambda tmp: (
        np.savez(tmp / "x.npz", semantic=np.eye(4), labels=np.arange(4) // 2),
        save(tmp / "file", "x"),
    ),
    "--out={tmp}/file/m.json",
)

# Archives and label files.
one = {"a/1.jpg": made.jpeg(0, 0)}
storing("none", "x", "no such file or folder", nothing)
storing("no archive", "x.txt", "neither a folder nor an archive", lambda tmp: save(tmp / "x.txt", "x"))
storing("empty", "x", "holds no images", lambda tmp: (tmp / "x").mkdir())
storing(
    "a name that leads out",
    "x",
    "letters, digits and _ only",
    lambda tmp: (tmp / "x").mkdir(),
    "folder",
    "--name=../up",
)
storing(
    "shards of nothing", "x", "--shard_megabytes=0", lambda tmp: (tmp / "x").mkdir(), "folder", "--shard_megabytes=0"
)
for path in ("../out/1.jpg", "/etc/1.jpg", "a/../../1.jpg", "C:\\a\\1.jpg"):
    for kind in ("x.tar", "x.zip"):
        storing(
            f"{path} in {kind}",
            kind,
            "points outside the archive; refused",
            lambda tmp, path=path, kind=kind: archive(tmp, kind, {path: made.jpeg(0, 0), **one}),
        )
for title, kind in (
    ("link", tarfile.SYMTYPE),
    ("hard link", tarfile.LNKTYPE),
    ("device", tarfile.CHRTYPE),
    ("pipe", tarfile.FIFOTYPE),
):
    storing(f"a {title} in a tar", "x.tar", "is a link or a device; refused", lambda tmp, kind=kind: special(tmp, kind))
storing("a link in a zip", "x.zip", "is a link or a device; refused", zip_link)
for kind in ("x.tar", "x.zip"):
    storing(f"{kind} cut short", kind, "damaged or cut short after", lambda tmp, kind=kind: cut(tmp, kind))
    storing(
        f"{kind} of html",
        kind,
        "damaged or cut short after 0 files",
        lambda tmp, kind=kind: save(tmp / kind, b"<html>Please sign in</html>" * 40),
    )
storing(
    "an image of 100,000 x 100,000 pixels",
    "x",
    "100000 x 100000 pixels|1.png",
    lambda tmp: made.write_files(tmp / "x", {"a/1.png": huge_png(), "b/1.png": png()}),
)
storing(
    "CIFAR's pickle runs code",
    "x",
    "data_batch_3: not one of CIFAR's pickles",
    lambda tmp: cifar(tmp, pickle.dumps({b"data": RunsCode(tmp / "was_here"), b"labels": []}, 2)),
    "cifar10",
)
storing("CIFAR's pickle is none", "x", "data_batch_3: not one of CIFAR's", lambda tmp: cifar(tmp, b"hello"), "cifar10")
storing(
    "CUB without labels",
    "x",
    "image_class_labels|no known layout",
    lambda tmp: cub(tmp, image_class_labels=lambda _: None),
    "cub",
)
storing(
    "CUB's labels are words",
    "x",
    "image_class_labels",
    lambda tmp: cub(tmp, image_class_labels=b"one two\nthree four\n"),
    "cub",
)
storing(
    "CUB's labels are cut short",
    "x",
    "not the complete CUB-200-2011: train: 21 of 5,864 images",
    lambda tmp: cub(tmp, image_class_labels=lambda data: data[: len(data) // 2]),
    "cub",
)
storing(
    "CUB's labels are binary",
    "x",
    "image_class_labels",
    lambda tmp: cub(tmp, image_class_labels=b"\xff\xfe\x00\x80"),
    "cub",
)


DOORS = {"evaluate": evaluate.main, "pretrained": pretrained.main, "prepare": prepare.main}


def enter(door, arguments, monkeypatch):
    """Runs a command and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["idml_jax", *arguments])
    with pytest.raises(SystemExit) as stop:
        if door == "main":
            main_lib._main(main_lib.parse(["main", *arguments]))
        else:
            DOORS[door](list(arguments))
    return stop.value.code


def listing(folder):
    """Everything below a folder with its content, except what ``prepare`` keeps for resuming."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "sets" not in name.split("/"):
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def test_there_are_many_cases():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line(name, image_folder, tmp_path, monkeypatch, capsys, command_line):
    door, arguments, message, make = CASES[name]
    tmp = tmp_path / "inside"
    tmp.mkdir()
    make(tmp)
    monkeypatch.chdir(tmp)
    before = listing(tmp_path)
    code = enter(door, [a.format(tmp=tmp, folder=image_folder) for a in arguments], monkeypatch)
    told = capsys.readouterr()
    assert isinstance(code, int) and code != 0
    assert "Traceback" not in told.err + told.out
    lines = told.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), told.err
    assert re.search(message, lines[0]), lines[0]
    assert len(lines[0]) < 800
    assert listing(tmp_path) == before
    assert not list((tmp / "sets").rglob("1.0.0")), "published"


@pytest.mark.parametrize(
    "door,arguments,asked",
    [
        ("main", ("--workdir={tmp}/run", FOLDER, "--config.epochs=0"), "flag"),
        ("prepare", ("--dataset=folder", "--source={tmp}/none"), "environment"),
        ("evaluate", ("--embeddings={tmp}/none.npz",), "environment"),
        ("pretrained", ("convert", "{tmp}/none.pth", "{tmp}/out"), "environment"),
    ],
)
def test_the_traceback_comes_when_asked_for(door, arguments, asked, tmp_path):
    given = [a.format(tmp=tmp_path) for a in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if asked == "flag":
        given.append("--traceback")
    else:
        environment["IDML_JAX_TRACEBACK"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", f"idml_jax.{door}", *given], env=environment, capture_output=True, text=True
    )
    assert done.returncode not in (0, None)
    assert "Traceback" in done.stderr and "UserError" in done.stderr
