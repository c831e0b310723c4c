import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import scene_checker
import scenes
from PIL import Image, ImageFilter
from scenes import Prompt, Scene, Wanted

SCENES = 300


def fully_described(scene: Scene, prompt: Prompt) -> Prompt:
    """The prompt with nothing left open."""
    objects = tuple(
        Wanted(thing.colour, thing.shape, size_of(thing.radius)) for thing in scene.objects
    )
    position = None
    if len(scene.objects) == 1:
        cell = tuple(int((v - 28) // 24) for v in (scene.objects[0].x, scene.objects[0].y))
        position = next(name for name, place in scenes.POSITIONS.items() if place == cell)
    return Prompt(objects, scene.background, position, prompt.relation)


def size_of(radius: float) -> str:
    return next(name for name, value in scenes.RADII.items() if value == radius)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Prompt, scene_checker.Reading]]:
    rng = np.random.default_rng(21)
    result = []
    for _ in range(SCENES):
        scene, prompt = scenes.sample_scene(rng)
        result.append((fully_described(scene, prompt), scene_checker.read(scenes.draw(scene))))
    return result


def other(rng: np.random.Generator, value: str, values: list[str]) -> str:
    rest = [v for v in values if v != value]
    return rest[int(rng.integers(len(rest)))]


def with_object(prompt: Prompt, rng: np.random.Generator, field: str, values: list[str]) -> Prompt:
    """The prompt with one attribute of one of its objects changed."""
    at = int(rng.integers(len(prompt.objects)))
    changed = other(rng, getattr(prompt.objects[at], field), values)
    objects = list(prompt.objects)
    objects[at] = dataclasses.replace(objects[at], **{field: changed})
    return dataclasses.replace(prompt, objects=tuple(objects))


def wrong_colour(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    return with_object(prompt, rng, "colour", list(scenes.COLOURS))


def wrong_shape(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    return with_object(prompt, rng, "shape", list(scenes.SHAPES))


def wrong_size(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    return with_object(prompt, rng, "size", list(scenes.RADII))


def wrong_background(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    assert prompt.background is not None
    return dataclasses.replace(
        prompt, background=other(rng, prompt.background, list(scenes.COLOURS))
    )


def wrong_place(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """Another relation of two objects, another position of one."""
    if prompt.relation is not None:
        return dataclasses.replace(
            prompt, relation=other(rng, prompt.relation, list(scenes.RELATIONS))
        )
    assert prompt.position is not None
    return dataclasses.replace(prompt, position=other(rng, prompt.position, list(scenes.POSITIONS)))


def swapped_objects(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """The same objects, each where the other should be; one object gets a companion instead."""
    if len(prompt.objects) == 1:
        return dataclasses.replace(prompt, objects=prompt.objects * 2, relation="above")
    return dataclasses.replace(prompt, objects=prompt.objects[::-1])


def test_right_scenes_pass(drawn: list[tuple[Prompt, scene_checker.Reading]]) -> None:
    passed = [scene_checker.judge(reading, prompt).right for prompt, reading in drawn]
    assert np.mean(passed) >= 0.99


@pytest.mark.parametrize(
    "change",
    [wrong_colour, wrong_shape, wrong_size, wrong_background, wrong_place, swapped_objects],
)
def test_any_one_wrong_attribute_fails(
    drawn: list[tuple[Prompt, scene_checker.Reading]],
    change: Callable[[Prompt, np.random.Generator], Prompt],
) -> None:
    rng = np.random.default_rng(22)
    failed = [
        not scene_checker.judge(reading, change(prompt, rng)).right for prompt, reading in drawn
    ]
    assert np.mean(failed) >= 0.99


def test_whatever_is_left_open_is_right() -> None:
    scene = Scene("blue", (scenes.Placed("red", "heart", 24, 38, 90),))
    reading = scene_checker.read(scenes.draw(scene))
    assert scene_checker.judge(reading, Prompt((Wanted("red", "heart"),), None)).right


def test_soft_edges_and_noise_are_forgiven() -> None:
    rng = np.random.default_rng(23)
    passed = []
    for _ in range(60):
        scene, prompt = scenes.sample_scene(rng)
        soft = Image.fromarray(scenes.draw(scene)).filter(ImageFilter.GaussianBlur(0.8))
        noisy = np.asarray(soft, float) + rng.normal(0, 6, (128, 128, 3))
        passed.append(scene_checker.check(noisy.clip(0, 255).astype(np.uint8), prompt).core)
    assert np.mean(passed) >= 0.95


@pytest.mark.parametrize("kind", ["noise", "gray", "two backgrounds", "empty"])
def test_what_is_no_scene_is_never_right(kind: str) -> None:
    picture = np.full((128, 128, 3), scenes.COLOURS["blue"], np.uint8)
    if kind == "noise":
        picture = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
    elif kind == "gray":
        picture[:] = 128
    elif kind == "two backgrounds":
        picture[:, 64:] = scenes.COLOURS["red"]
    prompt = Prompt((Wanted("red", "circle"),), "blue")
    assert not scene_checker.check(picture, prompt).core


def test_an_extra_object_is_wrong() -> None:
    two = Scene(
        "white",
        (scenes.Placed("red", "circle", 17, 30, 64), scenes.Placed("blue", "star", 17, 90, 64)),
    )
    verdict = scene_checker.check(scenes.draw(two), Prompt((Wanted("red", "circle"),), "white"))
    assert not verdict.count
    assert not verdict.core


def test_a_patch_on_the_far_side_of_the_background_is_no_object() -> None:
    """Nearest to the background's own colour, but farther from it than the background is."""
    colour = scene_checker.COLOURS_BY_NAME["red"]
    away = np.array([-1, 0, 0], np.float32)
    pixels = np.broadcast_to(colour + 7 * away, (128, 128, 3)).copy()
    pixels[40:80, 40:80] = colour + 59 * away
    reading = scene_checker.read(pixels.round().astype(np.uint8))
    assert reading.background == "red"
    assert reading.objects == ()


def test_pictures_of_another_size_are_read() -> None:
    scene = Scene("white", (scenes.Placed("green", "cross", 29.5, 64, 64),))
    large = Image.fromarray(scenes.draw(scene)).resize((256, 256), Image.Resampling.BICUBIC)
    prompt = Prompt((Wanted("green", "cross", "big"),), "white", "in the center")
    assert scene_checker.check(large, prompt).right
