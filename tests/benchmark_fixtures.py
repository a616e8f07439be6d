"""Miniature benchmarks in exactly the layout of their archives: names of files, headers, runs of spaces, .mat files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

PER_CLASS = 4


class _Painter:
    """Noisy JPEGs of a pattern per class."""

    def __init__(self, size: int) -> None:
        self._random, self._size = np.random.default_rng(7), size
        self._patterns: dict[Any, np.ndarray] = {}

    def __call__(self, path: Path, label: Any) -> None:
        cells = self._size // 4
        if label not in self._patterns:
            self._patterns[label] = self._random.uniform(40, 215, (4, 4, 3)).repeat(cells, 0).repeat(cells, 1)
        pattern = self._patterns[label]
        pixels = (pattern + self._random.normal(0, 40, pattern.shape)).clip(0, 255).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def make_cub200(root: Path, classes: int = 6, size: int = 16) -> Path:
    """CUB_200_2011 with the first and the last of its classes: so many to train on, half as many to test."""
    paint = _Painter(size)
    labels = [*range(1, classes + 1), *range(200 - classes // 2 + 1, 201)]
    images, classes_of, official, number = [], [], [], 0
    for label in labels:
        for at in range(PER_CLASS):
            number += 1
            name = f"{label:03d}.Some_Bird_{label}/Some_Bird_{label}_{at + 40:04d}_{number}.jpg"
            paint(root / "images" / name, label)
            images.append(f"{number} {name}\n")
            classes_of.append(f"{number} {label}\n")
            official.append(f"{number} {at % 2}\n")
    (root / "images.txt").write_text("".join(images))
    (root / "image_class_labels.txt").write_text("".join(classes_of))
    (root / "classes.txt").write_text("".join(f"{label} {label:03d}.Some_Bird_{label}\n" for label in range(1, 201)))
    (root / "train_test_split.txt").write_text("".join(official))
    (root / "bounding_boxes.txt").write_text("".join(f"{at} 60.0 27.0 325.0 304.0\n" for at in range(1, number + 1)))
    (root / "README").write_text("The Caltech-UCSD Birds-200-2011 Dataset\n")
    (root / "images" / "._.DS_Store").write_bytes(b"x")
    return root


CAR_NAMES = [f"Maker C/V Model {number} 2012" for number in range(1, 197)]


def _structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A struct array (1, n) as MATLAB saves it: numbers (1, 1) of the smallest type, texts as they are."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for at, row in enumerate(rows):
        for name, value in row.items():
            array[0, at][name] = value if isinstance(value, str) else np.array([[value]], np.uint8 if value < 256 else np.uint16)
    return array


def _cells(texts: list[str]) -> np.ndarray:
    array = np.empty((1, len(texts)), object)
    array[0, :] = texts
    return array


_BOX = {"bbox_x1": 39, "bbox_y1": 116, "bbox_x2": 569, "bbox_y2": 375}


def _cars(classes: int) -> list[int]:
    return [*range(1, classes + 1), *range(196 - classes // 2 + 1, 197)]


def make_cars196(root: Path, classes: int = 6, size: int = 16) -> Path:
    """Cars196 in one folder: car_ims/ and cars_annos.mat."""
    paint, rows = _Painter(size), []
    for label in _cars(classes):
        for at in range(PER_CLASS):
            path = f"car_ims/{len(rows) + 1:06d}.jpg"
            paint(root / path, label)
            rows.append({"relative_im_path": path, **_BOX, "class": label, "test": at % 2})
    savemat(root / "cars_annos.mat", {"annotations": _structs(rows), "class_names": _cells(CAR_NAMES)}, do_compression=True)
    return root


def make_cars196_devkit(root: Path, classes: int = 6, size: int = 16) -> Path:
    """The same images in two folders with devkit/; the list with labels lies beside it, as it was published later."""
    paint = _Painter(size)
    rows: dict[str, list[dict[str, Any]]] = {"cars_train": [], "cars_test": []}
    for label in _cars(classes):
        for at in range(PER_CLASS):
            folder = ("cars_train", "cars_test")[at % 2]
            name = f"{len(rows[folder]) + 1:05d}.jpg"
            paint(root / folder / name, label)
            rows[folder].append({**_BOX, "class": label, "fname": name})
    (root / "devkit").mkdir()
    without = [{key: value for key, value in row.items() if key != "class"} for row in rows["cars_test"]]
    for path, values in (
        ("devkit/cars_train_annos.mat", {"annotations": _structs(rows["cars_train"])}),
        ("devkit/cars_test_annos.mat", {"annotations": _structs(without)}),
        ("devkit/cars_meta.mat", {"class_names": _cells(CAR_NAMES)}),
        ("cars_test_annos_withlabels.mat", {"annotations": _structs(rows["cars_test"])}),
    ):
        savemat(root / path, values, do_compression=True)
    return root


def make_sop(root: Path, classes: int = 6, size: int = 16) -> Path:
    """Stanford_Online_Products: class ids go on from the training list in the test list; names end in .JPG."""
    paint, number = _Painter(size), 0
    kinds = ["bicycle", "cabinet", "toaster"]
    for file, labels in (("Ebay_train.txt", range(1, classes + 1)), ("Ebay_test.txt", range(11_319, 11_319 + classes // 2))):
        lines = ["image_id class_id super_class_id path\n"]
        for label in labels:
            kind = label % len(kinds)
            for at in range(PER_CLASS):
                number += 1
                path = f"{kinds[kind]}_final/{111085122871 + label}_{at}.JPG"
                paint(root / path, label)
                lines.append(f"{number} {label} {kind + 1} {path}\n")
        (root / file).write_text("".join(lines))
    (root / "Ebay_info.txt").write_text("image_id class_id super_class_id path\n")
    (root / "bicycle_final.txt").write_text("nothing that is read\n")
    return root


def make_inshop(root: Path, classes: int = 6, size: int = 16, images: str = "img", listed_in: str = "Eval") -> Path:
    """In-shop: the number of rows, a header, and rows with runs of spaces; of each tested item two queries and a gallery."""
    paint, rows = _Painter(size), []
    items = [*(("train", number) for number in range(1, classes + 1)), *(("test", number) for number in range(101, 101 + classes // 2))]
    for part, item in items:
        for at in range(PER_CLASS):
            kind = ("WOMEN/Dresses", "MEN/Tees_Tanks")[item % 2]
            path = f"{kind}/id_{item:08d}/{at + 1:02d}_1_front.jpg"
            paint(root / images / path, item)
            status = "train" if part == "train" else ("query", "gallery")[at % 2]
            rows.append(f"{f'img/{path}':<70} id_{item:08d} {status:<10}\r\n")
    (root / listed_in).mkdir(exist_ok=True)
    header = f"{len(rows)}\r\nimage_name                        item_id        evaluation_status\r\n"
    (root / listed_in / "list_eval_partition.txt").write_bytes((header + "".join(rows)).encode())
    (root / "README.txt").write_text("In-shop Clothes Retrieval Benchmark\n")
    return root


TREES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "cub200": ("cub200", make_cub200),
    "cars196": ("cars196", make_cars196),
    "cars196_devkit": ("cars196", make_cars196_devkit),
    "sop": ("sop", make_sop),
    "inshop": ("inshop", make_inshop),
}
"""Name of a layout -> its reader, and what makes a tree of it."""
