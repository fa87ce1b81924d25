"""The text that other programs read: by a reader of its own, which knows nothing of the one in the package."""

import json
import random
import re

import pytest

from stable_diffusion import SAMPLERS
from stable_diffusion.app.infotext import number, read, sampler_name, schedule_name, to_arguments, write
from stable_diffusion.diffusion.schedule import SCHEDULES

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # the web UI's own


def as_others_read(text: str) -> tuple[str, str, dict[str, str]]:
    """What the web UI makes of a text: line by line, and the last line is one of settings if it holds three or more."""
    lines = text.strip().split("\n")
    found = _SETTING.findall(lines[-1])
    settings = {name: json.loads(value) if value[:1] == '"' else value for name, value in found if len(found) >= 3}
    sides: tuple[list[str], list[str]] = ([], [])
    side = 0
    for line in map(str.strip, lines[:-1] if settings else lines):
        if line.startswith("Negative prompt:"):
            side, line = 1, line.removeprefix("Negative prompt:").strip()
        sides[side].append(line)
    return "\n".join(sides[0]), "\n".join(sides[1]), settings


def as_arguments(text: str) -> tuple[dict, dict[str, str]]:
    return to_arguments(*read(text))


FIELDS = {"steps": 20, "sampler": "dpmpp_2m", "cfg": 7.5, "seed": 1, "size": (512, 768)}
SETTINGS = {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "1", "Size": "512x768"}
TEXT = """a cat, (red:1.2) "quoted"
Steps: 3, on the stairs
Negative prompt: blurry,
hands: six
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5, Clip skip: 2, Lora hashes: "a: 7c6bad76eb54, b: 1234", TI hashes: "x: y", Version: v1.9.4"""


def test_a_text_as_it_is_written():
    """A NUL would end it."""
    fields = FIELDS | {"tone": 1.0, "strength": None, "mask_blur": 2.0}
    settings = 'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 512x768, Mask blur: 2, Model: "a, b"'
    written = write("a cat", "a \0dog", fields, {"Model": "a, b", "VAE": None})
    assert written == f"a cat\nNegative prompt: a dog\n{settings}"
    assert write("a cat", "", FIELDS, {}).startswith("a cat\nSteps: 20, ")
    for second in ("red", "", '"red"', " red ", "{red}", "a, b: c"):
        written = write("a cat", "", FIELDS | {"prompt_2": second}, {})
        assert as_arguments(written)[0]["prompt_2"] == as_others_read(written)[2]["Prompt 2"] == second
    assert write("", "", {}, {"A": "b: c", "D": "e\nf", "G": 'h "i"'}) == '\nA: "b: c", D: "e\\nf", G: h "i"'


def test_a_text_of_another_program():
    prompt, negative, settings = read(TEXT)
    assert prompt == 'a cat, (red:1.2) "quoted"\nSteps: 3, on the stairs' and negative == "blurry,\nhands: six"
    assert settings["Lora hashes"] == "a: 7c6bad76eb54, b: 1234" and settings["Sampler"] == "DPM++ 2M Karras"
    assert (prompt, negative, settings) == as_others_read(TEXT)
    arguments, other = as_arguments(TEXT)
    expected = {"steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "cfg": 7.0, "seed": 965400086, "width": 512}
    assert arguments == expected | {"prompt": prompt, "negative_prompt": negative, "height": 768, "clip_skip": 1}
    assert list(other) == ["Model hash", "Model", "Lora hashes", "TI hashes", "Version"]


@pytest.mark.parametrize(
    "settings, fields",
    [
        ("Denoising strength: 0.4, Hires upscale: 1.5", {"hires": 1.5, "hires_strength": 0.4}),
        ("Hires steps: 0, Hires upscaler: Latent (nearest)", {"hires_upscaler": "latents"}),
        ("Hires steps: 12, Hires upscaler: 4x-UltraSharp", {"hires_steps": 12, "hires_upscaler": "pixels"}),
        ("Clip skip: 1, Sampler: Euler a", {"clip_skip": 0, "sampler": "euler_a"}),
        ("Sampler: DPM++ 2M Karras, Schedule type: Automatic", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("Sampler: DPM++ 2M Karras, Schedule type: Beta", {"sampler": "dpmpp_2m", "schedule": "beta"}),
        ("Sampler: Euler a, Eta: 0.5", {"sampler": "euler_a", "eta": 0.5}),
        ("RNG: CPU, ENSD: 31337", {"noise_source": "torch", "eta_noise_seed_delta": 31337}),
        ("RNG: NV", {"noise_source": "cuda"}),
        ('Prompt 2: "a cat, film", Negative prompt 2: ', {"prompt_2": "a cat, film", "negative_prompt_2": ""}),
        ("Variation seed: 7, Variation seed strength: 0.2", {"variation_seed": 7, "variation_strength": 0.2}),
        ("Sampler: Euler a, Sigma noise: 1.003", {"sampler": "euler_a", "s_noise": 1.003}),
        ("Sampler: Heun, Sigma churn: 4, Sigma tmin: 0.5", {"sampler": "heun", "s_churn": 4.0, "s_tmin": 0.5}),
        ("Sampler: Euler, Sigma tmax: 9, Sigma tmin: 0", {"sampler": "euler", "s_tmax": 9.0, "s_tmin": 0.0}),
        ("Sampler: Euler, Sigma tmax: inf", {"sampler": "euler"}),
        ("Sampler: DDIM, Eta DDIM: 1", {"sampler": "ddim", "eta": 1.0}),
    ],
)
def test_settings_as_fields(settings, fields):
    found, other = as_arguments(f"a cat\nSteps: 20, Seed: 1, {settings}, Size: 64x72")
    common = {"prompt": "a cat", "negative_prompt": "", "steps": 20, "seed": 1, "width": 64, "height": 72}
    assert found == common | fields and other == {}


@pytest.mark.parametrize(
    "setting",
    [
        'Hashes: {"model": "1", "lora:x": "2"}',
        "Eta: 1",
        "Sigma churn: 4",
        "Steps: many",
        "Size: 512",
        "Sampler: DPM fast",
        "Schedule type: Zigzag",
        "RNG: std_default",
        "ENSD: many",
    ],
)
def test_settings_that_cannot_be_read_are_named(setting):
    found, other = as_arguments(f"a cat\nA: 1, B: 2, C: 3, {setting}")
    assert found == {"prompt": "a cat", "negative_prompt": ""}
    assert [f"{name}: {value}" for name, value in other.items()] == ["A: 1", "B: 2", "C: 3", setting]


def test_every_field_comes_back():
    values = {"steps": 3, "sampler": "euler_a", "schedule": "beta", "cfg": 7.25, "image_cfg": 1.5, "seed": 2**63 - 1}
    values |= {"strength": 0.3, "clip_skip": 2, "mask_blur": 1.5, "refiner_start": 0.75, "width": 64, "height": 72}
    values |= {"eta": 0.5, "noise_source": "torch", "eta_noise_seed_delta": 31337}
    values |= {"variation_seed": 9, "variation_strength": 0.25}
    values |= {"s_noise": 1.1}
    found, other = as_arguments(write("a", "b", values | {"size": (64, 72)}, {}))
    assert (found, other) == ({"prompt": "a", "negative_prompt": "b"} | values, {})
    churn = {"sampler": "euler", "s_churn": 4.0, "s_tmin": 0.5, "s_tmax": 9.25, "steps": 3, "seed": 1}
    assert as_arguments(write("a", "b", churn, {})) == ({"prompt": "a", "negative_prompt": "b"} | churn, {})
    hires = {"hires": 1.5, "hires_steps": 3, "hires_upscaler": "pixels", "hires_strength": 0.3}
    assert as_arguments(write("a", "b", hires, {}))[0] == {"prompt": "a", "negative_prompt": "b"} | hires


@pytest.mark.parametrize("text", ["", "a cat\nSteps: 20, Seed: 1", "Negative prompt:", ":::,,,"])
def test_texts_without_settings(text):
    prompt, negative, settings = read(text)
    assert settings == {} and prompt + negative == text.strip().removeprefix("Negative prompt:")


def test_names_of_samplers_and_schedules_come_back():
    for name in SAMPLERS:
        assert as_arguments(f"\nSteps: 1, Seed: 1, Sampler: {sampler_name(name)}")[0]["sampler"] == name
    for name in SCHEDULES:
        found = as_arguments(f"\nSteps: 1, Seed: 1, Schedule type: {schedule_name(name)}")[0]["schedule"]
        assert found == name.removesuffix("_xl")
    ours = "k_euler_a, DPM++ 2M Karras, pndm, unipc, dpmpp_2s_a, dpmpp_3m_sde, heun, dpm2_a, lcm"
    theirs = "Euler a, DPM++ 2M, PLMS, UniPC, DPM++ 2S a, DPM++ 3M SDE, Heun, DPM2 a, LCM"
    assert [sampler_name(name) for name in ours.split(", ")] == theirs.split(", ")
    names = [schedule_name(name) for name in ("default", "karras", "sgm_uniform", "align_your_steps_xl")]
    assert names == ["Uniform", "Karras", "SGM Uniform", "Align Your Steps"]


def test_numbers_have_all_their_digits_and_no_exponent():
    texts = ["7", "7.5", "0.1", "0.0000001", "10000000000000000000000", "0.1234567890123456", "3", "x"]
    assert [number(x) for x in (7.0, 7.5, 0.1, 1e-7, 1e22, 0.1234567890123456, 3, "x")] == texts


def test_random_texts_are_read_as_others_read_them():
    generator = random.Random(0)

    def any_text() -> str:
        letters = 'ab 01.,:;"\\/()[]{}<>|_-#=é富\U0001f600\u202e\t\r\u0301\n'
        return "".join(generator.choices(letters, k=generator.randint(0, 40))).strip()

    for _ in range(600):
        prompt, negative = any_text(), any_text()
        values = {name: any_text() or "x" for name in ("Model", "VAE", "Lora hashes", "TI hashes")}
        values = {name: value.replace('"', "'") if value[0] == '"' else value for name, value in values.items()}
        text = write(prompt, negative, FIELDS, values)
        found, others = read(text), as_others_read(text)
        assert found == (prompt, negative, SETTINGS | values) and others[2] == found[2]
        assert [side.split() for side in others[:2]] == [side.split() for side in found[:2]]


def test_a_very_long_prompt_takes_no_time():
    prompt = "Steps: 3, a " * 9000
    text = write(prompt, prompt, FIELDS, {})
    assert read(text)[:2] == (prompt.strip(), prompt.strip())
    for unusual in ("a", " ", "a ", '"', "\\", 'a:"', "a:", ",", "-/", '": "'):
        assert read(f"a\nSteps: 1, Seed: 2, Size: {unusual * 100_000}")[2]["Steps"] == "1"
        read(unusual * 100_000)
