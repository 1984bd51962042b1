from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from statewise.images import load_images

GENERATOR = np.random.default_rng(0)


def draw(height: int, width: int, channels: int = 3) -> Any:
    return GENERATOR.integers(0, 256, (height, width, channels)[: 2 if channels == 1 else 3], dtype=np.uint8)


def put(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def arrays(count: int = 20, kinds: int = 3, **others: Any) -> dict[str, Any]:
    return {
        "train_images": draw(count * 4, 4, 3).reshape(count, 4, 4, 3),
        "train_labels": np.arange(count) % kinds,
    } | others


def saved(path: Path, given: dict[str, Any]) -> str:
    np.savez(path / "d.npz", **given)
    return str(path / "d.npz")


def test_digits_are_sklearns_and_their_split_keeps_every_class() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    data = load_images("digits")
    assert len(data.train.labels) + len(data.test.labels) == 1797
    assert (data.side, data.channels, data.mirrored, len(data.classes)) == (8, 1, False, 10)
    for label in range(10):
        kept, held = (int((part.labels == label).sum()) for part in (data.train, data.test))
        assert held == round(0.2 * (kept + held))
    assert data.train.read(0).max() == 255  # 16 of 16
    assert load_images("digits").sha256 == data.sha256


def test_an_npz_is_what_it_holds(tmp_path: Path) -> None:
    given = arrays(test_images=draw(8, 4, 3).reshape(2, 4, 4, 3), test_labels=np.array([2, 0], np.uint8))
    data = load_images(saved(tmp_path, given | {"classes": np.array(["a", "b", "c"])}))
    assert data.classes == ("a", "b", "c")
    assert (data.side, data.channels) == (4, 3)
    assert np.array_equal(data.train.read(7), given["train_images"][7])
    assert data.test.labels.tolist() == [2, 0]
    assert load_images(saved(tmp_path, given | {"classes": np.array([b"a", b"b", b"c"])})).classes == ("a", "b", "c")
    given["train_images"] = given["train_images"] ^ np.uint8(1)
    assert load_images(saved(tmp_path, given | {"classes": np.array(["a", "b", "c"])})).sha256 != data.sha256


def test_gray_arrays_have_one_channel(tmp_path: Path) -> None:
    data = load_images(saved(tmp_path, arrays(train_images=draw(100, 6, 1).reshape(20, 5, 6))))
    assert (data.channels, data.side) == (1, None)
    assert data.train.read(0).shape == (5, 6, 1)


def test_packed_files(tmp_path: Path) -> None:
    pictures, files = [draw(3, 5), draw(6, 6), draw(2, 2), draw(7, 4)], []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    packed = np.concatenate(files)
    offsets = np.cumsum([0, *map(len, files)])
    given = {
        f"{part}_{name}": value
        for part in ("train", "test")
        for name, value in {"jpeg": packed, "offsets": offsets, "labels": np.array([0, 1, 0, 1])}.items()
    }
    data = load_images(saved(tmp_path, given))
    assert (data.side, data.channels) == (None, 3)
    assert all(np.array_equal(data.train.read(number), picture) for number, picture in enumerate(pictures))
    with pytest.raises(ValueError, match=r"train_offsets must rise from 0"):
        load_images(saved(tmp_path, given | {"train_offsets": offsets[::-1].copy()}))
    broken = packed.copy()
    broken[offsets[2] : offsets[2] + 8] = 0
    with pytest.raises(ValueError, match=r"train, image 2: not an image"):
        load_images(saved(tmp_path, given | {"train_jpeg": broken}))


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"images": np.zeros(3)}, "array 'images' is none of"),
        ({"train_labels": np.arange(20) % 3 - 1}, r"train_labels\[0\] is -1; accepted are 0..1"),
        ({"classes": np.array(["a", "b"])}, r"train_labels\[2\] is 2; accepted are 0..1"),
        ({"train_labels": np.zeros(20, np.int64)}, "of 1 class"),
        ({"train_labels": np.zeros(19, np.int64)}, "20 train_images, but 19 train_labels"),
        ({"train_labels": np.zeros(20)}, "accepted is .N,. of integers"),
        ({"train_images": np.zeros((20, 4, 4, 3))}, "float64; accepted is"),
        ({"train_images": np.zeros((20, 3, 4, 4), np.uint8)}, r"\(20, 3, 4, 4\)"),
        ({"train_jpeg": np.zeros(3, np.uint8)}, "accepted is train_images, or"),
        ({"test_labels": np.zeros(3, np.int64)}, "accepted is test_images, or"),
        ({"test_images": np.zeros((1, 4, 4), np.uint8), "test_labels": np.zeros(1, np.int64)}, "differ in channels"),
        ({"train_labels": np.array([{}] * 20)}, "not an .npz of images"),
    ],
)
def test_an_npz_of_another_kind_is_refused(tmp_path: Path, others: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_images(saved(tmp_path, arrays(**others)))


def test_files_that_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"not an .npz of images"):
        load_images(str(tmp_path / "text.npz"))
    with pytest.raises(FileNotFoundError, match="no images at"):
        load_images(str(tmp_path / "absent"))


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for name, count in (("cat", 10), ("dog", 5), ("eel", 2)):
        for number in range(count):
            put(tmp_path / name / f"{number}.png", draw(3 + number, 4, 1 if name == "eel" else 3))
    (tmp_path / "cat" / ".hidden").write_text("not looked at")
    data = load_images(str(tmp_path))
    assert data.classes == ("cat", "dog", "eel")
    assert np.bincount(data.test.labels).tolist() == [2, 1, 1]
    assert (data.channels, data.side) == (3, None)
    assert data.train.read(len(data.train.labels) - 1).shape[2] == 3  # gray among colours
    for file in (tmp_path / "eel").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"\.png: cannot be read any more"):
        data.train.read(len(data.train.labels) - 1)
    put(tmp_path / "eel" / "0.png", draw(3, 4))
    (tmp_path / "dog" / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"note\.txt: not an image"):
        load_images(str(tmp_path))


def test_a_folder_with_a_test_part(tmp_path: Path) -> None:
    for part, name in (("train", "a"), ("train", "b"), ("val", "b")):
        put(tmp_path / part / name / "0.png", draw(4, 4, 1))
    data = load_images(str(tmp_path))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1])
    assert (data.channels, data.side) == (1, 4)
    put(tmp_path / "val" / "c" / "0.png", draw(4, 4))
    with pytest.raises(ValueError, match="class 'c' is not among"):
        load_images(str(tmp_path))


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folders in it"):
        load_images(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a: no images in it"):
        load_images(str(tmp_path))
    put(tmp_path / "a" / "0.png", draw(4, 4))
    with pytest.raises(ValueError, match="of 1 class"):
        load_images(str(tmp_path))
    put(tmp_path / "b" / "0.png", draw(4, 4))
    with pytest.raises(ValueError, match="too few to hold some out"):
        load_images(str(tmp_path))


def test_the_data_of_tests(shared: Path) -> None:
    path = shared / "data" / "vision" / "cifar10_jpeg_subset.npz"
    if not path.exists():
        pytest.skip("no CIFAR-10 subset beside the checkout")
    data = load_images(str(path))
    assert (len(data.train.labels), len(data.test.labels), data.side, data.channels) == (8000, 2000, 32, 3)
    assert data.train.read(7999).shape == (32, 32, 3)
