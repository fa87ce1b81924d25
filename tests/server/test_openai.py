"""OpenAI's API, by its own client."""

import base64
import io
from types import SimpleNamespace

import openai
import pytest
from PIL import Image, ImageDraw

from serving import Server

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def opened(one: object) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(one.b64_json)))


def png(image: Image.Image) -> tuple[str, bytes, str]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "picture.png", file.getvalue(), "image/png"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_picture_is_the_scripts(client, run, tmp_path):
    """Also of a model that is not listed: clients send what their settings say."""
    extra = {"seed": 7, "steps": 3, "negative_prompt": "green", "cfg": 3.5, "sampler": "euler"}
    answer = client.images.generate(model="dall-e-3", prompt=PROMPT, n=2, size="64x48", extra_body=extra)
    assert answer.created > 1.7e9 and answer.output_format == "png" and len(answer.data) == 2
    words = "--seed 7 --n_images 2 --width 64 --height 48 --steps 3 --cfg 3.5 --sampler euler --negative_prompt green"
    run("txt2image", PROMPT, "--model", "tiny", *words.split(), "--output", tmp_path / "a.png")
    for i, one in enumerate(answer.data, start=1):
        with Image.open(tmp_path / f"a_{i}.png") as script:
            assert opened(one).tobytes() == script.tobytes()
            assert opened(one).text["parameters"] == script.text["parameters"]


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "PNG"),
        ({"output_format": "jpeg", "output_compression": 50}, "JPEG"),
        ({"output_format": "webp"}, "WEBP"),
        ({"response_format": "url", "size": "auto", "quality": "high", "user": "me"}, "PNG"),
    ],
)
def test_forms_of_pictures(client, options, form):
    (one,) = client.images.generate(prompt=PROMPT, **options, extra_body={"steps": 1, "seed": 1}).data
    text = one.b64_json or one.url.removeprefix("data:image/png;base64,")
    assert (one.url is None) == ("response_format" not in options)
    with opened(SimpleNamespace(b64_json=text)) as image:
        assert (image.format, image.size) == (form, (64, 64))


def test_braces_and_tags_of_prompts(client):
    """Braces of a model that writes prompts are text, not alternatives."""
    assert len(client.images.generate(prompt='{"a": "b|c"} {x|y}', extra_body={"steps": 1}).data) == 1
    with pytest.raises(openai.BadRequestError, match="give the folder of LoRAs"):
        client.images.generate(prompt=PROMPT, extra_body={"steps": 1, "lora": "thing:0.5"})


@pytest.mark.parametrize("partial_images", [0, 2])
def test_a_stream_has_previews_and_the_picture(client, partial_images):
    extra = {"seed": 7, "steps": 9}
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=partial_images, extra_body=extra)
    *partial, last = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == [*range(partial_images)]
    assert all(opened(event).size == (64, 64) for event in partial)
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0
    (once,) = client.images.generate(prompt=PROMPT, extra_body=extra).data
    assert opened(last).tobytes() == opened(once).tobytes()
    distances = [difference(opened(event), opened(last)) for event in partial]
    assert distances == sorted(distances, reverse=True)  # grey levels; a preview is linear and coarse
    assert all(0 < distance < 40 for distance in distances)


def difference(a: Image.Image, b: Image.Image) -> float:
    pairs = zip(a.convert("RGB").tobytes(), b.convert("RGB").tobytes(), strict=True)
    return sum(abs(x - y) for x, y in pairs) / (3 * a.width * a.height)


def test_what_is_transparent_is_repainted(client):
    image, half = Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64), 255)
    ImageDraw.Draw(half).rectangle((0, 0, 31, 63), fill=0)
    masked = image.convert("RGBA")
    masked.putalpha(half)
    extra = {"seed": 3, "steps": 4}
    for files in ({"image": png(image), "mask": png(masked)}, {"image": [png(masked)]}):
        (one,) = client.images.edit(prompt="a red square", **files, extra_body=extra).data
        edited = opened(one).convert("RGB")
        kept, painted = ((part := edited.crop(box)).tobytes() for box in ((32, 0, 64, 64), (0, 0, 28, 64)))
        assert kept == image.crop((32, 0, 64, 64)).tobytes() and part.size
        assert painted != image.crop((0, 0, 28, 64)).tobytes()


def test_an_edit_without_a_mask_changes_all(client):
    image = Image.new("RGB", (64, 64), "blue")
    stream = client.images.edit(
        image=png(image),
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={"steps": 4, "strength": 1, "seed": 2},
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "63x64"}, "width 63 is not a multiple of 8"),
        ({"size": "large"}, "size: String should match pattern"),
        ({"size": "4096x4096"}, "width 4096 is too large, the limit of this server is 2048"),
        ({"n": 17}, "n_images 17 is too large, the limit of this server is 16"),
        ({"extra_body": {"steps": 151}}, "steps 151 is too large, the limit of this server is 150"),
        ({"extra_body": {"steps": "many"}}, "steps: Input should be a valid integer"),
        ({"extra_body": {"sampler": "best"}}, "best"),
        ({"extra_body": {"partial_images": 4}}, "partial_images: Input should be less than or equal to 3"),
        ({"extra_body": {"output_format": "gif"}}, "output_format: Input should be 'png', 'jpeg' or 'webp'"),
        (
            {"output_format": "jpeg", "output_compression": 101},
            "output_compression: Input should be less than or equal to 100",
        ),
        ({"stream": True, "extra_body": {"seed": -2}}, "seed -2 is not"),
    ],
)
def test_mistakes_are_one_line(client, options, message):
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as raised:
        client.images.generate(prompt=PROMPT, **options)
    assert message in raised.value.body["message"] and raised.value.body["type"] == "invalid_request_error"
    assert "\n" not in raised.value.body["message"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"image": ("a.png", b"no picture", "image/png")}, "not an image that can be read"),
        ({"image": [png(Image.new("RGB", (64, 64)))] * 2}, "2 files in image; give one"),
        (
            {"image": png(Image.new("RGB", (64, 64))), "mask": png(Image.new("RGB", (64, 64)))},
            "the mask has no transparent area",
        ),
    ],
)
def test_mistakes_of_edits(client, files, message):
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.edit(prompt=PROMPT, **files)
    assert message in raised.value.body["message"] and "/" not in raised.value.body["message"]


def test_a_body_that_is_no_form(server: Server):
    assert server("/v1/images/edits", {"prompt": PROMPT}).status == 422
    assert server("/v1/images/generations", [1]).status == 422
