"""The command `resnet-pack`: write a tree of photographs as shards of resized JPEG.

The images and bytes of a shard depend only on the tree and the settings, not on the number of processes or on how often
the command was interrupted. While it runs, OUT/packing/ has the settings and a note for each finished shard; at the end
the notes are combined into pack.json, and the folder is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.layout import PACKED, PACKING, describe_left_out
from resnet_train.config.schema import format_value, from_dict
from resnet_train.data.decode import ImageError, decode, jpeg_size
from resnet_train.data.imagefolder import Files, open_image_splits, read_file
from resnet_train.data.pack_schema import (
    FORMAT,
    LARGEST,
    LEAST,
    Pack,
    PackPart,
    PackSettings,
    PackShard,
    PackSource,
    check_classes,
    check_shard,
    checksum,
    digest_of,
    read_about,
    shard_name,
)
from resnet_train.data.packed import stored_order
from resnet_train.data.pool import work_in_processes
from resnet_train.errors import RunError, UserError
from resnet_train.files import lock_directory, read_json, write_json
from resnet_train.terminal import printable, say

LONGEST_JPEG = 65_500  # pixels of a side, the limit of libjpeg


def pack(*, root: str, out: Path, shorter_side: int, quality: int, images: int, workers: int, broken: str) -> None:
    """Pack the tree at `root` into the folder `out`, or resume packing. Raises UserError and RunError.

    Each shard has `images` images, encoded by `packed_image`. With `broken="skip"` images that cannot be decoded are
    left out and reported.
    """
    if find_spec("litdata") is None:
        raise UserError("resnet-pack: needs litdata: pip install 'resnet-train[streaming]'")
    splits = open_image_splits(root)
    assert isinstance(splits.train, Files)  # ensured by check_pack
    assert isinstance(splits.test, Files)
    undivided = splits.test.folder == splits.train.folder
    files = {"train": splits.train, "test" if undivided else splits.test.folder.name: splits.test}
    check_classes(splits.classes)
    source = PackSource(os.fsencode(Path(root).name).decode(errors="replace"), splits.digest)
    settings = PackSettings(FORMAT, source, shorter_side, quality, images, typing.cast(Any, broken))
    with lock_directory(out, "out", "packing"):
        if (out / PACKED).is_file():
            _check_same(out, read_about(out), settings)
            shutil.rmtree(out / PACKING, ignore_errors=True)
            say(f"{out}: is packed already; nothing to do")
            return
        _begin(out, settings, files)
        if line := describe_left_out(splits.left_out):
            say(f"note: {line}")
        shards = list(_shards(out, files, images))
        missing = [shard for shard in shards if _note_of(shard) is None]
        total, done = sum(map(len, files.values())), len(shards) - len(missing)
        if done:
            say(f"resuming: {done} of {len(shards)} shards are there")
        common = {"images": images, "shorter_side": shorter_side, "quality": quality, "skip": broken == "skip"}
        jobs = (common | {"path": shard.path, "note": shard.note, "items": _items(shard)} for shard in missing)
        bar = tqdm(total=total, desc="packing", unit=" images", disable=None)
        with bar, contextlib.closing(work_in_processes(_write_shard, jobs, workers)) as written:
            bar.update(total - sum(len(shard.places) for shard in missing))
            for job, lines in written:
                bar.update(len(job["items"]))
                for line in lines:
                    tqdm.write(printable(f"skipped: {line}"), file=sys.stderr)
        parts = _finish(out, settings, splits.classes, files, shards).parts.values()
    size = sum(shard.bytes for part in parts for shard in part.shards)
    skipped = sum(len(part.skipped) for part in parts)
    say(
        f"{out}: {total - skipped} images in {sum(len(part.shards) for part in parts)} shards,"
        f" {size / 1e6:.1f} MB" + (f"; {skipped} broken ones skipped" if skipped else "")
    )


def _check_same(out: Path, existing: PackSettings, settings: PackSettings) -> None:
    """Raises UserError if the pack in `out` has other settings."""
    for field in dataclasses.fields(PackSettings):
        value = getattr(existing, field.name)
        if value != getattr(settings, field.name):
            key = "data.root" if field.name == "source" else field.name
            raise UserError(f"{key}: {out} holds a pack with other values ({format_value(value)}); use another out=")


def _begin(out: Path, settings: PackSettings, files: dict[str, Files]) -> None:
    """Make the folders, or check that existing ones are of the same pack. Raises UserError."""
    path = out / PACKING / "settings.json"
    if path.is_file():
        try:
            existing = from_dict(PackSettings, read_json(path))
        except (OSError, ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}: is damaged ({error}); remove {out}") from error
        _check_same(out, existing, settings)
    elif any(entry.name != PACKING or not entry.is_dir() for entry in out.iterdir()):
        raise UserError(f"out={out}: exists and holds no pack; use another out=")
    for folder in (PACKING, *files):
        (out / folder).mkdir(exist_ok=True)
    if not path.is_file():
        write_json(path, dataclasses.asdict(settings))


@dataclasses.dataclass(frozen=True)
class _Note:
    """The note of a finished shard: skipped images, the shard (None if it would be empty) and litdata's config."""

    skipped: list[int]
    shard: PackShard | None
    config: dict[str, Any] | None = None


class _Planned(NamedTuple):
    """A planned shard: its file, its note, and its images as places in the listing of a part."""

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


def _note_of(planned: _Planned) -> _Note | None:
    """The note of a finished shard; None, so that it is made again, if note or file do not match the plan."""
    try:
        note = from_dict(_Note, read_json(planned.note))
        if note.shard is not None:
            check_shard(planned.path, note.shard)
    except (OSError, ValueError, RecursionError, UserError):
        return None
    stored = note.shard.images if note.shard else 0
    fits = len(set(note.skipped)) == len(note.skipped) and set(note.skipped) <= set(planned.places.tolist())
    fits &= len(note.skipped) + stored == len(planned.places)
    fits &= note.shard is None or (note.shard.name == planned.path.name and note.config is not None)
    return note if fits else None


def _write_shard(job: dict[str, Any]) -> list[str]:
    """Write one shard, then its note; return a line for each skipped image. Raises UserError.

    A shard whose images are all broken is not written.
    """
    from litdata.streaming.writer import BinaryWriter

    path, note_file = job["path"], job["note"]
    skipped, broken, count, size = [], [], 0, 0
    with tempfile.TemporaryDirectory(dir=note_file.parent) as folder:
        writer = BinaryWriter(folder, chunk_size=job["images"])
        for place, file, length, label in job["items"]:
            try:
                image = packed_image(read_file(file, length), file, job["shorter_side"], job["quality"])
            except ImageError as error:
                if not job["skip"]:
                    raise
                skipped.append(place)
                broken.append(str(error))
                continue
            name = os.fsencode("/".join(file.split(os.sep)[-2:])).decode(errors="replace")
            size += len(image) + len(name.encode()) + LEAST
            if size + 8 > LARGEST:
                raise UserError(f"shard_images={job['images']}: the shard would exceed 4 GiB; use fewer")
            writer.add_item(count, {"image": image, "label": label, "name": name})
            count += 1
        note = _Note(skipped, None)
        for chunk in map(Path, writer.done()):  # one, or none
            with chunk.open("rb") as handle:
                os.fsync(handle.fileno())
            shard = PackShard(path.name, count, chunk.stat().st_size, checksum(chunk))
            note = _Note(skipped, shard, writer.get_config())
            chunk.replace(path)
        write_json(note_file, dataclasses.asdict(note))
    return broken


def packed_image(data: bytes, name: str, shorter_side: int, quality: int) -> bytes:
    """Encode an image as JPEG of `quality`, its shorter side at most `shorter_side`. Raises ImageError.

    A JPEG for which `jpeg_size` gives a size is kept unchanged if it is small enough in pixels and bytes.
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
    keep_original = scale >= 1 and len(data) <= encoded.tell() and jpeg_size(data) is not None
    return data if keep_original else encoded.getvalue()


def _finish(
    out: Path, settings: PackSettings, classes: list[str], files: dict[str, Files], planned: list[_Planned]
) -> Pack:
    """Write litdata's index of each part and, last, pack.json; return its content. Raises UserError."""
    parts: dict[str, PackPart] = {}
    for part, source in files.items():
        written = [(shard, _note_of(shard)) for shard in planned if shard.source is source]
        notes = [note for _, note in written if note is not None]
        if len(notes) < len(written):
            raise RunError(f"{out}: was changed while it was packed; the same command resumes")
        shards = [note.shard for note in notes if note.shard]
        if not shards:
            raise UserError(f"data.root: no image of {part}/ can be decoded")
        skipped = sorted(place for note in notes for place in note.skipped)
        parts[part] = PackPart(sum(shard.images for shard in shards), len(source), skipped, shards)
        chunks = [
            {"chunk_bytes": shard.bytes, "chunk_size": shard.images, "dim": None, "filename": shard.name}
            for shard in shards
        ]
        config = next(note.config for note in notes if note.shard)
        write_json(out / part / "index.json", {"chunks": chunks, "config": config})
    test: Any = next(part for part in files if part != "train")
    common = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    pack = Pack(**common, classes=classes, test=test, digest=digest_of(classes, parts), parts=parts)
    write_json(out / PACKED, dataclasses.asdict(pack))
    shutil.rmtree(out / PACKING)
    return pack
