# The pictures: what is drawn where, in which words, for one module, for many, for odd names.
import io
import random
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.image import imread

import rankwise as rw

PROJECTIONS = ("attention.query", "attention.value", "output.dense")
NAMES = [f"encoder.layer.{i}.{name}" for i in range(12) for name in PROJECTIONS]
HOSTILE = ["$a$", "$\\frac{", "_hidden", "</svg><script>alert(1)</script>", "a--b", "x" * 300]


def words(figure):
    """All that is written in it."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def cells(axes):
    """{(row, column): text} of a heat map, by the names of both."""
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()] or [""]
    return {
        (rows[round(text.get_position()[1])], columns[round(text.get_position()[0])]): text
        for text in axes.texts
    }


def event(step, ranks):
    return SimpleNamespace(step=step, ranks=ranks, budget=sum(ranks))


def history(count, events=5):
    return [event(10 * (i + 1), [12 - i - (m == 0) for m in range(count)]) for i in range(events)]


def update(rank, seed=0, size=12):
    torch.manual_seed(seed)
    return rw.analysis.Update(torch.randn(rank, size), torch.randn(size, rank))


def test_a_rank_map_has_layers_and_projections_as_the_names_tell():
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    ranks = {name: place % 7 for place, name in enumerate(shuffled)}
    axes = rw.plots.rank_map(ranks).axes[0]
    found = {place: int(text.get_text()) for place, text in cells(axes).items()}
    assert found == {(name.split(".")[2], ".".join(name.split(".")[3:])): ranks[name]
                     for name in NAMES}  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, range(12)))
    assert axes.get_ylabel() == "encoder.layer" and axes.get_title("left") == "Rank of each module"
    assert axes.images[0].get_clim() == (0, 6)


def test_a_rank_map_writes_what_can_be_read_on_its_cell():
    axes = rw.plots.rank_map({"0": 0, "1": 9}).axes[0]
    assert {place[0]: text.get_color() for place, text in cells(axes).items()} == {
        "0": "white",  # on the dark end of the scale
        "1": "black",
    }


def test_names_without_a_number_and_of_two_stacks_have_rows_of_their_own():
    ranks = {
        "decoder.1.q": 3,
        "encoder.0.q": 1,
        "encoder.1.q": 2,
        "classifier": 4,
        "decoder.0.q": 5,
    }
    found = cells(rw.plots.rank_map(ranks).axes[0])
    assert {place: int(text.get_text()) for place, text in found.items()} == {
        ("decoder.0", "q"): 5, ("decoder.1", "q"): 3, ("encoder.0", "q"): 1, ("encoder.1", "q"): 2,
        ("classifier", ""): 4,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [{"only": 0}, {str(i): 1 for i in range(500)}])
def test_a_rank_map_of_one_module_of_rank_0_and_of_five_hundred(ranks):
    figure = rw.plots.rank_map(ranks)
    assert figure.axes[0].images[0].get_array().shape == (len(ranks), 1)
    assert figure.get_figheight() < 31


def test_ranks_over_time_are_lines_with_the_modules_names():
    axes = rw.plots.ranks_over_time(history(2), ["wide", "narrow"]).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"wide": [11, 10, 9, 8, 7], "narrow": [12, 11, 10, 9, 8]}
    assert list(axes.lines[0].get_xdata()) == [10, 20, 30, 40, 50]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "rank")
    assert len({line.get_marker() for line in axes.lines}) == 2


def test_ranks_of_many_modules_are_means_and_ranges_by_projection():
    figure = rw.plots.ranks_over_time(history(len(NAMES)), NAMES)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [f"{name} (12)" for name in PROJECTIONS]
    first = figure.axes[0]
    assert first.lines[0].get_ydata()[0] == pytest.approx(12 - 1 / 12)  # one of them is at 11
    assert first.collections[0].get_datalim(first.transData).ymin == 7
    many = [f"block.{i}.kind_{i % 11}" for i in range(66)]
    assert "24 others" in words(rw.plots.ranks_over_time(history(66), many))


def test_an_allocator_s_own_history_is_drawn():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=6, final_steps=2, target_modules=["0", "1"]
    )
    allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    optimizer = torch.optim.SGD(rw.parameter_groups(model, lr=0.1))
    allocator.attach(optimizer)
    for _ in range(6):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    axes = rw.plots.ranks_over_time(allocator.history, allocator.ranks).axes[0]
    assert {line.get_label(): line.get_ydata()[-1] for line in axes.lines} == allocator.ranks
    curve = rw.plots.budget_curve(allocator).axes[0]
    assert list(curve.lines[0].get_ydata()[[0, -1]]) == [8, 4]
    assert curve.get_ylabel() == "directions kept"


def test_a_budget_curve_has_the_schedule_s_phases():
    config = rw.AdaLoRAConfig(
        initial_rank=12, target_rank=8, total_steps=1000, warmup_steps=100, final_steps=300,
        allocation_interval=100, target_modules="all-linear",
    )  # fmt: skip
    figure = rw.plots.budget_curve(config)
    steps, ranks = figure.axes[0].lines[0].get_data()
    assert steps[0] == 0 and steps[-1] == 1000 and ranks[0] == 12 and ranks[-1] == 8
    at_step_400 = 8 + 4 * (1 - 300 / 600) ** 3  # methods: cubic between warm-up and final phase
    assert ranks[list(steps).index(400)] == pytest.approx(at_step_400, abs=1e-3)
    assert {"warm-up: steps 1 to 100", "pruning: steps 101 to 700",
            "final phase: steps 701 to 1,000"} <= set(words(figure))  # fmt: skip


def test_a_long_schedule_takes_few_points_and_a_spectral_one_parameters():
    long = rw.AdaLoRAConfig(total_steps=50_000, target_modules="all-linear")
    assert len(rw.plots.budget_curve(long).axes[0].lines[0].get_xdata()) < 1100
    options = dict(total_steps=100, allocation_interval=10, target_modules="all-linear")
    falling = rw.SpectralConfig(initial_budget=900, final_budget=300, **options)
    axes = rw.plots.budget_curve(falling).axes[0]
    assert list(axes.lines[0].get_ydata()[[0, -1]]) == [900, 300]
    assert axes.get_ylabel() == "parameters"
    chosen = rw.SpectralConfig(budget_at=lambda step: 500 + step, **options)
    assert rw.plots.budget_curve(chosen).axes[0].lines[0].get_ydata()[0] == 510
    level = rw.plots.budget_curve(rw.SpectralConfig(**options)).axes[0]
    assert set(level.lines[0].get_ydata()) == {100} and level.get_ylabel().startswith("% of")


def test_a_spectral_allocator_s_budget_falls_from_what_its_first_ranks_cost():
    config = rw.SpectralConfig(
        initial_rank=2, total_steps=60, allocation_interval=10, final_budget=22,
        target_modules=["0"],
    )  # fmt: skip
    model = rw.apply_lora(torch.nn.Sequential(torch.nn.Linear(12, 10)), config)
    axes = rw.plots.budget_curve(rw.SpectralAllocator(model, config)).axes[0]
    assert list(axes.lines[0].get_ydata()[[0, -1]]) == [44, 22]
    assert axes.get_ylabel() == "parameters"


def test_a_similarity_grid_has_both_triangles_on_a_fixed_scale():
    phi = rw.analysis.subspace_similarity(update(3), update(8, seed=1))
    figure = rw.plots.similarity_grid(phi, "r = 3", "r = 8")
    whole, square = figure.axes[:2]
    assert whole.images[0].get_array().tolist() == pytest.approx(phi.numpy())
    assert square.images[0].get_array().shape == (3, 3)
    assert all(axes.images[0].get_clim() == (0, 1) for axes in (whole, square))
    assert whole.get_xlabel() == "j, directions of r = 8"
    assert whole.get_ylabel() == "i, directions of r = 3"
    named = rw.plots.similarity_grid({"q": phi[:, :3], "zero": phi[:0, :0]})
    assert len(named.axes) == 3 and "no directions:\nan update is zero" in words(named)


def test_spectra_are_the_singular_values():
    own = {"wide": update(4), "zero": rw.analysis.Update(torch.zeros(2, 3), torch.zeros(3, 2))}
    axes = rw.plots.spectra(own).axes[0]
    wanted = torch.linalg.svdvals(own["wide"].dense())[:4]
    assert list(axes.lines[0].get_ydata()) == pytest.approx(wanted.tolist())
    assert len(axes.lines[1].get_ydata()) == 0 and axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("direction", "singular value")
    many = rw.plots.spectra({name: update(i % 3, seed=i) for i, name in enumerate(NAMES)})
    assert [axes.get_title("left") for axes in many.axes] == [f"{p} (12)" for p in PROJECTIONS]
    assert "all updates are zero" in words(rw.plots.spectra({"zero": own["zero"]}))


def test_amplification_bars_are_the_factors_of_three_kinds_of_directions():
    torch.manual_seed(2)
    found = rw.analysis.amplification_factor(torch.randn(12, 12), update(2))
    axes = rw.plots.amplification({"q": found}).axes[0]
    bars = {bar.get_label(): bar.patches[0].get_width() for bar in axes.containers}
    assert bars == pytest.approx({
        "its own directions": found.factor,
        "W's first directions": found.update_norm / found.along_weight,
        "random directions": found.update_norm / found.along_random,
    })  # fmt: skip
    fast = rw.analysis.amplification_factor(torch.randn(12, 12), update(2), own=False)
    assert len(rw.plots.amplification({"q": fast}).axes[0].containers) == 2
    zero = rw.analysis.Update(torch.zeros(2, 12), torch.zeros(12, 2))
    none = rw.plots.amplification({"q": rw.analysis.amplification_factor(torch.eye(12), zero)})
    assert "all updates are zero" in words(none)


def test_sweep_curves_have_a_line_for_each_rank():
    rows = [
        {"rank": rank, "rate": rate, "alpha": 2.0 * rank, "score": rate * rank + fold, "fold": fold}
        for rank in (4, 1)
        for rate in (2.0, 1.0)
        for fold in (0, 1)
    ]
    rows.append({"rank": 1, "rate": 9.0, "alpha": 2.0, "score": float("nan")})
    figure = rw.plots.sweep_curves(rows, score="accuracy")
    axes = figure.axes[0]
    lines = {x.get_label(): x.get_data() for x in axes.lines if not x.get_label().startswith("_")}
    assert {label: [list(part) for part in data] for label, data in lines.items()} == {
        "r = 1, α = 2": [[1.0, 2.0], [1.5, 2.5]],
        "r = 4, α = 8": [[1.0, 2.0], [4.5, 8.5]],
    }
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "accuracy (mean and range)"


@pytest.mark.parametrize("draw", [
    lambda: rw.plots.rank_map(dict.fromkeys(HOSTILE, 2)),
    lambda: rw.plots.ranks_over_time(history(len(HOSTILE)), HOSTILE),
    lambda: rw.plots.spectra({name: update(2) for name in HOSTILE}),
])  # fmt: skip
def test_names_are_written_as_they_are_and_stay_text(draw):
    figure, written = draw(), io.StringIO()
    figure.savefig(written, format="svg")
    root = ElementTree.fromstring(written.getvalue())
    assert not [x for x in root.iter() if x.tag.endswith("script")]
    assert "<script" not in written.getvalue()
    shown = "".join(words(figure))
    assert r"\$a\$" in shown and "_hidden" in shown and "x" * 100 not in shown


def test_pictures_are_files_and_leave_matplotlib_as_it_is(tmp_path):
    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        figure = rw.plots.rank_map({name: 3 for name in NAMES})
        for name in ("ranks.png", "ranks.svg"):
            figure.savefig(tmp_path / name)
        assert dict(matplotlib.rcParams) == before
    pixels = imread(tmp_path / "ranks.png")
    assert pixels.shape[1] == 700 and pixels.std() > 0.1


def test_what_is_wrong_is_said():
    spectral = dict(total_steps=100, target_modules="all-linear")
    for draw, message in [
        (lambda: rw.plots.rank_map({}), "rank_map: ranks must have at least one module, got none"),
        (lambda: rw.plots.ranks_over_time([]), "must have at least one event, got none"),
        (lambda: rw.plots.ranks_over_time(history(2), ["a"]), "names must be 2, got 1"),
        (lambda: rw.plots.budget_curve([]), "budget_curve: the history must have at least one"),
        (lambda: rw.plots.budget_curve(rw.SpectralConfig(final_budget=5, **spectral)),
         "initial_budget must be given"),
        (lambda: rw.plots.similarity_grid(torch.ones(3)), r"phi must be \[k1, k2\], got \[3\]"),
        (lambda: rw.plots.similarity_grid({}), "at least one grid"),
        (lambda: rw.plots.spectra({}), "spectra: updates must have at least one module"),
        (lambda: rw.plots.amplification({}), "amplification: found must have at least one module"),
        (lambda: rw.plots.sweep_curves([]), "at least one finite score, got none"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            draw()
    with pytest.raises(TypeError, match="source must be an AdaLoRAConfig.*, got int"):
        rw.plots.budget_curve(3)


def test_matplotlib_is_for_those_who_draw():
    program = (
        "import sys; import rankwise as rw; print('matplotlib' in sys.modules)\n"
        "sys.modules['matplotlib'] = None  # as if it was not installed\n"
        "try: rw.plots\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "False",
        'rankwise.plots needs matplotlib: pip install "rankwise[plots]"',
    ], run.stderr
