"""Damaged or malicious archives and stored sets: a one-line error that names them, and bounded work."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import archives_made as made
import numpy as np
import pytest

from idml_jax import prepare as prepare_lib
from idml_jax.data import datasets, files
from idml_jax.data.stored import archives, crc32c, layouts_classification, layouts_tfds, plain_pickle, shards
from idml_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


FILES = {f"c{k}/{i}.jpg": made.jpeg(k, i) for k in range(4) for i in range(3)}


def prepare(source, tmp_path, dataset="folder", **options):
    said = []
    return prepare_lib.prepare(dataset, source, tmp_path / "sets", say=said.append, **options), said


def refused(source, tmp_path, match, dataset="folder", **options):
    """Checks that nothing is published and the error is a ``UserError``."""
    with pytest.raises(UserError, match=match):
        prepare(source, tmp_path, dataset, **options)
    assert not list((tmp_path / "sets").rglob("1.0.0"))


def save(path, data):
    path.write_bytes(data)
    return path


PACK = {"x.tar": bytes, "x.tar.gz": gzip.compress, "x.tar.bz2": bz2.compress, "x.tar.xz": lzma.compress}


def place_of(data, member):
    """Where the header of a member of a tar begins."""
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        return tar.getmembers()[member].offset


class TestTars:
    @pytest.mark.parametrize("name", PACK)
    def test_a_bad_header_is_not_the_end(self, tmp_path, name):
        data = bytearray(made.tar_bytes(FILES))
        data[place_of(data, 5) + 10] ^= 1
        refused(save(tmp_path / name, PACK[name](bytes(data))), tmp_path, r"after 5 files, the last c1/1\.jpg .*header")

    @pytest.mark.parametrize("name", PACK)
    def test_without_the_mark_of_its_end(self, tmp_path, name):
        data = made.tar_bytes(FILES)
        place = place_of(data, 7)
        for end in (place, place + 100, place + 512, place + 600):
            refused(
                save(tmp_path / name, PACK[name](data[:end])), tmp_path, "cut short after [67] files|unexpected end"
            )

    @pytest.mark.parametrize("name", PACK)
    def test_two_archives_one_after_the_other(self, tmp_path, name):
        data = made.tar_bytes(FILES) + made.tar_bytes({"z/1.jpg": made.jpeg(0, 0)})
        refused(save(tmp_path / name, PACK[name](data)), tmp_path, "more data follow its end mark")

    @pytest.mark.parametrize("name", [name for name in PACK if name != "x.tar"])
    def test_checksums_are_verified(self, tmp_path, name):
        packed = PACK[name](made.tar_bytes(FILES))
        prepare(save(tmp_path / name, packed), tmp_path / "good")
        rng = np.random.default_rng(0)
        for place in rng.integers(12, len(packed), 12):
            broken = bytearray(packed)
            broken[place] ^= 1 << int(rng.integers(8))
            refused(save(tmp_path / name, bytes(broken)), tmp_path, "damaged or cut short")
        refused(save(tmp_path / name, packed[:-4]), tmp_path, "damaged or cut short")

    def test_long_headers(self, tmp_path):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in FILES.items():
                info = tarfile.TarInfo(f"{'n' * 90}/{'m' * 90}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        prepare(save(tmp_path / "x.tar", buffer.getvalue()), tmp_path / "good")
        for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            info = tarfile.TarInfo("x")
            info.type, info.size = kind, 5 * 2**30
            data = info.tobuf(tarfile.GNU_FORMAT) + made.tar_bytes(FILES)
            refused(save(tmp_path / "y.tar", data), tmp_path, "a header of 5,368,709,120 bytes", name="y")

    def test_headers_that_lead_backwards(self, tmp_path):
        info = tarfile.TarInfo("a/1.jpg")
        for size in (-1024, -(2**40)):
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            refused(save(tmp_path / "x.tar", made.tar_bytes(FILES)[:2048] + header), tmp_path, "negative|damaged")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            info.pax_headers = {"size": "-1024"}
            tar.addfile(info)
        refused(save(tmp_path / "x.tar", buffer.getvalue()), tmp_path, "damaged")

    def test_members_of_unreasonable_size(self, tmp_path):
        with open(tmp_path / "x.tar", "wb") as file:
            for name, data in FILES.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.write(info.tobuf() + data + b"\0" * (-len(data) % 512))
            info = tarfile.TarInfo("c0/huge.jpg")
            info.size = 2**29 + 512
            file.write(info.tobuf())
            file.seek(info.size, 1)  # a hole, which takes no room
            file.write(b"\0" * 1024)
        refused(tmp_path / "x.tar", tmp_path, r"c0/huge\.jpg: 536,871,424 bytes are more than the limit")
        _, said = prepare(tmp_path / "x.tar", tmp_path, on_corrupt="skip", allow_incomplete=True)
        assert any("1 files are not complete images, the first x.tar/c0/huge.jpg" in line for line in said)

    def test_zeros_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archives, "_MAX_PADDING", 2**21)
        data = gzip.compress(made.tar_bytes(FILES) + b"\0" * 2**22)
        refused(save(tmp_path / "x.tgz", data), tmp_path, "more than 2,097,152 zeros")


class TestZips:
    def broken(self, tmp_path, change):
        """A zip of which one member is changed in some way."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in FILES.items():
                archive.writestr(name, data)
        with zipfile.ZipFile(buffer) as archive:
            info = archive.infolist()[4]
        data = bytearray(buffer.getvalue())
        central = data.index(b"PK\1\2")
        for _ in range(4):
            central = data.index(b"PK\1\2", central + 4)
        change(data, info.header_offset, central)
        return save(tmp_path / "x.zip", bytes(data))

    def both(self, data, local, central, local_place, central_place, value):
        data[local + local_place : local + local_place + 2] = struct.pack("<H", value)
        data[central + central_place : central + central_place + 2] = struct.pack("<H", value)

    @pytest.mark.parametrize(
        "kind,match",
        [
            ("crc", "Bad CRC-32"),
            ("deflate64", "compression method is not supported"),
            ("aes", "it is encrypted"),
            ("encrypted", "it is encrypted"),
            ("damaged", "Error -3|Bad CRC|invalid"),
            ("local header", "[Bb]ad magic|File name in directory"),
        ],
    )
    def test_members_that_cannot_be_read(self, tmp_path, kind, match):
        def change(data, local, central):
            if kind == "crc":
                for place in (local + 14, central + 16):
                    data[place] ^= 1
            elif kind == "deflate64":
                self.both(data, local, central, 8, 10, 9)
            elif kind == "aes":
                self.both(data, local, central, 8, 10, 99)
            elif kind == "encrypted":
                self.both(data, local, central, 6, 8, 1)
            elif kind == "damaged":
                data[local + 60 : local + 80] = b"\xff" * 20
            else:
                data[local] ^= 1

        source = self.broken(tmp_path, change)
        refused(source, tmp_path, rf"x\.zip: c1/1\.jpg: cannot be read from the archive \(.*{match}.*on_corrupt=skip")
        _, said = prepare(source, tmp_path, on_corrupt="skip", allow_incomplete=True)
        assert any("1 files are not complete images, the first x.zip/c1/1.jpg" in line for line in said)

    def test_more_than_the_header_says(self, tmp_path):
        bomb = np.zeros(2**26, np.uint8).tobytes()
        for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", method) as archive:
                for name, data in {**FILES, "c0/bomb.jpg": bomb}.items():
                    archive.writestr(name, data)
            data = bytearray(buffer.getvalue())
            for place, offset in ((data.rindex(b"PK\3\4"), 22), (data.rindex(b"PK\1\2"), 24)):
                data[place + offset : place + offset + 4] = struct.pack("<I", 1000)
            source = save(tmp_path / "x.zip", bytes(data))
            tracemalloc.start()
            refused(source, tmp_path, r"c0/bomb\.jpg: (cannot be read|not a)|bomb\.jpg")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < (80e6 if method == zipfile.ZIP_LZMA else 40e6)

    def test_a_zip_within_an_archive_is_bounded(self, tmp_path, monkeypatch):
        inner = made.zip_bytes(FILES)
        source = save(tmp_path / "x.tar", made.tar_bytes({"in/y.zip": inner}, "w:gz"))
        prepare(source, tmp_path, name="good")
        monkeypatch.setattr(archives, "MAX_INNER_BYTES", 1000)
        with pytest.raises(UserError, match=r"x\.tar: in/y\.zip: a zip of more than 1,000 bytes within an archive"):
            prepare(source, tmp_path, name="bad")

    def test_archives_in_archives_without_end(self, tmp_path):
        data, name = made.zip_bytes(FILES), "x.zip"
        for _ in range(6):
            data = made.zip_bytes({name: data})
        refused(save(tmp_path / "x.zip", data), tmp_path, "archives within archives more than 4 deep")


class TestPickles:
    def test_work_is_bounded(self):
        nested = b"\x80\x02}(K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\x01u."
        itself = b"\x80\x02]q\x00h\x00a."
        start = time.monotonic()
        for data in (
            nested,
            itself,
            b"\x80\x02" + b"(" * 10_000 + b".",
            b"(" * 50 + b"t" * 60,
            b"\x80\x02" + b"2" * 100,
        ):
            with pytest.raises(UserError, match="not one of CIFAR's pickles"):
                layouts_classification.read_pickle(data, "x")
        assert time.monotonic() - start < 2

    def test_number_of_instructions(self, monkeypatch):
        monkeypatch.setattr(plain_pickle, "MAX_INSTRUCTIONS", 100)
        with pytest.raises(plain_pickle.PickleError, match="more than 100 instructions"):
            plain_pickle.load(b"\x80\x02}" + b"Nq\0" * 100 + b".")

    @pytest.mark.parametrize("shape", [[1] * 3, "x", (2**40, 3072), ([0] * 5, 3072), (-1, 3072), (1, 3072, 1)])
    def test_shapes_that_do_not_fit(self, shape):
        array, dtype = plain_pickle._Array(()), plain_pickle._Array(("u1", 0, 1))
        array.state = (1, shape, dtype, False, b"\0" * 3072)
        assert plain_pickle.byte_table(array, 3072) is None


class TestStoredSets:
    @pytest.fixture
    def stored(self, tmp_path):
        source = made.write_files(tmp_path / "x", FILES)
        return prepare(source, tmp_path)[0]

    def load(self, stored):
        return datasets.load_dataset("folder", data_dir=str(stored.parents[2]), variant="x", warn=lambda line: None)

    @pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
    def test_features_of_other_packages(self, stored, key, tmp_path, monkeypatch):
        (tmp_path / "was_imported.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w').close()")
        monkeypatch.syspath_prepend(str(tmp_path))
        self.load(stored)
        features = json.loads((stored / "features.json").read_text())
        inner = next(iter(features["featuresDict"]["features"].values()))
        inner.pop("pythonClassName")
        for name in ("was_imported.Feature", "os.system", "tensorflow_datasets.core.features_x.Feature"):
            inner[key] = name
            (stored / "features.json").write_text(json.dumps(features))
            with pytest.raises(UserError, match=f"features.json: names the feature '{name}'.*refused"):
                self.load(stored)
        assert not (tmp_path / "was_here").exists()

    @pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "idml_jax.json"])
    def test_metadata_that_is_none(self, stored, name):
        for text in ("", "[]", "{", "[" * 100_000, "3"):
            (stored / name).write_text(text)
            with pytest.raises(UserError, match=f"{name}: not readable as JSON"):
                self.load(stored)

    @pytest.mark.parametrize("label", [-1, 4, 2**31])
    def test_labels_outside_the_classes(self, stored, label):
        from idml_jax.data.stored import label_index

        labels = np.repeat(np.arange(4), 3)
        labels[7] = label
        label_index.write(stored, "images", {"label": labels})
        with pytest.raises(
            UserError, match=rf"1 records of the split 'images' .* 0 to 3, the first record 7 with {label}"
        ):
            self.load(stored)
        label_index.write(stored, "images", {"label": labels.astype(float)})
        with pytest.raises(UserError, match="no usable labels"):
            self.load(stored)

    def test_damaged_records(self, stored):
        splits = self.load(stored)
        path = next(stored.glob("*.array_record*"))
        data = bytearray(path.read_bytes())
        rng = np.random.default_rng(0)
        for place in rng.integers(100, len(data), 200):
            data[place] ^= 0xFF
        path.write_bytes(bytes(data))
        splits, failed = self.load(stored), 0
        for part in (splits.train, splits.test):
            for i in range(len(part)):
                assert part.name(i)
                try:
                    assert part.read(i) in FILES.values(), "changed bytes passed for whole ones"
                except files.FileError as error:
                    assert "record" in str(error) and "\n" not in str(error)
                    failed += 1
        assert failed

    def test_checksums_of_tfrecords(self, tmp_path):
        for data, value in (
            (b"123456789", 0xE3069283),
            (bytes(32), 0x8A9136AA),
            (b"", 0),
            (bytes(range(32)), 0x46DD794E),
        ):
            assert crc32c.crc32c(data) == value
        # How TensorBoard's files of events begin.
        assert crc32c.masked((24).to_bytes(8, "little")) == 0x224B7FA3
        records = [bytes(np.random.default_rng(n).integers(0, 256, n, np.uint8)) for n in (0, 1, 3, 4, 255, 257, 3000)]
        whole = made.tfrecord(records)
        path = save(tmp_path / "x.tfrecord", whole)
        assert list(layouts_tfds.read_tfrecord(path)) == records
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(whole), 40):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(broken))
            with pytest.raises(UserError, match=r"x\.tfrecord: (damaged|cut short)"):
                list(layouts_tfds.read_tfrecord(path))

    def test_cars_with_the_list_of_the_other_layout(self, tmp_path):
        names = made.cars_apart()
        names["cars_annos.mat"] = made.cars_together()["cars_annos.mat"]
        _, said = prepare(made.write_files(tmp_path / "cars", names), tmp_path, "cars", allow_incomplete=True)
        assert any("cars_train and cars_test with the devkit" in line for line in said)
        alone = {"cars_annos.mat": names["cars_annos.mat"], "other/1.jpg": made.jpeg(0, 0)}
        with pytest.raises(UserError, match=r"cars_annos\.mat, but no images in a folder car_ims/"):
            prepare(made.write_files(tmp_path / "y", alone), tmp_path / "z", "cars")


class TestFullDisk:
    @pytest.mark.parametrize("limit", [100, 30_000])
    def test_one_line(self, tmp_path, limit):
        """Files cannot grow beyond a limit, as on a full disk."""
        source = made.write_files(
            tmp_path / "x", {f"c{k}/{i}.jpg": made.jpeg(k, i, 96) for k in range(4) for i in range(9)}
        )
        code = (
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
            "import sys; from idml_jax import prepare; prepare.main(sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "--dataset=folder", f"--source={source}", f"--data_dir={tmp_path / 'sets'}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "cannot be written" in done.stderr and ("resume" if limit > 1000 else "nothing is left") in done.stderr
        assert not list((tmp_path / "sets").rglob("1.0.0"))
        prepare(source, tmp_path)

    def test_what_is_stored_is_kept(self, tmp_path, monkeypatch):
        source = made.write_files(
            tmp_path / "x", {f"c{k:02}/{i}.jpg": made.jpeg(k, i, 128) for k in range(12) for i in range(20)}
        )
        real, calls = shards._check_and_flush, []

        def full(path, records):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(28, "No space left on device", str(path))
            return real(path, records)

        monkeypatch.setattr(shards, "_check_and_flush", full)
        message = r"array_record-00001\.tmp: cannot be written \(No space left on device\).* ([0-9]+) images are stored"
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path, shard_megabytes=1)
        monkeypatch.setattr(shards, "_check_and_flush", real)
        _, said = prepare(source, tmp_path, shard_megabytes=1)
        assert any(line.startswith("resuming after") for line in said)
