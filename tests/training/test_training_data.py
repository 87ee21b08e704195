"""Training samples are cut from photographs: unusable files are skipped, and samples are reproducible."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny_training as tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moesr.runtime.errors import InputError
from moesr.runtime.images.resize import imresize
from moesr.training.data import photographs
from moesr.training.data.crops import Crops, Degradation, condition, resize_batch
from moesr.training.recipe import Augmentation
from moesr.training.seeded_random import SampleRng, seed_of


@pytest.fixture(autouse=True)
def fresh_cache():
    photographs.decoded.clear()


def test_corrupt_and_small_files_are_skipped_and_reported(tmp_path, caplog):
    folder = tiny.photographs(tmp_path / "photos")
    (folder / "deep").mkdir()
    (folder / "photo_1.png").rename(folder / "deep" / "photo_1.PNG")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image, and not said to be one")
    Image.new("RGB", (40, 31)).save(folder / "small.png")
    found = photographs.scan(folder).at_least(32)
    assert [p.name for p in found] == ["photo_1.PNG", "photo_0.png"]
    for name in ("broken.jpg", "empty.png"):
        assert f"{name}: skipped, cannot be read" in caplog.text
    assert "small.png: skipped, 40x31 is smaller than a crop of 32 px" in caplog.text
    assert "notes.txt" not in caplog.text


def test_truncated_file_is_skipped_when_it_is_drawn(tmp_path, caplog):
    folder = tiny.photographs(tmp_path)
    whole = (folder / "photo_0.png").read_bytes()
    (folder / "photo_0.png").write_bytes(whole[: len(whole) // 2])
    data = tiny.crops(folder)
    assert len(data.paths) == 2
    whole_image = np.asarray(Image.open(folder / "photo_1.png"))
    for index in range(6):
        assert int(data.crop(index).max()) <= int(whole_image.max())
    assert caplog.text.count("photo_0.png: truncated or damaged") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_of_damaged_files_is_reported_in_one_line(workers, tmp_path):
    from moesr.training.loop.fit import batches
    from moesr.training.recipe import StageConfig

    folder = tiny.photographs(tmp_path, count=1)
    whole = (folder / "photo_0.png").read_bytes()
    (folder / "photo_0.png").write_bytes(whole[:200])
    data = Crops(photographs.scan(folder).at_least(32), 32, 0)
    with pytest.raises(InputError) as caught:
        next(batches(data, StageConfig(batch=1), 0, tiny.run(tmp_path, workers=workers)))
    assert str(caught.value) == f"{folder}: 100 photographs in a row are damaged; replace them"


@pytest.mark.parametrize("content", [None, "small", "nothing"], ids=str)
def test_folder_without_photographs_is_refused(content, tmp_path):
    folder = tmp_path / "photos"
    if content:
        folder.mkdir()
    if content == "small":
        Image.new("RGB", (20, 20)).save(folder / "a.png")
    with pytest.raises(InputError, match="photographs"):
        photographs.scan(folder).at_least(32)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_every_kind_of_image_gives_three_channels(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (40, 1))
    image = (
        Image.fromarray(ramp.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(ramp).convert(mode)
    )
    image.save(tmp_path / "a.png")
    pixels = photographs.load_rgb(tmp_path / "a.png")
    assert pixels is not None and pixels.shape == (40, 40, 3) and pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels.astype(int) - ramp[..., None]).max() <= 1


@pytest.fixture
def four_photographs(tmp_path, monkeypatch):
    """Return the paths of four photographs and a cache size that holds two and a half of them."""
    folder = tiny.photographs(tmp_path, count=4)
    paths = sorted(folder.iterdir())
    one = photographs.load_rgb(paths[0])
    assert one is not None
    monkeypatch.setattr(photographs, "CACHE_BYTES", one.nbytes * 5 // 2)
    return paths, one.nbytes


def test_cache_is_bounded_in_bytes_and_drops_the_least_recently_used(four_photographs, monkeypatch):
    paths, size = four_photographs
    read = []
    load = photographs.load_rgb
    monkeypatch.setattr(photographs, "load_rgb", lambda path: (read.append(path), load(path))[1])
    cache = photographs.PhotoCache()
    for i in (0, 1, 0, 2, 0, 1):
        got = cache.load(paths[i])
        np.testing.assert_array_equal(got, load(paths[i]))
        assert cache.held_bytes <= 2 * size
    assert read == [paths[i] for i in (0, 1, 2, 1)]


def test_photograph_larger_than_the_cache_is_kept_alone(four_photographs, monkeypatch):
    paths, size = four_photographs
    monkeypatch.setattr(photographs, "CACHE_BYTES", size // 2)
    cache = photographs.PhotoCache()
    for path in paths:
        assert cache.load(path) is cache.load(path)
        assert cache.held_bytes == size


class Shares(Dataset[int]):
    """A dataset whose samples are the cache size of the loader process."""

    def __getitem__(self, index: int) -> int:
        return photographs.share_bytes()


def test_loader_processes_share_the_cache(monkeypatch):
    assert photographs.share_bytes() == photographs.CACHE_BYTES
    assert set(DataLoader(Shares(), sampler=range(2), batch_size=None, num_workers=2)) == {2**29}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert set(DataLoader(Shares(), sampler=range(2), batch_size=None, num_workers=2)) == {2**27}


def test_a_sample_depends_on_seed_and_number_only(tmp_path):
    folder = tiny.photographs(tmp_path)
    first, second = tiny.crops(folder), tiny.crops(folder)
    for index in (7, 0, 123_456):
        assert torch.equal(first[index][1], second[index][1])
    assert not torch.equal(first.crop(0), first.crop(1))
    assert not torch.equal(first.crop(0), tiny.crops(folder, seed=1).crop(0))
    assert int(first[7][0]) == 7 and first[7][1].shape == (3, 32, 32) and first[7][1].dtype == torch.uint8


@pytest.mark.parametrize("kind", ["bicubic", "blind"])
def test_lr_does_not_depend_on_the_batch(kind, tmp_path):
    data = tiny.crops(tiny.photographs(tmp_path))
    degrade = Degradation(kind, 4, seed=3)
    together = degrade(data.crops(0, 3), torch.arange(3))
    assert together.shape == (3, 3, 8, 8) and together.dtype == torch.uint8
    for i in range(3):
        assert torch.equal(together[i], degrade(data.crops(i, 1), torch.tensor([i]))[0])
        number, hr, lr = Crops(data.paths, 32, 0, degrade)[i]
        assert int(number) == i and torch.equal(lr, together[i]) and torch.equal(hr, data.crop(i))
    again = Degradation(kind, 4, seed=4)(data.crops(0, 3), torch.arange(3))
    assert torch.equal(again, together) == (kind == "bicubic")


def test_channel_shuffling_permutes_the_planes(tmp_path):
    plain = tiny.crops(tiny.photographs(tmp_path))
    shuffled = Crops(plain.paths, 32, plain.seed, augmentation=Augmentation(shuffle_channels=True))
    orders = set()
    for i in range(40):
        want, got = plain.crop(i), shuffled.crop(i)
        order = tuple(next(k for k in range(3) if torch.equal(plane, want[k])) for plane in got)
        orders.add(order)
        assert sorted(order) == [0, 1, 2]
    assert len(orders) == 6
    _, hr, lr = shuffled.with_lr(Degradation("bicubic", 4, 0))[1]
    assert torch.equal(hr, shuffled.crop(1)) and torch.equal(lr, resize_batch(hr[None], 8, 8)[0])


def test_photographs_are_reduced_at_random(tmp_path):
    """The photograph is a ramp, so the slope of a crop shows by which factor (1 to 2) it was reduced."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (96, 96, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "ramp.png")
    crops = Crops([tmp_path / "ramp.png"], 32, 0, augmentation=Augmentation(smallest_size=0.5))
    slopes = []
    for i in range(60):
        crop = crops.crop(i)[0].double().numpy()
        assert crop.shape == (32, 32)
        slopes.append(max(abs(np.diff(crop[4:-4, 4:-4], axis=axis)).mean() for axis in (0, 1)))
    assert 1.9 <= min(slopes) < 2.4 and 3.6 < max(slopes) <= 4.1
    np.testing.assert_array_equal(crops.crop(5), crops.crop(5))


def test_photographs_as_small_as_a_crop_are_not_reduced(tmp_path):
    photograph = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "small.png")
    crops = Crops([tmp_path / "small.png"], 32, 0, augmentation=Augmentation(smallest_size=0.5))
    plain = Crops([tmp_path / "small.png"], 32, 0)
    assert {tuple(crops.crop(i).flatten().sort().values.tolist()) for i in range(60)} == {
        tuple(plain.crop(i).flatten().sort().values.tolist()) for i in range(200)
    }


def test_contrast_change_keeps_the_mean_color(tmp_path):
    plain = tiny.crops(tiny.photographs(tmp_path))
    pale = Crops(plain.paths, 32, plain.seed, augmentation=Augmentation(least_contrast=0.25))
    shares = []
    for i in range(60):
        want, got = plain.crop(i).double(), pale.crop(i).double()
        torch.testing.assert_close(got.mean(dim=(1, 2)), want.mean(dim=(1, 2)), atol=0.5, rtol=0)
        shares.append(float(got.std() / want.std()))
    assert 0.24 < min(shares) < 0.4 and 0.85 < max(shares) < 1.01


def test_bicubic_share_of_a_blind_degradation(tmp_path):
    crops = tiny.crops(tiny.photographs(tmp_path)).crops(0, 40)
    numbers = torch.arange(40)
    plain = Degradation("bicubic", 4, seed=3)(crops, numbers)

    def shared(share: float) -> int:
        lr = Degradation("blind", 4, seed=3, bicubic_share=share)(crops, numbers)
        return sum(map(torch.equal, lr, plain))

    assert (shared(0.0), shared(1.0)) == (0, 40)
    assert 10 < shared(0.5) < 30


@pytest.mark.parametrize("out", [4, 8, 32, 64, 128])
def test_batch_resize_equals_the_runtimes_imresize(out):
    rng = np.random.default_rng(out)
    pixels = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    got = resize_batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), out, out)
    want = np.stack([imresize(image, out, out) for image in pixels])
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), want)


@pytest.mark.parametrize(("scale", "lr_side"), [(4, 8), (8, 4)])
def test_condition_is_the_lr_image_at_the_latent_size(scale, lr_side):
    lr = torch.full((1, 3, lr_side, lr_side), 255, dtype=torch.uint8)
    cond = condition(lr, scale, factor=4)
    assert cond.shape == (1, 3, 8, 8)
    torch.testing.assert_close(cond, torch.ones_like(cond))


def test_random_draws_depend_on_each_sample_only():
    together = SampleRng(5, 2, [10, 11])
    apart = [SampleRng(5, 2, [n]) for n in (10, 11)]
    for shape in ((4,), (2, 3)):
        assert torch.equal(together.normal(*shape), torch.cat([d.normal(*shape) for d in apart]))
    assert torch.equal(together.integers(0, 1000), torch.cat([d.integers(0, 1000) for d in apart]))
    assert not torch.equal(SampleRng(5, 2, [10]).normal(8), SampleRng(5, 3, [10]).normal(8))
    assert not torch.equal(SampleRng(5, 2, [10]).normal(8), SampleRng(6, 2, [10]).normal(8))


def test_seeds_have_at_most_32_bits():
    seeds = {seed_of(seed, stream, index) for seed in range(4) for stream in range(4) for index in range(64)}
    assert len(seeds) == 1024 and max(seeds) < 2**32


def test_reports_go_to_the_project_logger(tmp_path, caplog):
    folder = tiny.photographs(tmp_path)
    (folder / "bad.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, logger="moesr"):
        photographs.scan(folder).at_least(32)
    assert [r.name for r in caplog.records] == ["moesr"]
