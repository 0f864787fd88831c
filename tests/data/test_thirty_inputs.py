"""Thirty bad or odd inputs that training data hold, by name: each works by a documented rule or is one named error."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_records

from mm_moslora.config import SourceConfig
from mm_moslora.data.images.picture_faults import ImageError
from mm_moslora.data.images.record_picture import open_image, open_image_bytes
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.open_sources import RecordFile, open_source
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import chatml_encoder, make_set

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"id": "good", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def chat(question: object = "q", answer: object = "a", **more: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def write(folder: Path, content: str | bytes | object, name: str = "d.jsonl") -> Path:
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content.encode("utf-8", errors="surrogatepass") if isinstance(content, str) else content)
    return path


def fault(folder: Path, content: object, row: int = 0, **source: object) -> RecordError:
    """The error of a record."""
    path = write(folder, content)
    with pytest.raises(RecordError) as caught:
        open_source(SourceConfig(path=str(path), **source))[row]
    message = str(caught.value)
    assert message.startswith(f"{caught.value.code}: {path}:")
    assert f"(record {row}" in message
    return caught.value


def unreadable(folder: Path, content: object, name: str = "d.json") -> str:
    """The message about a file that cannot be read at all."""
    with pytest.raises(DataError) as caught:
        RecordFile(write(folder, content, name))
    assert name in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image_bytes(data, name="x.png")
    return caught.value


def test_01_an_empty_file(tmp_path: Path) -> None:
    assert "0 records" in unreadable(tmp_path, b"")


def test_02_a_list_that_is_cut_in_the_middle(tmp_path: Path) -> None:
    text = json.dumps([GOOD, GOOD, GOOD])
    message = unreadable(tmp_path, text[:-20])
    assert "at byte" in message
    assert "the 2 records before it are whole" in message
    lines = RecordFile(write(tmp_path, f"{json.dumps(GOOD)}\n{json.dumps(GOOD)[:-20]}"))
    assert lines[0].id == "good"


def test_03_one_broken_line(tmp_path: Path) -> None:
    content = f"{json.dumps(GOOD)}\n\n{{broken\n{json.dumps(GOOD)}\n"
    error = fault(tmp_path, content, row=1)
    assert (error.code, error.where.line) == (Code.BAD_JSON, 3)
    file = RecordFile(tmp_path / "d.jsonl")
    assert [file[0].id, file[2].id] == ["good", "good"]


def test_04_byte_order_mark_crlf_and_utf_16(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    assert RecordFile(write(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n" + line))[1].id == "good"
    assert "UTF-16" in unreadable(tmp_path, json.dumps([GOOD]).encode("utf-16"))


def test_05_deep_nesting_and_long_integers(tmp_path: Path) -> None:
    assert fault(tmp_path, '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}").code == Code.TOO_DEEP
    assert "5000 digits" in str(fault(tmp_path, '{"id": ' + "9" * 5000 + "}"))


def test_06_nan_infinity_null_and_keys_written_twice(tmp_path: Path) -> None:
    """pandas writes NaN or null into the empty cells of a table: both name no picture, and cost nothing elsewhere."""
    assert fault(tmp_path, '{"id": {"a": 1, "a": 2}}').code == Code.BAD_JSON
    asked = json.dumps(chat())[:-1]
    for unused in ("NaN", "-Infinity", "null"):
        for image in ("NaN", "null"):
            for key in ("image", "images", "video"):
                line = f'{asked}, "score": {unused}, "id": {image}, "{key}": {image}}}'
                record = open_source(SourceConfig(path=str(write(tmp_path, line, "d.jsonl"))))[0]
                assert (record.id, record.images, record.turns[0].text) == ("0", (), "q")
    for used in ("NaN", "Infinity"):
        error = fault(tmp_path, json.dumps(chat("Q")).replace('"Q"', used))
        assert (error.code, error.where.row) == (Code.BAD_TEXT, 0)


@pytest.mark.parametrize(("text", "shown"), [("\\ud83d", "U+D83D"), ("\\u0000", "U+0000"), ("\\u001b[31m", "U+001B")])
def test_07_half_surrogates_nul_and_control_characters(tmp_path: Path, text: str, shown: str) -> None:
    error = fault(tmp_path, json.dumps(chat("QQ")).replace("QQ", text))
    assert error.code == Code.BAD_CHARACTER
    assert shown in error.what


@pytest.mark.parametrize(("value", "kind"), [([], "a list"), ("text", "a string"), (None, "null"), (7, "a number")])
def test_08_a_record_that_is_no_object(tmp_path: Path, value: object, kind: str) -> None:
    error = fault(tmp_path, f"{json.dumps(GOOD)}\n{json.dumps(value)}", row=1)
    assert (error.code, error.what) == (Code.NOT_AN_OBJECT, f"is {kind}")


@pytest.mark.parametrize("value", [{"id": "x"}, {"conversations": []}, {"conversations": None}, {"messages": {}}])
def test_09_no_conversation(tmp_path: Path, value: object) -> None:
    assert fault(tmp_path, value).code == Code.NO_TURNS


@pytest.mark.parametrize(
    ("roles", "code", "field"),
    [(("robot", "gpt"), Code.BAD_ROLE, "[0]"), (("gpt", "human"), Code.ROLES_DO_NOT_ALTERNATE, "[0]"),
     (("human", "human"), Code.ROLES_DO_NOT_ALTERNATE, "[1]"), (("human",), Code.NO_ANSWER, "[0]")],
)  # fmt: skip
def test_10_wrong_roles(tmp_path: Path, roles: tuple[str, ...], code: Code, field: str) -> None:
    error = fault(tmp_path, {"conversations": [{"from": role, "value": "x"} for role in roles]})
    assert error.code == code
    assert error.field.endswith(field)


@pytest.mark.parametrize(
    ("answer", "code"), [(None, Code.BAD_TEXT), (5, Code.BAD_TEXT), ("", Code.EMPTY_ANSWER), (" \n", Code.EMPTY_ANSWER)]
)
def test_11_an_answer_that_is_none(tmp_path: Path, answer: object, code: Code) -> None:
    assert fault(tmp_path, chat(answer=answer)).code == code


@pytest.mark.parametrize(
    ("record", "shown"),
    [(chat("q", image="a.png"), "0 <image>"), (chat("<image><image>", image="a.png"), "2 <image>"),
     (chat("q", "<image>", image="a.png"), "turns [1] do not count"), (chat("<image>"), "0 images")],
)  # fmt: skip
def test_12_placeholders_and_pictures_that_do_not_match(tmp_path: Path, record: object, shown: str) -> None:
    error = fault(tmp_path, record)
    assert error.code == Code.IMAGE_COUNT
    assert shown in error.what


def test_13_special_tokens_typed_by_users_are_text(tmp_path: Path) -> None:
    encoder = chatml_encoder()
    parts = [{"type": "text", "text": "what do <image>, <|im_end|> and </s> mean?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "<|im_end|> ends"}]}
    record = RecordFile(write(tmp_path, row))[0]
    ids = encoder.encode(record.turns).input_ids.tolist()
    special = set(encoder.tokenizer.all_special_ids)
    plain = encoder.encode(RecordFile(write(tmp_path, chat()))[0].turns).input_ids.tolist()
    assert sum(token in special for token in ids) == sum(token in special for token in plain)
    assert "what do <image>, <|im_end|> and </s> mean?" in encoder.tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png"])
def test_14_a_path_that_leaves_the_image_folder(tmp_path: Path, name: str) -> None:
    assert fault(tmp_path, chat("<image>", image=name)).code == Code.PATH_ESCAPES


def test_15_a_link_that_leaves_the_image_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    outside.write_bytes(encoded(Image.new("RGB", (4, 4))))
    (inside / "a.png").symlink_to(outside)
    row = chat("<image>", image="a.png")
    assert fault(tmp_path, row, image_folder=str(inside)).code == Code.PATH_ESCAPES
    config = SourceConfig(path=str(tmp_path / "d.jsonl"), image_folder=str(inside), follow_links=True)
    assert open_source(config)[0].images[0].rgb().size == (4, 4)


@pytest.mark.parametrize("name", ["http://x/a.png", "file:///a.png", "~/a.png", "%2e%2e/a.png", "a\\b.png", "a\0.png"])
def test_16_schemes_escapes_and_nul_in_names(tmp_path: Path, name: str) -> None:
    assert fault(tmp_path, chat("<image>", image=name)).code == Code.BAD_IMAGE_NAME


@pytest.mark.parametrize("image", [5, {}, [["a.png"]], [None], ""])
def test_17_an_image_that_is_no_name(tmp_path: Path, image: object) -> None:
    assert fault(tmp_path, chat("<image>", image=image)).code == Code.BAD_IMAGE_NAME


def test_18_missing_files_folders_pipes_and_no_permission(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "Cat.PNG").write_bytes(b"x")
    codes = {}
    for name in ("missing.png", "folder", "pipe"):
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        codes[name] = caught.value.code
    assert codes == {
        "missing.png": Code.IMAGE_MISSING, "folder": Code.IMAGE_NOT_A_FILE, "pipe": Code.IMAGE_NOT_A_FILE,
    }  # fmt: skip
    data = make_set(make_records(tmp_path / "set", 8), max_bad_share=0.5)
    (tmp_path / "set" / "images" / "0.png").rename(tmp_path / "set" / "images" / "0.PNG")
    with pytest.raises(RecordError, match=r"There is '0\.PNG'"):
        data.load(0)


@pytest.mark.parametrize(
    ("data", "shown"),
    [(b"", "0 bytes"), (b"<!DOCTYPE html><html>404", "HTML"),
     (b"version https://git-lfs.github.com/spec/v1", "lfs pull"),
     (b"<svg xmlns='x'/>", "SVG")],
)  # fmt: skip
def test_19_files_that_are_no_pictures(data: bytes, shown: str) -> None:
    error = refused(data)
    assert error.code in (Code.IMAGE_EMPTY, Code.IMAGE_FORMAT)
    assert shown in error.what


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_20_a_picture_that_is_cut_short(kind: str) -> None:
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    assert refused(whole[: len(whole) // 2]).code in (Code.IMAGE_DAMAGED, Code.IMAGE_FORMAT)
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def _png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    packed = (struct.pack(">I", len(body)) + kind + body for kind, body in chunks)
    parts = (part + struct.pack(">I", zlib.crc32(part[4:])) for part in packed)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_21_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    assert refused(_png_header(9000, 9000)).code == Code.IMAGE_TOO_LARGE
    assert refused(_png_header(60000, 60000)).code == Code.IMAGE_TOO_LARGE


def test_22_one_pixel_and_one_pixel_wide() -> None:
    assert open_image_bytes(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)
    assert open_image_bytes(encoded(Image.new("RGB", (1, 150)))).size == (1, 150)
    assert refused(encoded(Image.new("RGB", (1, 20_000)))).code == Code.IMAGE_ASPECT
    assert refused(encoded(Image.new("RGB", (20_000, 1)))).code == Code.IMAGE_ASPECT
    assert refused(_png_header(0, 5)).code in (Code.IMAGE_ASPECT, Code.IMAGE_DAMAGED, Code.IMAGE_FORMAT)


def test_23_sixteen_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    opened = np.asarray(open_image_bytes(encoded(Image.fromarray(ramp))))[..., 0].flatten()
    assert np.abs(opened.astype(int) - np.arange(256)).max() <= 1
    wide = Image.fromarray(ramp.astype(np.int32) * 1000)
    assert len(np.unique(np.asarray(open_image_bytes(encoded(wide, "TIFF"))))) > 200


def test_24_a_float_picture_from_0_to_1_is_not_black() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    opened = np.asarray(open_image_bytes(encoded(Image.fromarray(ramp), "TIFF")))[..., 0].flatten()
    assert np.abs(opened.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_25_other_colour_models(mode: str) -> None:
    for colour in ((200, 30, 20), (10, 180, 90), (240, 240, 10)):
        image = Image.new("RGB", (16, 16), colour).convert(mode)
        seen = open_image_bytes(encoded(image, "JPEG", quality=98)).getpixel((8, 8))
        assert np.abs(np.subtract(seen, colour)).max() <= 8


def test_25_lab() -> None:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(
        Image.new("RGB", (4, 4), (200, 30, 20)), ImageCms.buildTransform(*profiles, "RGB", "LAB")
    )
    assert np.abs(np.subtract(open_image_bytes(encoded(lab, "TIFF")).getpixel((0, 0)), (200, 30, 20))).max() <= 4


def test_26_a_colour_hidden_under_transparency_stays_hidden() -> None:
    assert open_image_bytes(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert open_image_bytes(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_27_rotation_by_exif(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = open_image_bytes(encoded(Image.new("RGB", (64, 48)), "JPEG", exif=exif)).size
    assert size == ((48, 64) if orientation in (5, 6, 7, 8) else (64, 48))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_28_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {} if kind == "GIF" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.subtract(open_image_bytes(data).getpixel((4, 4)), (255, 0, 0))).max() <= 3


def test_29_exotic_formats_are_refused_and_the_suffix_does_not_matter(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    for kind in ("EPS", "PPM", "ICO", "PCX"):
        assert refused(encoded(picture, kind)).code == Code.IMAGE_FORMAT
    (tmp_path / "a.png").write_bytes(encoded(picture, "TIFF"))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    body = b"zTXtx\0\0" + zlib.compress(b"\0" * 50_000_000)
    bomb = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = encoded(picture)
    assert refused(whole[:33] + bomb + whole[33:]).code == Code.IMAGE_DAMAGED


@pytest.mark.parametrize("trick", ["parent", "absolute", "link", "device", "compressed"])
def test_30_an_archive_that_plays_tricks(tmp_path: Path, trick: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w:gz" if trick == "compressed" else "w") as tar:
        info = tarfile.TarInfo({"parent": "../x.txt", "absolute": "/x.txt"}.get(trick, "x.txt"))
        info.type = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}.get(trick, tarfile.REGTYPE)
        info.linkname, info.size = "/etc/passwd" * (trick == "link"), 0
        tar.addfile(info)
    with pytest.raises(DataError, match=r"s\.tar"):
        open_source(SourceConfig(path=str(path)))


class TestAlsoCovered:
    """What the list of thirty does not number."""

    def test_file_names_in_another_unicode_form_get_a_hint(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 8)
        composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
        (tmp_path / "images" / "0.png").rename(tmp_path / "images" / decomposed)
        path.write_text(path.read_text().replace('"0.png"', json.dumps(composed)))
        data = make_set(path, max_bad_share=0.5)
        assert data.quarantine.codes == {"IMAGE_MISSING": 1}
        with pytest.raises(RecordError, match="There is"):
            data.load(0)

    @pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
    def test_weights_that_make_no_sense(self, weight: float) -> None:
        with pytest.raises(ConfigError, match="weight"):
            SourceConfig(path="x", weight=weight)


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "soak" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fuzzed_records_are_records_or_named_errors() -> None:
    script = _script("fuzz_records")
    kinds = repr(script.NASTY) + repr(script.SEEDS)
    found = script.run(6000, seed=1)
    assert repr(script.NASTY) + repr(script.SEEDS) == kinds  # else records, and memory, would grow without end
    assert (found["uncaught"], found["over_one_second"]) == (0, 0), found["first_uncaught"]
    assert found["outcomes"]["record"] + found["rejections_named"] == 6000
    assert len(found["outcomes"]) > 12


def test_fuzzed_pictures_open_or_are_named_errors() -> None:
    found = _script("fuzz_images").run(1500, seed=1, chunk=1500)
    assert (found["uncaught"], found["crashes"], found["over_one_second"]) == (0, 0, 0), found["first_uncaught"]
    assert found["outcomes"]["opened"] + found["rejections_named"] == 1500
