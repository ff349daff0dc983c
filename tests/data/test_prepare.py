"""From official archives to stored sets to batches: every layout, the protocol's splits, refusals, interruptions."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import archives_made as made
import numpy as np
import pytest

from idml_jax import prepare as prepare_lib
from idml_jax.data import datasets
from idml_jax.data.images import transforms
from idml_jax.data.stored import benchmarks as protocol
from idml_jax.data.stored import layouts_classification
from idml_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def prepare(dataset, source, data_dir, **options):
    said = []
    options = {"allow_incomplete": True, **options}
    return prepare_lib.prepare(dataset, source, data_dir, say=said.append, **options), said


def load(dataset, data_dir, **options):
    said = []
    return datasets.load_dataset(dataset, data_dir=str(data_dir), warn=said.append, **options), said


def colours(source):
    """Mean colour of every image, to tell images apart."""
    return np.stack([transforms.decode(source.read(i)).mean((0, 1)) for i in range(len(source))])


class TestCub:
    numbers = (1, 2, 3, 99, 100, 101, 102, 103, 200)

    def check(self, data_dir):
        splits, said = load("cub", data_dir)
        assert [int(n[:3]) for n in splits.train.class_names] == [1, 2, 3, 99, 100]
        assert [int(n[:3]) for n in splits.test.class_names] == [101, 102, 103, 200]
        assert (len(splits.train), len(splits.test)) == (20, 16)
        np.testing.assert_array_equal(np.bincount(splits.test.labels), [4] * 4)
        for i in range(len(splits.test)):
            # The record's file name agrees with its label.
            assert splits.test.class_names[splits.test.labels[i]] in splits.test.name(i)
        assert "not the complete CUB-200-2011: train: 20 of 5,864 images; train: 5 of 100 classes" in said[-1]
        return splits

    @pytest.mark.parametrize("form", ["tgz", "zip", "folder", "folder_with_archive", "images_only"])
    def test_layouts(self, tmp_path, form):
        files, source = made.cub(), tmp_path / "CUB_200_2011.tgz"
        if form == "tgz":
            source.write_bytes(made.tar_bytes(files, "w:gz"))
        elif form == "zip":
            source = tmp_path / "birds.zip"
            source.write_bytes(made.zip_bytes(files))
        elif form == "images_only":
            source = made.write_files(tmp_path / "x", {n: d for n, d in files.items() if n.endswith(".jpg")})
        else:
            source = made.write_files(tmp_path / "downloads", files)
            if form == "folder_with_archive":
                (source / "CUB_200_2011.tgz").write_bytes(made.tar_bytes(files, "w:gz"))
        folder, _ = prepare("cub", source, tmp_path / "sets")
        assert folder == tmp_path / "sets" / "idml_cub" / "1.0.0"
        splits = self.check(tmp_path / "sets")
        assert splits.train.read(0).startswith(b"\xff\xd8")
        # What was stored is what lay there, byte for byte.
        assert sorted(splits.test.read(i) for i in range(16)) == sorted(
            d for n, d in files.items() if n.endswith(".jpg") and int(n.split("/")[2][:3]) > 100
        )
        assert not list(folder.parent.glob("*.incomplete"))

    def test_counts_are_compared_with_the_benchmark(self, tmp_path):
        files = made.cub()
        del files["CUB_200_2011/images/002.Bird_2/Bird_2_0001.jpg"]
        source = made.write_files(tmp_path / "cub", files)
        with pytest.raises(UserError) as caught:
            prepare("cub", source, tmp_path / "sets", allow_incomplete=False)
        message = str(caught.value)
        for part in (
            "train: 19 of 5,864 images",
            "test: 4 of 100 classes",
            "1 listed images are missing",
            "002.Bird_2/Bird_2_0001.jpg",
            "--allow_incomplete",
        ):
            assert part in message
        assert not (tmp_path / "sets/idml_cub/1.0.0").exists()
        with pytest.raises(UserError, match="no prepared cub under .*prepare --dataset=cub"):
            load("cub", tmp_path / "sets")
        _, said = prepare("cub", source, tmp_path / "sets")
        assert any("resuming after 35 images" in line for line in said)
        about = json.loads((tmp_path / "sets/idml_cub/1.0.0/idml_jax.json").read_text())
        assert about["complete"] is False and about["counts"]["train"] == {"images": 19, "classes": 5}

    def test_a_complete_set_is_asserted_at_loading(self, tmp_path, monkeypatch):
        counts = {"train": protocol.Count(20, 5), "test": protocol.Count(16, 4)}
        monkeypatch.setitem(protocol.BENCHMARKS, "cub", protocol.BENCHMARKS["cub"]._replace(splits=counts))
        source = made.write_files(tmp_path / "cub", made.cub())
        _, said = prepare("cub", source, tmp_path, allow_incomplete=False)
        assert said[-1].startswith("complete; stored in")
        splits, said = load("cub", tmp_path)
        assert not said and len(splits.train) == 20
        counts["train"] = protocol.Count(21, 5)
        with pytest.raises(UserError, match="train: 20 of 21 images; delete it and prepare it again"):
            load("cub", tmp_path)

    @pytest.mark.parametrize(
        "change, match",
        [
            ({"CUB_200_2011/classes.txt": None}, r"classes\.txt missing beside"),
            ({"CUB_200_2011/image_class_labels.txt": b"1 x\n"}, "'x' is not a number"),
            ({"CUB_200_2011/image_class_labels.txt": b"1\n"}, "line 1: '1' has 1 columns; expected 2"),
            ({"CUB_200_2011/image_class_labels.txt": b"999 1\n"}, "image 999 of class 1 is not in"),
            ({"CUB_200_2011/images/001.Bird_1/Bird_1_0000.jpg": b"no picture"}, "Bird_1_0000.jpg: not an image"),
        ],
    )
    def test_damage_is_named(self, tmp_path, change, match):
        files = {**made.cub(), **change}
        source = made.write_files(tmp_path / "cub", {n: d for n, d in files.items() if d is not None})
        with pytest.raises(UserError, match=match):
            prepare("cub", source, tmp_path / "sets")

    def test_lists_cannot_name_files_outside(self, tmp_path):
        (tmp_path / "secret.jpg").write_bytes(made.jpeg(0, 0))
        files = made.cub()
        files["CUB_200_2011/images.txt"] = b"1 ../../../secret.jpg\n"
        files["CUB_200_2011/image_class_labels.txt"] = b"1 1\n"
        source = made.write_files(tmp_path / "cub", files)
        with pytest.raises(UserError, match="no readable images for train"):
            prepare("cub", source, tmp_path / "sets")


class TestCars:
    @pytest.mark.parametrize("form", ["together", "together_tgz", "apart", "apart_tgz", "folders", "zip"])
    def test_layouts(self, tmp_path, form):
        files = {"together": made.cars_together, "apart": made.cars_apart}.get(form.split("_")[0], made.cars_folders)()
        source = tmp_path / "cars"
        if form == "together_tgz":
            images = {n: d for n, d in files.items() if n.startswith("car_ims/")}
            lists = {n: d for n, d in files.items() if n not in images}
            made.write_files(source, {**lists, "car_ims.tgz": made.tar_bytes(images, "w:gz")})
        elif form == "apart_tgz":
            packed = {}
            for part, archive in (("cars_train", "cars_train"), ("cars_test", "cars_test"), ("devkit", "car_devkit")):
                inside = {n: d for n, d in files.items() if n.startswith(f"{part}/")}
                packed[f"{archive}.tgz"] = made.tar_bytes(inside, "w:gz")
            withlabels = "cars_test_annos_withlabels.mat"
            made.write_files(source, {**packed, withlabels: files[withlabels]})
        elif form == "zip":
            source = tmp_path / "archive.zip"
            source.write_bytes(made.zip_bytes(files))
        else:
            made.write_files(source, files)
        prepare("cars", source, tmp_path / "sets")
        splits, _ = load("cars", tmp_path / "sets")
        names = made.official_car_names()
        # 98 is the last training class, by the official order.
        assert splits.train.class_names == [names[k - 1] for k in (1, 2, 97, 98)]
        extra = (174,) if form in ("folders", "zip") else ()
        assert splits.test.class_names == [names[k - 1] for k in (99, 100, *extra, 196)]
        assert len(splits.train) == 16 and len(splits.test) == 12 + 4 * len(extra)
        labels = [made.CAR_CLASSES[k] for k in splits.train.labels]
        expected = np.stack([colours_of(made.jpeg(k, i)) for k in labels for i in range(4)]).reshape(16, 4, 3)
        distance = np.abs(expected - colours(splits.train)[:, None]).sum(-1).min(1)
        assert distance.max() == 0

    def test_official_names(self):
        names = made.official_car_names()
        assert len(names) == len(set(names)) == 196
        assert (names[0], names[97], names[98], names[195]) == (
            "AM General Hummer SUV 2000",
            "Eagle Talon Hatchback 1998",
            "FIAT 500 Abarth 2012",
            "smart fortwo Convertible 2012",
        )

    def test_test_annotations_without_labels(self, tmp_path):
        files = made.cars_apart()
        files["devkit/cars_test_annos.mat"] = files.pop("cars_test_annos_withlabels.mat")
        with pytest.raises(UserError, match="cars_test_annos_withlabels.mat missing .*has no labels"):
            prepare("cars", made.write_files(tmp_path / "cars", files), tmp_path / "sets")

    def test_damaged_annotations_and_foreign_folders(self, tmp_path):
        files = {**made.cars_together(), "cars_annos.mat": b"MATLAB 5.0 nonsense" * 20}
        with pytest.raises(UserError, match="cars_annos.mat: not a readable MATLAB file"):
            prepare("cars", made.write_files(tmp_path / "a", files), tmp_path / "sets")
        files = {**made.cars_folders(), "car_data/train/Trabant 601 1964/1.jpg": made.jpeg(0, 0)}
        with pytest.raises(UserError, match="1 folders with images are not a class of Cars196: 'Trabant 601 1964'"):
            prepare("cars", made.write_files(tmp_path / "b", files), tmp_path / "sets")


def colours_of(data):
    return transforms.decode(data).mean((0, 1))


class TestSop:
    @pytest.mark.parametrize("form", ["zip", "folder"])
    def test_own_split(self, tmp_path, form):
        files, source = made.sop(), tmp_path / "Stanford_Online_Products.zip"
        if form == "zip":
            source.write_bytes(made.zip_bytes(files))
        else:
            source = made.write_files(tmp_path / "sop", files) / "Stanford_Online_Products"
        prepare("sop", source, tmp_path / "sets")
        splits, _ = load("sop", tmp_path / "sets")
        assert splits.train.class_names == ["chair_00001", "bicycle_00002", "chair_00003"]
        assert splits.test.class_names == ["bicycle_00004", "chair_00005", "bicycle_00006"]
        assert len(splits.train) == len(splits.test) == 12 and splits.gallery is None

    def test_missing_list(self, tmp_path):
        files = made.sop()
        del files["Stanford_Online_Products/Ebay_test.txt"]
        with pytest.raises(UserError, match=r"Ebay_test\.txt missing beside"):
            prepare("sop", made.write_files(tmp_path / "sop", files), tmp_path / "sets")


class TestInshop:
    @pytest.mark.parametrize("form", ["folder", "zip", "official"])
    def test_query_and_gallery(self, tmp_path, form):
        images, listed = made.inshop()
        files = {"list_eval_partition.txt": listed}
        if form == "folder":
            files |= images
        elif form == "zip":
            files["img.zip"] = made.zip_bytes(images)
        else:
            files = {"Eval/list_eval_partition.txt": listed, "Img/img.zip": made.zip_bytes(images)}
        prepare("inshop", made.write_files(tmp_path / "inshop", files), tmp_path / "sets")
        splits, _ = load("inshop", tmp_path / "sets")
        assert (len(splits.train), len(splits.test), len(splits.gallery)) == (12, 12, 12)
        assert splits.test.class_names == splits.gallery.class_names == [f"id_{k:08d}" for k in range(4, 10)]
        np.testing.assert_array_equal(np.bincount(splits.test.labels), np.bincount(splits.gallery.labels))
        assert not {splits.test.name(i).split("(")[1] for i in range(12)} & {
            splits.gallery.name(i).split("(")[1] for i in range(12)
        }

    def test_unknown_split(self, tmp_path):
        images, listed = made.inshop()
        files = {**images, "list_eval_partition.txt": listed.replace(b"gallery", b"other")}
        with pytest.raises(UserError, match="of the split 'other'; known: train, query, gallery"):
            prepare("inshop", made.write_files(tmp_path / "x", files), tmp_path / "sets")


class TestMarket:
    def test_persons_and_cameras(self, tmp_path):
        files = made.market()
        archive = {"market.zip": made.zip_bytes({f"Market-1501/{name}": data for name, data in files.items()})}
        _, said = prepare("market", made.write_files(tmp_path / "x", archive), tmp_path / "sets")
        assert any("left out 1 junk images" in line for line in said)
        splits, _ = load("market", tmp_path / "sets")
        assert (len(splits.train), len(splits.test), len(splits.gallery)) == (6, 3, 7)
        assert splits.gallery.class_names == ["0000", "0004", "0005", "0006"]
        assert splits.test.fields["group"].tolist() == ["1", "1", "1"]
        assert sorted(splits.gallery.fields["group"].tolist()) == ["1", "1", "1", "2", "2", "2", "3"]

    def test_unknown_layout(self, tmp_path):
        with pytest.raises(UserError, match="no known layout of Market-1501; expected bounding_box_train"):
            prepare(
                "market",
                made.write_files(tmp_path / "x", {"query/0001_c1s1_1.jpg": made.jpeg(1, 1)}),
                tmp_path / "sets",
            )


class TestInaturalist:
    def test_the_lists_for_retrieval(self, tmp_path):
        files = made.inaturalist()
        prepare("inaturalist", made.write_files(tmp_path / "x", files), tmp_path / "sets")
        splits, _ = load("inaturalist", tmp_path / "sets")
        assert splits.train.class_names == ["Aves/0", "Aves/1"] and splits.test.class_names == ["Aves/2", "Aves/3"]
        (tmp_path / "x/splits/Inaturalist_test_set1.txt").write_bytes(files["splits/Inaturalist_train_set1.txt"])
        with pytest.raises(UserError, match="Aves/0 is a species of the training images too"):
            prepare("inaturalist", tmp_path / "x", tmp_path / "other")


class TestCifar:
    @pytest.mark.parametrize("hundred", [False, True])
    @pytest.mark.parametrize("form", ["python", "binary", "folder", "archive_in_folder"])
    def test_pixels_and_labels(self, tmp_path, hundred, form):
        name = "cifar100" if hundred else "cifar10"
        files, truth = made.cifar(hundred, form == "binary")
        source = tmp_path / "downloads" / f"cifar-{name[5:]}-python.tar.gz"
        source.parent.mkdir()
        if form == "folder":
            source = made.write_files(tmp_path / "x", files)
        else:
            source.write_bytes(made.tar_bytes(files, "w:gz"))
        prepare(name, source.parent if form == "archive_in_folder" else source, tmp_path / "sets")
        splits, _ = load(name, tmp_path / "sets")
        np.testing.assert_array_equal(splits.test.labels, truth["labels"])
        assert splits.test.class_names == splits.train.class_names
        assert splits.test.class_names == [f"kind_{k}" for k in range(20 if hundred else 10)]
        pixels = np.stack([transforms.decode(splits.test.read(i)) for i in range(len(splits.test))])
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1), truth["pixels"])
        assert len(splits.train) == len(splits.test) * (1 if hundred else 5)

    def test_pickles_that_run_code_are_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'was_here'}",)

        for protocol_number in (0, 2, 4):
            evil = pickle.dumps({b"data": Evil(), b"labels": []}, protocol_number)
            with pytest.raises(UserError, match=r"x: not one of CIFAR's pickles \(it asks for (posix|os)\.system\)"):
                layouts_classification.read_pickle(evil, "x")
            # Whatever a file asks for beyond plain arrays, numpy's own parts included.
            evil = pickle.dumps({b"data": np.random.default_rng(0)}, protocol_number)
            with pytest.raises(UserError, match="refused"):
                layouts_classification.read_pickle(evil, "x")
        files, _ = made.cifar(False, False)
        files["cifar-10-batches-py/data_batch_3"] = evil
        with pytest.raises(UserError, match="data_batch_3: not one of CIFAR's pickles"):
            prepare("cifar10", made.write_files(tmp_path / "x", files), tmp_path / "sets")
        assert not (tmp_path / "was_here").exists()
        for bad in (b"", b"\x80\x02.", b"nonsense", pickle.dumps([1, 2])):
            with pytest.raises(UserError, match="not one of CIFAR's pickles"):
                layouts_classification.read_pickle(bad, "x")

    def test_arrays_of_another_kind_are_refused(self, tmp_path):
        for wrong in (np.zeros((3, 10), np.uint8), np.zeros((3, 3072), np.float32), np.zeros((3, 3072), object), 7):
            files, _ = made.cifar(False, False)
            batch = {b"data": wrong, b"labels": [0, 1, 2]}
            files["cifar-10-batches-py/test_batch"] = pickle.dumps(batch, 2)
            source = made.write_files(tmp_path / f"{np.asarray(wrong).dtype}_{np.size(wrong)}", files)
            with pytest.raises(UserError, match=r"test_batch: its 'data' is not an array of bytes \[n, 3072\]"):
                prepare("cifar10", source, tmp_path / "sets")

    def test_a_missing_batch_is_named(self, tmp_path):
        files, _ = made.cifar(False, False)
        del files["cifar-10-batches-py/data_batch_4"]
        with pytest.raises(UserError, match="data_batch_4 missing in"):
            prepare("cifar10", made.write_files(tmp_path / "x", files), tmp_path / "sets")

    def test_validation_holds_images_out(self, tmp_path):
        files, _ = made.cifar(False, True)
        prepare("cifar10", made.write_files(tmp_path / "x", files), tmp_path)
        splits, _ = load("cifar10", tmp_path, validation_images=0.2)
        assert (len(splits.train), len(splits.validation)) == (120, 30)
        np.testing.assert_array_equal(np.bincount(splits.validation.labels), [3] * 10)
        names = {s.name(i) for s in (splits.train, splits.validation) for i in range(len(s))}
        assert len(names) == 150
        with pytest.raises(UserError, match="use config.data.validation_images"):
            load("cifar10", tmp_path, validation_classes=0.2)
        with pytest.raises(UserError, match="leaves none"):
            load("cifar10", tmp_path, validation_images=0.99)


class TestImagenet:
    def check(self, data_dir, validation=True):
        splits, said = load("imagenet", data_dir)
        assert splits.train.class_names == splits.test.class_names == list(made.WNIDS)
        for i in range(len(splits.train)):
            assert made.WNIDS[splits.train.labels[i]] in splits.train.name(i)
        if validation:
            assert len(splits.train) == 16
            order = np.argsort([splits.test.name(i).rsplit("_", 1)[1] for i in range(len(splits.test))])
            np.testing.assert_array_equal(splits.test.labels[order], made.VALIDATION)
        return splits, said

    @pytest.mark.parametrize("truth", ["devkit", "synsets", "kaggle"])
    def test_tars(self, tmp_path, truth):
        files = {
            "ILSVRC2012_img_train.tar": made.tar_bytes(made.imagenet_train()),
            "ILSVRC2012_img_val.tar": made.tar_bytes(made.imagenet_validation()),
        }
        if truth == "devkit":
            files["ILSVRC2012_devkit_t12.tar.gz"] = made.tar_bytes(made.imagenet_devkit(), "w:gz")
        elif truth == "synsets":
            lines = "".join(f"{made.WNIDS[k]}\n" for k in made.VALIDATION)
            files["imagenet_2012_validation_synset_labels.txt"] = lines.encode()
        else:
            rows = [f"ILSVRC2012_val_{i:08d},{made.WNIDS[k]} 1 2 3 4 \n" for i, k in enumerate(made.VALIDATION, 1)]
            files["LOC_val_solution.csv"] = "".join(["ImageId,PredictionString\n", *reversed(rows)]).encode()
        prepare("imagenet", made.write_files(tmp_path / "x", files), tmp_path / "sets")
        self.check(tmp_path / "sets")

    @pytest.mark.parametrize("flat", [False, True])
    def test_class_folders(self, tmp_path, flat):
        files = {
            f"ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_{i}.JPEG": made.jpeg(label, i)
            for label, wnid in enumerate(made.WNIDS)
            for i in range(4)
        }
        for (name, data), label in zip(made.imagenet_validation().items(), made.VALIDATION, strict=True):
            files[f"ILSVRC/Data/CLS-LOC/val/{'' if flat else made.WNIDS[label] + '/'}{name}"] = data
        if flat:
            files |= made.imagenet_devkit()
        prepare("imagenet", made.write_files(tmp_path / "x", files), tmp_path / "sets")
        self.check(tmp_path / "sets")

    def test_training_images_alone(self, tmp_path):
        source = tmp_path / "ILSVRC2012_img_train.tar"
        source.write_bytes(made.tar_bytes(made.imagenet_train()))
        prepare("imagenet", source, tmp_path)
        splits, said = self.check(tmp_path, validation=False)
        assert "no validation images; 4% of the training images replace them" in said[-1]
        assert (len(splits.train), len(splits.test)) == (12, 4)
        np.testing.assert_array_equal(np.bincount(splits.test.labels), [1] * 4)

    def test_validation_images_without_labels(self, tmp_path):
        files = {
            "ILSVRC2012_img_train.tar": made.tar_bytes(made.imagenet_train()),
            "ILSVRC2012_img_val.tar": made.tar_bytes(made.imagenet_validation()),
        }
        with pytest.raises(UserError, match="its class is unknown; put ILSVRC2012_devkit_t12.tar.gz"):
            prepare("imagenet", made.write_files(tmp_path / "x", files), tmp_path / "sets")


class TestFolder:
    def test_prepared_folder_is_split_by_class_when_read(self, tmp_path):
        files = {f"mine/c{k}/deeper/{i}.jpg": made.jpeg(k, i) for k in range(6) for i in range(3)}
        source = tmp_path / "mine.zip"
        source.write_bytes(made.zip_bytes(files))
        folder, _ = prepare("folder", source, tmp_path, allow_incomplete=False)
        assert folder == tmp_path / "idml_folder/mine/1.0.0"
        splits, _ = load("folder", tmp_path, root="", variant="mine", train_classes=4.0)
        assert splits.train.class_names == ["c0", "c1", "c2", "c3"] and splits.test.class_names == ["c4", "c5"]
        with pytest.raises(UserError, match="no prepared folder under .*idml_folder/yours"):
            load("folder", tmp_path, root="", variant="yours")

    def test_the_next_command_has_settings_and_weights(self, tmp_path, monkeypatch, capsys):
        from idml_jax.training import packaged_weights, recipes

        files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(2)}
        source = made.write_files(tmp_path / "x", files)
        home = tmp_path / "my sets"
        words = ["--dataset=folder", f"--source={source}", "--name=oth", f"--data_dir={home}"]
        absent = lambda name: (_ for _ in ()).throw(UserError("not installed"))
        for packaged, config, weights in (
            (lambda name: tmp_path, "folder", " --config.model.init_from=efficientnet_lite0"),
            (absent, "folder:scratch", ""),
        ):
            monkeypatch.setattr(packaged_weights, "packaged", packaged)
            prepare_lib.main(words)
            assert capsys.readouterr().out.splitlines()[-1] == (
                f"next: python -m idml_jax.main --config={config} --config.data.variant=oth{weights} "
                f"--config.data.data_dir='{home}' --workdir=runs/oth"
            )
        for name in prepare_lib.LAYOUTS:
            command = prepare_lib._training(name, "x", "")
            assert recipes.get_config(re.search("--config=([^ ]*)", command)[1]).data.name == name

    def test_given_splits(self, tmp_path):
        files = {f"{s}/{s}{k}/{i}.png": made.jpeg(k, i) for s in ("train", "val") for k in range(3) for i in range(2)}
        prepare("folder", made.write_files(tmp_path / "x", files), tmp_path, name="named")
        splits, _ = load("folder", tmp_path, variant="named")
        assert splits.train.class_names == ["train0", "train1", "train2"]
        assert splits.test.class_names == ["val0", "val1", "val2"] and splits.test.labels.max() == 2

    def test_query_and_gallery_folders(self, tmp_path):
        files = {
            f"{s}/c{k}/{i}.jpg": made.jpeg(k, i)
            for s, classes in (("train", (0, 1)), ("query", (2, 3)), ("gallery", (2, 3, 4)))
            for k in classes
            for i in range(2)
        }
        source = made.write_files(tmp_path / "x", files)
        prepare("folder", source, tmp_path)
        for splits in (load("folder", tmp_path, variant="x")[0], datasets.load_dataset("folder", root=str(source))):
            assert splits.train.class_names == ["c0", "c1"]
            assert splits.gallery.class_names == splits.test.class_names == ["c2", "c3", "c4"]
            np.testing.assert_array_equal(splits.gallery.labels, [0, 0, 1, 1, 2, 2])
            np.testing.assert_array_equal(splits.test.labels, [0, 0, 1, 1])
        shutil.rmtree(source / "gallery")
        with pytest.raises(UserError, match="but no gallery; expected train, query and gallery"):
            datasets.load_dataset("folder", root=str(source))

    def test_bad_images_can_be_skipped(self, tmp_path):
        files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(3)}
        files["c1/1.jpg"] = files["c1/1.jpg"][:-300]
        source = made.write_files(tmp_path / "x", files)
        with pytest.raises(UserError, match=r"c1/1\.jpg: .*--on_corrupt=skip"):
            prepare("folder", source, tmp_path)
        folder, said = prepare("folder", source, tmp_path, on_corrupt="skip")
        assert any("1 files are not complete images, the first c1/1.jpg" in line for line in said)
        assert json.loads((folder / "idml_jax.json").read_text())["skipped"] == ["c1/1.jpg"]
        splits, _ = load("folder", tmp_path, variant="x")
        assert len(splits.train) + len(splits.test) == 11

    def test_refusals(self, tmp_path):
        def refuses(match, source, **options):
            with pytest.raises(UserError, match=match):
                prepare("folder", source, tmp_path / "sets", **options)

        refuses("no such file or folder", tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        refuses("holds no images", tmp_path / "empty")
        refuses("lies outside a class folder", made.write_files(tmp_path / "loose", {"1.jpg": made.jpeg(0, 0)}))
        (tmp_path / "note.txt").write_text("x")
        refuses("neither a folder nor an archive", tmp_path / "note.txt")
        refuses("letters, digits and _ only", tmp_path / "empty", name="../up")
        with pytest.raises(UserError, match="--dataset=birds; known: cub, cars"):
            prepare("birds", tmp_path, tmp_path)
        for dataset in prepare_lib.LAYOUTS:
            with pytest.raises(UserError, match="no known layout of .*; expected|holds no images; expected"):
                prepare(dataset, tmp_path / "empty", tmp_path / "sets")
        assert not (tmp_path / "sets").exists()


class TestForeignArchives:
    def refuses(self, path, match, tmp_path):
        with pytest.raises(UserError, match=match):
            prepare("folder", path, tmp_path / "sets")
        assert not list((tmp_path / "sets").rglob("1.0.0"))

    @pytest.mark.parametrize("name", ["../out/1.jpg", "/etc/1.jpg", "a/../../1.jpg", "..\\out\\1.jpg", "C:\\a\\1.jpg"])
    def test_names_that_point_outside(self, tmp_path, name):
        files = {name: made.jpeg(0, 0), "a/1.jpg": made.jpeg(0, 0)}
        for path, data in (("x.tar", made.tar_bytes(files)), ("x.zip", made.zip_bytes(files))):
            (tmp_path / path).write_bytes(data)
            self.refuses(tmp_path / path, "points outside the archive; refused", tmp_path)

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    def test_links_and_devices_in_tars(self, tmp_path, kind):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            info = tarfile.TarInfo("a/1.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        self.refuses(tmp_path / "x.tar", "is a link or a device; refused", tmp_path)

    def test_links_in_zips(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            info = zipfile.ZipInfo("a/1.jpg")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
        self.refuses(tmp_path / "x.zip", "is a link or a device; refused", tmp_path)

    @pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip"])
    def test_cut_short(self, tmp_path, name):
        files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(3)}
        mode = "w:gz" if name == "x.tgz" else "w"
        data = made.zip_bytes(files) if name == "x.zip" else made.tar_bytes(files, mode)
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        self.refuses(tmp_path / name, r"damaged or cut short after [0-9]+ files", tmp_path)

    def test_not_an_archive_at_all(self, tmp_path):
        for name in ("x.tar", "x.tar.gz", "x.zip"):
            (tmp_path / name).write_bytes(b"<html>Please sign in</html>" * 40)
            self.refuses(tmp_path / name, "damaged or cut short after 0 files", tmp_path)

    def test_system_files_are_skipped(self, tmp_path):
        files = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(2)}
        litter = {"__MACOSX/c0/._1.jpg": b"x", "c0/._1.jpg": b"x", ".DS_Store": b"x", "c1/.hidden/1.jpg": b"x"}
        (tmp_path / "x.zip").write_bytes(made.zip_bytes({**files, **litter}))
        prepare("folder", tmp_path / "x.zip", tmp_path)
        splits, _ = load("folder", tmp_path, variant="x")
        assert len(splits.train) + len(splits.test) == 8


class TestInterruption:
    def many(self, root, classes=20, per_class=60):
        files = {f"c{k:02d}/{i:03d}.jpg": made.jpeg(k, i, 128) for k in range(classes) for i in range(per_class)}
        return made.write_files(root, files), files

    def test_killed_runs_resume(self, tmp_path):
        source, files = self.many(tmp_path / "x")
        sets = tmp_path / "sets"
        incomplete = sets / "idml_folder/x/1.0.0.incomplete"
        # A slow reader, so that the kill comes in the middle on any machine.
        code = (
            "import sys, time; from idml_jax import prepare; from idml_jax.data.images import transforms as t;"
            "check = t.check_whole; t.check_whole = lambda data: (time.sleep(0.003), check(data));"
            "prepare.main(sys.argv[1:])"
        )
        arguments = ["--dataset=folder", f"--source={source}", f"--data_dir={sets}", "--shard_megabytes=1"]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(incomplete.glob("notes/*.npz"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (incomplete.parent / "1.0.0").exists()
        with pytest.raises(UserError, match="no prepared folder"):
            load("folder", sets, variant="x")
        folder, said = prepare("folder", source, sets, shard_megabytes=1)
        line = next(line for line in said if line.startswith("resuming after"))
        assert 0 < int(line.split()[2].replace(",", "")) < len(files)
        splits, _ = load("folder", sets, variant="x")
        stored = [s.read(i) for s in splits[:2] for i in range(len(s))]
        assert stored == [files[name] for name in sorted(files)]
        # Uninterrupted, the same files come out.
        again, _ = prepare("folder", source, tmp_path / "again", shard_megabytes=1)
        names = sorted(p.name for p in folder.glob("*array_record*"))
        assert names == sorted(p.name for p in again.glob("*array_record*")) and len(names) > 2
        for name in names:
            assert (folder / name).stat().st_size == (again / name).stat().st_size
        assert not list(sets.rglob("*.tmp")) and not list(sets.rglob("*.incomplete"))

    def test_a_source_that_changed_meanwhile_is_read_anew(self, tmp_path):
        source, files = self.many(tmp_path / "x", classes=15, per_class=60)
        broken = source / "c14/050.jpg"
        broken.write_bytes(b"not yet there")
        with pytest.raises(UserError, match="050.jpg"):
            prepare("folder", source, tmp_path, shard_megabytes=1)
        broken.write_bytes(files["c14/050.jpg"])
        # The same number of files, but another order.
        (source / "c00/000.jpg").rename(source / "c14/000a.jpg")
        _, said = prepare("folder", source, tmp_path, shard_megabytes=1)
        assert any("has changed since the stopped run; starting over" in line for line in said), said
        splits, _ = load("folder", tmp_path, variant="x")
        stored = [s.read(i) for s in splits[:2] for i in range(len(s))]
        assert sorted(stored) == sorted(files.values())

    def test_one_writer_at_a_time_and_finished_sets_stay(self, tmp_path):
        source, _ = self.many(tmp_path / "x", classes=4, per_class=2)
        from idml_jax.data.stored import shards

        busy = pytest.raises(UserError, match="another process is preparing this set")
        with shards.locked(tmp_path / "idml_folder/x"), busy:
            prepare("folder", source, tmp_path)
        folder, _ = prepare("folder", source, tmp_path)
        before = (folder / "dataset_info.json").stat().st_mtime_ns
        _, said = prepare("folder", source, tmp_path)
        assert "is already prepared" in said[0] and (folder / "dataset_info.json").stat().st_mtime_ns == before
