"""Comparison grids: where each image stands, what is written there, and what cannot be drawn."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from command_line import PROMPT
from stable_diffusion.app import plots
from stable_diffusion.app.plots import Plot, compare, draw
from stable_diffusion.app.request import Request, Sweep, expand


def compared(sweep: dict[str, tuple], *requests: Request) -> list[Plot]:
    """The grids of requests, whose settings are swept."""
    return compare(expand([(request, Sweep(sweep)) for request in requests or (Request(prompt="a", seed=1),)]))


def pictures(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """So many different pictures, none of them with white or black in it."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(40, 200, (*size[::-1], 3), np.uint8)) for _ in range(count)]


def found_in(canvas: Image.Image, image: Image.Image) -> tuple[int, int]:
    """(x, y) of the only place where an image stands, pixel for pixel, on white."""
    whole, part = np.asarray(canvas), np.asarray(image)
    corners = np.argwhere((whole == part[0, 0]).all(axis=-1))
    places = [(x, y) for y, x in corners if np.array_equal(whole[y : y + image.height, x : x + image.width], part)]
    assert len(places) == 1
    return places[0]


def ink(canvas: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a box are not white."""
    return int((np.asarray(canvas.crop(box)).min(axis=-1) < 255).sum())


# --- what is compared ------------------------------------------------------------------------------------------------


def test_the_first_list_makes_columns_and_the_second_rows():
    (plot,) = compared({"sampler": ("euler", "DPM++ 2M Karras"), "steps": (10, 20, 30)})
    assert plot.columns == ("sampler euler", "sampler DPM++ 2M Karras")
    assert plot.rows == ("steps 10", "steps 20", "steps 30") and plot.title == ""
    assert plot.cells == {(row, column): 3 * column + row for row in range(3) for column in range(2)}
    (plot,) = compared({"cfg": (3.0, 7.5, -0.25)})
    assert (plot.columns, plot.rows) == (("cfg 3", "cfg 7.5", "cfg -0.25"), ())
    assert plot.cells == {(0, i): i for i in range(3)}


def test_seeds_as_a_list_and_as_several_images():
    (plot,) = compared({"seed": (9, 2), "strength": (0.3, 0.6)}, Request(seed=(9, 2)))
    assert (plot.columns, plot.rows) == (("seed 9", "seed 2"), ("strength 0.3", "strength 0.6"))
    assert plot.cells == {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}
    (plot,) = compared({"steps": (1, 2)}, Request(seed=5, n_images=2))
    assert (plot.columns, plot.rows) == (("steps 1", "steps 2"), ("seed 5", "seed 6"))


def test_variations_of_a_seed():
    request = Request(seed=5, n_images=2).with_values(variation_seed=8)
    (plot,) = compared({"variation_strength": (0.0, 0.25)}, request)
    assert (plot.columns, plot.rows) == (("variation_strength 0", "variation_strength 0.25"), ("image 1", "image 2"))
    assert plot.cells == {(row, column): 2 * column + row for row in range(2) for column in range(2)}


def test_prompts_are_a_list_too():
    sweep, request = {"cfg": (1.0, 2.0)}, Request(prompt="{red|blue}", seed=5)
    (plot,) = compared(sweep, request)
    assert (plot.columns, plot.rows) == (("cfg 1", "cfg 2"), ("red", "blue"))
    assert plot.cells == {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}
    by_prompt = compared(sweep, request.with_values(n_images=2))
    assert [plot.title for plot in by_prompt] == ["seed 5", "seed 6"]  # of each prompt
    assert [plot.rows for plot in by_prompt] == [("red", "blue")] * 2
    assert by_prompt[1].cells == {(0, 0): 1, (1, 0): 3, (0, 1): 5, (1, 1): 7}
    assert compared({}, request) == []  # without lists nothing is compared


def test_further_lists_make_a_grid_for_each_of_their_values():
    plots = compared({"steps": (1, 2), "cfg": (3.0, 4.0), "sampler": ("euler", "lms")}, Request(prompt="{red|blue}"))
    assert len(plots) == 4
    for n, plot in enumerate(plots):
        assert (plot.columns, plot.rows) == (("steps 1", "steps 2"), ("cfg 3", "cfg 4"))
        assert plot.title == ("sampler euler, red", "sampler euler, blue", "sampler lms, red", "sampler lms, blue")[n]
        assert plot.cells == {(row, column): 8 * column + 4 * row + n for row in (0, 1) for column in (0, 1)}


def test_images_that_differ_in_their_lists_leave_cells_empty():
    lines = [(Request(prompt="a", seed=1), Sweep(steps=(1, 2))), (Request(prompt="b", seed=1, n_images=1), Sweep())]
    (plot,) = compare(expand(lines))
    assert (plot.columns, plot.rows) == (("steps 1", "steps default", "steps 2"), ("a", "b"))
    assert plot.cells == {(0, 0): 0, (1, 1): 1, (0, 2): 2}
    canvas = draw(plot, pictures(3))
    assert ink(canvas, (0, 0, *canvas.size)) > 3 * 64 * 48


# --- where it stands -------------------------------------------------------------------------------------------------


def test_images_stand_under_their_columns_and_beside_their_rows():
    """Margins and gaps are white, and written on above and at the left only."""
    (plot,) = compared({"steps": (1, 2, 3), "cfg": (1.0, 2.0)})
    made = pictures(6)
    canvas = draw(plot, made)
    places = {cell: found_in(canvas, made[i]) for cell, i in plot.cells.items()}
    xs, ys = (sorted({place[axis] for place in places.values()}) for axis in (0, 1))
    assert places == {(row, column): (x, y) for row, y in enumerate(ys) for column, x in enumerate(xs)}
    assert xs[1] - xs[0] >= 64 + 8 and ys[1] - ys[0] == 48 + 8
    assert canvas.width >= xs[2] + 64 + 8 and canvas.height == ys[1] + 48 + 8
    assert ink(canvas, (xs[0], ys[0], *canvas.size)) == 6 * 64 * 48
    assert ink(canvas, (0, 0, xs[0], ys[0])) == 0
    assert all(ink(canvas, (x, 0, x + 64, ys[0])) > 20 for x in xs)
    assert all(ink(canvas, (0, y, xs[0], y + 48)) > 20 for y in ys)


def test_images_of_several_sizes_stand_in_the_middle_of_cells_of_the_largest():
    (plot,) = compared({"steps": (1, 2), "cfg": (1.0, 2.0)})
    made = [pictures(i + 1, size)[i] for i, size in enumerate([(320, 120), (160, 200), (200, 200), (64, 64)])]
    canvas = draw(plot, made)
    middles = {cell: np.array(found_in(canvas, made[i])) + np.array(made[i].size) / 2 for cell, i in plot.cells.items()}
    for i in (0, 1):
        assert (middles[i, 1] - middles[i, 0])[0] == 320 + 8 and (middles[1, i] - middles[0, i])[1] == 200 + 8


@pytest.mark.parametrize("n_rows, across", [(1, 5), (2, 3), (9, 1)])
def test_one_list_is_laid_in_rows(n_rows, across):
    (plot,) = compared({"seed": (1, 2, 3, 4, 5)}, Request(seed=(1, 2, 3, 4, 5)))
    made = pictures(5, (160, 48))
    canvas = draw(plot, made, n_rows)
    places = [found_in(canvas, image) for image in made]
    columns, rows = sorted({x for x, _ in places}), sorted({y for _, y in places})
    assert places == [(columns[i % across], rows[i // across]) for i in range(5)]
    assert canvas.width == columns[-1] + 160 + 8 and columns[0] == 8
    assert all(ink(canvas, (x, y - 20, x + 160, y)) > 20 for x, y in places)


def test_large_images_have_large_letters():
    (plot,) = compared({"steps": (1, 2)})
    small, large = (draw(plot, pictures(2, (side, 64))) for side in (256, 1024))
    assert ink(large, (0, 0, large.width, large.height - 72)) > 4 * ink(small, (0, 0, small.width, small.height - 72))


def test_a_grid_that_is_too_large_is_left_out(caplog, monkeypatch):
    (plot,) = compared({"steps": (1, 2)})
    made = pictures(2)
    whole = draw(plot, made)
    monkeypatch.setattr(plots, "_LARGEST_SIDE", max(whole.size))
    assert draw(plot, made) is not None and caplog.messages == []
    monkeypatch.setattr(plots, "_LARGEST_SIDE", max(whole.size) - 1)
    assert draw(plot, made) is None
    assert caplog.messages[0].startswith(f"a grid of {whole.width} x {whole.height} pixels is omitted")


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, label",
    [
        ("  two\n lines\tand a tab ", "two lines and a tab"),
        ("Éire — “ça va” Straße 🐈", "Eire - “ca va” Stra?e ?"),
        ("日本 a", "prompt 2"),  # half of it is unknown
        ("", "prompt 2"),
        ("\x00\x07", "prompt 2"),
        ("a" * 10**5, "a" * 400),
    ],
)
def test_prompts_of_any_letters(prompt, label):
    (plot,) = compared({"steps": (1, 2)}, Request(prompt="first", seed=1), Request(prompt=prompt, seed=1))
    assert plot.rows == ("first", label)
    assert draw(plot, pictures(4)) is not None


def test_the_font_has_the_letters_that_are_written():
    drawn = ImageFont.load_default(20).getmask
    letters = [chr(c) for c in range(33, 127)] + list(plots._MORE_LETTERS)
    assert [c for c in letters if bytes(drawn(c)) == bytes(drawn("\uffff"))] == []


def test_whatever_is_written_stays_inside():
    texts, made = ["x" * 300, "word " * 80, "\ud800 🐈 \u202e\u0301", "W", ""], pictures(25)
    canvas = draw(Plot("title " * 40, tuple(texts), tuple(texts), {divmod(i, 5): i for i in range(25)}), made)
    places = [found_in(canvas, image) for image in made]
    assert ink(canvas, (*places[0], *canvas.size)) == 25 * 64 * 48
    assert ink(canvas, (0, 0, 6, canvas.height)) == 0 and ink(canvas, (0, 0, canvas.width, 6)) == 0
    text = plots._Text(12)
    for long, lines in zip(texts[:2], (4, 4), strict=True):  # dots at the end of what is cut
        wrapped = text.wrap(long, 100, 4)
        assert len(wrapped) == lines and wrapped[-1].endswith("…") and max(map(text.width, wrapped)) <= 100
    assert text.wrap("a b", 100, 4) == ["a b"]


def test_a_script_writes_a_grid_for_each_further_value(run, sd1_folder, tmp_path):
    lists = ["--cfg", "1,5,9", "--steps", "1,2", "--seed", "1,2", "--width", 64, "--height", 72]
    done = run("txt2image", PROMPT, "--model", sd1_folder, *lists, "--output", tmp_path / "out.png").succeeded()
    assert [line.rpartition(" ")[2] for line in done.out[:12]] == ["1", "2"] * 6 and done.remarks == []
    assert done.out[12:] == [str(tmp_path / name) for name in ("out.png", "out_grid_2.png")]
    made = [Image.open(line.split(" seed ")[0]) for line in done.out[:12]]
    for which, path in enumerate(done.out[12:]):
        canvas = Image.open(path)
        places = [found_in(canvas, image) for image in made[which::2]]
        columns, rows = sorted({x for x, _ in places}), sorted({y for _, y in places})
        assert places == [(x, y) for x in columns for y in rows] and (len(columns), len(rows)) == (3, 2)
        assert ink(canvas, (0, 0, canvas.width, rows[0])) > 50 < ink(canvas, (0, 0, columns[0], canvas.height))


def test_a_seed_that_is_given_twice_has_two_columns():
    (plot,) = compared({"cfg": (1.0, 2.0), "seed": (7, 7)}, Request(prompt="a", seed=(7, 7)))
    assert (plot.columns, plot.rows) == (("cfg 1", "cfg 2"), ("seed 7", "seed 7")) and len(plot.cells) == 4
