import errno
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sparkir.data.codec import GreyLevels, decoded_bytes, read_image, write_png
from sparkir.errors import SparkirError


def png_bytes(array: np.ndarray, *, bits: int, colour_type: int) -> bytes:
    """A PNG encoder for what Pillow cannot write: 16-bit colour."""
    rows = array.astype(f">u{bits // 8}")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp"])
def test_lossless_formats_come_back_exactly(save, photo, suffix):
    image = photo(13, 17)
    options = {"lossless": True} if suffix == "webp" else {}
    read = read_image(save(f"a.{suffix}", image, **options))
    np.testing.assert_array_equal(read, image)
    assert read.flags.writeable


def test_jpeg_is_close(save, photo):
    image = photo(32, 48)
    read = read_image(save("a.jpg", image, quality=98, subsampling=0)).astype(int)
    assert np.abs(read - image).mean() < 2


def test_grey_is_repeated(save):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    read = read_image(save("a.png", grey))
    np.testing.assert_array_equal(read, np.stack([grey] * 3, axis=2))


def test_black_and_white_spans_the_range(save):
    read = read_image(save("a.png", np.array([[True, False]])))
    assert read[0, :, 0].tolist() == [255, 0]


def test_alpha_is_dropped_and_the_colour_under_it_stays(save, photo):
    image = photo(5, 6)
    transparent = np.dstack([image, np.zeros((5, 6), np.uint8)])
    np.testing.assert_array_equal(read_image(save("a.png", transparent)), image)


def test_palette_with_transparency_is_looked_up(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_rounded_to_the_nearest_level(save, suffix):
    values = np.array([[0, 128, 129, 257, 385, 386, 32767, 65406, 65407, 65535]], np.uint16)
    read = read_image(save(f"a.{suffix}", values))
    assert read[0, :, 1].tolist() == [round(v / 257) for v in values[0].tolist()]
    assert (read[..., :1] == read).all()


def test_16_bit_grey_rounds_right_for_every_value(save):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values.astype(np.float64) / 257)
    np.testing.assert_array_equal(read_image(save("a.png", values))[..., 0], expected)


def test_32_bit_integers_within_16_bits_are_read(save):
    assert read_image(save("a.tif", np.array([[0, 65535]], np.int32)))[0, :, 0].tolist() == [0, 255]


def test_16_bit_colour_comes_as_its_high_byte(tmp_path):
    values = np.array([[[0x0000, 0x12FF, 0xFFFF]]])
    (tmp_path / "a.png").write_bytes(png_bytes(values, bits=16, colour_type=2))
    assert read_image(tmp_path / "a.png").tolist() == [[[0x00, 0x12, 0xFF]]]


def test_bytes_in_32_bits_are_refused(save):
    """Of 16 bits they would be nearly black."""
    assert read_image(save("black.tif", np.zeros((2, 2), np.int32))).max() == 0
    with pytest.raises(SparkirError, match=r"0\.\.255 in 32 bits.*convert it to 8 bits"):
        read_image(save("a.tif", np.array([[0, 255]], np.int32)))


@pytest.mark.parametrize("array", [np.array([[-1]], np.int32), np.array([[65536]], np.int32)])
def test_integers_without_a_known_white_are_refused(save, array):
    with pytest.raises(SparkirError, match=r"a\.tif: it holds integers outside 0\.\.65535"):
        read_image(save("a.tif", array))


def test_floats_are_refused(save):
    with pytest.raises(SparkirError, match=r"a\.tif holds floating-point pixels"):
        read_image(save("a.tif", np.array([[0.5]], np.float32)))


@pytest.mark.parametrize("grey16", [False, True])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_honoured(save, photo, orientation, upright, grey16):
    image = photo(5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image[..., 0].astype(np.uint16) * 257 if grey16 else image
    expected = np.repeat(image[..., :1], 3, axis=2) if grey16 else image
    read = read_image(save("a.png", stored, exif=exif))
    np.testing.assert_array_equal(read, upright(expected))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.2, 0.5, 0.9])
def test_truncated_file_is_named(save, photo, suffix, kept):
    path = save(f"cut.{suffix}", photo(40, 40))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(SparkirError, match=rf"cut\.{suffix}: .+; replace or remove"):
        read_image(path)


def test_broken_bytes_never_escape_as_another_error(save, photo):
    rng = np.random.default_rng(0)
    refused = 0
    for suffix in ("png", "jpg", "webp", "tif", "bmp"):
        path = save(f"a.{suffix}", photo(20, 20))
        content = path.read_bytes()
        for _ in range(40):
            broken = bytearray(content)
            for position in rng.integers(min(len(content), 200), size=4):
                broken[position] = rng.integers(256)
            path.write_bytes(broken)
            try:
                assert read_image(path).dtype == np.uint8  # harmless damage is read
            except SparkirError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("make", ["text", "folder", "nothing"])
def test_not_an_image(tmp_path, make):
    path = tmp_path / "a.png"
    if make == "text":
        path.write_text("not an image")
    elif make == "folder":
        path.mkdir()
    with pytest.raises(SparkirError, match=r"a\.png"):
        read_image(path)


def test_decompression_bomb_is_refused_and_a_large_photograph_is_not(save, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writer
        large, bomb = save("large.png", photo(10, 20)), save("bomb.png", photo(10, 21))
    assert read_image(large).shape == (10, 20, 3)
    with pytest.raises(SparkirError, match=r"bomb\.png.*210 pixels"):
        read_image(bomb)


def test_decoded_bytes_are_those_of_the_array(save, photo, tmp_path):
    path = save("a.png", photo(7, 9)[..., 0])
    assert decoded_bytes(path) == read_image(path).nbytes
    assert decoded_bytes(tmp_path / "missing.png") == 0


def test_write_png_round_trip_makes_folders_and_takes_views(tmp_path, photo):
    path = tmp_path / "new" / "folder" / "a.png"
    view = photo(9, 8)[::-1].transpose(1, 0, 2)
    write_png(path, view)
    np.testing.assert_array_equal(read_image(path), view)
    assert list(path.parent.iterdir()) == [path]


def test_write_png_on_a_full_disk_leaves_the_older_file(tmp_path, photo, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, photo(4, 4))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SparkirError, match=r"a\.png: No space left"):
        write_png(path, photo(4, 4, seed=1))
    np.testing.assert_array_equal(read_image(path), photo(4, 4))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_turned_tiffs_are_not_scrambled(tmp_path, photo, mode, orientation):
    """Uncompressed, which Pillow would map by the turned size."""
    image = photo(5, 7)
    grey = image[..., 0]
    if mode == "I;16":
        stored = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        stored = Image.fromarray(image).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (("raw", {}), ("packed", {"compression": "tiff_lzw"})):
        stored.save(tmp_path / f"{name}.tif", exif=exif, **options)
    read = read_image(tmp_path / "raw.tif")
    assert read.shape == (7, 5, 3)
    np.testing.assert_array_equal(read, read_image(tmp_path / "packed.tif"))


def test_black_is_black_where_the_file_counts_from_white(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    grey = np.array([[0, 257, 65535]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="miniswhite")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 254, 0]


def test_12_bits_reach_white():
    levels = GreyLevels(bits=12, black_is_zero=True)
    assert levels.read(np.array([[0, 1, 4095]])).tolist() == [[0, 16, 65535]]


def test_16_bit_colour_in_planes_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    planes = np.zeros((3, 4, 5), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(SparkirError, match="its 16-bit channels lie apart; save it with inter"):
        read_image(tmp_path / "a.tif")
