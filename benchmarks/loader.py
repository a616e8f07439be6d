"""Images a second of one core: our loader beside torchvision's ImageFolder, plain WebDataset and spdl, in one run.

    python -m benchmarks.loader --out benchmarks/results/loader.jsonl

Parts of two photographs that come with scikit-learn are stored as JPEGs of each size (quality 90, 4:2:0), as a folder for each class and
as our shards. Every loader reads all of them in this process, with one thread: in training with a random resized crop (area 0.2 to 1) and
a flip, in evaluation with the centre square of 7/8 of the shorter side, both at 224 x 224. ImageFolder has the transforms of torchvision's
reference training, which end in normalised float32; "ImageFolder, bytes" and all others end in uint8, and leave the rest to the device.
What is counted is processor time, and rounds of all loaders take turns, so that other work on the machine hits all of them. spdl needs
FFmpeg's libraries; where they are not found, the line says so.
"""

from __future__ import annotations

import argparse
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from benchmarks import record
from dnc_dist.base import torchvision_guard
from dnc_dist.data.batching import epoch_schedule
from dnc_dist.data.index import DatasetIndex, open_index
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches, TrainBatches
from dnc_dist.data.transforms import Geometry

torchvision_guard.install()

from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

SIDE, CROP, BATCH, CLASSES = 224, 0.875, 32, 2
record.PACKAGES += ("torchvision", "pillow", "simplejpeg", "webdataset", "spdl", "av")
Pass = Callable[[], Iterator[torch.Tensor]]


def photographs(width: int, height: int, count: int) -> list[bytes]:
    """Random parts of two photographs, as JPEGs."""
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        source = sources[number % len(sources)]
        scale = min(source.width / width, source.height / height) * generator.uniform(0.7, 1.0)
        left = generator.uniform(0, source.width - scale * width)
        top = generator.uniform(0, source.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        buffer = io.BytesIO()
        source.resize((width, height), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        files.append(buffer.getvalue())
    return files


def store(files: list[bytes], folder: Path) -> DatasetIndex:
    """A folder for each class, and shards of the same images."""
    samples = []
    for number, data in enumerate(files):
        name = f"{number % CLASSES:02d}"
        path = folder / "classes" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        samples.append(Sample(name, "train", f"{name}/{number}", data=data))
    write_shards(Reading("photographs", samples, {}), folder / "shards")
    return open_index(folder / "shards")


def ours(index: DatasetIndex) -> dict[str, Pass]:
    view = index.view("train")
    train = TrainBatches(index, view, Geometry("standard", SIDE), seed=0)
    schedule = epoch_schedule(np.zeros(len(view), int), view.labels, seed=0, epoch=0, batch_size=BATCH, samples_per_class=4)

    def training() -> Iterator[torch.Tensor]:
        return (batch.images for batch in train.epoch(schedule, first_step=0))

    def evaluation() -> Iterator[torch.Tensor]:
        return (block.images for block in SequentialBatches(index, view, Geometry(None, SIDE, CROP), block_size=BATCH))

    return {"train": training, "evaluation": evaluation}


def transforms(*, normalised: bool) -> dict[str, Any]:
    """As torchvision's reference training has them."""
    end = [v2.PILToTensor()]
    if normalised:
        end += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return {
        "train": v2.Compose([v2.RandomResizedCrop(SIDE, (0.2, 1.0)), v2.RandomHorizontalFlip(), *end]),
        "evaluation": v2.Compose([v2.Resize(round(SIDE / CROP)), v2.CenterCrop(SIDE), *end]),
    }


def image_folder(folder: Path, *, normalised: bool) -> dict[str, Pass]:
    def read(transform: Any) -> Iterator[torch.Tensor]:
        return (images for images, _ in DataLoader(ImageFolder(str(folder), transform), batch_size=BATCH))

    return {name: lambda transform=transform: read(transform) for name, transform in transforms(normalised=normalised).items()}


def web_dataset(index: DatasetIndex) -> dict[str, Pass]:
    urls = [str(path) for path in index.shard_paths]

    def read(transform: Any) -> Iterator[torch.Tensor]:
        samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg").map_tuple(transform)
        return (images for (images,) in DataLoader(samples, batch_size=BATCH))

    return {name: lambda transform=transform: read(transform) for name, transform in transforms(normalised=False).items()}


def spdl(folder: Path, width: int, height: int) -> dict[str, Pass]:
    """Decoding, cut, scaling (bilinear, antialiased) and flip by FFmpeg.

    Raises:
        ImportError, RuntimeError: it is not installed, or finds no FFmpeg.
    """
    import spdl.io

    spdl.io.demux_image(photographs(16, 16, 1)[0])
    paths = sorted(folder.glob("*/*.jpg"))
    ending = f"scale={SIDE}:{SIDE}:flags=bilinear,format=pix_fmts=rgb24"

    def read(cut: Callable[[], str]) -> Iterator[torch.Tensor]:
        for start in range(0, len(paths), BATCH):
            frames = [
                spdl.io.decode_packets(spdl.io.demux_image(str(path)), filter_desc=f"{cut()},{ending}")
                for path in paths[start : start + BATCH]
            ]
            yield spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(0, 3, 1, 2)

    generator = torch.Generator().manual_seed(0)

    def random_cut() -> str:
        top, left, h, w = v2.RandomResizedCrop.make_params(crop, [torch.empty(3, height, width, dtype=torch.uint8)]).values()
        return f"crop={w}:{h}:{left}:{top}" + (",hflip" if torch.rand(1, generator=generator) < 0.5 else "")

    crop = v2.RandomResizedCrop(SIDE, (0.2, 1.0))
    side = round(min(width, height) * CROP)
    return {"train": lambda: read(random_cut), "evaluation": lambda: read(lambda: f"crop={side}:{side}")}


def timed(run: Pass, count: int) -> float:
    """Processor seconds of a pass over ``count`` images, of all threads of this process."""
    gc.collect()
    start = time.process_time()
    seen = 0
    for images in run():
        assert images.shape[1:] == (3, SIDE, SIDE)
        seen += len(images)
    seconds = time.process_time() - start
    assert seen == count, f"{seen} images instead of {count}"
    return seconds


def measure(width: int, height: int, count: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dnc-dist-loader-") as place:
        folder = Path(place)
        index = store(photographs(width, height, count), folder)
        loaders = {"ours": ours(index), "ImageFolder": image_folder(folder / "classes", normalised=True)}
        loaders |= {"ImageFolder, bytes": image_folder(folder / "classes", normalised=False), "WebDataset": web_dataset(index)}
        absent = {}
        try:
            loaders["spdl"] = spdl(folder / "classes", width, height)
        except (ImportError, RuntimeError) as error:
            absent["spdl"] = str(error).partition(".")[0]
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds + 1):
            for name, passes in loaders.items():
                for kind, run in passes.items():
                    taken = timed(run, count)
                    if number:  # the first round warms up
                        seconds.setdefault((kind, name), []).append(taken)
    result: dict[str, Any] = {"size": [width, height], "absent": absent}
    for kind in ("train", "evaluation"):
        result[kind] = {
            name: {
                "images_per_core_second": round(count / statistics.median(seconds[kind, name]), 1),
                "of_image_folder": round(
                    statistics.median(a / b for a, b in zip(seconds[kind, "ImageFolder"], seconds[kind, name], strict=True)), 2
                ),
            }
            for name in loaders
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["256x256", "500x375"], help="width x height of the stored images")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = record.machine()
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        line = {"benchmark": "loader", "images": args.images, "rounds": args.rounds, "batch": BATCH, "side": SIDE, **machine}
        line |= measure(width, height, args.images, args.rounds)
        for kind in ("train", "evaluation"):
            print(size, kind, {name: tuple(values.values()) for name, values in line[kind].items()}, flush=True)
        if args.out:
            record.append(args.out, line)


if __name__ == "__main__":
    main()
