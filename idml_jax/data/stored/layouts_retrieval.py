"""Layouts of the retrieval benchmarks as distributed, with the protocol's splits."""

import importlib.resources
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from idml_jax.data.folders import is_image
from idml_jax.data.stored import archives
from idml_jax.data.stored.benchmarks import BENCHMARKS
from idml_jax.data.stored.layouts import (
    Listed,
    Place,
    Plan,
    by_pattern,
    find,
    not_found,
    parent,
    rows,
    whole_number,
)
from idml_jax.errors import UserError

Enter = Callable[[str], bool]
_ENDING = r"\.(tgz|tar|tar\.gz|tar\.bz2|tar\.xz|zip)"


def _split_of(dataset: str, number: int) -> str:
    """Split of a class by its official number, which starts at 1."""
    bound = BENCHMARKS[dataset].train_classes
    assert bound is not None  # true for the sets that are split by class
    return "train" if number <= bound else "test"


def _look(
    source: Path, wanted: str, complete: Sequence[str], archive: str
) -> tuple[list[str], dict[str, bytes], Enter]:
    """Scans a source.

    Args:
      source: folder or archive.
      wanted: pattern of the base names of the lists.
      complete: base names that must exist, with at least one image, for the unpacked files to be used.
      archive: pattern of the archives to enter otherwise. (If an archive lies next to its unpacked content, only one of
        them must be used.)

    Returns:
      Names of all files, the lists by name, and which archives to enter.
    """
    for enter in (lambda name: False, by_pattern(archive)):
        names, lists = archives.read_small(source, by_pattern(wanted), enter)
        if all(find(lists, base) for base in complete) and any(map(is_image, names)):
            break
    return names, lists, enter


def _two_splits(
    layout: str,
    listed: Callable[[dict[str, Place]], Listed],
    places: Mapping[str, Place],
    class_names: Mapping[int, str],
) -> Plan:
    """A plan with training and test images; official class numbers become labels from 0."""
    order = sorted(class_names)
    label_of = {number: label for label, number in enumerate(order)}
    images = listed({key: Place(place.split, label_of[place.label]) for key, place in places.items()})
    splits = ("train", "test")
    return Plan(layout, [class_names[number] for number in order], splits, images, images.listed(splits))


def cub(source: Path) -> Plan:
    """CUB-200-2011: ``images.txt`` and ``image_class_labels.txt`` beside ``images/``, or the folders of ``images/``
    (``001.Name`` to ``200.Name``) alone. Both official splits are joined; classes 1 to 100 are for training."""
    needed = ("images.txt", "image_class_labels.txt", "classes.txt")
    pattern = r"images\.txt|image_class_labels\.txt|classes\.txt"
    names, lists, enter = _look(source, pattern, needed, r".*(cub|birds).*" + _ENDING)
    images = find(lists, "images.txt")
    if images is None:
        return _cub_folders(source, names, enter)
    root = parent(images)
    absent = [base for base in needed if root + base not in lists]
    if absent:
        raise UserError(f"{source}: {' and '.join(absent)} missing beside {images}")
    path_of = dict(rows(lists[images], images, 2))
    file = root + "classes.txt"
    class_names = {whole_number(number, file): name for number, name in rows(lists[file], file, 2)}
    file = root + "image_class_labels.txt"
    places = {}
    for image, number in rows(lists[file], file, 2):
        number = whole_number(number, file)
        if image not in path_of or number not in class_names:
            raise UserError(f"{file}: image {image} of class {number} is not in images.txt and classes.txt")
        places[f"{root}images/{path_of[image]}"] = Place(_split_of("cub", number), number)
    listed = lambda p: Listed(source, p, lambda name: name, enter)
    return _two_splits("CUB_200_2011 with its lists", listed, places, class_names)


def _cub_folders(source: Path, names: Sequence[str], enter: Enter) -> Plan:
    class_of = re.compile(r"(?:.*/)?((\d{3})\.[^/]+)/[^/]+")
    places: dict[str, Place] = {}
    class_names: dict[int, str] = {}
    for name in filter(is_image, names):
        match = class_of.fullmatch(name)
        if match is None:
            continue
        number = int(match[2])
        if not 1 <= number <= 200 or class_names.setdefault(number, match[1]) != match[1]:
            raise UserError(
                f"{source}: {name}: CUB-200-2011 has the class folders 001.Name to 200.Name, each once; another set of "
                "birds is prepared with --dataset=folder"
            )
        places[name] = Place(_split_of("cub", number), number)
    if not places:
        raise not_found(
            source,
            "CUB-200-2011",
            "CUB_200_2011.tgz, or CUB_200_2011/ with images.txt, image_class_labels.txt, classes.txt and images/",
        )
    listed = lambda p: Listed(source, p, lambda name: name, enter)
    return _two_splits("class folders 001.Name to 200.Name", listed, places, class_names)


def official_car_names() -> list[str]:
    """The 196 class names of Cars196 in their official order, which is not alphabetical."""
    file = importlib.resources.files("idml_jax.data") / "cars196_classes.txt"
    return file.read_text(encoding="utf-8").splitlines()


def cars(source: Path) -> Plan:
    """Cars196: ``cars_annos.mat`` with ``car_ims``; ``cars_train`` and ``cars_test`` with the devkit; or ``train/`` and
    ``test/`` of class folders. Both official splits are joined; classes 1 to 98 are for training."""
    pattern = r"cars_annos\.mat|cars_meta\.mat|cars_(train|test)_annos(_withlabels)?\.mat"
    apart = ("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    archive = r"(car|stanford|archive).*" + _ENDING
    names, lists, enter = _look(source, pattern, ("cars_annos.mat",), archive)
    together = find(lists, "cars_annos.mat")
    # The annotation file of one layout may lie next to the images of the other.
    if together and any(is_image(name) and _last_two(name).startswith("car_ims/") for name in names):
        return _cars_together(source, lists, enter)
    names, lists, enter_apart = _look(source, pattern, apart, archive)
    if any("annos" in name.rsplit("/", 1)[-1] and find(lists, "cars_annos.mat") != name for name in lists):
        return _cars_apart(source, lists, apart, enter_apart)
    enter = enter_apart
    if together:
        raise UserError(f"{source}: {together}, but no images in a folder car_ims/ (or car_ims.tgz)")
    return _cars_folders(source, names, enter)


def _load_mat(lists: Mapping[str, bytes], base: str, variable: str) -> tuple[str, np.ndarray]:
    """Name of a MATLAB file and one of its variables; structs become objects with attributes.

    Raises:
      UserError: if the file is unreadable or lacks the variable.
    """
    name = find(lists, base) or base
    try:
        values = loadmat(io.BytesIO(lists[name]), squeeze_me=True, struct_as_record=False, variable_names=[variable])
    except Exception as error:
        raise UserError(f"{name}: not a readable MATLAB file ({(str(error) or 'damaged').splitlines()[0]})") from error
    if variable not in values:
        raise UserError(f"{name}: lacks the variable {variable!r}")
    return name, np.atleast_1d(values[variable])


def _car_places(name: str, annotations: np.ndarray, field: str, folder: str, class_names: Mapping[int, str]) -> dict:
    """Places by the image's folder and name, e.g. ``cars_train/00001.jpg``."""
    places = {}
    for row in annotations:
        if not hasattr(row, field) or not hasattr(row, "class"):
            raise UserError(f"{name}: its annotations lack {field!r} or 'class'")
        number = getattr(row, "class")
        if not isinstance(number, int | np.integer) or int(number) not in class_names:
            raise UserError(f"{name}: class {str(number)[:50]} is not one of the {len(class_names)} classes")
        number = int(number)
        file = str(getattr(row, field)).rsplit("/", 1)[-1]
        places[f"{folder}/{file}"] = Place(_split_of("cars", number), number)
    return places


def _last_two(name: str) -> str:
    """Folder and name of a file; the extension of an archive is not part of the folder's name."""
    parts = [part.split(".")[0] if archives.is_archive(part) else part for part in name.split("/")[-2:]]
    return "/".join(parts)


def _cars_together(source: Path, lists: Mapping[str, bytes], enter: Enter) -> Plan:
    _, names = _load_mat(lists, "cars_annos.mat", "class_names")
    file, annotations = _load_mat(lists, "cars_annos.mat", "annotations")
    class_names = {number: str(name) for number, name in enumerate(names, 1)}
    places = _car_places(file, annotations, "relative_im_path", "car_ims", class_names)
    listed = lambda p: Listed(source, p, _last_two, enter)
    return _two_splits("car_ims with cars_annos.mat", listed, places, class_names)


def _cars_apart(source: Path, lists: Mapping[str, bytes], needed: Sequence[str], enter: Enter) -> Plan:
    absent = [base for base in needed if not find(lists, base)]
    if absent:
        hint = " (the devkit's cars_test_annos.mat has no labels)" if "cars_test_annos_withlabels.mat" in absent else ""
        raise UserError(f"{source}: {' and '.join(absent)} missing{hint}")
    _, names = _load_mat(lists, "cars_meta.mat", "class_names")
    class_names = {number: str(name) for number, name in enumerate(names, 1)}
    places: dict[str, Place] = {}
    for split, base in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        file, annotations = _load_mat(lists, base, "annotations")
        places |= _car_places(file, annotations, "fname", f"cars_{split}", class_names)
    listed = lambda p: Listed(source, p, _last_two, enter)
    return _two_splits("cars_train and cars_test with the devkit", listed, places, class_names)


def _plain(name: str) -> str:
    """A class name without spaces and punctuation, which differ between copies (``Ram C/V`` became ``Ram C-V``)."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _cars_folders(source: Path, names: Sequence[str], enter: Enter) -> Plan:
    class_names = dict(enumerate(official_car_names(), 1))
    number_of = {_plain(name): number for number, name in class_names.items()}
    places, unknown = {}, set()
    for name in filter(is_image, names):
        folder = name.split("/")[-2] if "/" in name else ""
        number = number_of.get(_plain(folder))
        if number is None:
            unknown.add(folder)
        else:
            places[name] = Place(_split_of("cars", number), number)
    if not places:
        raise not_found(
            source,
            "Cars196",
            "cars_annos.mat with car_ims/ or car_ims.tgz; cars_train and cars_test with cars_train_annos.mat, "
            "cars_test_annos_withlabels.mat and cars_meta.mat; or train/<class>/ and test/<class>/",
        )
    if unknown:
        some = ", ".join(repr(name) for name in sorted(unknown)[:3])
        raise UserError(f"{source}: {len(unknown)} folders with images are not a class of Cars196: {some}")
    listed = lambda p: Listed(source, p, lambda name: name, enter)
    return _two_splits("class folders", listed, places, class_names)


def sop(source: Path) -> Plan:
    """Stanford Online Products: ``Ebay_train.txt`` and ``Ebay_test.txt`` beside the ``*_final`` folders."""
    needed = ("Ebay_train.txt", "Ebay_test.txt")
    _, lists, enter = _look(source, r"Ebay_(train|test)\.txt", needed, r".*(online|sop).*" + _ENDING)
    absent = [base for base in needed if not find(lists, base)]
    if len(absent) == 2:
        raise not_found(
            source, "Stanford Online Products", "Stanford_Online_Products.zip or its folder, with Ebay_train.txt"
        )
    if absent:
        raise UserError(f"{source}: {absent[0]} missing beside {next(iter(lists))}")
    places: dict[str, Place] = {}
    class_names: dict[int, str] = {}
    split_of: dict[int, str] = {}
    for split, base in zip(("train", "test"), needed, strict=True):
        file = find(lists, base) or base
        for _, number, _, path in rows(lists[file], file, 4, header=1):
            number = whole_number(number, file)
            kind = path.split("/")[0].removesuffix("_final")
            class_names.setdefault(number, f"{kind}_{number:05d}")
            if split_of.setdefault(number, split) != split:
                raise UserError(f"{file}: class {number} is a training class too")
            places[parent(file) + path] = Place(split, number)
    listed = lambda p: Listed(source, p, lambda name: name, enter)
    return _two_splits("Stanford_Online_Products with Ebay_train.txt and Ebay_test.txt", listed, places, class_names)


def inshop(source: Path) -> Plan:
    """In-shop Clothes Retrieval: ``list_eval_partition.txt`` and ``img/`` or ``img.zip``; training, query, gallery."""
    base = "list_eval_partition.txt"
    archive = r"(img|.*(in-?shop|deepfashion).*)" + _ENDING
    _, lists, enter = _look(source, r"list_eval_partition\.txt", (base,), archive)
    file = find(lists, base)
    if file is None:
        raise not_found(source, "In-shop Clothes Retrieval", f"{base} and img/ or img.zip below one folder")
    raw, splits = {}, ("train", "query", "gallery")
    for path, item, split in rows(lists[file], file, 3, header=2):
        if split not in splits:
            raise UserError(f"{file}: {path} is of the split {split!r}; known: {', '.join(splits)}")
        raw[path] = (split, item)
    class_names = sorted({item for _, item in raw.values()})
    label_of = {item: label for label, item in enumerate(class_names)}
    places = {path: Place(split, label_of[item]) for path, (split, item) in raw.items()}
    # The names in the list begin with img/, wherever that folder is.
    key = lambda name: name[name.rfind("/img/") + 1 :] if "/img/" in name else name
    images = Listed(source, places, key, enter)
    return Plan(f"{base} and img", class_names, splits, images, images.listed(splits))


def market(source: Path) -> Plan:
    """Market-1501 (Zheng et al., ICCV 2015): ``bounding_box_train``, ``query`` and ``bounding_box_test``, whose file
    names begin with person and camera, as ``0002_c1s1_``.

    The gallery keeps the distractors (person 0000). Its junk images (person -1) count neither as right nor as wrong in
    the protocol, so they are left out; so are, at evaluation, the gallery's images of a query's person and camera.
    """
    folder_of = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    names, _, enter = _look(source, r"", (), r".*market.*" + _ENDING)
    form = re.compile(r"(?:.*/)?(bounding_box_train|query|bounding_box_test)/(-1|\d{4})_c\d+s?\d*_[^/]+")
    found = [match for match in map(form.fullmatch, filter(is_image, names)) if match]
    missing = [folder for folder in folder_of if not any(match[1] == folder for match in found)]
    if missing:
        raise not_found(source, "Market-1501", f"{', '.join(folder_of)} with 0002_c1s1_*.jpg; no {missing[0]}")
    kept = [match for match in found if match[2] != "-1"]
    persons = sorted({match[2] for match in kept})
    label_of = {person: label for label, person in enumerate(persons)}
    places = {match[0]: Place(folder_of[match[1]], label_of[match[2]]) for match in kept}
    images, splits = Listed(source, places, lambda name: name, enter), tuple(folder_of.values())
    junk = len(found) - len(kept)
    told = f"left out {junk:,} junk images of the gallery (person -1), which the protocol does not count"
    notes = [told] if junk else []
    return Plan("Market-1501", persons, splits, images, images.listed(splits), notes)


def inaturalist(source: Path) -> Plan:
    """iNaturalist 2018 with the retrieval split of Brown et al. ("Smooth-AP", ECCV 2020), which lists name:
    ``Inaturalist_train_set1.txt`` and ``Inaturalist_test_set1.txt`` above ``train_val2018`` or its archive."""
    needed = ("Inaturalist_train_set1.txt", "Inaturalist_test_set1.txt")
    archive = r"(train_val2018|.*inat.*)" + _ENDING
    _, lists, enter = _look(source, r"Inaturalist_(train|test)_set1\.txt", needed, archive)
    absent = [base for base in needed if not find(lists, base)]
    if absent:
        wanted = f"{' and '.join(needed)} (Inat_dataset_splits) and train_val2018/ or train_val2018.tar.gz"
        raise not_found(source, "iNaturalist 2018", wanted)
    places: dict[str, Place] = {}
    number_of: dict[str, int] = {}
    split_of: dict[str, str] = {}
    for split, base in zip(("train", "test"), needed, strict=True):
        file = find(lists, base) or base
        for (path,) in rows(lists[file], file, 1):
            parts = path.split("/")
            if len(parts) < 3:
                raise UserError(f"{file}: {path[:80]!r} is no path of kingdom, species and image")
            species = "/".join(parts[-3:-1])
            if split_of.setdefault(species, split) != split:
                raise UserError(f"{file}: {species} is a species of the training images too")
            places["/".join(parts[-3:])] = Place(split, number_of.setdefault(species, len(number_of)))
    listed = lambda p: Listed(source, p, lambda name: "/".join(name.split("/")[-3:]), enter)
    names = {number: species for species, number in number_of.items()}
    return _two_splits("iNaturalist 2018 with its lists for retrieval", listed, places, names)
