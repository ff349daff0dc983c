"""Use of stored sets: label index, tfds' own sets, query and gallery, one training step on every benchmark."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import archives_made as made
import jax
import numpy as np
import pytest

from idml_jax import main as main_lib  # noqa: F401 (its flags are those of a real run)
from idml_jax import prepare as prepare_lib
from idml_jax.data import datasets, pipeline
from idml_jax.data.images import transforms
from idml_jax.data.stored import label_index as index
from idml_jax.data.stored import prepared
from idml_jax.data.stored.benchmarks import BENCHMARKS
from idml_jax.errors import UserError
from idml_jax.runtime import sharding
from idml_jax.training import config as config_lib
from idml_jax.training import steps, train
from idml_jax.training.build import build
from idml_jax.training.config_checks import validate
from idml_jax.training.protocols import retrieval as protocols

ROOT = Path(__file__).resolve().parents[2]


def downloads(dataset: str, root: Path) -> Path:
    """A tiny source in the downloaded layout."""
    if dataset == "cub":
        return made.write_files(root, {"CUB_200_2011.tgz": made.tar_bytes(made.cub(), "w:gz")})
    if dataset == "cars":
        return made.write_files(root, made.cars_together())
    if dataset == "sop":
        return made.write_files(root, {"Stanford_Online_Products.zip": made.zip_bytes(made.sop())})
    if dataset == "inshop":
        images, listed = made.inshop()
        return made.write_files(root, {"list_eval_partition.txt": listed, "img.zip": made.zip_bytes(images)})
    if dataset.startswith("cifar"):
        files, _ = made.cifar(dataset == "cifar100", False, per_class=2)
        return made.write_files(root, {f"{dataset[:5]}-{dataset[5:]}-python.tar.gz": made.tar_bytes(files, "w:gz")})
    if dataset == "imagenet":
        return made.write_files(root, {"ILSVRC2012_img_train.tar": made.tar_bytes(made.imagenet_train())})
    if dataset == "market":
        return made.write_files(root, made.market(shots=2))
    if dataset == "inaturalist":
        return made.write_files(root, made.inaturalist(6, 4))
    files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(6) for i in range(4)}
    return made.write_files(root / "mine", files)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data folder with all data sets."""
    data_dir, root = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("downloads")
    for dataset in prepare_lib.LAYOUTS:
        source = downloads(dataset, root / dataset)
        prepare_lib.prepare(dataset, source, data_dir, allow_incomplete=True, say=lambda line: None)
    return data_dir


def small(dataset, data_dir):
    config = config_lib.default_config()
    config.data.name, config.data.data_dir = dataset, str(data_dir)
    config.data.variant = "mine" if dataset == "folder" else ""
    config.batch_size = config.eval.batch_size = 8
    config.data.image_size = config.data.resize = 16
    config.model.name, config.model.batchnorm = "convnet_tiny", "live"
    config.model.embedding_dim = config.model.uncertainty_dim = 8
    config.model.uncertainty_hidden = 8
    config.mixup.enabled = False
    config.optim.warmup_epochs = 0
    return config


@pytest.fixture(scope="module")
def setup(stored):
    """Settings of a step that fit every set, so that it is compiled once."""
    setup = build(small("cifar100", stored)).setup
    return dataclasses.replace(setup, objective=dataclasses.replace(setup.objective, num_classes=20))


@pytest.mark.parametrize("dataset", list(prepare_lib.LAYOUTS))
def test_one_training_step(stored, setup, dataset):
    run = build(small(dataset, stored))._replace(setup=setup)
    batch = next(
        pipeline.train_batches(
            run.splits.train, run.sampler, pipeline.Reading(run.train_transform, threads=1), seed=0, start=0, stop=1
        )
    )
    assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].std() > 10
    np.testing.assert_array_equal(batch["label"], run.splits.train.labels[batch["index"]])
    state = run.initial_state()
    before = jax.device_get(state.params)
    place = sharding.shard_batch({k: batch[k] for k in ("image", "label")}, run.mesh)
    state, metrics = steps.jit_train_step(state, place, setup=run.setup, train_trunk=True)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["loss"]) > 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved["trunk"]))
    if BENCHMARKS.get(dataset) and BENCHMARKS[dataset].shared_classes:
        assert run.splits.train.class_names == run.splits.test.class_names
    else:
        assert not set(run.splits.train.class_names) & set(run.splits.test.class_names)


def test_queries_search_the_gallery_in_a_run(stored, tmp_path, caplog):
    config = small("inshop", stored)
    config.epochs, config.eval.ks, config.log.tensorboard = 1, (1, 10), False
    config.eval.ambiguity_images, config.eval.cluster = 0, False
    result = train.train_and_evaluate(config, tmp_path)
    for part in ("untrained", "final"):
        # Twelve queries, none of which is its own neighbour; each item has two gallery images.
        assert result[part]["queries"] == 12 and result[part]["lone_queries"] == 0
    state_run = build(config)
    gallery, query = state_run.eval_gallery, state_run.eval_source
    assert len(gallery) == 12 and gallery is state_run.splits.gallery
    # The same metrics from embeddings computed separately from the run.
    from idml_jax.metrics.retrieval import retrieval_metrics
    from idml_jax.runtime.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path / "checkpoints", "R@1", read_only=True)
    state, _ = checkpoints.restore(checkpoints.latest, state_run.initial_state())
    checkpoints.close()
    embed = state_run.evaluation(state.variables).embedder
    q, g = embed(query), embed(gallery)
    alone = retrieval_metrics(q.semantic, q.labels, g.semantic, g.labels, ks=(1, 10))
    together = retrieval_metrics(q.semantic, q.labels, ks=(1, 10))
    for name in ("R@1", "R@10", "RP", "MAP@R"):
        assert result["final"][name] == pytest.approx(alone[name], abs=1e-6)
    assert any(abs(together[name] - alone[name]) > 1e-3 for name in ("R@1", "R@10", "RP", "MAP@R"))


def test_settings_are_chosen_on_held_out_training_classes(stored):
    config = small("inshop", stored)
    # Three training classes leave too few; of the cars there are four.
    config.data.name = "cars"
    config.data.validation_classes, config.eval.split = 0.5, "validation"
    run = build(config)
    assert run.eval_source is run.splits.validation and run.eval_gallery is None
    held_out, trained = set(run.splits.validation.class_names), set(run.splits.train.class_names)
    names = made.official_car_names()
    assert held_out | trained == {names[k - 1] for k in (1, 2, 97, 98)} and not held_out & trained
    config.data.validation_classes = 0.0
    with pytest.raises(UserError, match="needs config.data.validation_classes"):
        build(config)


class TestIndex:
    def scans(self, data_dir, **options):
        said = []
        splits = datasets.load_dataset("cub", data_dir=str(data_dir), warn=said.append, **options)
        return splits, [line for line in said if line.startswith("reading the labels of")]

    @pytest.fixture
    def foreign(self, stored, tmp_path):
        """A set without an index, as tfds would create it."""
        folder = tmp_path / "sets/caltech_birds2011/0.2.0"
        shutil.copytree(stored / "idml_cub/1.0.0", folder)
        shutil.rmtree(folder / index.FOLDER)
        (folder / "idml_jax.json").unlink()
        return folder

    def test_prepared_sets_include_an_index(self, stored):
        _, scans = self.scans(stored)
        assert not scans

    def test_scanned_once(self, foreign, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        first, scans = self.scans(tmp_path / "sets")
        assert len(scans) == 2
        again, scans = self.scans(tmp_path / "sets")
        assert not scans and not (tmp_path / "cache").exists()
        for a, b in zip(first[:2], again[:2], strict=True):
            np.testing.assert_array_equal(a.labels, b.labels)

    def test_read_only_sets_are_cached_for_the_user(self, foreign, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        # A file in the folder's place refuses even the superuser, who runs the tests in containers.
        (foreign / index.FOLDER).write_text("")
        assert len(self.scans(tmp_path / "sets")[1]) == 2
        assert len(list((tmp_path / "cache/idml_jax/index").glob("*.npz"))) == 2
        assert not self.scans(tmp_path / "sets")[1]
        # Nowhere to write: scanned every time, but it works.
        monkeypatch.setenv("XDG_CACHE_HOME", str(foreign / index.FOLDER))
        assert len(self.scans(tmp_path / "sets")[1]) == 2

    def test_stale_and_damaged_ones_are_not_used(self, foreign, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        right, _ = self.scans(tmp_path / "sets")
        path = foreign / index.FOLDER / "train.npz"
        path.write_bytes(b"PK nonsense")
        splits, scans = self.scans(tmp_path / "sets")
        assert len(scans) == 1
        np.testing.assert_array_equal(splits.train.labels, right.train.labels)
        # Another set in the same place.
        info = json.loads((foreign / "dataset_info.json").read_text())
        info["description"] = "changed"
        (foreign / "dataset_info.json").write_text(json.dumps(info))
        assert len(self.scans(tmp_path / "sets")[1]) == 2


class TestTfdsOwnSets:
    """Sets prepared by tfds: other names and features, both official splits, tfds' labels."""

    @pytest.fixture(scope="class")
    def birds(self, tmp_path_factory):
        """caltech_birds2011 in miniature, array_record and TFRecord, written by tfds' own code."""
        import tensorflow_datasets as tfds

        root = tmp_path_factory.mktemp("tfds")
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "image/filename": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=200),
                "bbox": tfds.features.BBoxFeature(),
                "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            }
        )
        import io

        import cv2
        from array_record.python.array_record_module import ArrayRecordWriter

        numbers = (1, 2, 100, 101, 200)
        mask = cv2.imencode(".png", np.zeros((4, 4, 1), np.uint8))[1].tobytes()
        for kind in ("array_record", "tfrecord"):
            folder = root / kind / "caltech_birds2011" / "0.2.0"
            folder.mkdir(parents=True)
            infos = []
            for split, offset in (("train", 0), ("test", 2)):
                raw = [
                    features.serialize_example(
                        {
                            "image": io.BytesIO(made.jpeg(number, offset + i)),
                            "image/filename": f"{number:03d}_{offset + i}.jpg",
                            "label": number - 1,
                            "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                            "segmentation_mask": io.BytesIO(mask),
                        }
                    )
                    for i in range(2)
                    for number in numbers
                ]
                path = folder / f"caltech_birds2011-{split}.{kind}-00000-of-00001"
                if kind == "array_record":
                    writer = ArrayRecordWriter(str(path), "group_size:1")
                    for record in raw:
                        writer.write(record)
                    writer.close()
                else:
                    path.write_bytes(made.tfrecord(raw))
                template = tfds.core.ShardedFileTemplate(
                    data_dir=folder, dataset_name="caltech_birds2011", split=split, filetype_suffix=kind
                )
                infos.append(
                    tfds.core.SplitInfo(
                        name=split, shard_lengths=[len(raw)], num_bytes=sum(map(len, raw)), filename_template=template
                    )
                )
            tfds.folder_dataset.write_metadata(
                data_dir=folder, features=features, split_infos=infos, version="0.2.0", check_data=False
            )
        return root

    def check(self, splits):
        assert splits.train.class_names == ["0", "1", "99"] and splits.test.class_names == ["100", "199"]
        assert (len(splits.train), len(splits.test)) == (12, 8)
        for part, numbers in ((splits.train, (1, 2, 100)), (splits.test, (101, 200))):
            for i in range(len(part)):
                file = part.name(i).split("(")[1].rstrip(")")
                number, seed = (int(x) for x in file.removesuffix(".jpg").split("_"))
                assert numbers[part.labels[i]] == number
                assert part.read(i) == made.jpeg(number, seed)

    def test_both_official_splits_by_class(self, birds):
        said = []
        splits = datasets.load_dataset("cub", data_dir=str(birds / "array_record"), warn=said.append)
        self.check(splits)
        assert "not the complete CUB-200-2011: train: 12 of 5,864 images" in said[-1]

    def test_stored_as_tfrecord(self, birds, tmp_path):
        folder = birds / "tfrecord/caltech_birds2011/0.2.0"
        with pytest.raises(UserError, match=f"stored as tfrecord.*prepare --dataset=cub --source={folder}"):
            datasets.load_dataset("cub", data_dir=str(birds / "tfrecord"))
        prepare_lib.prepare("cub", folder, tmp_path, allow_incomplete=True, say=lambda line: None)
        self.check(datasets.load_dataset("cub", data_dir=str(tmp_path), warn=lambda line: None))
        with pytest.raises(UserError, match="the tfds set caltech_birds2011; Cars196 is cars196"):
            prepare_lib.prepare("cars", folder, tmp_path, allow_incomplete=True)
        short = tmp_path / "short"
        shutil.copytree(folder, short)
        file = next(short.glob("*train.tfrecord*"))
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(UserError, match="cut short"):
            prepare_lib.prepare("cub", short, tmp_path / "other", allow_incomplete=True, say=lambda line: None)

    def test_ours_comes_first(self, birds, stored, tmp_path):
        shutil.copytree(birds / "array_record", tmp_path / "x")
        shutil.copytree(stored / "idml_cub", tmp_path / "x/idml_cub")
        splits = datasets.load_dataset("cub", data_dir=str(tmp_path / "x"), warn=lambda line: None)
        assert len(splits.train) == 20

    def test_tfds_itself_reads_what_we_store(self, stored):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(stored / "idml_cub/1.0.0")
        assert {k: s.num_examples for k, s in builder.info.splits.items()} == {"train": 20, "test": 16}
        example = builder.as_data_source("test")[3]
        assert example["image"].shape == (24, 24, 3) and example["image"].dtype == np.uint8
        splits = datasets.load_dataset("cub", data_dir=str(stored), warn=lambda line: None)
        decoded = transforms.decode(splits.test.read(3)).astype(int)
        # Decoders may round differently by a level or two.
        assert np.abs(decoded - example["image"]).mean() < 2
        assert builder.info.features["label"].names[example["label"]] == "101.Bird_101"

    def test_damaged_metadata_is_named(self, birds, tmp_path):
        shutil.copytree(birds / "array_record", tmp_path / "x")
        folder = tmp_path / "x/caltech_birds2011/0.2.0"
        (folder / "dataset_info.json").write_text("{")
        with pytest.raises(UserError, match="dataset_info.json: not readable as JSON"):
            prepared.find("cub", str(tmp_path / "x"))


def test_tensorflow_is_never_imported(tmp_path):
    downloads("cars", tmp_path / "cars")
    code = (
        "import sys; from idml_jax import prepare; from idml_jax.data import datasets;"
        "from idml_jax.data.images import transforms;"
        f"prepare.main(['--dataset=cars', '--source={tmp_path}/cars', '--data_dir={tmp_path}', '--allow_incomplete']);"
        f"splits = datasets.load_dataset('cars', data_dir='{tmp_path}', warn=lambda line: None);"
        "transforms.decode(splits.test.read(0));"
        "print(len(splits.train), [m for m in ('tensorflow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["16 []"], done.stdout + done.stderr


def test_command_line_reports_errors_in_one_line(tmp_path):
    command = [sys.executable, "-m", "idml_jax.prepare", "--dataset=sop", f"--source={tmp_path}", "--data_dir=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "Ebay_train.txt" in done.stderr


class TestProtocols:
    def test_settings_of_the_paper(self):
        config = protocols.retrieval_config("cars", "")
        assert config.data.name == "cars" and config.ism.enabled and config.mixup.enabled
        optim = config.optim
        assert (optim.learning_rate, optim.step_epochs, optim.step_factor, optim.warmup_epochs) == (2.5e-4, 10, 0.5, 5)
        assert (config.batch_size, config.epochs, config.loss.name) == (120, 60, "proxy_anchor")
        plain = protocols.retrieval_config("cub", "plain,contrastive")
        assert not plain.ism.enabled and plain.optim.learning_rate == 1e-4 and plain.loss.name == "contrastive"
        assert protocols.retrieval_config("sop", "").eval.ks == (1, 10, 100, 1000)

    @pytest.mark.parametrize("name", ["cub200", "cars196", "sop", "inshop"])
    def test_every_variant_is_valid(self, name):
        import importlib.util

        spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for arg in ("", "plain", "quick", "scratch", "plain,scratch,triplet_semihard", "fast_ap,quick"):
            validate(module.get_config(arg))
        with pytest.raises(ValueError, match="unknown variant 'fast'; known: plain, scratch, quick, contrastive"):
            module.get_config("plain,fast")
        with pytest.raises(ValueError, match="two losses"):
            module.get_config("contrastive,fast_ap")
