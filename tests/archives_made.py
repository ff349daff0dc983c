"""Builds tiny data sets in the official layouts, with correct names and lists and real JPEG bytes."""

import io
import itertools
import pickle
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

from idml_jax.data.stored import crc32c
from idml_jax.data.stored.layouts_retrieval import official_car_names

WNIDS = ("n01440764", "n01443537", "n01484850", "n02102040")


def jpeg(label: int, seed: int, size: int = 24) -> bytes:
    """A colour image whose stripes depend on the class."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size]
    angle = label * 0.7
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / (2 + label % 3) + rng.uniform(0, 6))
    picture = 128 + 60 * wave[:, :, None] * (1, 0.5, -0.5) + rng.normal(0, 15, (size, size, 3))
    return cv2.imencode(".jpg", np.clip(picture, 0, 255).astype(np.uint8))[1].tobytes()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    """Files as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """Files as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tfrecord(records: list[bytes]) -> bytes:
    """Records as a TFRecord file: length, its checksum, the record, its checksum."""
    whole = b""
    for record in records:
        head = len(record).to_bytes(8, "little")
        whole += head + crc32c.masked(head).to_bytes(4, "little") + record + crc32c.masked(record).to_bytes(4, "little")
    return whole


def cub(classes=(1, 2, 3, 99, 100, 101, 102, 103, 200), per_class: int = 4) -> dict[str, bytes]:
    """CUB_200_2011 with some of its classes."""
    files, images, labels, split = {}, [], [], []
    for number in classes:
        for i in range(per_class):
            name = f"{number:03d}.Bird_{number}/Bird_{number}_{i:04d}.jpg"
            images.append(name)
            labels.append(number)
            split.append((i + number) % 2)
            files[f"CUB_200_2011/images/{name}"] = jpeg(number, i)
    lines = lambda values: "".join(f"{i} {v}\n" for i, v in enumerate(values, 1)).encode()
    lists = {
        "CUB_200_2011/images.txt": lines(images),
        "CUB_200_2011/image_class_labels.txt": lines(labels),
        "CUB_200_2011/train_test_split.txt": lines(split),
        "CUB_200_2011/classes.txt": lines(f"{n:03d}.Bird_{n}" for n in range(1, 201)),
    }
    return {"attributes.txt": b"1 x\n", **files, **lists}


CAR_CLASSES = (1, 2, 97, 98, 99, 100, 196)


def _annotations(rows: list[dict], **more) -> bytes:
    """A MATLAB file with an array of structs, as in the devkit."""
    kinds = [(key, object) for key in rows[0]]
    array = np.zeros((1, len(rows)), kinds)
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[0, i][key] = value
    buffer = io.BytesIO()
    savemat(buffer, {"annotations": array, **more})
    return buffer.getvalue()


def _cell(values) -> np.ndarray:
    cell = np.zeros((1, len(values)), object)
    cell[0] = values
    return cell


def cars_together(per_class: int = 4) -> dict[str, bytes]:
    """cars_annos.mat and car_ims/."""
    files, rows = {}, []
    for number in CAR_CLASSES:
        for i in range(per_class):
            name = f"car_ims/{len(rows) + 1:06d}.jpg"
            files[name] = jpeg(number, i)
            rows.append({"relative_im_path": name, "bbox_x1": 1, "class": number, "test": i % 2})
    files["cars_annos.mat"] = _annotations(rows, class_names=_cell(official_car_names()))
    return files


def cars_apart(per_class: int = 4) -> dict[str, bytes]:
    """cars_train/, cars_test/ and devkit/."""
    files, rows = {}, {"train": [], "test": []}
    for number in CAR_CLASSES:
        for i in range(per_class):
            split = ("train", "test")[i % 2]
            name = f"{len(rows[split]) + 1:05d}.jpg"
            files[f"cars_{split}/{name}"] = jpeg(number, i)
            rows[split].append({"bbox_x1": 1, "class": number, "fname": name})
    buffer = io.BytesIO()
    savemat(buffer, {"class_names": _cell(official_car_names())})
    files["devkit/cars_meta.mat"] = buffer.getvalue()
    files["devkit/cars_train_annos.mat"] = _annotations(rows["train"])
    files["cars_test_annos_withlabels.mat"] = _annotations(rows["test"])
    return files


def cars_folders(per_class: int = 4) -> dict[str, bytes]:
    """The common copy by class, with its other spelling."""
    names = official_car_names()
    return {
        f"car_data/{('train', 'test')[i % 2]}/{names[number - 1].replace('/', '-')}/{i:05d}.jpg": jpeg(number, i)
        for number in (*CAR_CLASSES, 174)
        for i in range(per_class)
    }


def sop(classes: int = 6, per_class: int = 4) -> dict[str, bytes]:
    """Stanford_Online_Products; the first half of the classes trains."""
    root, files = "Stanford_Online_Products/", {}
    lists = {"train": "image_id class_id super_class_id path\n", "test": "image_id class_id super_class_id path\n"}
    for number in range(1, classes + 1):
        for i in range(per_class):
            path = f"{('bicycle', 'chair')[number % 2]}_final/11{number}_{i}.JPG"
            lists["train" if number <= classes // 2 else "test"] += f"{i + 1} {number} {number % 2 + 1} {path}\n"
            files[root + path] = jpeg(number, i)
    return {**files, **{f"{root}Ebay_{split}.txt": content.encode() for split, content in lists.items()}}


def inshop(classes: int = 9, per_class: int = 4) -> tuple[dict[str, bytes], bytes]:
    """img/ and list_eval_partition.txt; a third of the classes trains."""
    files, rows = {}, []
    for number in range(1, classes + 1):
        for i in range(per_class):
            name = f"img/WOMEN/Dresses/id_{number:08d}/{i:02d}_1_front.jpg"
            split = "train" if number <= classes // 3 else ("query", "gallery")[i % 2]
            files[name] = jpeg(number, i)
            rows.append(f"{name:70s} id_{number:08d} {split}")
    listed = f"{len(rows)}\nimage_name item_id evaluation_status\n" + "\n".join(rows) + "\n"
    return files, listed.encode()


def _pixels(labels, seed: int) -> np.ndarray:
    rows = [cv2.imdecode(np.frombuffer(jpeg(k, seed + i, 32), np.uint8), 1) for i, k in enumerate(labels)]
    return np.stack([row[:, :, ::-1].transpose(2, 0, 1).reshape(-1) for row in rows])


def cifar(hundred: bool, binary: bool, per_class: int = 3) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The files of either CIFAR, and the pixels and labels of its test images."""
    classes = 20 if hundred else 10
    labels = [k for k in range(classes) for _ in range(per_class)]
    parts = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    parts.append("test" if hundred else "test_batch")
    names = [f"kind_{k}" for k in range(classes)]
    root = (
        f"cifar-{100 if hundred else 10}-"
        + ("binary" if binary and hundred else "batches-bin" if binary else "python" if hundred else "batches-py")
        + "/"
    )
    files, truth = {}, {}
    for seed, part in enumerate(parts):
        pixels = _pixels(labels, seed * 100)
        truth = {"pixels": pixels, "labels": np.asarray(labels)}
        if binary:
            coarse = [[k // 5, k] if hundred else [k] for k in labels]
            rows = np.concatenate([np.asarray(coarse, np.uint8), pixels.astype(np.uint8)], axis=1)
            files[f"{root}{part}.bin"] = rows.tobytes()
            continue
        batch = {
            b"data": pixels,
            b"fine_labels" if hundred else b"labels": labels,
            b"batch_label": b"x",
            b"filenames": [f"{part}_{i}.png".encode() for i in range(len(labels))],
        }
        files[root + part] = pickle.dumps(batch, protocol=2)
    if binary:
        files[root + ("fine_label_names.txt" if hundred else "batches.meta.txt")] = "\n".join(names).encode() + b"\n\n"
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        files[root + ("meta" if hundred else "batches.meta")] = pickle.dumps({key: [n.encode() for n in names]}, 2)
    return files, truth


def imagenet_train(per_class: int = 4) -> dict[str, bytes]:
    """The members of ILSVRC2012_img_train.tar: a tar for every class."""
    return {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{i}.JPEG": jpeg(label, i) for i in range(per_class)})
        for label, wnid in enumerate(WNIDS)
    }


# Class of every validation image, and the devkit's class numbers, which are not in the order of the ids.
VALIDATION = (2, 0, 3, 1, 1, 2)
DEVKIT_NUMBER = {0: 3, 1: 1, 2: 4, 3: 2}


def imagenet_validation() -> dict[str, bytes]:
    """The members of ILSVRC2012_img_val.tar."""
    return {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(label, 50 + i) for i, label in enumerate(VALIDATION, 1)}


def imagenet_devkit() -> dict[str, bytes]:
    """The members of ILSVRC2012_devkit_t12.tar.gz that tell the validation images' classes."""
    synsets = np.zeros((len(WNIDS), 1), [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for label, wnid in enumerate(WNIDS):
        synsets[DEVKIT_NUMBER[label] - 1, 0] = (DEVKIT_NUMBER[label], wnid, "a fish")
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    truth = "".join(f"{DEVKIT_NUMBER[label]}\n" for label in VALIDATION)
    root = "ILSVRC2012_devkit_t12/data/"
    return {root + "meta.mat": buffer.getvalue(), root + "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def market(shots: int = 1) -> dict[str, bytes]:
    """Market-1501: three persons to train, three to test, seen by two cameras; a distractor and a junk image."""
    files = {}
    for person in range(1, 7):
        for camera, shot in itertools.product((1, 2), range(1, shots + 1)):
            name = f"{person:04d}_c{camera}s1_000{camera}_0{shot}.jpg"
            image = jpeg(person, 10 * shot + camera)
            files[f"{'bounding_box_train' if person <= 3 else 'bounding_box_test'}/{name}"] = image
            if person > 3 and camera == 1:
                files[f"query/{name}"] = image
    return files | {f"bounding_box_test/{who}_c3s2_7.jpg": jpeg(9, 1) for who in ("-1", "0000")}


def inaturalist(species: int = 4, per_species: int = 3) -> dict[str, bytes]:
    """iNaturalist 2018 with the lists for retrieval: half of the species train."""
    files, lists = {}, {"train": [], "test": []}
    for number in range(species):
        for i in range(per_species):
            name = f"train_val2018/Aves/{number}/{i}.jpg"
            files[name] = jpeg(number, i)
            lists["train" if number < species // 2 else "test"].append(name)
    return files | {f"splits/Inaturalist_{k}_set1.txt": "\n".join(v).encode() for k, v in lists.items()}
