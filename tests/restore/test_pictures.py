"""What is in a picture file comes out again; what is no picture is refused."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sparkir.errors import SparkirError
from sparkir.restore.files import restore_files
from sparkir.restore.pictures import Picture, mark_of, read_header, read_picture
from sparkir.restore.writing import FORMATS, require_room, write_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MARK = "sparkir restore test"
CHANNELS = [1, 2, 3, 4]


def random_pixels(channels: int, dtype: type, height: int = 21, width: int = 34) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(
        0, top, (height, width, channels), dtype, endpoint=True
    )


def camera_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = orientation, "Maker", "(c) somebody"
    exif[0x0131] = "camera 1.0"
    exif.get_ifd(0x8769)[0x9003] = "2020:02:03 04:05:06"
    exif.get_ifd(0x8769)[0xA002] = 34
    exif.get_ifd(0x8825)[1] = "N"
    return exif


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".TIF"])
def test_lossless_formats_keep_every_level(tmp_path, suffix, dtype, channels):
    path = tmp_path / f"a{suffix}"
    pixels = random_pixels(channels, dtype)
    write_picture(path, Picture(pixels=pixels, icc=SRGB if channels > 2 else b""), MARK)
    read = read_picture(path)
    if (dtype, channels, suffix == ".png") == (np.uint16, 2, False):
        assert read.pixels.shape[2] == 4  # see write_picture
        assert (read.pixels[..., :3] == pixels[..., :1]).all()
        read = read.with_pixels(read.pixels[..., [0, 3]])
    np.testing.assert_array_equal(read.pixels, pixels)
    assert read.pixels.dtype == dtype
    assert read.icc == (SRGB if channels > 2 else b"")
    assert mark_of(path) == MARK
    header = read_header(path)
    assert header.itemsize == pixels.itemsize
    assert header.shape[:2] == pixels.shape[:2]


def test_header_has_the_channels(tmp_path):
    for channels in CHANNELS:
        for dtype in (np.uint8, np.uint16):
            pixels = random_pixels(channels, dtype)
            write_picture(tmp_path / "a.png", Picture(pixels=pixels), MARK)
            assert read_header(tmp_path / "a.png").shape == pixels.shape


@pytest.mark.parametrize("channels", CHANNELS)
def test_webp_is_lossless(tmp_path, channels):
    pixels = random_pixels(channels, np.uint8)
    if channels in (2, 4):
        pixels[..., -1] |= 1  # colours under nothing are not kept by the format
    write_picture(tmp_path / "a.webp", Picture(pixels=pixels), MARK)
    read = read_picture(tmp_path / "a.webp").pixels
    colours = pixels if channels > 2 else pixels[..., [0, 0, 0, *range(1, channels)]]
    np.testing.assert_array_equal(read, colours)
    assert mark_of(tmp_path / "a.webp") == MARK


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_grey_grey_and_its_mark(tmp_path, channels):
    write_picture(tmp_path / "a.jpg", Picture(pixels=random_pixels(channels, np.uint8)), MARK)
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (21, 34, channels)
    assert mark_of(tmp_path / "a.jpg") == MARK


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s != ".tiff"])
@pytest.mark.parametrize("source", ["jpg", "png", "tif", "webp"])
def test_exif_profile_and_resolution_stay(tmp_path, identity, source, suffix):
    image = Image.fromarray(random_pixels(3, np.uint8))
    given = tmp_path / f"in.{source}"
    image.save(given, exif=camera_exif().tobytes(), icc_profile=SRGB, dpi=(300, 300))
    restore_files(identity, given, tmp_path / f"out{suffix}", lambda event: None)
    with Image.open(tmp_path / f"out{suffix}") as made:
        exif = made.getexif()
        assert (exif[0x010F], exif[0x8298]) == ("Maker", "(c) somebody")
        assert exif[0x0131].startswith("sparkir restore ")
        assert exif.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"
        assert 0xA002 not in exif.get_ifd(0x8769)
        assert exif.get_ifd(0x8825)[1] == "N"
        assert made.info["icc_profile"] == SRGB
        if "webp" not in (source, suffix[1:]):
            assert made.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_colour_keeps_what_belongs_to_it(tmp_path, suffix):
    exif = camera_exif().tobytes()
    picture = Picture(pixels=random_pixels(3, np.uint16), icc=SRGB, exif=exif, dpi=(300.0, 300.0))
    write_picture(tmp_path / f"a{suffix}", picture, MARK)
    read_back = read_picture(tmp_path / f"a{suffix}")
    assert read_back.icc == SRGB
    assert read_back.dpi == pytest.approx((300, 300), abs=0.1)
    kept = Image.Exif()
    kept.load(read_back.exif)
    assert (kept[0x010F], kept[0x8298]) == ("Maker", "(c) somebody")
    if suffix == ".png":
        assert kept.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90),
        (99, lambda a: a),
    ],
)
def test_orientation_turns_the_pixels_and_is_dropped(tmp_path, orientation, upright, deep):
    pixels = random_pixels(3, np.uint16 if deep else np.uint8)
    exif = camera_exif(orientation).tobytes()
    write_picture(tmp_path / "a.png", Picture(pixels=pixels, exif=exif), MARK)
    read = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(read.pixels, upright(pixels))
    write_picture(tmp_path / "b.png", read, MARK)
    with Image.open(tmp_path / "b.png") as again:
        assert again.getexif().get(0x0112, 1) == 1


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    expected = [[[10, 20, 30, 0], [200, 100, 50, 128]]]
    assert read_picture(tmp_path / "a.png").pixels.tolist() == expected
    image.save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_a_transparent_colour_becomes_alpha(tmp_path):
    grey = np.array([[7, 8]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=7)
    assert read_picture(tmp_path / "a.png").pixels.tolist() == [[[7, 0], [8, 255]]]
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "b.png", transparency=7000)
    assert read_picture(tmp_path / "b.png").pixels.tolist() == [[[7000, 0], [8000, 65535]]]


def test_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").pixels.tolist() == [[[255], [0]]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_is_not_scrambled(tmp_path, mode):
    """Uncompressed, which Pillow would map by the turned size; its resolution turns as well."""
    if mode == "I;16":
        image = Image.fromarray(random_pixels(1, np.uint16)[..., 0])
    else:
        image = Image.fromarray(random_pixels(3, np.uint8)).convert(mode)
    exif = camera_exif(6)
    image.save(tmp_path / "raw.tif", exif=exif, dpi=(300, 150))
    image.save(tmp_path / "packed.tif", exif=exif, compression="tiff_lzw")
    read = read_picture(tmp_path / "raw.tif")
    np.testing.assert_array_equal(read.pixels, read_picture(tmp_path / "packed.tif").pixels)
    assert read.pixels.shape[:2] == image.size
    assert read.dpi == (150, 300)


def test_16_bits_that_pillow_or_libvips_would_misread(tmp_path):
    tifffile, _ = pytest.importorskip("tifffile"), pytest.importorskip("pyvips")
    colour = random_pixels(3, np.uint16)
    planes = colour.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, colour)
    assert read_header(tmp_path / "a.tif").itemsize == 2
    tifffile.imwrite(tmp_path / "b.tif", colour[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(read_picture(tmp_path / "b.tif").pixels, 65535 - colour[..., :1])
    tifffile.imwrite(tmp_path / "c.tif", random_pixels(4, np.uint16), photometric="separated")
    with pytest.raises(SparkirError, match="it is CMYK of 16 bits, which is not read; convert"):
        read_picture(tmp_path / "c.tif")
    unnamed = random_pixels(4, np.uint16)
    tifffile.imwrite(tmp_path / "d.tif", unnamed, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(read_picture(tmp_path / "d.tif").pixels, unnamed[..., :3])


@pytest.mark.parametrize("suffix", [".webp", ".tif"])
def test_a_profile_of_grey_does_not_go_with_colour(tmp_path, suffix):
    dtype = np.uint8 if suffix == ".webp" else np.uint16
    grey = bytes(16) + b"GRAY" + bytes(108)
    picture = Picture(pixels=random_pixels(2, dtype), icc=grey)
    write_picture(tmp_path / f"a{suffix}", picture, MARK)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert not image.info.get("icc_profile")


def test_cmyk_without_a_profile(tmp_path):
    image = Image.new("CMYK", (3, 2), (255, 0, 0, 0))
    image.save(tmp_path / "a.tif")
    read = read_picture(tmp_path / "a.tif")
    assert read.pixels[0, 0].tolist() == [0, 255, 255]
    assert read.icc == b""


def test_lab_becomes_srgb_and_says_so(tmp_path):
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 120, 60)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    lab.save(tmp_path / "a.tif")
    read = read_picture(tmp_path / "a.tif")
    assert np.abs(read.pixels[0, 0].astype(int) - (200, 120, 60)).max() <= 2
    assert "sRGB" in ImageCms.getProfileDescription(io.BytesIO(read.icc))


def test_a_profile_that_does_not_fit(tmp_path):
    Image.new("CMYK", (3, 2)).save(tmp_path / "a.tif", icc_profile=SRGB)
    with pytest.raises(SparkirError, match="colour profile does not fit"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_without_a_known_white(tmp_path, value):
    Image.fromarray(np.array([[value]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(SparkirError, match=r"outside 0\.\.65535"):
        read_picture(tmp_path / "a.tif")


def test_floats(tmp_path):
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(SparkirError, match="floating-point"):
        read_picture(tmp_path / "a.tif")


# What a format cannot hold --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "itemsize", "says"),
    [
        ("a.jpg", (9, 9, 4), 1, "JPEG cannot hold transparency"),
        ("a.jpg", (9, 9, 2), 2, "JPEG cannot hold transparency and 16 bits"),
        ("a.jpeg", (9, 9, 1), 2, "JPEG cannot hold 16 bits"),
        ("a.jpg", (9, 70_000, 3), 1, "JPEG cannot hold 70000 px a side"),
        ("a.webp", (9, 9, 3), 2, "WEBP cannot hold 16 bits"),
        ("a.webp", (20_000, 9, 3), 1, "WEBP cannot hold 20000 px a side"),
        ("a.gif", (9, 9, 3), 1, "written as .png"),
        ("a", (9, 9, 3), 1, "written as .png"),
    ],
)
def test_what_a_format_cannot_hold(name, shape, itemsize, says):
    with pytest.raises(SparkirError, match=says):
        require_room(Path(name), shape, itemsize)


def test_16_bit_colour_without_its_packages(tmp_path, monkeypatch):
    pixels = random_pixels(3, np.uint16)
    write_picture(tmp_path / "a.png", Picture(pixels=pixels), MARK)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    says = r'16-bit colour, which needs pyvips: pip install "sparkir\[deep\]"'
    with pytest.raises(SparkirError, match=says):
        read_picture(tmp_path / "a.png")
    with pytest.raises(SparkirError, match="needs tifffile"):
        require_room(tmp_path / "b.tif", pixels.shape, 2)
    grey = Picture(pixels=random_pixels(1, np.uint16))
    write_picture(tmp_path / "grey.png", grey, MARK)  # this Pillow can
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png").pixels, grey.pixels)


# Hostile files --------------------------------------------------------------------------------


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb_png(side: int, bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_header_that_claims_60000_by_60000(tmp_path, identity, bits):
    (tmp_path / "a.png").write_bytes(bomb_png(60_000, bits))
    says = r"60000 x 60000 = 3,600,000,000 pixels, more than 178,956,970.*--max-pixels"
    with pytest.raises(SparkirError, match=says):
        read_picture(tmp_path / "a.png")
    with pytest.raises(SparkirError, match=r"60000 x 60000 px and its result take .* --memory"):
        restore_files(
            identity,
            tmp_path / "a.png",
            tmp_path / "b.png",
            lambda event: None,
            max_pixels=10**10,
            memory_bytes=10**9,
        )


def test_max_pixels_raises_the_limit(tmp_path):
    image = Image.new("L", (400, 300))
    image.save(tmp_path / "a.png")
    with pytest.raises(SparkirError, match="more than 119,999"):
        read_picture(tmp_path / "a.png", max_pixels=119_999)
    assert read_picture(tmp_path / "a.png", max_pixels=120_000).pixels.shape == (300, 400, 1)


def test_pillows_own_limit_is_put_back():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(SparkirError):
        read_picture(Path("gone.png"))
    assert before == Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated(tmp_path, suffix, channels, dtype, kept):
    path = tmp_path / f"cut.{suffix}"
    write_picture(path, Picture(pixels=random_pixels(channels, dtype, 60, 60)), MARK)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(SparkirError, match=rf"cannot read image .*cut\.{suffix}: .+; replace"):
        read_picture(path)


def test_broken_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for suffix in ("png", "jpg", "webp", "tif"):
        for dtype in (np.uint8, np.uint16) if suffix in ("png", "tif") else (np.uint8,):
            path = tmp_path / f"a.{suffix}"
            exif = camera_exif(6).tobytes()
            picture = Picture(pixels=random_pixels(3, dtype), exif=exif, icc=SRGB[:200])
            write_picture(path, picture, MARK)
            content = path.read_bytes()
            for _ in range(40):
                broken = bytearray(content)
                for position in rng.integers(min(len(content), 600), size=4):
                    broken[position] = rng.integers(256)
                path.write_bytes(broken)
                try:
                    read_header(path)
                    again = read_picture(path)
                    write_picture(tmp_path / "again.png", again, MARK)
                except SparkirError as error:
                    assert "\n" not in str(error)
                    refused += 1
                mark_of(path)
    assert refused > 50


@pytest.mark.parametrize(
    "content",
    [
        b"just text",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file closefile\n",
        b"GIF89a" + bytes(20),
        b"PK\x03\x04" + bytes(50),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_a_renamed_file_of_another_kind(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(SparkirError, match=r"cannot read image .*a\.png"):
        read_picture(tmp_path / "a.png")


def test_text_that_unpacks_to_gigabytes(tmp_path):
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(200_000_000), 9)
    content = png(
        (b"IHDR", header), (b"zTXt", b"a\0\0" + packed), (b"IDAT", zlib.compress(b"\0\0"))
    )
    (tmp_path / "a.png").write_bytes(content)
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from sparkir.restore.pictures import read_picture\n"
        "from sparkir.errors import SparkirError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_picture(Path(sys.argv[1]))\nexcept SparkirError:\n    pass\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sys.exit(after - before > 100_000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    assert subprocess.run(command, check=False).returncode == 0
