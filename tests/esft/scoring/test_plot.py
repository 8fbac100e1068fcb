import sys

import pytest

import esft
from esft.scoring import plot
from esft.scoring.plot import check_plot, plot_scores

SCORES = esft.ExpertScores({1: {0: 0.2, 1: 0.7, 2: 0.1}, 2: {2: 0.4, 1: 0.2, 0: 0.4}}, {1: {0: 0.6, 1: 0.4}})


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, as matplotlib closes them."""
    pytest.importorskip("matplotlib").use("template")  # one that writes nothing, as a screen's would
    import matplotlib.pyplot as plt

    figures = []
    real = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (figures.append(figure), real(figure)))
    return figures


def marked(axes) -> set[tuple[int, int]]:
    """(row, column) of the framed places: the frames' centres, which must lie on whole numbers."""
    centres = [(p.get_y() + p.get_height() / 2, p.get_x() + p.get_width() / 2) for p in axes.patches]
    rounded = [(round(y), round(x)) for y, x in centres]
    assert all(abs(y - v) + abs(x - w) < 1e-9 for (y, x), (v, w) in zip(centres, rounded, strict=True))
    assert all(0.5 < p.get_height() < 1 and 0.5 < p.get_width() < 1 and not p.get_fill() for p in axes.patches)
    return set(rounded)


def test_the_picture_shows_experts_by_falling_score_and_frames_the_chosen(tmp_path, drawn):
    import matplotlib

    path = plot_scores(SCORES, esft.ExpertSelection({1: [1], 2: [0, 2]}), str(tmp_path / "a.png"))
    assert path == tmp_path / "a.png" and path.read_bytes().startswith(b"\x89PNG")
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4]) for at in (16, 20))
    assert (width, height) == (780, int(130 * (1.6 + 2 * 0.42)))  # 130 dots an inch
    assert matplotlib.get_backend().lower() == "agg"  # which needs no screen
    (figure,) = drawn
    axes, bar = figure.axes
    assert axes.images[0].get_array().tolist() == [[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]
    ids = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    rows = ["102", "021"]  # of two equal scores the lower id comes first
    assert ids == {(row, column): rows[row][column] for row in range(2) for column in range(3)}
    assert {(t.get_ha(), t.get_va(), t.get_fontsize(), t.get_color()) for t in axes.texts} == {
        ("center", "center", 6.0, "white")
    }
    assert marked(axes) == {(0, 0), (1, 0), (1, 1)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert axes.get_yticks().tolist() == [0, 1]
    assert axes.get_ylabel() == "layer" and "falling score" in axes.get_xlabel()
    assert axes.get_title() == "token scores, 3 experts chosen" and bar.get_ylabel() == "token score"


def test_the_picture_shows_the_scores_that_are_asked_for_under_the_title_that_is_given(tmp_path, drawn):
    plot_scores(SCORES, esft.ExpertSelection({}), tmp_path / "a.png", "a title", by="gate")
    (figure,) = drawn
    axes, bar = figure.axes
    assert axes.images[0].get_array().tolist() == [[0.6, 0.4]]
    assert not axes.patches
    assert axes.get_title() == "a title" and bar.get_ylabel() == "gate score"


def test_layers_may_have_unlike_numbers_of_experts(tmp_path, drawn):
    scores = esft.ExpertScores({1: {0: 0.5, 1: 0.5}, 2: {0: 0.2, 1: 0.3, 2: 0.5}}, {})
    plot_scores(scores, esft.ExpertSelection({1: [1], 2: [2]}), tmp_path / "a.png")
    (figure,) = drawn
    assert figure.axes[0].images[0].get_array().filled(-1).tolist() == [[0.5, 0.5, -1], [0.5, 0.3, 0.2]]
    assert [t.get_text() for t in figure.axes[0].texts] == ["0", "1", "2", "1", "0"]
    assert marked(figure.axes[0]) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("experts", [64, 65])
def test_the_picture_grows_with_the_experts_and_names_up_to_64_of_them(tmp_path, drawn, experts: int):
    row = dict.fromkeys(range(experts), 1 / experts)
    few, many = {1: {0: 0.5, 1: 0.5}}, {1: row, 2: row}
    for scores in (few, many):
        plot_scores(esft.ExpertScores(scores, {}), esft.ExpertSelection({}), tmp_path / "a.png")
    small, large = drawn
    assert len(large.axes[0].texts) == (128 if experts == 64 else 0)
    assert small.get_figwidth() == 6  # inches: room for the labels even beside few experts
    assert large.get_figwidth() == pytest.approx(0.34 * experts)
    assert [figure.get_figheight() for figure in drawn] == pytest.approx([1.6 + 0.42, 1.6 + 2 * 0.42])


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(esft.InputError, match="a picture needs matplotlib: pip install 'esft\\[plot\\]'"):
        plot_scores(SCORES, esft.ExpertSelection({}), tmp_path / "a.png")


def test_a_picture_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    (tmp_path / "a.png").write_text("old")

    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(esft.DiskError, match=r"/a\.png: No space left on device$"):
        plot_scores(SCORES, esft.ExpertSelection({}), tmp_path / "a.png")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.png", "old")]


def test_a_format_that_there_is_not_is_named(tmp_path):
    for name in ("a.xyz", "a"):
        with pytest.raises(esft.InputError, match=rf"/{name}: cannot be drawn \(."):
            plot_scores(SCORES, esft.ExpertSelection({}), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_of_hundreds_of_layers_stays_of_a_size_that_can_be_drawn(tmp_path, drawn):
    scores = esft.ExpertScores({layer: {0: 1.0} for layer in range(400)}, {})
    plot_scores(scores, esft.ExpertSelection({}), tmp_path / "a.png")
    assert max(drawn[0].get_size_inches()) <= 100


@pytest.mark.parametrize("name", ["a.png", "a.PDF", "a.svg"])
def test_its_own_picture_is_known_from_one_that_a_user_has_drawn_with_the_same_library(tmp_path, name: str):
    from matplotlib.figure import Figure

    check_plot(plot_scores(SCORES, esft.ExpertSelection({}), tmp_path / name))
    figure = Figure()
    figure.subplots().set_title("Matplotlib, and what I found")
    figure.savefig(tmp_path / f"mine{name}")
    with pytest.raises(esft.InputError, match="^not a picture that esft has drawn$"):
        check_plot(tmp_path / f"mine{name}")


def test_of_thousands_of_experts_the_chosen_are_framed_at_once_and_none_has_a_number(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plot, "_NUMBERED", 5)
    plot_scores(SCORES, esft.ExpertSelection({1: [1], 2: [0, 2]}), tmp_path / "a.png")
    axes, _ = drawn[0].axes
    (frames,) = axes.collections
    centres = {tuple(path.get_extents().get_points().mean(axis=0).round(1).tolist()) for path in frames.get_paths()}
    assert centres == {(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)}
    assert not axes.patches and not axes.texts
