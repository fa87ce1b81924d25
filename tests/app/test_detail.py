"""Places of a finished picture that are worked on again: what changes, what stays, and where the boxes come from."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_diffusion import Options
from stable_diffusion.app.detail import read_places
from stable_diffusion.app.engine import Engine, Resources, Step, open_model
from stable_diffusion.app.request import Request, expand
from stable_diffusion.images.inpaint import box_mask, mask_parts

REQUEST = Request(prompt="a red circle", model="tiny", steps=3, n_images=2, seed=1, options=Options(sampler="euler"))


@pytest.fixture(scope="module")
def tiny():
    return open_model(REQUEST)


def draw(tiny, request: Request, on_step=lambda step: None) -> list:
    return list(Engine(tiny, expand([(request, {})])).run(on_step))


def pixels(results: list) -> list[np.ndarray]:
    return [np.asarray(result.image).astype(int) for result in results]


def inside(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    found = np.zeros((64, 64), dtype=bool)
    for x, y, width, height in boxes:
        found[y : y + height, x : x + width] = True
    return found


def test_what_is_outside_of_the_boxes_stays_to_the_bit(tiny):
    request = replace(REQUEST, detail=("4,8,24,20", "40,40,20,22"), detail_prompt="a green star", detail_strength=0.9)
    before, seen = pixels(draw(tiny, REQUEST)), []
    results = draw(tiny, request, lambda step: seen.append((step.batch.index, step.batch.size)))
    assert {index for index, _ in seen} == {"", "detail 1", "detail 2"} and {size for _, size in seen} == {(64, 64)}
    boxes = [(4, 8, 24, 20), (40, 40, 20, 22)]
    for one, other, result in zip(before, pixels(results), results, strict=True):
        changed = np.abs(one - other).max(-1)
        assert not changed[~inside(*boxes)].any()
        assert all(changed[inside(box)].max() > 8 for box in boxes)
        alone = draw(tiny, replace(request, n_images=1, seed=result.request.seed))  # whatever the batch
        assert np.abs(pixels(alone)[0] - other).max() <= 1
        again = Request.from_dict(result.request.to_dict())[0]
        assert again.detail == request.detail and again.detail_prompt == "a green star"
    low = Engine(open_model(request, low_memory=True), expand([(request, {})]), Resources(low_memory=True))
    for one, other in zip(pixels(low.run()), pixels(results), strict=True):
        assert np.abs(one - other).max() <= 1
    larger = pixels(draw(tiny, replace(request, hires=1.5, detail=("50,50,40,40",))))[0]
    assert larger.shape == (96, 96, 3)


def test_a_given_image_is_kept_or_changed_first(tiny, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (75, 99, 3), dtype=np.uint8)  # of no size that a model works at
    Image.fromarray(image).save(tmp_path / "in.png")
    mask = Image.new("L", (99, 75))
    mask.paste(255, (5, 5, 25, 30))
    mask.paste(255, (60, 40, 90, 70))
    mask.save(tmp_path / "mask.png")
    request = replace(REQUEST, n_images=1, image=str(tmp_path / "in.png"), mask=str(tmp_path / "mask.png"))
    request = replace(request, detail=("mask",), detail_padding=4)
    steps: list[Step] = []
    (kept,) = draw(tiny, request, steps.append)
    assert {step.batch.index for step in steps} == {"detail 1", "detail 2"}
    changed, white = (np.asarray(kept.image) != image).any(-1), np.asarray(mask) > 0
    assert kept.partial == "" and not changed[~white].any() and changed[white].mean() > 0.9
    (first,) = draw(tiny, replace(request, strength=0.5))
    assert first.image.size != kept.image.size  # which the model has made as a whole
    (stopped,) = draw(tiny, request, lambda step: step.batch.index == "detail 2")
    assert stopped.partial == "detail 2 of 2"
    changed = (np.asarray(stopped.image) != image).any(-1)
    assert changed[:35, :30].any() and not changed[35:].any()


def test_masks():
    soft = np.asarray(box_mask((10, 20, 30, 16), (64, 64)))
    assert not soft[~inside((10, 20, 30, 16))].any() and soft[28, 25] == 255 and 0 < soft[21, 25] < 255
    mask = np.zeros((50, 70), dtype=np.uint8)
    mask[2:10, 2:10], mask[11:20, 11:20], mask[40:49, 60:69], mask[0:5, 60:65] = 255, 128, 200, 90
    parts = [np.asarray(part) for part in mask_parts(Image.fromarray(mask))]
    assert len(parts) == 2 and np.array_equal(sum(parts)[5:], mask[5:]) and (parts[0] > 0).sum() == 64 + 81


@pytest.mark.parametrize(
    "contents",
    [
        [[1.5, 2, 11, 22], [30, 30, 50, 50, 0.9]],
        [{"box": [1.5, 2, 11, 22]}, {"bbox": [30, 30, 50, 50], "score": 0.9}],
        {"image": "a.png", "detections": [{"box": {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 22}}, [30, 30, 50, 50]]},
        [{"box": {"x1": 1.5, "y1": 2.2, "x2": 10.7, "y2": 21.5}}, {"bbox": [30, 30, 20, 20], "category_id": 1}],
    ],
)
def test_boxes_of_detectors(tmp_path, contents):
    (tmp_path / "boxes.json").write_text(json.dumps(contents))
    assert read_places(str(tmp_path / "boxes.json")) == "1,2,10,20;30,30,20,20"


@pytest.mark.parametrize(
    "text", ["[]", "{", "[[1,2,3]]", '[{"box":"no"}]', "[[-1,0,5,5]]", "[" * 9999, "[[1e999,0,5,5]]"]
)
def test_files_without_boxes(tmp_path, text):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_places(str(tmp_path / "boxes.json"))
    assert "boxes.json" in str(caught.value) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)
