from __future__ import annotations

import cv2
import numpy as np
import pytest

from mmfinetune.data import drawing
from mmfinetune.data.drawing import (
    contact_sheet,
    draw_instances,
    draw_proposals,
    palette,
    side_by_side,
    with_colour_bar,
)

GREY = 100


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def box_mask(shape: tuple[int, int], left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((1, *shape), bool)
    mask[0, top:bottom, left:right] = True
    return mask


def changed(picture: np.ndarray) -> np.ndarray:
    return (picture != GREY).any(2)


def test_palette_does_not_depend_on_its_length():
    assert palette(300)[:20] == palette(20)
    assert palette(0) == []


# What linear RGB becomes without one kind of cones: Viénot, Brettel and Mollon, Color Research & Application 24, 1999.
VIENOT = {
    'normal': np.eye(3),
    'deuteranopia': np.array([(0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)]),
    'protanopia': np.array([(0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)]),
}


# 2.3 is what an eye just tells apart.
@pytest.mark.parametrize(
    ('vision', 'apart'),
    [('normal', {8: 43, 20: 24}), ('deuteranopia', {8: 31, 20: 15}), ('protanopia', {8: 30, 20: 16})],
)
def test_palette_colours_are_far_apart_for_all_readers(vision, apart):
    """By another simulation than the one with which they are chosen."""
    linear = (np.array(palette(20)) / 255) ** 2.2
    seen = (linear @ VIENOT[vision].T).clip(0, 1) ** (1 / 2.2)
    lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e9 * np.eye(20)
    assert {count: int(distances[:count, :count].min()) for count in apart} == apart


def test_palette_has_a_colour_for_each_of_many_classes():
    assert len(set(palette(80))) == 80


def test_palette_goes_round_where_there_are_more_classes_than_colours():
    colours = palette(5000)
    distinct = len(set(colours))
    assert distinct < 5000
    assert colours[distinct : 2 * distinct] == colours[:distinct]


def test_mask_is_tinted_by_alpha_within_it_only():
    image = grey(500, 600)
    picture = draw_instances(image, masks=box_mask((500, 600), 100, 100, 300, 300), alpha=0.5)
    expected = (np.array(palette(1)[0]) + GREY) / 2
    assert np.abs(picture[200, 200] - expected).max() <= 1
    assert not changed(picture)[:90].any()
    assert not changed(picture)[:, 310:].any()
    assert (image == GREY).all()


def test_contour_has_the_full_colour():
    picture = draw_instances(grey(500, 600), masks=box_mask((500, 600), 100, 100, 300, 300))
    assert tuple(picture[200, 100]) == tuple(picture[100, 200]) == palette(1)[0]


def test_hole_stays_and_has_a_contour():
    mask = box_mask((500, 600), 100, 100, 300, 300)
    mask[0, 150:250, 150:250] = False
    picture = draw_instances(grey(500, 600), masks=mask)
    assert not changed(picture)[160:240, 160:240].any()
    assert tuple(picture[200, 149]) == palette(1)[0]


def test_a_class_has_one_colour_in_all_pictures():
    colour = palette(8)[7]
    for labels, boxes in (([7], [[50, 50, 90, 90]]), ([2, 7], [[5, 5, 9, 9], [50, 50, 90, 90]])):
        picture = draw_instances(grey(500, 500), boxes=np.array(boxes), labels=labels)
        assert tuple(picture[70, 50]) == colour


def test_small_image_is_enlarged_and_so_is_what_lies_on_it():
    picture = draw_instances(grey(24, 48), boxes=np.array([[12, 6, 36, 18]]), masks=box_mask((24, 48), 12, 6, 36, 18))
    assert picture.shape == (240, 480, 3)
    rows, columns = np.nonzero(changed(picture))
    assert np.abs(np.array([rows.min(), rows.max()]) - (60, 180)).max() <= 3
    assert np.abs(np.array([columns.min(), columns.max()]) - (120, 360)).max() <= 3


def test_mask_at_the_edge_of_an_enlarged_image():
    picture = draw_instances(grey(30, 30), masks=np.ones((1, 30, 30), bool))
    assert changed(picture).all()


def test_lines_grow_with_the_image():
    def thickness(side: int) -> int:
        box = np.array([[0.2, 0.2, 0.8, 0.8]]) * side
        picture = draw_instances(grey(side, side), boxes=box)
        return int(changed(picture)[side // 2, : side // 2].sum())

    assert thickness(500) == 1
    assert thickness(4000) >= 4


def chips(monkeypatch, *args, **kwargs) -> list[tuple[int, int, int, int]]:
    """Places of the chips that a call draws."""
    places, original = [], drawing._free_place

    def keeping(*arguments):
        places.append(original(*arguments))
        return places[-1]

    with monkeypatch.context() as patch:
        patch.setattr(drawing, '_free_place', keeping)
        draw_instances(*args, **kwargs)
    return places


def test_text_grows_with_the_image(monkeypatch):
    heights = []
    for side in (500, 3000):
        ((_, top, _, bottom),) = chips(
            monkeypatch, grey(side, side), labels=[0], names=['cat'], boxes=np.array([[200, 200, 400, 400]])
        )
        heights.append(bottom - top)
    assert heights[1] > 3 * heights[0] > 30


def test_chip_does_not_hide_a_small_object(monkeypatch):
    ((_, top, _, _),) = chips(
        monkeypatch, grey(500, 500), boxes=np.array([[200, 0, 220, 15]]), labels=[0], names=['cat']
    )
    assert top >= 15
    ((_, top, _, _),) = chips(
        monkeypatch, grey(500, 500), boxes=np.array([[200, 0, 400, 400]]), labels=[0], names=['cat']
    )
    assert top == 0


def test_chips_stay_in_the_picture(monkeypatch):
    boxes = np.array([[0, 0, 10, 10], [590, 0, 600, 10], [0, 490, 10, 500], [590, 490, 600, 500], [-50, -50, 700, 700]])
    for left, top, right, bottom in chips(
        monkeypatch, grey(500, 600), boxes=boxes, labels=range(5), scores=[0.5] * 5, names=['bus'] * 5
    ):
        assert 0 <= left < right <= 600
        assert 0 <= top < bottom <= 500


def test_chips_do_not_hide_each_other_while_there_is_room(monkeypatch):
    places = chips(
        monkeypatch,
        grey(500, 600),
        boxes=np.array([[200, 200, 400, 400]] * 6),
        labels=range(6),
        scores=np.linspace(0.9, 0.4, 6),
        names=['sheep'] * 6,
    )
    assert len(places) == 6
    for i, (left, top, right, bottom) in enumerate(places):
        for other in places[i + 1 :]:
            assert other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top


def test_the_best_has_the_first_choice_of_place(monkeypatch):
    boxes = np.array([[200, 200, 400, 400]] * 2)
    best, other = chips(
        monkeypatch, grey(500, 600), boxes=boxes, labels=[0, 1], scores=[0.4, 0.9], names=['worse', 'best']
    )
    assert best[:2] == (200, 200 - (best[3] - best[1]))
    assert other != best


@pytest.mark.parametrize(
    'colour, ink', [((0, 116, 232), 255), ((230, 210, 0), 0), ((20, 20, 20), 255), ((250, 250, 250), 0)]
)
def test_text_contrasts_with_its_chip(colour, ink):
    assert drawing._ink_on(colour) == (ink,) * 3


def test_a_name_in_any_script_is_drawn():
    picture = draw_instances(grey(500, 500), boxes=np.array([[9, 99, 99, 199]]), labels=[0], scores=[0.5], names=['人'])
    assert changed(picture).any()


@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (3, 2000), (2000, 3)])
def test_images_of_any_shape(shape):
    picture = draw_instances(
        grey(*shape),
        boxes=np.array([[0, 0, shape[1], shape[0]]]),
        masks=np.ones((1, *shape), bool),
        labels=[0],
        scores=[1],
        names=['dog'],
    )
    assert max(picture.shape) >= 480
    assert picture.dtype == np.uint8


@pytest.mark.parametrize(
    'nothing', [{}, dict(boxes=np.zeros((0, 4)), labels=[], scores=[]), dict(masks=np.zeros((0, 500, 600), bool))]
)
def test_no_instance_leaves_the_image_as_it_is(nothing):
    assert not changed(draw_instances(grey(500, 600), **nothing)).any()


def test_empty_mask_and_box_of_no_size():
    picture = draw_instances(
        grey(500, 600), boxes=np.array([[5.0, 5, 5, 5]]), masks=np.zeros((1, 500, 600), bool), labels=[0], names=['cat']
    )
    assert changed(picture).any()


def test_a_label_without_a_name_is_written_as_its_number():
    assert drawing._texts([0, 7], [0.5, 0.25], ['cat']) == ['cat 0.50', '7 0.25']
    assert not any(drawing._texts(None, None, ['cat']))


@pytest.mark.parametrize('image', [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)])
def test_what_is_no_rgb_image_is_refused(image):
    with pytest.raises(ValueError, match='not an RGB uint8 image'):
        draw_instances(image)


def test_proposals_are_coloured_by_score_the_best_on_top():
    boxes = np.array([[100, 100, 200, 200], [100, 100, 200, 200], [300, 300, 400, 400]])
    picture = draw_proposals(grey(500, 600), boxes, np.array([1.0, 0.0, 0.0]))
    best, worst = drawing._heat(1), drawing._heat(0)
    assert tuple(picture[150, 100]) == best
    assert tuple(picture[350, 300]) == worst
    assert best != worst
    assert picture[0, 0].max() < GREY


def test_colour_bar_goes_from_0_to_1():
    picture = with_colour_bar(grey(500, 600), 'objectness')
    strip = picture[500:]
    assert picture.shape[1] == 600
    columns = {tuple(c) for c in strip[strip.shape[0] // 2]}
    assert {drawing._heat(0), drawing._heat(0.5), drawing._heat(1)} <= columns
    assert with_colour_bar(grey(500, 20), 'objectness').shape[1] == 20


def test_side_by_side_brings_panels_to_one_height():
    picture = side_by_side(grey(200, 100), grey(400, 300))
    assert picture.shape[0] == 400
    gap = (picture == 255).all((0, 2))
    assert picture.shape[1] == 200 + 300 + gap.sum()
    assert gap[200 : 200 + gap.sum()].all()


def test_side_by_side_titles():
    long = 'a title that is much too long for its panel ' * 3
    plain, titled = (side_by_side(grey(200, 300), grey(200, 300), titles=titles) for titles in ((), ('truth', long)))
    head = titled[: titled.shape[0] - 200]
    assert titled.shape[1] == plain.shape[1]
    assert (head[:, :300] < 128).any()
    assert (head[:, -300:] < 128).any()
    with pytest.raises(ValueError, match='2 panels, but 1 titles'):
        side_by_side(grey(9, 9), grey(9, 9), titles=['one'])


def test_contact_sheet_is_a_grid():
    colours = [np.full((60, 90, 3), c, np.uint8) for c in (10, 60, 110, 160, 210)]
    sheet = contact_sheet(colours, columns=2, width=90)
    gap = 4
    for i, value in enumerate((10, 60, 110, 160, 210)):
        row, column = divmod(i, 2)
        cell = sheet[gap + row * (60 + gap) :, gap + column * (90 + gap) :][:60, :90]
        assert (cell == value).all()
    assert sheet.shape == (gap + 3 * (60 + gap), gap + 2 * (90 + gap), 3)


def test_contact_sheet_with_titles_and_odd_sizes():
    pictures = [grey(10, 4000), grey(4000, 10), grey(100, 100)]
    sheet = contact_sheet(pictures, columns=4, width=200, titles=['wide', 'high', '方'])
    assert sheet.shape[1] == 3 * 200 + 4 * 6
    assert sheet.shape[0] <= 1.5 * 200 + 40
    assert (contact_sheet([grey(50, 50)], width=100)[4:104, 4:104] == GREY).all()
