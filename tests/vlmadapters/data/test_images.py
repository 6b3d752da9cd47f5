"""Views against torchvision's own transform, and evaluation images against the model's."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from backbones import config, shared_backbone
from PIL import Image
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, ToTensor
from torchvision.transforms.v2 import functional as V

from vlmadapters.data.images import (
    Augmentation,
    Images,
    Room,
    as_first_seen,
    epoch_batches,
    shared_room,
)
from vlmadapters.data.kept import Kept
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import decoding
from vlmlayers.models.companions import Processed
from vlmlayers.models.decoding import batches_of
from vlmlayers.models.load import build_clip, wrap_model

MANIFEST = Manifest.load("textures")


@pytest.mark.parametrize("shape", [(60, 80), (40, 200), (200, 40)])
def test_boxes_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    n, augmentation = 1500, Augmentation()
    draws = augmentation.draws(n, seed=0, view=0)
    ours = np.array([augmentation.box(draw, *shape)[:4] for draw in draws])
    image = torch.zeros(3, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale, ratio = list(augmentation.crop_scale), list(augmentation.crop_ratio)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()


@pytest.mark.parametrize(("shape", "box"), [((10, 200), (10, 13)), ((200, 10), (13, 10))])
def test_an_image_no_crop_fits_gives_the_central_one(
    shape: tuple[int, int], box: tuple[int, int]
) -> None:
    augmentation = Augmentation(crop_scale=(0.9, 1.0))
    top, left, h, w, _ = augmentation.box(augmentation.draws(1, 0, 0)[0], *shape)
    assert (h, w) == box
    assert (top, left) == ((shape[0] - h) // 2, (shape[1] - w) // 2)


def test_ratios_are_even_in_their_logarithm_and_places_reach_both_edges() -> None:
    """Half of the crops are taller than wide; a box of 90 in 100 has eleven places either way."""
    n = 4000

    def boxes(augmentation: Augmentation, size: int) -> np.ndarray[Any, Any]:
        return np.array([augmentation.box(d, size, size) for d in augmentation.draws(n, 1, 0)])

    error = 4 * np.sqrt(0.25 / n)
    drawn = boxes(Augmentation((0.25, 0.25), (3 / 4, 4 / 3)), 1000)
    assert np.mean(drawn[:, 3] < drawn[:, 2]) == pytest.approx(0.5, abs=error)
    square = boxes(Augmentation((0.81, 0.81), (1.0, 1.0)), 100)
    assert set(square[:, 2]) == set(square[:, 3]) == {90}
    for place in (square[:, 0], square[:, 1]):
        assert np.mean(place >= 6) == pytest.approx(5 / 11, abs=error)
        assert (place.min(), place.max()) == (0, 10)


def test_flips_have_their_chance_and_views_differ() -> None:
    augmentation = Augmentation(flip=0.25)
    draws = augmentation.draws(4000, 1, 0)
    flips = np.mean([augmentation.box(draw, 50, 50)[4] for draw in draws])
    assert flips == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(draws, augmentation.draws(4000, 1, 0))
    assert not np.array_equal(draws, augmentation.draws(4000, 1, 1))
    assert not np.array_equal(draws, augmentation.draws(4000, 2, 0))


def test_evaluation_images_are_what_the_models_transform_gives() -> None:
    model = shared_backbone()
    images, items = Images(model, MANIFEST), MANIFEST.items("test")[:6]
    expected = torch.stack([model.preprocess(MANIFEST.open_image(i, size=32)) for i in items])
    for _ in range(2):  # decoded, then kept
        found = torch.cat(list(images.batches(items, 4)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_views_and_test_images_have_the_height_and_width_that_the_model_takes() -> None:
    """Turned round they are as many patches, and nothing would fail."""
    clip = build_clip(config({"image_size": (32, 48)}))
    preprocess = open_clip.image_transform((32, 48), is_train=False)
    model = wrap_model(clip, preprocess, open_clip.SimpleTokenizer(), name="oblong", weights="own")
    images, items = Images(model, MANIFEST), MANIFEST.items("test")[:2]
    views = images.augmented(items, Augmentation().draws(2, 0, 0), Augmentation())
    assert views.shape == next(images.batches(items, 2)).shape == (2, 3, 32, 48)


def test_a_preprocessing_that_does_not_normalise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one of transformers that names a mean and does not take it off."""
    idle = SimpleNamespace(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for preprocess in (ToTensor(), Processed(idle)):
        monkeypatch.setattr(shared_backbone(), "preprocess", preprocess)
        with pytest.raises(UserError, match="preprocessing has no normalisation step"):
            Images(shared_backbone(), MANIFEST)


def test_views_of_images_that_are_not_square_are_torchvisions_of_the_same_boxes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, augmentation = Images(shared_backbone(), MANIFEST), Augmentation()
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 24, 72), dtype=np.uint8))
    monkeypatch.setattr(images, "raw", lambda item: raw)
    draws = augmentation.draws(8, 1, 0)
    views = []
    for draw in draws:
        *box, flip = augmentation.box(draw, 24, 72)
        view = V.resized_crop(raw, *box, [32, 32], InterpolationMode.BICUBIC, antialias=True)
        views.append(V.horizontal_flip(view) if flip else view)
    torch.testing.assert_close(
        images.augmented(MANIFEST.items("test")[:8], draws, augmentation), images.normalised(views)
    )


def test_decoded_images_leave_the_machine_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven datasets of a quarter each would not fit into it."""
    model = shared_backbone()
    for free, processes in ((4_000_000, 1), (1 << 40, 2)):
        monkeypatch.setattr(
            "vlmadapters.data.kept.available_memory", lambda device, free=free: free
        )
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        shared_room.cache_clear()
        rooms = {id(Images(model, MANIFEST).room): Images(model, MANIFEST).room for _ in range(11)}
        assert [room.limit for room in rooms.values()] == [free / 4 / processes]
    shared_room.cache_clear()


def test_images_that_rest_make_way_and_others_stay() -> None:
    model, items = shared_backbone(), MANIFEST.items("test")[:4]
    size = Images(model, MANIFEST, room=Room(1 << 30)).ready(items[0]).numel()
    room = Room(2 * size)
    first, second = (Images(model, MANIFEST, room=room) for _ in range(2))
    opened = counted_opens(first, second)
    for images in (first, second):
        for _ in range(2):
            [images.ready(item) for item in items[:2]]
    assert opened == [2, 4], "the second found the room taken"
    first.rest()
    for _ in range(2):
        [second.ready(item) for item in items[:2]]
    assert opened == [2, 6] and room.used == 2 * size
    first.ready(items[0])
    assert opened == [3, 6], "the first was made to forget"
    del second, images
    gc.collect()
    assert room.used == 0


def counted_opens(*several: Images) -> list[int]:
    """Return how many images each of several opens, counted from now on."""
    counts = [0] * len(several)
    for number, images in enumerate(several):

        def transform(image: object, number: int = number, made: Any = images.transform) -> Any:
            counts[number] += 1
            return made(image)

        images.transform = transform
    return counts


def test_threads_and_a_full_memory_change_nothing() -> None:
    model, items = shared_backbone(), MANIFEST.items("train")[:8]
    augmentation = Augmentation()
    draws = augmentation.draws(8, 0, 0)
    expected = Images(model, MANIFEST).augmented(items, draws, augmentation)
    threaded = Images(model, MANIFEST, workers=2).augmented(items, draws, augmentation)
    tight = Images(model, MANIFEST, room=Room(0))
    assert torch.equal(expected, threaded)
    assert torch.equal(expected, tight.augmented(items, draws, augmentation))
    assert tight.room.used == 0


def test_threads_are_those_that_suit_the_machine_where_none_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, items, asked = shared_backbone(), MANIFEST.items("test")[:3], []

    def suits(workers: int | None, images: int, device: torch.device) -> int:
        asked.append((workers, device))
        return 2 if workers is None else workers

    monkeypatch.setattr("vlmadapters.data.images.decoding_processes", suits)
    for workers, threads in ((None, "ThreadPoolExecutor"), (0, "MainThread")):
        images, names = Images(model, MANIFEST, workers=workers, room=Room(0)), set()
        own = images.transform

        def transform(image: Any, names: set[str] = names, own: Any = own) -> Any:
            names.add(threading.current_thread().name.partition("-")[0])
            return own(image)

        images.transform = transform
        list(images.batches(items, 3))
        assert names == {threads}
    assert asked == [(None, model.device), (0, model.device)]


def test_a_whole_image_view_is_the_image() -> None:
    model, items = shared_backbone(), MANIFEST.items("train")[:2]
    whole = Augmentation((1.0, 1.0), (1.0, 1.0), flip=0.0)
    images = Images(model, MANIFEST)
    found = images.augmented(items, whole.draws(2, 0, 0), whole)
    torch.testing.assert_close(found, images.normalised([images.raw(i) for i in items]))


def test_every_step_sees_other_items_and_the_rest_is_dropped() -> None:
    batches = epoch_batches(22, 4, seed=1, epoch=0)
    assert [len(b) for b in batches] == [4] * 5
    assert len(set(np.concatenate(batches).tolist())) == 20
    again = epoch_batches(22, 4, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    orders = {tuple(epoch_batches(22, 22, *key)[0]) for key in product(range(1, 5), range(4))}
    assert len(orders) == 16, "two seeds share an epoch, or an epoch comes again"
    assert [len(b) for b in epoch_batches(3, 16, 1, 0)] == [3]


@pytest.mark.parametrize("n", [0, 1, 22])
def test_items_as_first_seen_are_those_of_the_first_epoch(n: int) -> None:
    batches = epoch_batches(n, 4, seed=3, epoch=0, drop_last=False) if n else []
    assert as_first_seen(range(n), seed=3) == [i for batch in batches for i in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_on_the_device_are_close_to_those_of_the_cpu(workers: int) -> None:
    images = Images(shared_backbone(), MANIFEST, workers=workers)
    items, augmentation = MANIFEST.items("train")[:8], Augmentation()
    draws = augmentation.draws(len(items), 1, 0)
    host, device = (
        images.augmented(items, draws, augmentation, on_device=there) for there in (False, True)
    )
    levels = (device - host).abs() * images.std * 255
    assert levels.mean() < 0.5


@pytest.mark.parametrize(("free", "uploads"), [(1 << 30, [3, 0]), (0, [3, 3])])
def test_decoded_images_stay_on_the_device_while_it_has_room(
    free: int, uploads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.data.kept.available_memory", lambda device: free)
    shared_room.cache_clear()
    images, counts = Images(shared_backbone(), MANIFEST, room=Room(1 << 30)), []
    items, uploaded = MANIFEST.items("train")[:3], []

    def noted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploaded.append(tensor.shape)
        return tensor

    monkeypatch.setattr("vlmadapters.data.images.placed", noted)
    for _ in range(2):
        found = images.uploaded(items)
        assert all(map(torch.equal, found, map(images.raw, items)))
        counts.append(len(uploaded) - sum(counts))
    assert counts == uploads
    shared_room.cache_clear()


@pytest.mark.parametrize(("free", "uploads"), [(1 << 30, 2), (0, 4)])
def test_test_images_stay_on_a_gpu_while_it_has_room(
    free: int, uploads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.data.kept.available_memory", lambda device: free)
    shared_room.cache_clear()
    items, uploaded = MANIFEST.items("test")[:8], []
    expected = list(Images(shared_backbone(), MANIFEST, room=Room(1 << 30)).batches(items, 4))
    images = Images(shared_backbone(), MANIFEST, room=Room(1 << 30))

    def noted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploaded.append(tensor.shape)
        return tensor

    monkeypatch.setattr("vlmadapters.data.images.placed", noted)
    images.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    for _ in range(2):  # a batch that is normalised in place would be another one the next time
        assert all(map(torch.equal, images.batches(items, 4), expected))
    assert len(uploaded) == uploads
    # Nor is a batch of other items that starts with the same one.
    assert all(map(torch.equal, images.batches(items[:1], 4), [expected[0][:1]]))
    shared_room.cache_clear()


def test_many_images_are_decoded_in_processes_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 20)
    model, items = shared_backbone(), MANIFEST.items("test")[:30]
    here, there = (Images(model, MANIFEST, workers=n, room=Room(1 << 30)) for n in (0, 2))
    opened = counted_opens(there)
    for _ in range(2):  # decoded, then kept
        for size in (7, 30):
            assert all(map(torch.equal, here.batches(items, size), there.batches(items, size)))
    assert opened == [1], "in this process, to see how large they are"
    monkeypatch.setattr(MANIFEST.__class__, "open_image", none)
    with pytest.raises(AssertionError):
        there.raw(items[0])
    monkeypatch.undo()
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 20)
    with there.arriving(items, items):
        found = [there.raw(item) for item in items]
    assert all(map(torch.equal, found, map(here.raw, items)))
    assert there.room.used == here.room.used > 0


@pytest.mark.parametrize(("images", "at_a_time"), [(2.5, 2), (0.5, 1), (100, 16)])
def test_fewer_images_are_under_way_where_they_are_large(
    images: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty photographs of 36 MB for each of fifteen processes would be 17 GB."""
    sizes: list[int] = []

    def divided(rows: int, size: int) -> list[list[int]]:
        sizes.append(size)
        return batches_of(rows, size)

    monkeypatch.setattr(decoding, "batches_of", divided)
    monkeypatch.setattr(decoding, "HANDED_BYTES", int(images * 300))
    makers = [partial(torch.zeros, (3, 10, 10), dtype=torch.uint8)] * 20
    found = list(decoding.decode_pixels(makers, workers=2))
    assert sizes == [at_a_time]
    assert [image.nbytes for image in found] == [300] * 20


def test_room_that_others_leave_meanwhile_is_not_taken_twice() -> None:
    """Threads decode: one leaves its images to be dropped while another finds no room."""

    class Watched(Room):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "full" and value:
                other = threading.Thread(target=self.rest, args=(Kept(self),))
                other.start()
                other.join(0.2)

    room = Watched(10)
    assert not room.take(Kept(room), 11) and room.used == 0


def test_an_image_that_two_threads_make_at_once_takes_its_room_once() -> None:
    room, both = Room(1000), threading.Barrier(2)
    kept = Kept(room)

    def make() -> torch.Tensor:
        both.wait(10)
        return torch.zeros(100, dtype=torch.uint8)

    threads = [threading.Thread(target=kept.get, args=("a", make)) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert room.used == kept.forget() == 100


def none(*given: Any, **options: Any) -> Any:
    raise AssertionError("an image is opened here")


@pytest.fixture
def dots(tmp_path: Path) -> Manifest:
    """Six images, the third of which cannot be read."""
    for number in range(6):
        path = tmp_path / "test" / "ant" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (40 * number, 9, 9)).save(path)
    (tmp_path / "test" / "ant" / "2.png").write_bytes(b"no image")
    return Manifest.load(str(tmp_path))


def test_what_has_no_room_or_cannot_be_read_is_left_to_who_asks_for_it(
    dots: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    model, items, size = shared_backbone(), dots.items("test"), 3 * 32 * 32
    images = Images(model, dots, workers=2, room=Room(3 * size))
    assert list(images.unreadable(items, tested=True).reasons) == [2]
    assert images.room.used == 3 * size and images.room.full
    with pytest.raises(UserError, match=r"2\.png"):
        list(images.batches(items, 4))
    readable = items[:2] + items[3:]
    plain = Images(model, dots, room=Room(0))
    assert all(map(torch.equal, images.batches(readable, 2), plain.batches(readable, 2)))


def test_a_death_of_the_processes_stops_nothing(
    dots: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dies(*given: Any, **options: Any) -> Iterator[torch.Tensor]:
        yield torch.full((3, 32, 32), 7, dtype=torch.uint8)
        raise RuntimeError("worker exited")

    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    monkeypatch.setattr("vlmadapters.data.images.decode_pixels", dies)
    items = dots.items("test")[3:]
    images = Images(shared_backbone(), dots, workers=2, room=Room(1 << 20))
    with images.arriving(tested=items):
        found = [images.ready(item) for item in items]
    assert [int(image[0, 0, 0]) for image in found] == [7, 160, 200]
    assert "died, mostly for lack of memory (worker exited); threads decode" in caplog.text


def test_a_killed_process_stops_nothing_where_a_loader_was_used_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch raises the death of those that it watches in whatever the main thread does."""
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
    before = signal.getsignal(signal.SIGCHLD)
    list(DataLoader([0], num_workers=1))  # type: ignore
    items, opens = MANIFEST.items("test")[:40], MANIFEST.__class__.open_image
    monkeypatch.setattr(MANIFEST.__class__, "open_image", dying_at(items[20], opens))
    images = Images(shared_backbone(), MANIFEST, workers=2, room=Room(1 << 30))
    with images.arriving(tested=items):
        for _ in range(6000):
            if caplog.text:
                break
            time.sleep(0.01)
    assert caplog.text.count("a decoding process died") == 1
    signal.signal(signal.SIGCHLD, before)


def test_an_interrupt_leaves_the_processes_to_who_started_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C took ten seconds, and a warning of lacking memory."""
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    items, opens = MANIFEST.items("test")[:40], MANIFEST.__class__.open_image
    interrupted = dying_at(items[20], opens, signal.SIGINT)
    monkeypatch.setattr(MANIFEST.__class__, "open_image", interrupted)
    images = Images(shared_backbone(), MANIFEST, workers=2, room=Room(1 << 30))
    opened = counted_opens(images)
    assert len(torch.cat(list(images.batches(items, 10)))) == 40
    assert opened == [1], "in this process, to see how large they are"
    assert not caplog.text


@pytest.mark.skipif(not decoding.FORKS, reason="needs processes that are forked")
def test_an_interrupt_in_a_hook_around_a_fork_is_not_lost() -> None:
    """Python prints what such a hook raises, and goes on."""
    here, pressed = os.getpid(), [True]

    def press() -> None:
        if os.getpid() == here and pressed:
            pressed.clear()
            signal.raise_signal(signal.SIGINT)

    os.register_at_fork(after_in_parent=press)  # for good: from here on it does nothing
    with pytest.raises(KeyboardInterrupt):
        list(decoding.decode_pixels([partial(torch.zeros, 2)] * 3, workers=1))
    assert not pressed and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_processes_start_leaves_nobody_decoding(
    dots: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starting(*given: Any, **options: Any) -> Iterator[None]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        return (None for _ in range(3))

    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    monkeypatch.setattr("vlmadapters.data.images.decode_pixels", starting)
    images = Images(shared_backbone(), dots, workers=2, room=Room(1 << 20))
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), images.arriving(tested=dots.items("test")):
        pass
    assert set(threading.enumerate()) <= before


def dying_at(item: Any, opens: Any, of: int = signal.SIGKILL) -> Any:
    here = os.getpid()

    def open_image(manifest: Any, asked: Any, *given: Any, **options: Any) -> Any:
        if asked == item and os.getpid() != here:
            os.kill(os.getpid(), of)
        return opens(manifest, asked, *given, **options)

    return open_image


def raising(*given: Any, **options: Any) -> Any:
    raise RuntimeError("No space left on device (28)")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("lacking", ["shared memory", "right to fork"])
def test_images_come_where_processes_lack_something(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    if lacking == "shared memory":  # as where a container has 64 MB of it
        monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", raising)
    else:  # as in a pool of processes
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore
    items, found = MANIFEST.items("test")[:40], []
    here, there = (
        Images(shared_backbone(), MANIFEST, workers=n, room=Room(1 << 30)) for n in (0, 2)
    )
    asking = threading.Thread(target=lambda: found.extend(there.batches(items, 40)), daemon=True)
    asking.start()
    asking.join(60)
    assert torch.equal(found[0], next(here.batches(items, 40)))


def test_what_code_of_the_user_raises_is_raised_to_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    items, opens = MANIFEST.items("test")[:20], MANIFEST.__class__.open_image

    def broken(manifest: Any, item: Any, *given: Any, **options: Any) -> Any:
        return {}["row"] if item == items[5] else opens(manifest, item, *given, **options)

    monkeypatch.setattr(MANIFEST.__class__, "open_image", broken)
    images = Images(shared_backbone(), MANIFEST, workers=2, room=Room(1 << 30))
    with images.arriving(tested=items):
        with pytest.raises(KeyError, match="row"):
            images.ready(items[5])
        monkeypatch.setattr(MANIFEST.__class__, "open_image", none)
        assert images.ready(items[19]).shape == images.ready(items[0]).shape


def test_an_image_on_its_way_is_waited_for_and_what_nobody_wants_is_not_made(
    dots: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = threading.Event(), []

    def slow(*given: Any, **options: Any) -> Iterator[torch.Tensor]:
        for number in range(3):
            asked.wait(60)
            made.append(number)
            yield torch.full((3, 32, 32), number, dtype=torch.uint8)

    monkeypatch.setattr("vlmadapters.data.images.WORTH_STARTING", 2)
    monkeypatch.setattr("vlmadapters.data.images.decode_pixels", slow)
    items = dots.items("test")[3:]
    images = Images(shared_backbone(), dots, workers=2, room=Room(1 << 20))
    threading.Timer(0.3, asked.set).start()
    with images.arriving(tested=items):
        assert int(images.ready(items[0])[0, 0, 0]) == 0, "not made here"
        with images.arriving(tested=items):  # nothing is lacking: all is on its way
            pass
        assert int(images.ready(items[1])[0, 0, 0]) == 1
    asked.clear()
    threading.Timer(0.3, asked.set).start()
    images, made[:] = Images(shared_backbone(), dots, workers=2, room=Room(1 << 20)), []
    with pytest.raises(KeyboardInterrupt), images.arriving(tested=items):
        raise KeyboardInterrupt
    assert len(made) == 1
    assert int(images.ready(items[2])[0, 0, 0]) == 200, "made here, after all"
