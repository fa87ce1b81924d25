"""Tags in prompts name LoRAs with one scale or two; those without effect are remarked on and are no words."""

import pytest

from stable_diffusion.app.lora_tags import read_loras, remarks, write_tag
from stable_diffusion.app.request import Request, expand


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ("<lora:style>", 1.0),
        ("<lora:style:0.8>", 0.8),
        ("<lora:style:-1e-1>", -0.1),
        ("<lora:style:0.8:0.5>", (0.8, 0.5)),  # text encoder, UNet
        ("<lora:style:0.8:0.8>", 0.8),
        ("<LoRA: style : .8 :0 >", (0.8, 0.0)),
        ("<lora:style:te=0.8>", 0.8),
        ("<lora:style:unet=0.5>", (1.0, 0.5)),
        ("<lora:style:0.8:unet=0.5:te=0.1>", (0.1, 0.5)),
        ("<lyco:style:0.8:0.5>", (0.8, 0.5)),
        (r"[a <lora\:style\:0.8\:0.5>:0.91]", (0.8, 0.5)),
        ("<lora:style:1:1:8>", 1.0),
        ("<lora:style:0.8:0.5:dyn=8>", (0.8, 0.5)),
    ],
)
def test_scales(prompt, wanted):
    assert read_loras(prompt) == (("style", wanted),)
    assert read_loras(write_tag("style", wanted)) == (("style", wanted),)


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::1>", "<lora:a:b>", "<lora:a:0,8>", "<lora:a:>", "<lora:a:nan:1>"])
def test_mistakes_are_not_words(tag):
    with pytest.raises(ValueError, match=r"^<lora:.*write <lora:name:0.8>$"):
        read_loras(f"a cat {tag}")


@pytest.mark.parametrize(
    "prompt, negative, wanted",
    [
        ("a <lora:a:0.8:0.5> <lyco:b>", "ugly", []),
        ("a <hypernet:anime:1>", "", ["<hypernet:anime:1>: hypernetworks are not supported"]),
        ("<lora:a:1:1:8>", "", ["8 is not supported and ignored"]),
        ("<lora:a:1:lbw=IN:stop=10>", "", ["lbw=IN, stop=10 is not supported"]),
        ("a", "ugly <lora:a:1>", ["<lora:a:1> has no effect in the negative prompt"]),
    ],
)
def test_remarks(prompt, negative, wanted):
    lines = remarks([(prompt, negative)] * 2, {})
    assert len(lines) == len(wanted) and all(part in line for part, line in zip(wanted, lines, strict=True))
    request = Request(prompt=prompt, negative_prompt=negative)
    assert "<" not in "".join(request.texts[:2])


@pytest.mark.parametrize(
    "prompt, negative, wanted",
    [
        ("a cat", "bad, BADTHING4", []),
        ("(embedding:badthing4:1.2) cat", "", []),
        ("embedding:badthing4.pt, cat", "", []),
        ("a cat", "ugly", ["the embedding words/badthing4.pt has no effect: no prompt contains badthing3, badthing4"]),
        ("badthing3", "embedding:other, ugly", ["the prompt names embedding:other, which is not loaded"]),
    ],
)
def test_remarks_on_embeddings(prompt, negative, wanted):
    lines = remarks([(prompt, negative)], {"words/badthing4.pt": ("badthing3", "badthing4")})
    assert len(lines) == len(wanted) and all(part in line for part, line in zip(wanted, lines, strict=True))


def test_tags_survive_alternatives_and_records():
    typed = r"{red|blue} (cat <lora:a__b:0.5:1>:1.2) <lora:people/bob:te=0.5:unet=1>"
    for request in expand([(Request(prompt=typed, seed=1, n_images=1), {})]):
        assert request.prompt_loras == (("a__b", (0.5, 1.0)), ("people/bob", (0.5, 1.0))), request.resolved_prompt
        assert "lora" not in request.text
    record = Request(lora=(("a.safetensors", (0.5, 1.0)), ("b", 0.3)), lora_dir=("x", "y")).to_dict()
    assert Request.from_dict({"lora": [["a.safetensors", [0.5, 1.0]], ["b", 0.3]], "lora_dir": ["x", "y"]}) == (
        Request(**record),
        [],
    )
    assert Request.from_dict({"lora_dir": "loras"})[0].lora_dir == "loras"
