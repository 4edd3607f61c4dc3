"""Images and latents of every kind arrive as they are, and what does not fit is named."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from adaptive.models import DiffusionConfig
from launch.data.images import DiffusionImageConfig, ImageConfig, ImageData, tile, to_pixels
from launch.run.averaging import AverageConfig
from launch.run.errors import BadInput

DIGITS = {"image_size": 8, "channels": 1, "patch_size": 2, "num_classes": 10}
SMALL = {"image_size": 4, "patch_size": 1, "num_classes": 2, "dim": 16, "num_heads": 2}


def data_of(path: Path | None, *, held_out: float = 0.0, **model: int) -> ImageData:
    config = ImageConfig(path=None if path is None else str(path), validation_fraction=held_out)
    return ImageData(config, DiffusionConfig(**{**SMALL, **model}))


def test_digits_are_scikit_learns_in_the_range_minus_one_to_one() -> None:
    data = data_of(None, held_out=0.1, **DIGITS)
    digits = load_digits()
    everything = np.sort(np.concatenate([data.train, data.validation]))
    assert everything.tolist() == list(range(1797))
    assert 0.07 < len(data.validation) / 1797 < 0.13
    images = data.images([5, 70])
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[1, 0] * 8 + 8, digits.images[70])
    assert data.labels([5, 70]).tolist() == digits.target[[5, 70]].tolist()


def test_rendered_pictures_are_the_same_everywhere_and_tell_their_class() -> None:
    data, again = (
        ImageData(ImageConfig(rendered=600), DiffusionConfig(image_size=32, channels=3))
        for _ in range(2)
    )
    images, labels = data.images(range(600)), data.labels(range(600))
    assert images.shape == (600, 3, 32, 32)
    torch.testing.assert_close(again.images([599, 7]), images[[599, 7]], rtol=0, atol=0)
    # Recorded when it was written: pictures of a number stay what they were.
    torch.testing.assert_close(
        images[7, :, 16, 16], torch.tensor([-0.0461, 0.4635, 0.4374]), atol=1e-4, rtol=0
    )
    assert labels.bincount().tolist() == [60] * 10
    assert -1 <= images.min() < -0.9 < 0.9 < images.max() <= 1
    grey = ImageData(ImageConfig(rendered=4), DiffusionConfig(image_size=16, channels=1))
    assert grey.images([3]).shape == (1, 1, 16, 16)
    with pytest.raises(BadInput, match=r"data.rendered=4: draws 1 or 3 channels, not 4x8x8"):
        ImageData(ImageConfig(rendered=4), DiffusionConfig(image_size=8, channels=4))
    for wrong in ({"rendered": 0}, {"rendered": 3, "path": "somewhere"}):
        with pytest.raises(ValueError, match=r"rendered=.: must be above 0, and path null"):
            ImageConfig(**wrong)


def test_every_epoch_visits_every_training_image_once_in_its_own_order() -> None:
    data = data_of(None, held_out=0.1, **DIGITS)
    size = len(data.train)
    epochs = [[data.train_index(0, e * size + i) for i in range(size)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == data.train.tolist()
    assert epochs[0] != epochs[1]
    assert epochs[0] != [data.train_index(1, i) for i in range(size)]


def write_pictures(root: Path, *, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    for number, name in enumerate(("ants", "bees")):
        (root / name).mkdir()
        colour = 255 * number if mode == "L" else (255 * number, 0, 51)
        for copy in range(2):
            Image.new(mode, size, colour).save(root / name / f"{copy}.png")


def test_pictures_are_labelled_by_their_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = data_of(tmp_path, channels=3)
    assert data.source.classes == ["ants", "bees"]
    assert data.labels(range(4)).tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(data.images([2])[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_keeps_its_range(tmp_path: Path, channels: int) -> None:
    (tmp_path / "a").mkdir()
    grey = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a" / "x.png")
    image = data_of(tmp_path, channels=channels).images([0])[0]
    expected = torch.linspace(-1, 1, 16).view(4, 4).expand(channels, 4, 4)
    # Pictures have 8 bits a channel: half a step.
    torch.testing.assert_close(image, expected, atol=1 / 255, rtol=0)


def test_a_photograph_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture = Image.fromarray(np.eye(4, dtype=np.uint8) * 255).transpose(Image.Transpose.ROTATE_90)
    picture.putpixel((0, 1), 128)
    orientation = picture.getexif()
    orientation[0x0112] = 6  # the top of the scene is on the left
    picture.save(tmp_path / "a" / "x.png", exif=orientation)
    seen = np.rot90(np.asarray(picture), -1).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(data_of(tmp_path, channels=1).images([0])[0, 0], seen, atol=1e-6)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / ".ipynb_checkpoints" / "0.png")
    data = data_of(tmp_path, channels=3)
    assert data.source.classes == ["ants", "bees"]
    assert data.labels(range(4)).tolist() == [0, 0, 1, 1]


def test_pictures_of_mixed_size_are_refused_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    Image.new("RGB", (4, 5)).save(tmp_path / "bees" / "odd.png")
    with pytest.raises(BadInput, match=r"bees/odd.png: is 4x5 pixels, must be 4x4"):
        data_of(tmp_path, channels=3)


def test_a_picture_that_was_not_verified_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    Image.new("RGB", (4, 5)).save(tmp_path / "ants" / "0.png")
    model = DiffusionConfig(**SMALL, channels=3)
    config = ImageConfig(path=str(tmp_path), validation_fraction=0.0)
    data = ImageData(config, model, verify=False)
    with pytest.raises(BadInput, match=r"ants/0.png: is 4x5 pixels, must be 4x4"):
        data.images([0])
    whole = (tmp_path / "bees" / "0.png").read_bytes()
    (tmp_path / "bees" / "0.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(BadInput, match=r"bees/0.png: is no intact picture"):
        data.images([2])


def test_a_broken_picture_is_refused_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "ants" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match=r"ants/0.png: is no intact picture"):
        data_of(tmp_path, channels=3)


def test_numpy_latents_are_read_from_class_folders(tmp_path: Path) -> None:
    arrays = {}
    for name, shape in (("a", (3, 2, 4, 4)), ("b", (2, 4, 4))):
        (tmp_path / name).mkdir()
        arrays[name] = np.random.default_rng(0).normal(size=shape).astype(np.float16)
        np.save(tmp_path / name / "x.npy", arrays[name])
    data = data_of(tmp_path, channels=2)
    assert data.labels(range(4)).tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(data.images([1])[0], arrays["a"][1].astype(np.float32))
    np.testing.assert_array_equal(data.images([3])[0], arrays["b"].astype(np.float32))


def test_safetensors_latents_bring_their_labels(tmp_path: Path) -> None:
    images = [torch.randn(n, 2, 4, 4) for n in (2, 3)]
    for number, part in enumerate(images):
        labels = torch.arange(len(part)) % 2
        save_file({"images": part, "labels": labels}, tmp_path / f"{number}.safetensors")
    data = data_of(tmp_path, channels=2)
    assert data.labels(range(5)).tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(data.images([1, 4]), torch.stack([images[0][1], images[1][2]]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": torch.zeros(2, 2, 4, 4)}, "x.safetensors: has no tensor `labels`"),
        (
            {"images": torch.zeros(2, 2, 4, 5), "labels": torch.zeros(2).long()},
            "x.safetensors: images are 2x4x5, must be 2x4x4",
        ),
        (
            {"images": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(3).long()},
            "x.safetensors: labels must be 2 integers, one an image",
        ),
        (
            {"images": torch.tensor(0.0), "labels": torch.zeros(0).long()},
            "x.safetensors: images are single numbers, must be 2x4x4",
        ),
        (
            {"images": torch.zeros(0, 2, 4, 4), "labels": torch.zeros(0).long()},
            r"data.path=.*: its files hold no image",
        ),
        (
            {"images": torch.zeros(2, 2, 4, 4), "labels": torch.tensor([0, 7])},
            r"label 7 of image 1: must be below model.num_classes=2",
        ),
        (
            {"images": torch.zeros(2, 2, 4, 4), "labels": torch.tensor([-1, 0])},
            r"label -1 of image 0: must be below",
        ),
    ],
)
def test_tensor_files_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict, message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=message):
        data_of(tmp_path, channels=2)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        data_of(tmp_path / "none")
    with pytest.raises(BadInput, match=r"holds none of .png, "):
        data_of(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(BadInput, match=r"loose.png: must be in a folder named for its class"):
        data_of(tmp_path, channels=1)
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "x.npy", np.zeros((1, 4, 4)))
    with pytest.raises(BadInput, match="use one kind a folder"):
        data_of(tmp_path, channels=1)
    (tmp_path / "loose.png").unlink()
    for content in (b"junk", b""):
        (tmp_path / "a" / "y.npy").write_bytes(content)
        with pytest.raises(BadInput, match=r"y.npy: is no .npy array"):
            data_of(tmp_path, channels=1)
    with (tmp_path / "a" / "y.npy").open("wb") as file:
        np.savez(file, images=np.zeros((1, 4, 4)))
    with pytest.raises(BadInput, match=r"y.npy: is no .npy array: holds several"):
        data_of(tmp_path, channels=1)


def test_the_digits_need_their_own_shape() -> None:
    with pytest.raises(BadInput, match="the digits are 1x8x8, the model takes 3x4x4"):
        data_of(None, channels=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AverageConfig(decay=1.0), r"decay=1.0: must be in \[0, 1\)"),
        (lambda: ImageConfig(path=""), "path='': must name a file or folder"),
        (lambda: DiffusionImageConfig(class_drop=2), r"class_drop=2: must be in \[0, 1\]"),
        (lambda: ImageConfig(validation_fraction=1), r"validation_fraction=1: must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_pixels_round_trip_and_tiles_keep_their_places() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    pixels = to_pixels(images)
    assert pixels.shape == (4, 2, 2, 1)
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
    sheet = tile(pixels, 2, gap=1, zoom=1)
    assert sheet.shape == (7, 7, 1)
    assert sheet[1, 4, 0] == 128
    assert sheet[4, 1, 0] == 255
    assert tile(pixels, 3, zoom=2).shape == (14, 20, 1)


def test_held_out_images_of_every_class_come_at_all_places(tmp_path: Path) -> None:
    """Validation takes the times of noise in their order; folders come class after class."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.zeros((200, 2, 4, 4), np.float32))
    data = data_of(tmp_path, held_out=0.4, channels=2)
    labels = data.labels(data.validation).double()
    places = torch.arange(len(labels)).double()
    assert len(set(data.validation.tolist())) == len(labels) > 100
    # Random orders of so many stay within four standard deviations.
    correlation = torch.corrcoef(torch.stack([labels, places]))[0, 1]
    assert correlation.abs() < 4 / len(labels) ** 0.5


def test_a_picture_of_too_many_pixels_is_one_line(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    write_pictures(tmp_path)
    path = tmp_path / "ants" / "0.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(BadInput, match=r"ants/0.png: is no intact picture: .*3600000000 pixels"):
        data_of(tmp_path, channels=3)
