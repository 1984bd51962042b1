from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from statewise.images import Preprocessing, augment, decode_image, fit_image, read_image, read_preprocessing
from statewise.images.decode import image_header


def encoded(image: Any, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def ramp(height: int, width: int, channels: int = 1) -> Any:
    return (np.arange(height * width * channels) % 256).astype(np.uint8).reshape(height, width, channels)


def test_kinds_of_images() -> None:
    colour = ramp(2, 3, 3)
    assert np.array_equal(decode_image(encoded(Image.fromarray(colour))), colour)
    gray = ramp(2, 3)
    found = decode_image(encoded(Image.fromarray(gray[:, :, 0])))
    assert np.array_equal(found, np.repeat(gray, 3, 2))
    assert decode_image(encoded(Image.fromarray(colour)), 1).shape == (2, 3, 1)
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert decode_image(encoded(deep), 1)[0, :, 0].tolist() == [0, 1, 255]
    clear = Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], np.uint8))
    assert decode_image(encoded(clear))[0].tolist() == [[0, 0, 0], [200, 100, 50]]
    assert decode_image(encoded(Image.fromarray(gray[:, :, 0] > 2)), 1)[:, :, 0].tolist() == [[0, 0, 0], [255] * 3]


def test_an_image_on_its_side_is_turned() -> None:
    picture = Image.fromarray(ramp(2, 3)[:, :, 0])
    how = Image.Exif()
    how[0x0112] = 6
    assert decode_image(encoded(picture, exif=how), 1).shape == (3, 2, 1)


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.png: not an image of a known format"):
        read_image(tmp_path / "a.png")
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    with pytest.raises(ValueError, match="x: a damaged image"):
        decode_image(whole[: len(whole) // 2], name="x")
    with pytest.raises(ValueError, match="y: not an image that can be read"):
        decode_image(b"BM" + bytes(range(60)), name="y")
    with pytest.raises(ValueError, match="channels is 2"):
        decode_image(whole, 2)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_views_have_the_size_and_follow_from_the_generator(h: int, w: int, size: int, channels: int, seed: int) -> None:
    image = ramp(h, w, channels)
    assert fit_image(image, size).shape == (size, size, channels)
    for crop in ("none", "shift", "resized"):
        views = [augment(image, size, np.random.default_rng(seed), crop=crop, flip=True) for _ in range(2)]
        assert views[0].shape == (size, size, channels)
        assert np.array_equal(*views)


def test_the_middle_is_cut_out() -> None:
    image = np.zeros((4, 10, 1), np.uint8)
    image[:, 3:7] = 200
    assert (fit_image(image, 4) == 200).all()
    assert fit_image(image[:, :4], 4).base is image.base or np.array_equal(fit_image(image[:, :4], 4), image[:, :4])


def test_a_shift_moves_and_a_flip_mirrors() -> None:
    image = ramp(16, 16)
    seen = set()
    for seed in range(200):
        view = augment(image, 16, np.random.default_rng(seed), crop="shift", flip=False)
        middle = int(view[8, 8, 0])
        seen.add((middle // 16 - 8, middle % 16 - 8))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    views = [augment(image, 16, np.random.default_rng(seed), crop="none", flip=True) for seed in range(200)]
    mirrored = sum(np.array_equal(view, image[:, ::-1]) for view in views)
    assert mirrored + sum(np.array_equal(view, image) for view in views) == 200
    assert 70 < mirrored < 130
    with pytest.raises(ValueError, match="crop is 'half'"):
        augment(image, 16, np.random.default_rng(0), crop="half", flip=False)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of what it passes over
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.integers(0, 2**32))
def test_no_file_does_worse_than_being_refused(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    how = Image.Exif()
    how[0x0112] = 6
    content = bytearray(encoded(Image.fromarray(ramp(9, 12, 3)), kind, exif=how))
    for place in generator.integers(0, min(len(content), int(generator.choice([40, 400]))), 4):
        content[place] = generator.integers(0, 256)
    for read in (decode_image, lambda found: image_header(found, "x")):
        with contextlib.suppress(ValueError):
            read(bytes(content))


def test_preprocessing_by_hand(tmp_path: Path) -> None:
    rule = Preprocessing(2, 1, (0.5,), (0.25,), ("no", "yes"))
    image = np.array([[[0], [255]], [[51], [102]]], np.uint8)
    assert np.allclose(rule([image]), [[[[-2, 2], [-1.2, -0.4]]]], atol=1e-6)
    assert (rule.name(1), rule.name(2)) == ("yes", "2")
    assert read_preprocessing(tmp_path) is None
    (tmp_path / "images.json").write_text(rule.to_json())
    assert read_preprocessing(tmp_path) == rule
    for wrong in (
        '{"image_size": 0}',
        "[",
        "[1]",
        rule.to_json().replace("0.25", "0.0"),
        rule.to_json().replace("1", "2"),
    ):
        (tmp_path / "images.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"images\.json"):
            read_preprocessing(tmp_path)
