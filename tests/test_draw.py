"""Pictures of detections: what can be read on them, and what is not drawn."""

import pytest
import torch

from resnet_train.detection.draw import draw_detections, likely

RED = torch.tensor([160, 16, 16])[:, None, None]  # behind the words of the second class


def found(*boxes):
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.full((len(boxes),), 2),
        "scores": torch.linspace(0.9, 0.6, len(boxes)),
    }


@pytest.mark.parametrize(("side", "times"), [(128, 4), (480, 1), (1000, 1)])
def test_words_are_as_large_as_the_picture_takes_and_hide_no_object(side, times):
    """Two objects of a tenth of the picture's side; words of each as the file has them, beside the boxes."""
    image, place = torch.zeros(3, side, side, dtype=torch.uint8), side // 10
    objects = found([2.0 * place, 4 * place, 3 * place, 5 * place], [6.0 * place, 4 * place, 7 * place, 5 * place])
    drawn = draw_detections(image, objects, ["disc", "thrombocyte"], 0.5)
    assert drawn.shape == (3, times * side, times * side)
    words = (drawn == RED).all(0)
    for box in objects["boxes"]:
        left, top, right, bottom = (times * box).int().tolist()
        assert not words[top:bottom, left:right].any()
        assert not drawn[:, top + 4 : bottom - 4, left + 4 : right - 4].any()
    rows = words.any(1).nonzero()
    assert 12 <= rows[-1] - rows[0] + 1 <= times * side / 25


def test_words_keep_inside_of_the_picture():
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    corners = found([0.0, 0, 20, 20], [180.0, 0, 200, 20], [0.0, 180, 20, 200], [180.0, 180, 200, 200])
    drawn = draw_detections(image, corners, ["disc", "thrombocyte"], 0.5)
    whole = draw_detections(image, found([90.0, 90, 110, 110]), ["disc", "thrombocyte"], 0.5)
    one = (whole == RED).all(0).sum()
    assert abs(int((drawn == RED).all(0).sum()) - 4 * one) < 0.1 * one


def test_a_box_without_a_pixel_is_none():
    thin = found([5.0, 5, 5, 9], [5.0, 5, 9, 5], [100.0, 3, 100, 3], [5.0, 5, 6, 6], [5.0, 5, 5.9, 30])
    assert likely(thin, 0)["boxes"].tolist() == [[5, 5, 6, 6]]
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    for boxes in (found([5.0, 5, 5, 9]), found()):
        assert not draw_detections(image, boxes, ["disc", "square"], 0.5).any()
