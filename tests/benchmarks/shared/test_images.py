"""Images as tensors: drawn, shuffled, cropped."""

from __future__ import annotations

import torch

from benchmarks.shared.images import (
    Images,
    center_crop,
    crop_and_mirror,
    draw_per_class,
    shuffled_batches,
    split_per_class,
)


def test_images_of_each_class():
    labels = torch.tensor([0, 1, 1, 2, 0, 1, 0, 0])
    images = Images(torch.arange(8).view(8, 1, 1, 1), labels)
    few, more = draw_per_class(images, 2, 5), draw_per_class(images, 3, 5)
    assert few.labels.bincount().tolist() == [2, 2, 1] and more.labels.bincount().tolist() == [3, 3, 1]
    kept = [set(part.pixels.flatten().tolist()) for part in (few, more)]
    assert kept[0] <= kept[1] and all(
        labels[i] == label for i, label in zip(few.pixels.flatten(), few.labels, strict=True)
    )
    assert any(set(draw_per_class(images, 2, s).pixels.flatten().tolist()) != kept[0] for s in range(10))


def test_a_share_of_each_class_is_set_aside():
    """A fifth of 10, 5 and 4 images, rounded; both parts in the order of the images, the same for the same seed."""
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 4)
    images = Images(torch.arange(19).view(19, 1, 1, 1), labels)
    aside, others = split_per_class(images, 0.2, 0)
    assert aside.labels.bincount().tolist() == [2, 1, 1] and others.labels.bincount().tolist() == [8, 4, 3]
    kept = [part.pixels.flatten().tolist() for part in (aside, others)]
    assert sorted(kept[0] + kept[1]) == list(range(19)) and all(k == sorted(k) for k in kept)
    assert split_per_class(images, 0.2, 0)[0].pixels.flatten().tolist() == kept[0]
    assert any(split_per_class(images, 0.2, s)[0].pixels.flatten().tolist() != kept[0] for s in range(1, 5))


def test_an_epoch_has_every_image_once():
    images = Images(torch.arange(7).view(7, 1, 1, 1), torch.arange(7))
    batches = shuffled_batches(images, 3, torch.Generator().manual_seed(0))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    seen = [torch.cat([b.labels for b in epoch]) for epoch in epochs]
    assert [len(b) for b in epochs[0]] == [3, 3, 1]
    assert all(s.sort().values.tolist() == list(range(7)) for s in seen) and not torch.equal(*seen)


def test_cropped_and_mirrored_images_are_parts_of_the_images():
    """Every cut is found, as it is or mirrored, at some place of its image; both and all places come up."""
    pixels = torch.arange(3 * 25).view(3, 1, 5, 5)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(60):
        cut = crop_and_mirror(pixels, 4, generator)
        for image, part in zip(pixels, cut, strict=True):
            fits = [
                (y, x, flip)
                for y in (0, 1)
                for x in (0, 1)
                for flip in (False, True)
                if torch.equal(part.flip(-1) if flip else part, image[:, y : y + 4, x : x + 4])
            ]
            assert len(fits) == 1
            places.add(fits[0])
    assert len(places) == 8
    assert torch.equal(center_crop(pixels, 3), pixels[..., 1:4, 1:4])
