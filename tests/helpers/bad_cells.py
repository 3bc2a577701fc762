"""Cells with images that can and cannot be used, one of each kind."""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def saved(image: PILImage.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_that_claims(width: int, height: int, extra: bytes = b"") -> bytes:
    """A small file whose header has any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def webp_that_claims(width: int, height: int) -> bytes:
    """A small animation whose header has any size up to 16383."""
    still = saved(noise(0), "WEBP", lossless=True)[12:]

    def number(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    frame = number(0) * 2 + number(15) * 2 + number(100) + b"\0" + still
    parts = [
        b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + number(width - 1) + number(height - 1),
        b"ANIM" + struct.pack("<I", 6) + bytes(6),
        b"ANMF" + struct.pack("<I", len(frame)) + frame,
    ]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def data_cell(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def path_cell(path: object) -> dict[str, Any]:
    return {"bytes": None, "path": str(path)}


class BadCell(NamedTuple):
    """A cell that is not a usable image, the kind that it is counted as, and what the message says of it."""

    cell: Any
    kind: str
    message: str


def bad_cells(folder: Path) -> dict[str, BadCell]:
    """Cells that cannot be used, by what they are; their files are written to a folder."""
    image, large = noise(0), noise(1, (64, 64))
    (folder / "empty.png").write_bytes(b"")
    with zipfile.ZipFile(folder / "whole.zip", "w") as archive:
        archive.writestr("a.png", saved(large, "PNG"))
    whole = (folder / "whole.zip").read_bytes()
    (folder / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (folder / "loop.png").symlink_to(folder / "loop.png")
    frames = [noise(seed) for seed in (2, 3, 4)]
    undecodable = "cannot be decoded"
    return {
        "truncated PNG": BadCell(data_cell(saved(large, "PNG")[:2000]), "damaged", undecodable),
        "truncated JPEG": BadCell(data_cell(saved(large, "JPEG")[:900]), "damaged", undecodable),
        "truncated WebP": BadCell(data_cell(saved(large, "WEBP")[:700]), "damaged", "cannot be opened"),
        "PNG cut in its header": BadCell(data_cell(saved(large, "PNG")[:30]), "damaged", "not an image that Pillow"),
        "no bytes": BadCell(data_cell(b""), "empty cell", "the file has no bytes"),
        "empty file": BadCell(path_cell(folder / "empty.png"), "empty cell", "empty.png has no bytes"),
        "None": BadCell(None, "empty cell", "the image is None"),
        "neither bytes nor path": BadCell({"bytes": None, "path": None}, "empty cell", "neither bytes nor a path"),
        "text": BadCell(data_cell(b"no image"), "not an image", "not an image that Pillow can identify"),
        "video": BadCell(data_cell(b"\0\0\0\x18ftypisom" + bytes(40)), "wrong type", "found a video, but Stable"),
        "missing file": BadCell(path_cell(folder / "gone.png"), "missing file", "no file at"),
        "folder": BadCell(path_cell(folder), "unreadable file", "is a folder, not a file"),
        "link to itself": BadCell(
            path_cell(folder / "loop.png"), "unreadable file", "cannot be read .*symbolic links"
        ),
        "device": BadCell(path_cell("/dev/zero"), "unreadable file", "is a pipe or a device"),
        "cut archive": BadCell(path_cell(f"zip://a.png::{folder}/cut.zip"), "unreadable file", "BadZipFile"),
        "missing archive": BadCell(path_cell(f"zip://a.png::{folder}/no.zip"), "missing file", "no file at zip:"),
        "missing member": BadCell(path_cell(f"zip://b.png::{folder}/whole.zip"), "missing file", "no file at zip:"),
        "bad data URL": BadCell(path_cell("data:image/png;base64,xxx"), "unreadable file", "Incorrect padding"),
        "unknown protocol": BadCell(path_cell("foo://a.png"), "unreadable file", "Protocol not known: foo"),
        "animated GIF": BadCell(
            data_cell(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])), "animation", "of 3 frames"
        ),
        "32-bit TIFF": BadCell(
            data_cell(saved(PILImage.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "TIFF")),
            "wrong format",
            "mode I, whose range is not known",
        ),
        "float TIFF": BadCell(
            data_cell(saved(PILImage.fromarray(np.zeros((16, 16), np.float32)), "TIFF")), "wrong format", "mode F"
        ),
        "HEIC": BadCell(data_cell(b"\0\0\0\x18ftypheic" + bytes(40)), "wrong format", "pillow-heif"),
        "SVG": BadCell(data_cell(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "wrong format", "an SVG drawing"),
        "PDF": BadCell(data_cell(saved(image, "PDF")), "wrong format", "a PDF document"),
        "EPS": BadCell(data_cell(saved(image, "EPS")), "wrong format", "EPS files have lines instead of pixels"),
        "web page": BadCell(data_cell(b"<!doctype html><title>404</title>"), "wrong format", "a web page"),
        "bomb": BadCell(data_cell(png_that_claims(100_000, 100_000)), "too large", "decompression bomb"),
        "large": BadCell(
            data_cell(png_that_claims(12_000, 12_000)),
            "too large",
            "12000x12000 pixels; PIL.Image.MAX_IMAGE_PIXELS is",
        ),
        "1x1": BadCell(data_cell(saved(noise(5, (1, 1)), "PNG")), "too small", "of 1x1 pixels"),
        "thin": BadCell(data_cell(saved(noise(6, (2000, 2)), "PNG")), "too long and thin", "of 2000x2 pixels"),
        "text bomb": BadCell(
            data_cell(png_that_claims(16, 16, chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(2_000_000))))),
            "damaged",
            "Decompressed data too large",
        ),
    }


def unusual_cells(folder: Path) -> dict[str, Any]:
    """Cells that are unusual and can be used."""
    (folder / "jpeg.png").write_bytes(saved(noise(20), "JPEG"))
    (folder / "no suffix").write_bytes(saved(noise(21), "PNG"))
    exif = PILImage.Exif()
    exif[0x0112], exif[0x927C] = 6, b"x" * 5_000_000
    return {
        "wrong suffix": path_cell(folder / "jpeg.png"),
        "no suffix": path_cell(folder / "no suffix"),
        "CMYK": data_cell(saved(noise(22).convert("CMYK"), "JPEG")),
        "16-bit grey": data_cell(
            saved(PILImage.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200), "PNG")
        ),
        "bilevel": data_cell(saved(noise(23).convert("1"), "PNG")),
        "grey with transparency": data_cell(saved(noise(24).convert("LA"), "PNG")),
        "palette": data_cell(saved(noise(25).convert("P"), "GIF")),
        "huge EXIF": data_cell(saved(noise(26), "PNG", exif=exif)),
        "BMP": data_cell(saved(noise(27), "BMP")),
        "AVIF": data_cell(saved(noise(28), "AVIF")),
    }
