"""The command `resnet-pack`: a tree of photographs as shards of resized JPEG, and the check of such a folder.

Which images make up a shard, and the bytes of it, depend on the tree and the settings alone: not on the number of
processes, nor on how often the command was killed. While it works, OUT/packing/ holds the settings and a note for
each shard that is whole and on disk; at the end the notes become pack.json, and the folder goes.
"""

from __future__ import annotations

import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from resnet_train.data.images import ImageError, decode, jpeg_size
from resnet_train.data.packed import (
    FORMAT,
    Shard,
    check_size,
    checksum,
    digest_of,
    located,
    read_about,
    shard_name,
    stored_order,
)
from resnet_train.data.photographs import Files, open_photographs, read_file
from resnet_train.data.places import PACKED, PACKING, describe_left_out
from resnet_train.errors import SIGNALS, RunError, UserError
from resnet_train.files import claimed, write_json

LONGEST_JPEG = 65_500  # pixels of a side, as libjpeg has it


def pack(*, root: str, out: Path, shorter_side: int, quality: int, images: int, workers: int, broken: str) -> None:
    """Write the tree at `root` to the folder `out`, or go on with that. Raises UserError and RunError.

    Images come `images` to a shard, as `packed_image` makes them. With `broken="skip"` those that cannot be decoded are
    left out and named.
    """
    if find_spec("litdata") is None:
        raise UserError("resnet-pack: needs litdata: pip install 'resnet-train[streaming]'")
    found = open_photographs(root)
    assert isinstance(found.train, Files)  # check_pack has seen to it
    assert isinstance(found.test, Files)
    files = {"train": found.train, found.test.folder.name: found.test}
    settings = {
        "format": FORMAT,
        "source": {"name": Path(root).name, "digest": found.digest},
        "shorter_side": shorter_side,
        "quality": quality,
        "images": images,
        "broken": broken,
    }
    with claimed(out, "out", "packing"):
        if (out / PACKED).is_file():
            about = read_about(out)
            _check_same(out, about, settings)
            shutil.rmtree(out / PACKING, ignore_errors=True)
            print(f"{out}: is packed already; nothing to do")
            return
        _begin(out, settings, files)
        if line := describe_left_out(found.left_out):
            print(f"note: {line}", flush=True)
        shards = list(_shards(out, files, images))
        missing = [shard for shard in shards if _note_of(shard) is None]
        total, done = sum(map(len, files.values())), len(shards) - len(missing)
        if done:
            print(f"going on: {done} of {len(shards)} shards are there", flush=True)
        common = {"images": images, "shorter_side": shorter_side, "quality": quality, "skip": broken == "skip"}
        jobs = (common | {"path": shard.path, "note": shard.note, "items": _items(shard)} for shard in missing)
        bar = tqdm(total=total, desc="packing", unit=" images", disable=None)
        with bar:
            bar.update(total - sum(len(shard.places) for shard in missing))
            for job, lines in _worked(_write_shard, jobs, workers):
                bar.update(len(job["items"]))
                for line in lines:
                    tqdm.write(f"skipped: {line}", file=sys.stderr)
        about = _finish(out, settings, found.classes, files, shards)
    size = sum(shard["bytes"] for told in about["parts"].values() for shard in told["shards"])
    skipped = sum(len(told["skipped"]) for told in about["parts"].values())
    print(
        f"{out}: {total - skipped} images in {sum(len(told['shards']) for told in about['parts'].values())} shards,"
        f" {size / 1e6:.1f} MB" + (f"; {skipped} broken ones skipped" if skipped else "")
    )


def _check_same(out: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a folder that holds something else. Raises UserError."""
    for key, value in settings.items():
        if before.get(key) != value:
            word = "data.root" if key == "source" else key
            raise UserError(f"{word}: {out} holds a pack with other values ({before.get(key)}); take another out=")


def _begin(out: Path, settings: dict[str, Any], files: dict[str, Files]) -> None:
    """Make the folders, or see that they are of the same pack. Raises UserError."""
    place = out / PACKING / "settings.json"
    if place.is_file():
        try:
            before = json.loads(place.read_text())
        except ValueError as error:
            raise UserError(f"{place}: is damaged; remove {out}") from error
        _check_same(out, before, settings)
        return
    if any(path.name != PACKING for path in out.iterdir()):
        raise UserError(f"out={out}: exists and holds no pack; take another out=")
    for folder in (PACKING, *files):
        (out / folder).mkdir(exist_ok=True)
    write_json(place, settings)


class _Planned(NamedTuple):
    """A shard to be: its file, the note of it, and which images of a part it holds."""

    path: Path
    note: Path
    source: Files
    places: Tensor


def _shards(out: Path, files: dict[str, Files], images: int) -> Iterator[_Planned]:
    for part, source in files.items():
        for number, places in enumerate(stored_order(part, len(source)).split(images)):
            yield _Planned(out / part / shard_name(number), out / PACKING / f"{part}-{number}.json", source, places)


def _items(shard: _Planned) -> list[tuple[int, str, int, int]]:
    """Place in the listing, path, size and label of each image of a shard."""
    return [(place, *shard.source.entry(place)) for place in shard.places.tolist()]


def _note_of(shard: _Planned) -> Any:
    """What is noted of a shard that is whole, or None."""
    try:
        return json.loads(shard.note.read_text())
    except (OSError, ValueError):
        return None


def _write_shard(job: dict[str, Any]) -> list[str]:
    """Write one shard, then its note; a line for each image that was skipped. Raises UserError.

    A shard of which all images are broken is not written.
    """
    from litdata.streaming.writer import BinaryWriter

    path, note = job["path"], job["note"]
    skipped, broken, count = [], [], 0
    with tempfile.TemporaryDirectory(dir=note.parent) as folder:
        writer = BinaryWriter(folder, chunk_size=job["images"])
        for place, file, size, label in job["items"]:
            try:
                image = packed_image(read_file(file, size), file, job["shorter_side"], job["quality"])
            except ImageError as error:
                if not job["skip"]:
                    raise
                skipped.append(place)
                broken.append(str(error))
                continue
            writer.add_item(count, {"image": image, "label": label, "name": "/".join(file.split(os.sep)[-2:])})
            count += 1
        about: dict[str, Any] = {"skipped": skipped, "shard": None}
        for written in map(Path, writer.done()):  # one, or none
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
            size = written.stat().st_size
            about["shard"] = {"name": path.name, "images": count, "bytes": size, "sha256": checksum(written)}
            about["config"] = writer.get_config()
            written.replace(path)
        write_json(note, about)
    return broken


def packed_image(data: bytes, name: str, shorter_side: int, quality: int) -> bytes:
    """An encoded image as JPEG of `quality`, its shorter side brought down to `shorter_side`. Raises ImageError.

    A JPEG that any reader takes, and that is small enough in pixels and in bytes, stays as it is.
    """
    image = Image.fromarray(decode(data, name).numpy())
    scale = shorter_side / min(image.size)
    if scale < 1:
        width, height = (max(1, round(scale * n)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    if max(image.size) > LONGEST_JPEG:
        raise ImageError(f"{name}: is {image.width}x{image.height}; a JPEG has at most {LONGEST_JPEG} pixels a side")
    image.save(encoded, "JPEG", quality=quality)
    stays = scale >= 1 and len(data) <= encoded.tell() and jpeg_size(data) is not None
    return data if stays else encoded.getvalue()


def _finish(
    out: Path, settings: dict[str, Any], classes: list[str], files: dict[str, Files], planned: list[_Planned]
) -> dict[str, Any]:
    """Write litdata's index of each part and, last, pack.json; what it holds. Raises UserError."""
    parts: dict[str, Any] = {}
    for part, source in files.items():
        notes = [_note_of(shard) for shard in planned if shard.source is source]
        shards = [note["shard"] for note in notes if note["shard"]]
        if not shards:
            raise UserError(f"data.root: no image of {part}/ can be decoded")
        parts[part] = {
            "images": sum(shard["images"] for shard in shards),
            "listed": len(source),
            "skipped": sorted(place for note in notes for place in note["skipped"]),
            "shards": shards,
        }
        chunks = [
            {"chunk_bytes": shard["bytes"], "chunk_size": shard["images"], "dim": None, "filename": shard["name"]}
            for shard in shards
        ]
        config = next(note["config"] for note in notes if note["shard"])
        write_json(out / part / "index.json", {"chunks": chunks, "config": config})
    test = next(part for part in files if part != "train")
    about = {**settings, "classes": classes, "test": test, "digest": digest_of(classes, parts), "parts": parts}
    write_json(out / PACKED, about)
    shutil.rmtree(out / PACKING)
    return about


# --- The check -------------------------------------------------------------------------------------------------------


def check_packed(root: str, workers: int) -> None:
    """Read all shards of a packed folder and decode every image. Raises UserError and, naming them, RunError."""
    folder = located(root)
    about = read_about(folder)
    jobs = [
        {"path": folder / part / shard["name"], "classes": len(about["classes"]), **shard}
        for part, told in about["parts"].items()
        for shard in told["shards"]
    ]
    total, wrong = sum(job["images"] for job in jobs), []
    with tqdm(total=total, desc="checking", unit=" images", disable=None) as bar:
        for job, errors in _worked(_check_shard, jobs, workers):
            bar.update(job["images"])
            wrong += errors
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if wrong:
        raise RunError(f"check={root}: {len(wrong)} things are wrong, the first: {wrong[0]}")
    print(f"{root}: {total} images in {len(jobs)} shards, all as they were packed")


def _check_shard(job: dict[str, Any]) -> list[str]:
    """What is wrong with a shard, as lines."""
    try:
        check_size(job["path"], job["bytes"])
        shard = Shard(job["path"])
    except UserError as error:
        return [str(error)]
    wrong = [] if checksum(job["path"]) == job["sha256"] else [f"{job['path']}: its checksum does not hold"]
    if len(shard) != job["images"]:
        return [*wrong, f"{job['path']}: holds {len(shard)} images and should {job['images']}"]
    for place in range(len(shard)):
        try:
            name, data, label = shard.item(place)
            decode(data, name)
            if not 0 <= label < job["classes"]:
                wrong.append(f"{name}: there is no class {label}")
        except UserError as error:
            wrong.append(str(error))
    return wrong


# --- Processes -------------------------------------------------------------------------------------------------------


def _worked(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Each job and what `work` makes of it in one of `workers` processes, as they finish. Raises what it raises.

    Jobs are taken from `jobs` when there is room. The processes end with this one, however that ends; 0 is this one.
    """
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting = iter(jobs)
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker
    ) as pool:
        try:
            running = {pool.submit(work, job): job for job in itertools.islice(waiting, 2 * workers)}
            while running:
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(work, job): job for job in itertools.islice(waiting, 1)}
        except BrokenProcessPool as error:
            raise RunError("a process was killed (out of memory?); the same command goes on") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Leave signals to the parent, compute with one thread, and end where the parent is no more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
