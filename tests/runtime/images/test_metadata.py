"""Metadata are kept if the target can hold them, scaled with the image, or named in a warning."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from image_files import iptc_resource, jpeg_with, png_chunk, write_png
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from moesr.runtime.images import icc, provenance, reading, writing
from moesr.runtime.images.provenance import Provenance

RNG = np.random.default_rng(4)
RECORD = Provenance(4, "synthetic", {"steps": 2}, "a.png", "0" * 64)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IPTC = b"\x1c\x02\x78\x00\x07caption"
RDF = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" {}</rdf:RDF></x:xmpmeta>'
)
PANORAMA = RDF.format(
    'xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    'GPano:ProjectionType="equirectangular" GPano:FullPanoWidthPixels="32" tiff:Orientation="6">'
    "<GPano:CroppedAreaTopPixels>3</GPano:CroppedAreaTopPixels></rdf:Description>"
).encode()
ALL = [".png", ".jpg", ".webp", ".tif", ".bmp"]


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).convert(mode)


def through(source: Path, target: Path) -> Path:
    """Return a result of `source`, four times as large, as a run writes it."""
    loaded = reading.load(source)
    pixels = loaded.pixels.repeat(4, axis=0).repeat(4, axis=1)
    writing.save(target, reading.with_pixels(loaded, pixels), RECORD)
    assert reading.load(target).pixels.shape[:2] == pixels.shape[:2]
    assert target.suffix == ".bmp" or provenance.read(target) == RECORD
    return target


def with_everything(path: Path) -> Path:
    """Return an image with XMP, IPTC and a comment or text, as its format stores them."""
    image = picture()
    if path.suffix == ".png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", PANORAMA.decode())
        texts.add_text("parameters", "a cat\nSteps: 20")
        raw = iptc_resource(IPTC)[14:]
        texts.add_text("Raw profile type iptc", f"\niptc\n{len(raw):8}\n{raw.hex()}\n", zip=True)
        image.save(path, pnginfo=texts)
    elif path.suffix == ".tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype.update({700: 1, 33723: 7})
        tags[700], tags[33723], tags[270] = PANORAMA, IPTC, "a cat"
        image.save(path, tiffinfo=tags)
    else:
        image.save(path, xmp=PANORAMA)
    if path.suffix == ".jpg":
        packet = b"http://ns.adobe.com/xap/1.0/\0" + PANORAMA
        image.save(path)
        jpeg_with(path, (0xED, iptc_resource(IPTC)), (0xE1, packet), (0xFE, b"a cat"))
    return path


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
def test_xmp_iptc_and_texts_are_kept_beside_the_record(tmp_path: Path, source: str, target: str, caplog):
    caplog.set_level(logging.WARNING, "moesr")
    result = through(with_everything(tmp_path / f"a{source}"), tmp_path / f"b{target}")
    found, content = reading.load(result).metadata, result.read_bytes()
    if target == ".bmp":
        assert "BMP cannot hold" in caplog.text and "XMP" in caplog.text
        return
    assert found.xmp
    assert b'FullPanoWidthPixels="128"' in found.xmp and b"CroppedAreaTopPixels>12<" in found.xmp
    assert b'Orientation="1"' in found.xmp
    if source != ".webp":
        assert b"a cat" in content
        assert (found.iptc == IPTC) == (target != ".webp")
        assert ("IPTC" in caplog.text) == (target == ".webp")


def test_all_kinds_of_text(tmp_path: Path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", "Anna Müller")
    texts.add_text("long", "x" * 5000, zip=True)
    texts.add_itxt("Title", "夕焼け", "ja", "題名")
    picture().save(tmp_path / "a.png", pnginfo=texts)
    late = (b"tEXt", b"Late\0after the pixels")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-12] + png_chunk(*late) + content[-12:])
    through(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as result:
        result.load()
        assert (result.text["Author"], result.text["Title"]) == ("Anna Müller", "夕焼け")
        assert (result.text["Title"].lang, result.text["Title"].tkey) == ("ja", "題名")
        assert result.text["long"] == "x" * 5000 and result.text["Late"] == "after the pixels"
    through(tmp_path / "a.png", tmp_path / "b.jpg")
    assert "Title: 夕焼け".encode() in (tmp_path / "b.jpg").read_bytes()


def test_comments_of_gif_and_jpeg_2000(tmp_path: Path):
    picture("P").save(tmp_path / "a.gif", comment=b"of a gif")
    picture().save(tmp_path / "a.jp2", comment="of a jp2")
    for name in ("a.gif", "a.jp2"):
        result = through(tmp_path / name, tmp_path / f"{name}.png")
        assert Image.open(result).info["Comment"] == f"of a {name[2:]}"


def test_xmp_of_gif_jpeg_2000_and_avif(tmp_path: Path):
    picture("P").save(tmp_path / "a.gif")
    content = (tmp_path / "a.gif").read_bytes()
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    block = b"\x21\xff\x0bXMP DataXMP" + PANORAMA + trailer
    (tmp_path / "a.gif").write_bytes(content[:-1] + block + content[-1:])
    picture().save(tmp_path / "a.jp2")
    box = bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + PANORAMA
    with (tmp_path / "a.jp2").open("r+b") as stream:
        content = stream.read()
        place = content.index(b"jp2c") - 4
        stream.seek(place)
        stream.write(struct.pack(">I4s", len(box) + 8, b"uuid") + box + content[place:])
    names = ["a.gif", "a.jp2"]
    if "AVIF" in Image.SAVE:
        picture().save(tmp_path / "a.avif", xmp=PANORAMA)
        names.append("a.avif")
    for name in names:
        result = through(tmp_path / name, tmp_path / f"{name}.jpg")
        assert b'FullPanoWidthPixels="128"' in result.read_bytes(), name


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", [".png", ".jpg", ".tif", ".bmp"])
def test_printed_size_stays_the_same(tmp_path: Path, source: str, target: str):
    picture().save(tmp_path / f"a{source}", dpi=(300, 150))
    through(tmp_path / f"a{source}", tmp_path / f"b{target}")
    with Image.open(tmp_path / f"b{target}") as result:
        exif = result.getexif()
        found = (exif[282], exif[283]) if target == ".webp" else result.info["dpi"]
        np.testing.assert_allclose([float(v) for v in found], (1200, 600), rtol=1e-3)


def test_no_resolution_is_invented(tmp_path: Path):
    picture().save(tmp_path / "a.tif")
    assert "dpi" not in Image.open(through(tmp_path / "a.tif", tmp_path / "b.png")).info


@pytest.mark.parametrize("turn", [1, 6])
def test_sizes_in_exif(tmp_path: Path, turn: int, caplog: pytest.LogCaptureFixture):
    block = Image.Exif()
    block[0x0112], block[282], block[283], block[296], block[315] = turn, 72.0, 72.0, 2, "Müller".encode()
    details = {0xA002: 8, 0xA003: 6, 0x9214: (4, 3, 2, 2), 0xA20E: 1000.0, 0x927C: b"note"}
    block.get_ifd(0x8769).update(details)
    picture().save(tmp_path / "a.jpg", exif=block)
    with Image.open(through(tmp_path / "a.jpg", tmp_path / "b.jpg")) as result:
        exif = result.getexif()
        found = exif.get_ifd(0x8769)
        size = result.size
    assert (found[0xA002], found[0xA003]) == size == ((32, 24) if turn == 1 else (24, 32))
    assert (exif[282], found[0xA20E], found[0x927C]) == (288, 4000, b"note")
    assert exif[315].encode("latin-1") == "Müller".encode()
    assert found.get(0x9214) == ((16, 12, 8, 8) if turn == 1 else None)
    assert ("SubjectArea" in caplog.text) == (turn == 6)


def geo(path: Path, **values: object) -> Path:
    """Write a georeferenced TIFF; `values` are `t` and a tag's number."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype.update({33550: 12, 33922: 12, 34264: 12, 34735: 3, 34737: 2, 50844: 12, 65000: 2})
    keys = (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, values.pop("raster", 1))
    tags[34735], tags[34737] = keys, "WGS 84|"
    for name, value in values.items():
        tags[int(name[1:])] = value
    picture().save(path, tiffinfo=tags)
    return path


@pytest.mark.parametrize("point", [False, True])
def test_georeference(tmp_path: Path, point: bool):
    """The corners of the image keep their positions on the map."""
    matrix = (10.0, 1.0, 0.0, 500.0, 2.0, -10.0, 0.0, 900.0, *([0.0] * 7), 1.0)
    ties = (3.0, 2.0, 0.0, 530.0, 880.0, 0.0)
    kind = {"raster": 2 if point else 1}
    geo(tmp_path / "a.tif", t33550=(10.0, 10.0, 0.0), t33922=ties, t34264=matrix, **kind)
    through(tmp_path / "a.tif", tmp_path / "b.tif")
    before, after = (Image.open(tmp_path / name).tag_v2 for name in ("a.tif", "b.tif"))
    assert after[33550] == (2.5, 2.5, 0.0)
    assert (after[34735], after[34737]) == (before[34735], before[34737])
    half = 0.5 if point else 0.0  # positions are measured from the center of the first pixel

    def by_matrix(tags, column: float, row: float) -> np.ndarray:
        return np.reshape(tags[34264], (4, 4)) @ (column - half, row - half, 0, 1)

    def by_tie(tags, column: float, row: float) -> tuple[float, float]:
        i, j, _, x, y, _ = tags[33922]
        across, down, _ = tags[33550]
        return x + (column - half - i) * across, y - (row - half - j) * down

    for column, row in ((0, 0), (8, 6), (2, 5)):
        for place in (by_matrix, by_tie):
            np.testing.assert_allclose(place(after, 4 * column, 4 * row), place(before, column, row))


@pytest.mark.parametrize("target", [".png", ".jpg", ".webp", ".bmp"])
def test_lost_georeference_is_named(tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture):
    through(geo(tmp_path / "a.tif", t33550=(10.0, 10.0, 0.0)), tmp_path / f"b{target}")
    assert "georeference (TIFF can)" in caplog.text


@pytest.mark.parametrize(
    ("tag", "value", "words"),
    [
        (270, "ImageJ=1.53\nimages=10\nslices=10\n", "page counts"),
        (270, '<OME xmlns="o"><Pixels SizeX="8" SizeY="6"/></OME>', "sizes in pixels"),
        (270, '{"shape": [10, 6, 8]}', "sizes in pixels"),
        (297, (0, 9), "PageNumber"),
        (50844, tuple(float(i) for i in range(92)), "RPCCoefficient"),
        (65000, "of unknown meaning", "tag 65000"),
    ],
    ids=["imagej", "ome", "tifffile", "page", "rpc", "private"],
)
@pytest.mark.parametrize("target", [".tif", ".png"])
def test_descriptions_of_pixels_are_left_out(
    tmp_path: Path, tag: int, value, words: str, target: str, caplog
):
    geo(tmp_path / "a.tif", **{f"t{tag}": value})
    result = through(tmp_path / "a.tif", tmp_path / f"b{target}")
    assert tag not in Image.open(result).getexif()
    assert words in caplog.text


def test_other_descriptions_are_kept(tmp_path: Path):
    geo(tmp_path / "a.tif", t270="A view of the sea", t315="Anna")
    exif = Image.open(through(tmp_path / "a.tif", tmp_path / "b.png")).getexif()
    assert (exif[270], exif[315]) == ("A view of the sea", "Anna")


GAMMA = (b"gAMA", struct.pack(">I", 100_000))
CHROMATICITIES = (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
CICP = (b"cICP", bytes((12, 13, 0, 1)))  # Display P3
PQ = (b"cICP", bytes((9, 16, 0, 1)))
SRGB_TAG = (b"sRGB", b"\0")
RGB = RNG.integers(0, 256, (6, 8, 3), np.uint8)
GREY = RGB[..., 0]


@pytest.mark.parametrize("tags", [(GAMMA,), (GAMMA, CHROMATICITIES), (SRGB_TAG,), (CICP,), (PQ,)], ids=str)
@pytest.mark.parametrize(("pixels", "color"), [(RGB, 2), (GREY, 0), (GREY.astype(np.uint16) * 257, 0)])
def test_color_tags_are_kept_in_a_png(tmp_path: Path, tags: tuple, pixels: np.ndarray, color: int):
    write_png(tmp_path / "a.png", pixels, color, tags)
    content = through(tmp_path / "a.png", tmp_path / "b.png").read_bytes()
    for kind, data in tags:
        assert content.count(kind + data) == 1


@pytest.mark.parametrize("target", [".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("tags", [(GAMMA,), (GAMMA, CHROMATICITIES), (SRGB_TAG,), (CICP,), (PQ,)], ids=str)
@pytest.mark.parametrize(("pixels", "color"), [(RGB, 2), (GREY, 0)], ids=["rgb", "grey"])
def test_color_tags_become_a_profile(
    tmp_path: Path, tags: tuple, pixels: np.ndarray, color: int, target: str, caplog
):
    write_png(tmp_path / "a.png", pixels, color, tags)
    result = reading.load(through(tmp_path / "a.png", tmp_path / f"b{target}"))
    if tags == (SRGB_TAG,):
        assert result.icc is None and not caplog.records  # a file without a profile is treated as sRGB
    elif tags == (PQ,):
        assert "color tags (PNG can)" in caplog.text
    elif target == ".bmp":
        assert "converted to sRGB" in caplog.text
    else:
        assert result.icc and not caplog.records


def test_profiles_of_color_tags():
    """A gamma of 1 makes the value 0.5 brighter by the factor of sRGB's curve."""
    profile = icc.of_color_tags(dict([GAMMA]), grey=False)
    assert profile
    converted = icc.to_srgb(Image.new("RGB", (1, 1), (128, 128, 128)), profile)
    assert converted and np.abs(np.array(converted.getpixel((0, 0))) - 188).max() <= 1
    wide = icc.of_color_tags(dict([CICP]), grey=False)
    assert wide
    red = icc.to_srgb(Image.new("RGB", (1, 1), (200, 60, 60)), wide)
    assert red and abs(red.getpixel((0, 0))[0] - 216) <= 3  # type: ignore[index]
    grey = icc.of_color_tags(dict([GAMMA]), grey=True)
    converted = icc.to_srgb(Image.new("L", (1, 1), 128), grey or b"")
    assert converted and abs(converted.getpixel((0, 0)) - 188) <= 1  # type: ignore[operator]


def test_results_of_results_hold_one_record(tmp_path: Path):
    source = with_everything(tmp_path / "a.jpg")
    for suffix in ALL[:4]:
        source = through(source, tmp_path / f"b{suffix}")
        assert source.read_bytes().count(b'"source_sha256"') == 1
