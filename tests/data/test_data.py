"""The data pipeline from image folders to batches."""

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from idml_jax.data import datasets, pipeline, samplers, sources
from idml_jax.data.images import transforms
from idml_jax.data.images.decode import reduction
from idml_jax.data.images.transforms import DecodeError, RandomResizedCrop, ResizeCenterCrop, decode
from idml_jax.errors import UserError


def encoded(array, fmt="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, fmt, **options)
    return buffer.getvalue()


def photo(height=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


class TestDecode:
    def test_colour_and_grey(self):
        image = photo()
        np.testing.assert_array_equal(decode(encoded(image)), image)
        grey = decode(encoded(image), channels=1)
        assert grey.shape == (60, 80, 1)
        expected = np.asarray(Image.fromarray(image).convert("L"), float)
        assert np.abs(grey[:, :, 0] - expected).max() <= 1
        assert decode(encoded(image[:, :, 0])).shape == (60, 80, 3)

    def test_jpeg_is_close_to_pillows(self):
        data = encoded(photo(), "JPEG", quality=90)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
        assert np.abs(decode(data) - expected).mean() < 1.0

    def test_unusual_modes(self):
        image = photo()
        one_bit = Image.fromarray(image).convert("1")
        buffer = io.BytesIO()
        one_bit.save(buffer, "PNG")
        assert set(np.unique(decode(buffer.getvalue()))) == {0, 255}
        buffer = io.BytesIO()
        Image.fromarray(image).convert("P").save(buffer, "PNG")
        assert decode(buffer.getvalue()).shape == (60, 80, 3)
        rgba = np.dstack([image, np.full((60, 80), 128, np.uint8)])
        assert decode(encoded(rgba)).shape == (60, 80, 3)
        buffer = io.BytesIO()
        Image.fromarray(image).convert("CMYK").save(buffer, "JPEG", quality=95)
        expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"), float)
        assert np.abs(decode(buffer.getvalue()) - expected).mean() < 1.0
        wide = (np.arange(60 * 80).reshape(60, 80) * 13).astype(np.uint16)
        expected = np.round(wide / 65535 * 255)
        assert np.abs(decode(encoded(wide))[:, :, 0] - expected).max() <= 1

    def test_exif_rotation_is_applied(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(photo(), "JPEG", exif=exif)
        assert decode(data).shape == (80, 60, 3)

    @pytest.mark.parametrize(
        "data,message",
        [
            (b"", "empty"),
            (b"hello, I am no picture", "not an image"),
            (encoded(photo())[:200], "not a readable image"),
            (encoded(photo(), "JPEG")[:-300], "not a readable image"),
            (encoded(photo(), "JPEG")[:400], "not a"),
        ],
    )
    def test_damaged_files_are_refused(self, data, message):
        for function in (decode, transforms.check_whole):
            with pytest.raises(DecodeError, match=message):
                function(data)

    def test_a_picture_that_claims_to_be_huge_is_refused_unread(self):
        data = bytearray(encoded(photo()))
        data[16:24] = (100_000).to_bytes(4, "big") * 2
        import zlib

        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        with pytest.raises(DecodeError, match="pixels|not an image"):
            decode(bytes(data))


class TestTransforms:
    @given(height=st.integers(3, 400), width=st.integers(3, 400), seed=st.integers(0, 1000), low=st.floats(0.05, 1.0))
    @example(height=279, width=372, seed=0, low=1.0)
    @settings(max_examples=200, deadline=None)
    def test_boxes_lie_inside_and_have_the_wanted_shape(self, height, width, seed, low):
        crop = RandomResizedCrop(32, scale=(low, 1.0))
        rng = np.random.default_rng(seed)
        top, left, h, w = crop.box(height, width, rng)
        assert min(top, left) >= 0 and min(h, w) > 0
        assert top + h <= height and left + w <= width
        # Sides are rounded to pixels, then cut to multiples of the decoder's reduction: a side is at most half a pixel
        # longer and `below` shorter than that of a box with a ratio in [3/4, 4/3].
        below = reduction((h, w), (32, 32)) - 0.5
        assert (w + below) / (h - 0.5) >= 3 / 4 and (w - 0.5) / (h + below) <= 4 / 3

    def test_areas_follow_the_scale(self):
        crop = RandomResizedCrop(32, scale=(0.08, 1.0))
        rng = np.random.default_rng(0)
        areas = [np.prod(crop.box(200, 200, rng)[2:]) / 40_000 for _ in range(2000)]
        # Uniform on [0.08, 1], less the boxes of high area and ratio that do not fit.
        assert 0.07 < min(areas) < 0.1 and max(areas) > 0.95
        assert 0.42 < np.mean(areas) < 0.56

    def test_random_crop_is_a_function_of_its_generator(self):
        crop, image = RandomResizedCrop(24, rotation=10), photo()
        first, again, other = (crop(image, np.random.default_rng(s)) for s in (1, 1, 2))
        assert first.shape == (24, 24, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

    def test_flip_mirrors_half_of_the_time(self):
        image = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 1))
        crop = RandomResizedCrop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        mirrored = [crop(image, np.random.default_rng(s))[0, 0, 0] > 100 for s in range(300)]
        assert 0.4 < np.mean(mirrored) < 0.6
        never = RandomResizedCrop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
        np.testing.assert_array_equal(never(image, np.random.default_rng(0)), image)

    @pytest.mark.parametrize("height,width", [(60, 80), (80, 60), (33, 120), (20, 20)])
    def test_center_crop_follows_torchvision(self, height, width):
        image = photo(height, width)
        out = ResizeCenterCrop(24, 28)(image)
        assert out.shape == (24, 24, 3)
        shorter = min(height, width)
        size = (int(28 * width / shorter), int(28 * height / shorter))
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), float)
        top, left = round((size[1] - 24) / 2), round((size[0] - 24) / 2)
        assert np.abs(out - resized[top : top + 24, left : left + 24]).mean() < 4.0

    def test_grey_stays_grey(self):
        grey = photo()[:, :, :1]
        rng = np.random.default_rng(0)
        assert RandomResizedCrop(24, rotation=5)(grey, rng).shape == (24, 24, 1)
        assert ResizeCenterCrop(24, 28)(grey).shape == (24, 24, 1)

    def test_crop_larger_than_resize_is_refused(self):
        with pytest.raises(ValueError, match="must be at least size"):
            ResizeCenterCrop(28, 24)


class TestSamplers:
    def test_shuffled_epochs_show_every_image_once(self):
        sampler = samplers.ShuffledSampler(103, 10, seed=3)
        assert sampler.steps_per_epoch == 10
        epochs = [np.concatenate([sampler.batch(e * 10 + i) for i in range(10)]) for e in range(2)]
        for epoch in epochs:
            assert len(np.unique(epoch)) == 100 and epoch.max() < 103
        assert np.any(epochs[0] != epochs[1])
        # Any step, asked for alone, in a new sampler, is the same.
        np.testing.assert_array_equal(samplers.ShuffledSampler(103, 10, seed=3).batch(17), sampler.batch(17))
        assert np.any(samplers.ShuffledSampler(103, 10, seed=4).batch(17) != sampler.batch(17))

    @given(
        classes=st.integers(4, 40), per_batch=st.integers(2, 8), per_class=st.integers(2, 5), seed=st.integers(0, 99)
    )
    @settings(max_examples=60, deadline=None)
    def test_balanced_batches(self, classes, per_batch, per_class, seed):
        per_batch = min(per_batch, classes)
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(classes), rng.integers(1, 7, classes)))
        sampler = samplers.BalancedSampler(labels, per_batch * per_class, per_class, seed)
        seen = []
        for step in range(3 * classes):
            batch = sampler.batch(step)
            found, counts = np.unique(labels[batch], return_counts=True)
            assert len(found) == per_batch and np.all(counts == per_class)
            for label in found:
                members = batch[labels[batch] == label]
                # As many different images as the class has, up to K.
                assert len(np.unique(members)) == min(per_class, np.sum(labels == label))
            seen.append(labels[batch][::per_class])
        seen = np.concatenate(seen)
        if classes >= 3 * per_batch:
            # Every class once before any comes again.
            for start in range(0, len(seen) - classes + 1, classes):
                assert len(np.unique(seen[start : start + classes])) == classes
        else:
            assert len(np.unique(seen)) == classes

    def test_impossible_batches_are_refused(self):
        with pytest.raises(UserError, match="a batch of 64 cannot be filled from 50 images"):
            samplers.ShuffledSampler(50, 64, 0)
        labels = np.repeat(np.arange(4), 5)
        with pytest.raises(UserError, match=r"multiple of config.data.per_class \(4\)"):
            samplers.BalancedSampler(labels, 10, 4, 0)
        with pytest.raises(UserError, match="8 classes per batch are wanted but there are 4"):
            samplers.BalancedSampler(labels, 16, 2, 0)


def batches(folder, start=0, stop=6, hosts=1, threads=4, workers=0, **kwargs):
    source = sources.scan_folder(folder / "train")
    sampler = samplers.BalancedSampler(source.labels, 16, 4, seed=5)
    crop = RandomResizedCrop(16, rotation=8)
    reading = pipeline.Reading(crop, channels=1, threads=threads, workers=workers, hosts=hosts, **kwargs)
    parts = [
        list(pipeline.train_batches(source, sampler, replace(reading, host=host), seed=7, start=start, stop=stop))
        for host in range(hosts)
    ]
    return [{k: np.concatenate([p[i][k] for p in parts]) for k in parts[0][0]} for i in range(len(parts[0]))]


class TestPipeline:
    def test_batches_do_not_depend_on_hosts_threads_workers_or_start(self, image_folder):
        expected = batches(image_folder)
        assert len(expected) == 6
        assert expected[0]["image"].shape == (16, 16, 16, 1) and expected[0]["image"].dtype == np.uint8
        assert expected[0]["label"].dtype == np.int32
        for other in (
            batches(image_folder, hosts=4),
            batches(image_folder, threads=1),
            batches(image_folder, workers=2),
            batches(image_folder, start=0, stop=2) + batches(image_folder, start=2),
        ):
            assert len(other) == 6
            for a, b in zip(expected, other, strict=True):
                for key in ("image", "label", "index"):
                    np.testing.assert_array_equal(a[key], b[key])

    def test_all_threads_read_although_few_batches_are_prepared(self, image_folder):
        """Twelve images are in work at a time, or the first twelve wait in vain for each other."""
        together, lock, count = threading.Barrier(12, timeout=60), threading.Lock(), [0]

        def meet(picture, rng):
            with lock:
                count[0] += 1
                first = count[0] <= 12
            if first:
                together.wait()
            return RandomResizedCrop(8)(picture, rng)

        source = sources.scan_folder(image_folder / "train")
        sampler = samplers.ShuffledSampler(len(source), 16, 0)
        reading = pipeline.Reading(meet, channels=1, threads=12, prefetch=1)
        assert len(list(pipeline.train_batches(source, sampler, reading, seed=0, start=0, stop=3))) == 3
        assert count[0] == 48 and not [t for t in threading.enumerate() if t.name.startswith("read images")]

    def test_the_first_of_several_damaged_images_of_a_batch_is_named(self, image_folder, tmp_path, monkeypatch):
        source = sources.scan_folder(image_folder / "train")
        order = samplers.ShuffledSampler(len(source), 16, 0)
        bad = order.batch(1)[[3, 5, 11]]
        for record in bad:
            (tmp_path / f"bad_{record}.png").write_bytes(b"nonsense")
            source.paths[record] = str(tmp_path / f"bad_{record}.png")
        reading, read, others = (
            pipeline.Reading(RandomResizedCrop(8), channels=1, threads=8),
            source.read,
            threading.Event(),
        )

        def later(record):  # the first of them, once another one has failed
            if record == bad[0]:
                others.wait(60)
                time.sleep(0.1)
            elif record == bad[2]:
                others.set()
            return read(record)

        monkeypatch.setattr(source, "read", later)
        found = pipeline.train_batches(source, order, reading, seed=0, start=0, stop=5)
        next(found)
        with pytest.raises(UserError, match=rf"bad_{bad[0]}\.png: not an image"):
            next(found)

    def test_worker_processes_end_with_a_killed_parent(self, image_folder):
        program = (
            "import multiprocessing, sys, time\n"
            "from pathlib import Path\n"
            "from idml_jax.data import pipeline, samplers, sources\n"
            "from idml_jax.data.images.transforms import RandomResizedCrop\n"
            "if __name__ == '__main__':\n"
            "    source = sources.scan_folder(Path(sys.argv[1]))\n"
            "    sampler = samplers.ShuffledSampler(len(source), 16, 0)\n"
            "    reading = pipeline.Reading(RandomResizedCrop(16), channels=1, workers=1)\n"
            "    batches = pipeline.train_batches(source, sampler, reading, seed=0, start=0, stop=1000)\n"
            "    next(batches)\n"
            "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
            "    time.sleep(600)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(image_folder / "train")], stdout=subprocess.PIPE, text=True
        ) as parent:
            try:
                worker = int(parent.stdout.readline())
                os.kill(worker, 0)  # it lives
            finally:
                parent.kill()
        for _ in range(300):
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                return
            if Path(f"/proc/{worker}/stat").exists() and " Z " in Path(f"/proc/{worker}/stat").read_text():
                return  # ended; nobody waits for it in a container without init
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker process lives on")

    def test_a_script_without_a_guard_is_told_so(self, image_folder, tmp_path):
        """Its worker processes would train, too."""
        script = tmp_path / "script.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from runs_made import small_config\n"
            "import idml_jax\n"
            f"config = small_config({str(image_folder)!r}, max_steps=2, **{{'data.workers': 1}})\n"
            "config.eval.untrained = False\n"
            f"idml_jax.train_and_evaluate(config, {str(tmp_path / 'run')!r})\n"
        )
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        assert "error: config.data.workers starts processes that read the script again" in done.stderr
        assert "UserError: a reader process (config.data.workers) has ended unexpectedly" in done.stderr
        assert "another process is training" not in done.stderr

    def test_evaluation_shows_every_image_once_tail_included(self, image_folder):
        source = sources.scan_folder(image_folder / "test")
        for hosts in (1, 2):
            seen = []
            parts = [
                list(
                    pipeline.eval_batches(
                        source, pipeline.Reading(ResizeCenterCrop(16, 16), host=h, hosts=hosts), batch_size=20
                    )
                )
                for h in range(hosts)
            ]
            for step in zip(*parts, strict=True):
                assert sum(len(p["mask"]) for p in step) == 20
                seen += [i for p in step for i in p["index"][p["mask"]]]
            assert seen == list(range(96))

    def test_a_damaged_image_is_named(self, image_folder, tmp_path):
        source = sources.scan_folder(image_folder / "test")
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"nonsense")
        source.paths[7] = str(bad)
        with pytest.raises(UserError, match=r"bad\.png: not an image"):
            list(pipeline.eval_batches(source, pipeline.Reading(ResizeCenterCrop(16, 16)), batch_size=16))


def make_folder(root, classes, per_class=3):
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 256, (20, 20, 3), np.uint8))
    return root


class TestFolders:
    def test_class_disjoint_split(self, tmp_path):
        root = make_folder(tmp_path, 6)
        splits = datasets.load_dataset("folder", root=str(root))
        assert splits.train.class_names == ["c0", "c1", "c2"] and splits.test.class_names == ["c3", "c4", "c5"]
        assert set(splits.test.labels) == {0, 1, 2} and len(splits.test) == 9
        assert splits.test.name(0).endswith("c3/0.jpg")
        decode(splits.test.read(0))
        splits = datasets.load_dataset("folder", root=str(root), train_classes=4.0)
        assert len(splits.train.class_names) == 4 and len(splits.test.class_names) == 2

    def test_given_split_and_nested_files(self, tmp_path):
        make_folder(tmp_path / "train", 2)
        make_folder(tmp_path / "val", 3)
        nested = tmp_path / "train" / "c0" / "deeper"
        nested.mkdir()
        (tmp_path / "train" / "c0" / "0.jpg").rename(nested / "0.JPG")
        (tmp_path / "train" / "c0" / "notes.txt").write_text("x")
        splits = datasets.load_dataset("folder", root=str(tmp_path))
        assert len(splits.train) == 6 and len(splits.test) == 9

    def test_validation_classes_come_out_of_the_training_classes(self, tmp_path):
        root = make_folder(tmp_path, 12)
        splits = datasets.load_dataset("folder", root=str(root), validation_classes=0.34)
        train, validation = set(splits.train.class_names), set(splits.validation.class_names)
        assert len(train) == 4 and len(validation) == 2
        assert train | validation == {f"c{i}" for i in (0, 1, 10, 11, 2, 3)}
        again = datasets.load_dataset("folder", root=str(root), validation_classes=0.34)
        assert again.validation.class_names == splits.validation.class_names

    def test_unusable_folders_are_refused(self, tmp_path):
        def refuses(match, **options):
            with pytest.raises(UserError, match=match):
                datasets.load_dataset("folder", warn=logging.warning, **options)

        refuses("config.data.root is empty", root="")
        refuses("no such folder", root=str(tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir()
        refuses("holds no images; expected .*<class>", root=str(tmp_path / "empty"))
        loose = make_folder(tmp_path / "loose", 1) / "c0"
        refuses("outside class folders", root=str(loose))
        refuses("1 class", root=str(tmp_path / "loose"))
        make_folder(tmp_path / "three", 3)
        refuses("both sides need at least 2", root=str(tmp_path / "three"))
        with pytest.raises(UserError, match="unknown data set 'cubs'.*known: cars, .*folder, glyphs, .*tfds"):
            datasets.load_dataset("cubs")

    def test_classes_with_one_image(self, tmp_path):
        root = make_folder(tmp_path, 8)
        for i in (1, 2):
            (root / "c1" / f"{i}.jpg").unlink()
        with pytest.raises(UserError, match=r"1 of 4 classes have a single image, the first .*c1/0\.jpg"):
            datasets.load_dataset("folder", root=str(root))
        said = []
        splits = datasets.load_dataset("folder", root=str(root), on_small_class="skip", warn=said.append)
        assert splits.train.class_names == ["c0", "c2", "c3"] and "left out" in said[0]
        splits = datasets.load_dataset("folder", root=str(root), on_small_class="keep", warn=said.append)
        assert len(splits.train.class_names) == 4

    @pytest.mark.parametrize("content", [b"", b"not a picture at all", None])
    def test_damaged_files(self, tmp_path, content):
        root = make_folder(tmp_path, 4)
        victim = root / "c2" / "1.jpg"
        victim.write_bytes(victim.read_bytes()[:-200] if content is None else content)
        with pytest.raises(UserError, match=r"c2/1\.jpg: .*on_corrupt=skip"):
            datasets.load_dataset("folder", root=str(root))
        said = []
        splits = datasets.load_dataset("folder", root=str(root), on_corrupt="skip", warn=said.append)
        assert len(splits.train) + len(splits.test) == 11
        assert said and said[0].startswith("1 of 12 files") and "c2/1.jpg" in said[0]
        with pytest.raises(UserError, match="known: refuse, skip"):
            datasets.load_dataset("folder", root=str(root), on_corrupt="ignore")


def test_tfds_records_become_a_source(tmp_path):
    """The glyphs come as a real tfds array_record set; the generic door to such sets splits it by class."""
    from idml_jax.data.glyphs import builder as glyphs

    glyphs.prepare(tmp_path, "tiny")
    splits = datasets.load_dataset("glyphs", data_dir=str(tmp_path), variant="tiny")
    assert len(splits.train.class_names) >= 2 and not set(splits.train.class_names) & set(splits.test.class_names)
    assert splits.test.fields["ambiguity"].shape == (len(splits.test),)
    assert decode(splits.test.read(3), channels=1).ndim == 3
    both = datasets.load_dataset("tfds", data_dir=str(tmp_path), variant="glyphs/tiny")
    assert len(both.train) + len(both.test) == len(splits.train) + len(splits.test)
    for source in (splits.test, both.test):  # as a worker process of the reader gets it
        assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)
    with pytest.raises(UserError, match="not prepared as array_record"):
        datasets.load_dataset("tfds", data_dir=str(tmp_path), variant="no_such_set_anywhere")
